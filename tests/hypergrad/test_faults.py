"""Whatever fails, wherever it fails: everything is as before, and the next call works.

Each test counts the places that a call passes (a loss, a backward pass, a step of a torch
optimizer) and raises at every one of them: an error, Ctrl-C, out of memory.
"""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    Accumulated,
    BilevelProblem,
    HypergradEstimator,
    estimator_names,
    make_estimator,
)
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.rules import SGD
from hypergrad.solvers import CGSolver
from hypergrad.tree import Params
from tests.faults import Faults, break_everywhere, content, differences, identities

pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")

# Short, so that each has few places; damped, so that each takes the same number of
# products wherever it is.
SETTINGS: dict[str, dict[str, Any]] = {
    "unrolled": {"num_steps": 2},
    "forward": {"num_steps": 2, "num_directions": 1},
    "zeroth-order": {"num_steps": 2, "num_directions": 1},
    "cg": {"max_iter": 1, "damping": 10.0},
    "neumann": {"num_terms": 1, "damping": 10.0},
    "nystrom": {"rank": 1, "damping": 1.0},
    "implicit": {"solver": CGSolver(1, damping=10.0)},
    "penalty": {"num_steps": 2},
    "f2sa": {"num_steps": 1, "num_points": 2},
}
VIRTUAL: dict[str, dict[str, Any]] = {
    "darts": {"inner_lr": 0.1},
    "sama": {"rule": SGD(0.1)},
    "unrolled": {"rule": SGD(0.1)},
    "penalty": {"rule": SGD(0.1)},
    "f2sa": {"rule": SGD(0.1)},
    "forward": {"rule": SGD(0.1)},
    "zeroth-order": {"rule": SGD(0.1)},
}


def estimators() -> list[Any]:
    """Every estimator, with exact products and with finite differences."""
    out = []
    for name in estimator_names():
        made = make_estimator(name, **SETTINGS.get(name, {}))
        products = ("exact", "finite-difference") if hasattr(made, "product") else ("",)
        out += [pytest.param(name, p, id=f"{name} {p}".strip()) for p in products]
    return out


def made_of(name: str, product: str, **more: Any) -> HypergradEstimator:
    settings = {**SETTINGS.get(name, {}), **more}
    return make_estimator(name, **settings, **({"product": product} if product else {}))


class Net(nn.Module):
    """Batch norm and dropout beside a gate (outer), in float64."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        make_random = torch.Generator().manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.ones(4))
        self.faults = faults
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=make_random) / 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.norm(self.first(x))) * self.gate)
        return self.second(self.faults.watch(h))


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    noise = random.random() + float(np.random.rand())
    return (model(x) - noise).square().mean()


def batch(seed: int) -> Tensor:
    make_random = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=make_random, dtype=torch.float64)


def two(seed: int) -> Any:
    return Accumulated([batch(seed)[:3], batch(seed)[3:]])


def build(estimator: HypergradEstimator, *, warm: int = 3, **settings: Any) -> Any:
    """Return a function that makes an optimizer after some inner steps."""

    def make(faults: Faults) -> tuple[BilevelProblem, BilevelOptimizer]:
        model = Net(faults)

        def mess() -> None:
            model.train(not model.training)
            torch.set_grad_enabled(False)

        faults.mess = mess
        given: dict[str, Any] = {
            "inner_optimizer": partial(torch.optim.AdamW, lr=1e-2),
            "outer_optimizer": partial(torch.optim.AdamW, lr=1e-2),
            "outer_warmup": 0,
            "outer_every": 1,
            **settings,
        }
        opt = BilevelOptimizer(
            model, faults.loss(loss_fn), outer="gate", estimator=estimator, **given
        )
        faults.steps(opt.inner, "inner")
        faults.steps(opt.outer, "outer")
        for p in opt.problem.tensors:
            p.grad = torch.ones_like(p)
        for i in range(warm):
            opt.inner_step(batch(i), batch(6))
        return opt.problem, opt

    return make


def step(problem: Any, opt: BilevelOptimizer) -> Any:
    return opt.step(batch(5), lambda: batch(6))


def inner_step(problem: Any, opt: BilevelOptimizer) -> Any:
    return opt.inner_step(batch(5))


def outer_step(problem: Any, opt: BilevelOptimizer) -> Any:
    return opt.outer_step(batch(6))


# -- the optimizer's entry points -------------------------------------------------------


def slow_ones(given: list[Any]) -> list[Any]:
    """Mark what takes many steps or products by finite differences as slow, but cg."""
    many = ("implicit", "neumann", "nystrom", "forward", "unrolled")
    return [
        pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        if p.id in [f"{n} finite-difference" for n in many]
        else p
        for p in given
    ]


def optimizer_steps(places: list[str]) -> list[str]:
    return [p for p in places if p.endswith(" step")]


@pytest.mark.parametrize(("name", "product"), slow_ones(estimators()))
def test_step(name: str, product: str) -> None:
    """The inner part is undone where the outer part fails."""
    places = break_everywhere(
        build(made_of(name, product)), step, recovers=name == "nystrom"
    )
    assert optimizer_steps(places) == [
        f"{when} an {level} step"
        for level in ("inner", "outer")
        for when in ("before", "within", "after")
    ]
    assert places.count("before a loss") == places.count("after a loss") >= 2
    assert places.count("a backward pass") >= 2


@pytest.mark.parametrize(
    ("name", "product", "settings"),
    [
        ("first-order", "", {}),
        ("darts", "exact", {"reuse_graph": True}),
        ("sama", "finite-difference", {}),
        ("unrolled", "", {"max_grad_norm": 0.1}),
        ("cg", "exact", {"audit_every": 1}),
        ("nystrom", "exact", {}),
    ],
)
def test_outer_step(name: str, product: str, settings: Any) -> None:
    """Also where the graph that the inner step kept was used up before the failure."""
    places = break_everywhere(
        build(made_of(name, product), **settings),
        outer_step,
        recovers=name == "nystrom",
        anew="reuse_graph" in settings,
    )
    assert len(optimizer_steps(places)) == 3


@pytest.mark.parametrize(
    ("name", "product", "settings"),
    [
        ("first-order", "", {}),
        ("darts", "exact", {"reuse_graph": True}),
        ("unrolled", "", {"inner_optimizer": partial(torch.optim.SGD, lr=0.1)}),
    ],
)
def test_inner_step(name: str, product: str, settings: Any) -> None:
    def call(problem: Any, opt: BilevelOptimizer) -> Any:
        return opt.inner_step(two(5))  # the first half moves batch norm's statistics

    places = break_everywhere(build(made_of(name, product), **settings), call)
    assert places.count("before a loss") == 2
    assert len(optimizer_steps(places)) == 3


def test_the_first_step_of_auto() -> None:
    """The choice is undone with the step, and made again."""
    places = break_everywhere(build(made_of("auto", ""), warm=0), step, recovers=True)
    assert optimizer_steps(places)


def test_freezing_passes_no_place() -> None:
    def call(problem: Any, opt: BilevelOptimizer) -> None:
        opt.freeze_outer()

    assert break_everywhere(build(made_of("unrolled", "")), call) == []


def test_a_callable_batch_that_raises() -> None:
    def end_of_data() -> Any:
        raise StopIteration

    problem, opt = build(made_of("sama", "exact"))(Faults())
    before = content(problem, opt), identities(problem, opt)
    with pytest.raises(StopIteration):
        opt.step(batch(5), end_of_data)
    assert not differences(before, (content(problem, opt), identities(problem, opt)))


def test_state_of_an_optimizer_of_another_kind() -> None:
    """State under a name, a list in it, settings that a step writes into its group."""

    class Odd(torch.optim.RMSprop):
        def step(self, closure: Any = None) -> None:
            super().step()
            group = self.param_groups[0]
            group["lr"] *= 0.5
            group["seen"] = group.get("seen", 0) + 1
            self.state["history"].setdefault("norms", []).append(torch.ones(1))  # pyright: ignore[reportArgumentType]

    make = build(made_of("cg", "exact"), inner_optimizer=partial(Odd, lr=1e-2))
    assert optimizer_steps(break_everywhere(make, inner_step))


# -- loading ----------------------------------------------------------------------------


def saved_and_fresh() -> tuple[dict[str, Any], BilevelProblem, BilevelOptimizer]:
    make = build(made_of("unrolled", ""))
    _, first = make(Faults())
    first.step(batch(5), batch(6))
    problem, second = make(Faults())
    return copy.deepcopy(first.state_dict()), problem, second


def torn(saved: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return copies of a checkpoint, each with something missing or of another kind."""
    out = []
    newer = (
        "chosen",
        "resolved",
        "rank",
        "left",
        "why",
        "began",
        "outer_began",
        "asked",
        "learned",
    )  # older ones lack them
    for key in saved["bilevel"]:
        if key not in newer:
            less = copy.deepcopy(saved)
            del less["bilevel"][key]
            out.append((f"without {key}", less))
    for key in ("state", "param_groups"):
        less = copy.deepcopy(saved)
        del less[key]
        out.append((f"without {key}", less))
    for name, place, value in (
        ("no window", "window", [{}]),
        ("no batches", "last", [{"what": 1}]),
        ("no estimator", "chosen", {"name": "newton", "settings": {}}),
        ("no state", "estimator_state", 3),
    ):
        other = copy.deepcopy(saved)
        other["bilevel"][place] = value
        out.append((name, other))
    fewer = copy.deepcopy(saved)
    fewer["param_groups"][0]["params"].pop()
    out.append(("fewer parameters", fewer))
    return out


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    saved, problem, opt = saved_and_fresh()
    before = content(problem, opt), identities(problem, opt)
    for what, bad in torn(saved):
        with pytest.raises((KeyError, TypeError, ValueError)):
            opt.load_state_dict(bad)
        after = content(problem, opt), identities(problem, opt)
        assert not differences(before, after), what
    opt.load_state_dict(saved)
    assert differences(before[0], content(problem, opt))


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_hook_that_raises_while_loading(when: str, kind: Any) -> None:
    def broken(*given: Any) -> None:
        raise kind("on purpose")

    saved, problem, opt = saved_and_fresh()
    before = content(problem, opt), identities(problem, opt)
    handle = getattr(opt, f"register_load_state_dict_{when}_hook")(broken)
    with pytest.raises(kind, match="on purpose"):
        opt.load_state_dict(saved)
    handle.remove()
    assert not differences(before, (content(problem, opt), identities(problem, opt)))
    opt.load_state_dict(saved)
    assert opt.n_outer_steps == 1


# -- estimators alone -------------------------------------------------------------------


# Without steps to look back at, auto takes cg, to the end.
@pytest.mark.parametrize(
    ("name", "product"), [p for p in slow_ones(estimators()) if p.id != "auto"]
)
def test_an_estimate_by_virtual_steps(name: str, product: str) -> None:
    estimator = made_of(name, product, **VIRTUAL.get(name, {}))

    def make(faults: Faults) -> tuple[BilevelProblem, None]:
        model = Net(faults)
        faults.mess = lambda: model.train(not model.training)
        return BilevelProblem.from_module(
            model, faults.loss(loss_fn), outer="gate"
        ), None

    def call(problem: Any, opt: None) -> Any:
        return estimator.estimate(problem, inner_batch=batch(1), outer_batch=batch(2))

    places = break_everywhere(make, call, recovers=name == "nystrom")
    assert "a backward pass" in places


@pytest.mark.parametrize(
    ("name", "product"), [("auto", ""), ("darts", "exact"), ("unrolled", "")]
)
def test_an_estimate_by_recorded_steps(name: str, product: str) -> None:
    estimator = made_of(name, product)

    def call(problem: Any, opt: BilevelOptimizer) -> Any:
        steps = opt.recorded_steps
        return estimator.estimate(
            problem, inner_batch=batch(1), outer_batch=batch(2), steps=steps
        )

    assert break_everywhere(build(estimator), call, recovers=name == "auto")


PRODUCTS = ("exact", "forward-over-reverse", "finite-difference")


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_problem_without_a_module(product: str) -> None:
    def make(faults: Faults) -> tuple[BilevelProblem, BilevelOptimizer]:
        def inner_loss(i: Params, o: Params, x: Tensor) -> Tensor:
            w = faults.watch(i["w"])
            return ((x @ w) ** 2).mean() + (w**2 * o["penalty"]).sum()

        def outer_loss(i: Params, o: Params, x: Tensor) -> Tensor:
            return ((x @ faults.watch(i["w"]) - 1) ** 2).mean()

        def ones(n: int) -> Tensor:
            return torch.ones(n, dtype=torch.float64, requires_grad=True)

        problem = BilevelProblem(
            faults.loss(inner_loss),
            faults.loss(outer_loss),
            {"w": ones(3)},
            {"penalty": ones(3)},
        )
        opt = BilevelOptimizer(
            problem,
            estimator=made_of("cg", product),
            inner_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_warmup=0,
        )
        faults.steps(opt.inner, "inner")
        faults.steps(opt.outer, "outer")
        return problem, opt

    places = break_everywhere(make, step)
    assert ("a tangent" in places) is (product == "forward-over-reverse")
