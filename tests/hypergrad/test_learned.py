"""λ in the inner optimizer and in the start of the inner run, against plain autograd."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    NumericalWarning,
    compare_estimators,
    estimator_names,
    make_estimator,
    take_steps,
)
from hypergrad.batches import Accumulated
from hypergrad.estimator import Choice
from hypergrad.estimators import Auto
from hypergrad.rules import SGD, Adam, AdamW, Clipped, Grouped, Rule
from hypergrad.testing.snapshot import snapshot_of
from tests.hypergrad.estimators.truths import Case, network_case
from tests.tolerances import error

F64 = torch.float64
NAMES = ("first", "bias", "second")
TWO = (("first",), ("bias", "second"))
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """An inner optimizer, what is learned of it, and the same written by hand.

    Attributes:
        kind: class of torch.optim.
        fixed: settings of it; those that are learned are replaced.
        learned: start values of what is learned.
        groups: names of the parameters of each group, with settings of its own.
        max_norm: norm to clip to.
    """

    kind: Any
    fixed: dict[str, Any]
    learned: dict[str, Any]
    groups: tuple[tuple[str, ...], ...] = (NAMES,)
    own: tuple[dict[str, Any], ...] = ({},)
    max_norm: float | None = None

    def optimizer(self, params: Params) -> torch.optim.Optimizer:
        groups = [
            {"params": [params[n] for n in names], **own}
            for names, own in zip(self.groups, self.own, strict=True)
        ]
        return self.kind(groups, **self.fixed)

    def rule(self) -> Rule:
        kinds: dict[Any, Any] = {torch.optim.SGD: SGD, torch.optim.Adam: Adam}
        make = kinds.get(self.kind, AdamW)
        parts = tuple(
            (names, make(**{**self.fixed, **own}))
            for names, own in zip(self.groups, self.own, strict=True)
        )
        rule: Rule = parts[0][1] if len(parts) == 1 else Grouped(parts)
        return rule if self.max_norm is None else Clipped(rule, self.max_norm)


SGD_ALL = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}
ADAM_ALL = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
FAR = {"lr": 9.0, "weight_decay": 9.0}  # which is replaced
SETUPS: dict[str, Setup] = {
    "sgd": Setup(torch.optim.SGD, {"lr": 9.0}, {"lr": 0.1}),
    "momentum": Setup(torch.optim.SGD, {**FAR, "momentum": 0.1}, SGD_ALL),
    "nesterov": Setup(
        torch.optim.SGD, {**FAR, "momentum": 0.1, "nesterov": True}, SGD_ALL
    ),
    "adam": Setup(torch.optim.Adam, FAR, ADAM_ALL),
    "adamw": Setup(torch.optim.AdamW, FAR, ADAM_ALL),
    "clipped": Setup(torch.optim.AdamW, FAR, ADAM_ALL, max_norm=0.3),
    "groups": Setup(
        torch.optim.AdamW,
        {"lr": 9.0},
        {"lr": [0.02, 0.05], "weight_decay": 0.1, "betas": [(0.8, 0.9), (0.7, 0.95)]},
        TWO,
        ({"weight_decay": 1.0}, {"weight_decay": 0.0}),
        0.5,
    ),
}


# -- by hand ------------------------------------------------------------------------------


def natural(name: str, held: Tensor) -> Tensor:
    return held.exp() if name in ("lr", "weight_decay", "schedule") else held.sigmoid()


def one_of(held: Tensor, name: str, group: int) -> Tensor:
    depth = 2 if name == "betas" else 1
    return held[group] if held.dim() == depth else held


@dataclass
class Hand:
    """Unroll by plain autograd, with every setting a tensor."""

    setup: Setup
    case: Case
    theta: Params = field(default_factory=dict)
    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def setting(self, name: str, group: int) -> Any:
        if name in self.theta:
            own = {**self.setup.fixed, **self.setup.own[group]}
            if name == "weight_decay" and not own.get(name, 0.0):
                return 0.0
            return natural(name, one_of(self.theta[name], name, group))
        return {**self.setup.fixed, **self.setup.own[group]}.get(name, 0.0)

    def step(self, w: Params, g: Params, t: int, factor: float) -> Params:
        new: Params = {}
        for group, names in enumerate(self.setup.groups):
            lr = self.setting("lr", group) * factor
            if "schedule" in self.theta:
                lr = lr * natural("schedule", self.theta["schedule"][t - 1])
            decay = self.setting("weight_decay", group)
            for n in names:
                if self.setup.kind is torch.optim.SGD:
                    new[n] = self._sgd(n, w[n], g[n], lr, decay, group)
                else:
                    new[n] = self._adam(n, w[n], g[n], t, lr, decay, group)
        return {n: new[n] for n in w}

    def _sgd(
        self, n: str, w: Tensor, g: Tensor, lr: Any, decay: Any, group: int
    ) -> Tensor:
        g = g + decay * w
        momentum = self.setting("momentum", group)
        if isinstance(momentum, float) and not momentum:
            return w - lr * g
        held = self.slots.setdefault(n, {})
        held["b"] = momentum * held["b"] + g if "b" in held else g
        nesterov = self.setup.fixed.get("nesterov")
        return w - lr * (g + momentum * held["b"] if nesterov else held["b"])

    def _adam(
        self, n: str, w: Tensor, g: Tensor, t: int, lr: Any, decay: Any, group: int
    ) -> Tensor:
        if self.setup.kind is torch.optim.Adam:
            g, kept = g + decay * w, w
        else:
            kept = w * (1 - lr * decay)
        b1, b2 = self.setting("betas", group)
        held = self.slots.setdefault(n, {})
        held["m"] = b1 * held.get("m", 0.0) + (1 - b1) * g
        held["v"] = b2 * held.get("v", 0.0) + (1 - b2) * g**2
        m, v = held["m"] / (1 - b1**t), held["v"] / (1 - b2**t)
        return kept - lr * m / (v.sqrt() + 1e-8)


def truth(
    setup: Setup,
    case: Case,
    made: BilevelProblem,
    steps: int,
    *,
    data: Callable[[int], list[tuple[float, Any]]],
    factor: Callable[[int], float] = lambda k: 1.0,
) -> Params:
    """Return df/dλ through all steps of a run, by plain autograd."""
    leaves = {
        n: t.detach().clone().requires_grad_() for n, t in made.outer_params.items()
    }
    theta = {s.setting: leaves[n] for n, s in made.inner_settings.items()}
    lam = {n: t for n, t in leaves.items() if n not in made.beside_losses}
    w = {
        n: leaves[made.inner_start[n]] if n in made.inner_start else t.clone()
        for n, t in case.inner.items()
    }
    w = {n: t if t.requires_grad else t.requires_grad_() for n, t in w.items()}
    hand = Hand(setup, case, theta)
    for k in range(steps):
        parts = [a * case.inner_loss(w, lam, b) for a, b in data(k)]
        total = torch.stack(parts).sum()
        grads = torch.autograd.grad(total, list(w.values()), create_graph=True)
        g = dict(zip(w, grads, strict=True))
        if setup.max_norm is not None:
            norm = torch.stack([x.square().sum() for x in g.values()]).sum().sqrt()
            c = torch.clamp(setup.max_norm / (norm + 1e-6), max=1.0)
            g = {n: c * x for n, x in g.items()}
        w = hand.step(w, g, k + 1, factor(k))
    value = case.outer_loss(w, lam, case.outer_batch)
    found = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def problem(case: Case, setup: Setup, **more: Any) -> BilevelProblem:
    return BilevelProblem(
        case.inner_loss,
        case.outer_loss,
        {n: t.clone().requires_grad_() for n, t in case.inner.items()},
        {n: t.clone().requires_grad_() for n, t in case.outer.items()},
        inner_settings={**setup.learned, **more.pop("learned", {})},
        **more,
    )


def worst(found: Params, known: Params) -> float:
    """Return the largest error of a λ, relative to it or to a thousandth of the whole.

    A first step of Adam hardly depends on what scales its gradient, and not at all on its
    betas: terms of the size of the step cancel there, to their rounding.
    """
    assert found.keys() == known.keys()
    least = 1e-3 * float(torch.stack([t.norm() for t in known.values()]).norm())
    return max(
        float((found[n] - t).norm()) / max(float(t.norm()), least)
        for n, t in known.items()
    )


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("name", SETUPS)
def test_virtual_steps(name: str, steps: int) -> None:
    setup, case = (
        SETUPS[name],
        replace(network_case(), batches=[network_case().batch(0)]),
    )
    made = problem(
        case,
        setup,
        learn_start=True,
        learned={"schedule": [1 + 0.1 * (k % 3) for k in range(steps)]},
    )
    known = truth(setup, case, made, steps, data=lambda k: [(1.0, case.batch(0))])
    result = make_estimator("unrolled", num_steps=steps, rule=setup.rule()).estimate(
        made, inner_batch=case.batch(0), outer_batch=case.outer_batch
    )
    assert worst(result.outer_grads, known) <= 1e-12
    assert not any(result.direct[n].any() for n in made.beside_losses)
    assert all(known[n].any() for n in known if steps > 1)


@pytest.mark.parametrize("snapshots", ["all", 4])
@pytest.mark.parametrize("name", SETUPS)
def test_recorded_steps(name: str, snapshots: Any) -> None:
    """Accumulated batches, and a scheduler whose factor stays."""
    setup, case, steps = SETUPS[name], network_case(), 8
    made = problem(case, setup, learn_start=["first"], learned={"schedule": [0.9] * 9})
    opt = BilevelOptimizer(
        made,
        estimator=make_estimator("unrolled", num_steps=steps, snapshots=snapshots),
        inner_optimizer=setup.optimizer(made.inner_params),
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
        outer_warmup=0,
        max_grad_norm=setup.max_norm,
    )

    def factor(k: int) -> float:
        return 1 / (1 + k)

    schedule = torch.optim.lr_scheduler.LambdaLR(opt.inner, factor)
    rates = [g["lr"] for g in opt.inner.param_groups]
    weights = [0.25, 0.75]
    for k in range(steps):
        data = Accumulated([case.batch(k), case.batch(k + 1)], weights)
        opt.step(data, case.outer_batch)
        schedule.step()
    assert rates == [9.0] * len(rates)  # the optimizer's own are left alone
    known = truth(
        setup,
        case,
        made,
        steps,
        data=lambda k: [(0.25, case.batch(k)), (0.75, case.batch(k + 1))],
        factor=factor,
    )
    result = opt.estimator.estimate(
        made,
        inner_batch=None,
        outer_batch=case.outer_batch,
        steps=opt.recorded_steps,
    )
    assert worst(result.outer_grads, known) <= 1e-12


def test_differences_of_the_whole_map() -> None:
    """The functional path again, by values alone: no derivative of anybody's."""
    case, setup = network_case(), SETUPS["adamw"]

    def end(shift: float, name: str) -> Tensor:
        made = problem(case, setup, learn_start=True)
        with torch.no_grad():
            made.outer_params[name].add_(shift)
        batches = [case.batch(k) for k in range(6)]
        _, w = take_steps(made, batches, setup.rule())
        return case.outer_loss(w, case.outer, case.outer_batch)

    made = problem(case, setup, learn_start=True)
    opt = BilevelOptimizer(
        made,
        estimator=make_estimator("unrolled", num_steps=6),
        inner_optimizer=setup.optimizer(made.inner_params),
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
    )
    for k in range(6):
        opt.inner_step(case.batch(k))
    found = opt.estimator.estimate(
        made,
        inner_batch=None,
        outer_batch=case.outer_batch,
        steps=opt.recorded_steps,
    ).outer_grads
    for name in ("log_lr", "log_weight_decay", "start of bias"):
        slope = (end(1e-5, name) - end(-1e-5, name)) / 2e-5
        assert error(found[name].sum(), slope) <= 1e-7, name


# -- a run of one's own -------------------------------------------------------------------


class Line(nn.Module):
    """y = w x, of which the start is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(4.0, dtype=F64))


def loss(model: Any, batch: Any) -> Tensor:
    return (model.w - batch).square() / 2


def line(estimator: Any = None, **more: Any) -> BilevelOptimizer:
    return BilevelOptimizer(
        Line(),
        loss,
        estimator=estimator or make_estimator("unrolled", num_steps=2),
        inner_optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.0),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        outer_warmup=0,
        **more,
    )


def test_a_learned_start_by_hand() -> None:
    """MAML: two steps of rate 1/2 from w₀ towards 0, f = w²/2: df/dw₀ = w₀/16."""
    opt = line(learn_start=True)
    opt.step(0.0, 0.0)
    report = opt.step(0.0, 0.0)
    assert report.outer_step
    start = opt.problem.outer_params["start of w"]
    assert start.item() == 4.0 - 4.0 / 16
    assert opt.problem.inner_params["w"].item() == 1.0
    opt.begin_run()
    assert opt.problem.inner_params["w"].item() == 3.75
    assert opt.recorded_steps == ()
    # Another task: f = (w - 1)²/2 after two steps towards 1.
    opt.step(1.0, 1.0)
    opt.step(1.0, 1.0)
    assert start.item() == 3.75 - 2.75 / 16


def test_settings_of_a_module_by_hand() -> None:
    """One step from 4 towards 0 at rate 1/2, f = w²/2: df/dlog lr = -w₁ w₀ lr = -4."""
    opt = line(make_estimator("unrolled", num_steps=1), inner_settings={"lr": 0.5})
    report = opt.step(0.0, 0.0)
    assert report.hypergrad_norm is not None
    assert abs(report.hypergrad_norm - 4.0) < 1e-14
    assert list(opt.problem.outer_params) == ["log_lr"]
    grown = torch.tensor(0.5, dtype=F64).log() + 4.0
    assert error(opt.problem.outer_params["log_lr"], grown) < 1e-15
    opt.inner_step(0.0)
    assert abs(opt.problem.inner_params["w"].item() - 2 * (1 - grown.exp())) < 1e-12


def end(rates: list[float]) -> float:
    """w after steps from 4 towards 0."""
    return 4.0 * math.prod(1 - rate for rate in rates)


def moved(rates: list[float]) -> float:
    """Of f = w²/2 after such steps, df/dlog lr = -w² Σ r/(1 - r)."""
    return -(end(rates) ** 2) * sum(rate / (1 - rate) for rate in rates)


def hypergradient(opt: BilevelOptimizer) -> float:
    found = opt.estimator.estimate(
        opt.problem, inner_batch=None, outer_batch=0.0, steps=opt.recorded_steps
    )
    return found.outer_grads["log_lr"].item()


def test_a_plateau_lowers_a_learned_rate() -> None:
    """The scheduler notes no rate that it began with, as others of torch do."""
    opt = line(make_estimator("unrolled", num_steps=4), inner_settings={"lr": 0.25})
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        opt.inner, factor=0.1, patience=0
    )
    factors = []
    for _ in range(4):
        factors.append(opt.inner.param_groups[0]["lr"] / 0.5)
        opt.inner_step(0.0)
        schedule.step(1.0)
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.01])
    rates = [0.25 * factor for factor in factors]
    here = opt.problem.inner_params["w"].item()
    assert abs(here - end(rates)) <= 1e-14
    assert abs(hypergradient(opt) - moved(rates)) <= 1e-14


def test_a_rate_set_by_hand_is_a_factor_of_the_learned_one() -> None:
    opt = line(inner_settings={"lr": 0.25})
    opt.inner_step(0.0)
    opt.inner.param_groups[0]["lr"] = 0.05  # a tenth of what it was made with
    file = io.BytesIO()
    torch.save((opt.state_dict(), opt.problem.module.state_dict()), file)  # pyright: ignore[reportOptionalMemberAccess]
    file.seek(0)
    state, model = torch.load(file, weights_only=True)
    other = line(inner_settings={"lr": 0.25})
    other.problem.module.load_state_dict(model)  # pyright: ignore[reportOptionalMemberAccess]
    other.load_state_dict(state)
    for each in (opt, other):
        each.inner_step(0.0)
        here = each.problem.inner_params["w"].item()
        assert abs(here - end([0.25, 0.025])) <= 1e-14
        assert abs(hypergradient(each) - moved([0.25, 0.025])) <= 1e-14


def test_a_rate_that_began_at_zero_has_no_factor() -> None:
    def of(rate: float, **settings: Any) -> BilevelOptimizer:
        return BilevelOptimizer(
            Line(),
            loss,
            estimator=make_estimator("unrolled", num_steps=2),
            inner_optimizer=partial(torch.optim.SGD, lr=rate),
            outer_optimizer=partial(torch.optim.SGD, lr=1.0),
            inner_settings=settings,
        )

    with pytest.raises(ValueError, match=r"learning rate begins at 0: .*any positive"):
        of(0.0, lr=0.5)
    assert "initial_lr" not in of(0.0, schedule=[1.0, 1.0]).param_groups[0]
    opt = of(0.5, lr=0.5)
    opt.inner.param_groups[0]["lr"] = 0.0
    opt.inner_step(0.0)  # a factor of 0 is one
    assert opt.problem.inner_params["w"].item() == 4.0


def test_a_run_resumes_with_its_numbers() -> None:
    settings = {"inner_settings": {"lr": 0.5, "schedule": [1.0, 0.5, 0.25]}}
    opt, other = (line(learn_start=True, **settings) for _ in range(2))
    opt.begin_run()
    for _ in range(2):
        opt.step(0.0, 1.4)  # w goes from 4 to 2 to 1.5
    moved = snapshot_of(dict(opt.problem.outer_params))
    assert moved != snapshot_of(dict(other.problem.outer_params))
    opt.begin_run()
    opt.step(0.0, 0.0)
    file = io.BytesIO()
    torch.save((opt.state_dict(), opt.problem.module.state_dict()), file)  # pyright: ignore[reportOptionalMemberAccess]
    file.seek(0)
    state, model = torch.load(file, weights_only=True)
    other.problem.module.load_state_dict(model)  # pyright: ignore[reportOptionalMemberAccess]
    other.load_state_dict(state)
    assert snapshot_of(dict(other.problem.outer_params)) == moved
    for o in (opt, other):
        o.step(0.0, 1.0)
        o.begin_run()
        for _ in range(2):
            o.step(0.0, 1.0)
    mine, theirs = opt.problem.outer_params, other.problem.outer_params
    assert snapshot_of(mine) == snapshot_of(theirs)
    assert other.recorded_steps[0].number == 0


def test_a_failing_step_leaves_the_groups_alone() -> None:
    opt = line(inner_settings={"lr": 0.25})
    before = [dict(g) for g in opt.param_groups]
    with pytest.raises(HypergradError, match="the inner loss is nan"):
        opt.inner_step(float("nan"))
    opt.inner_step(0.0)
    assert opt.problem.inner_params["w"].item() == 3.0
    after = [dict(g) for g in opt.param_groups]
    assert [g["lr"] for g in before] == [g["lr"] for g in after] == [0.5, 1.0]


def test_several_steps_learn_a_better_rate() -> None:
    opt = line(inner_settings={"lr": 0.1}, learn_start=False)
    for _ in range(20):
        with torch.no_grad():
            opt.problem.inner_params["w"].fill_(4.0)
        opt.begin_run()
        opt.step(0.0, 0.0)
        opt.step(0.0, 0.0)
    assert opt.problem.outer_params["log_lr"].exp().item() > 0.5


# -- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in estimator_names() if n != "auto"])
def test_estimators_that_do_not_see_where_it_acts(name: str) -> None:
    estimator = make_estimator(name)
    if estimator.reaches:
        return
    text = (
        rf"{type(estimator).__name__} cannot answer for log_lr.*Unrolled\(num_steps=K"
    )
    with pytest.raises(HypergradError, match=text):
        line(estimator, inner_settings={"lr": 0.1})
    with pytest.raises(HypergradError, match=r"cannot answer for start of w: .*starts"):
        line(estimator, learn_start=True)
    made = BilevelProblem.from_module(Line(), loss, inner_settings={"lr": 0.1})
    with pytest.raises(HypergradError, match=text):
        estimator.estimate(made, inner_batch=0.0, outer_batch=0.0)


def test_auto_unrolls() -> None:
    opt = line("auto", inner_settings={"lr": 0.5})
    report = opt.step(0.0, 0.0)
    assert opt.estimator == make_estimator("unrolled", num_steps=1)
    assert "acts in inner steps" in opt.why
    assert report.hypergrad_norm is not None
    assert abs(report.hypergrad_norm - 4.0) < 1e-14


def settings_of(given: Any, **more: Any) -> Callable[[], Any]:
    return lambda: line(inner_settings=given, **more)


BAD: list[tuple[Callable[[], Any], Any, str]] = [
    (
        settings_of({"lr": -0.1}),
        ValueError,
        r"\['lr'\] has -0.1, .*positive and finite",
    ),
    (settings_of({"lr": 0.0}), ValueError, r"\['lr'\] has 0.0, .*log scale"),
    (settings_of({"lr": float("inf")}), ValueError, "has inf, which must be positive"),
    (settings_of({"lr": 10**400}), ValueError, "has inf, which must be positive"),
    (settings_of({"lr": float("nan")}), ValueError, "has nan, which must be positive"),
    (
        settings_of({"momentum": 1.0}),
        ValueError,
        "has 1.0, which must be between 0 and",
    ),
    (
        settings_of({"lr": "big"}),
        TypeError,
        r"inner_settings\['lr'\]='big' must be a nu",
    ),
    (
        settings_of({"lr": []}),
        ValueError,
        r"\['lr'\]=\[\] is of another form: pass a n",
    ),
    (settings_of({"lr": [[0.1]]}), ValueError, "is of another form"),
    (settings_of({"lr": [0.1, 0.2]}), ValueError, "has 2 values.*1 parameter groups"),
    (
        settings_of({"weight_decay": [0.1]}),
        ValueError,
        r"that of group 0 would never act: .*a single number for all groups",
    ),
    (settings_of({"betas": 0.9}), ValueError, "is of another form: pass a pair"),
    (settings_of({"betas": (0.9, 0.99, 0.999)}), ValueError, "is of another form"),
    (
        settings_of({"schedule": [1.0, -1.0]}),
        ValueError,
        "has -1.0, which must be posit",
    ),
    (settings_of({"eps": 1e-8}), ValueError, "'eps', which cannot be learned; choose"),
    (settings_of(["lr"]), TypeError, r"inner_settings=\['lr'\] must be a dictionary"),
    (settings_of({"betas": (0.9, 0.99)}), ValueError, "learns 'betas', and SGD has no"),
    (
        settings_of({"weight_decay": 0.1}),
        ValueError,
        "it is 0 in every parameter group",
    ),
    (lambda: line(learn_start=["head"]), ValueError, "'head' fits no inner parameter"),
    (lambda: line(learn_start=[3]), TypeError, "learn_start holds 3: pass True"),
    (
        settings_of({"lr": 0.1}, learn_start=None),
        TypeError,
        "learn_start=None must be True, False, or names .*got NoneType",
    ),
    (settings_of({"lr": 0.1}, learn_start=1), TypeError, "learn_start=1 must be True"),
    (
        settings_of({"lr": 0.1}, audit_every=1, audit_reference="cg"),
        ValueError,
        "reference='cg' cannot answer for log_lr: .*Pass `steps`",
    ),
    (lambda: line(), TypeError, "with a module, pass loss_fn and outer"),
    (
        lambda: BilevelProblem.from_module(Line(), loss),
        TypeError,
        "outer must be names, a module type",
    ),
]


@pytest.mark.parametrize(("make", "kind", "text"), BAD, ids=range(len(BAD)))
def test_bad_input(make: Callable[[], Any], kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        make()


RATE: dict[str, Any] = {"inner_settings": {"lr": 0.1}}
START: dict[str, Any] = {"learn_start": True}


def test_an_optimizer_without_a_rule() -> None:
    made = BilevelProblem.from_module(Line(), loss, inner_settings={"lr": 0.1})
    with pytest.raises(
        TypeError, match="Rprop has no rule here, so its step cannot be"
    ):
        BilevelOptimizer(
            made,
            estimator=make_estimator("unrolled", num_steps=1),
            inner_optimizer=partial(torch.optim.Rprop, lr=0.1),
            outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        )
    for estimator in ("unrolled", "auto"):  # which else would take 'cg'
        for settings, name in ((RATE, "log_lr"), (START, "start of w")):
            with pytest.raises(
                TypeError, match=rf"\({name}\) acts in its steps alone: take one of"
            ):
                BilevelOptimizer(
                    BilevelProblem.from_module(Line(), loss, **settings),
                    estimator=estimator,
                    inner_optimizer=partial(torch.optim.Rprop, lr=0.1),
                    outer_optimizer=partial(torch.optim.SGD, lr=1.0),
                )
    with pytest.raises(TypeError, match=r"inner_settings.* go with a module"):
        BilevelOptimizer(
            made,
            estimator="unrolled",
            inner_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_optimizer=partial(torch.optim.SGD, lr=1.0),
            inner_settings={"lr": 0.1},
        )


def test_an_estimator_that_chooses_one_that_does_not_see_where_it_acts() -> None:
    class Blind(Auto):
        def resolve(self, problem: Any, inner_batch: Any, rule: Any) -> Choice:
            return Choice(make_estimator("cg"))

    with pytest.raises(HypergradError, match="ConjugateGradient cannot answer for lo"):
        line(Blind(), inner_settings={"lr": 0.1}).inner_step(0.0)


@pytest.mark.parametrize(
    ("given", "held", "says"),
    [
        (
            {"lr": 0.1},
            710.0,
            r"'log_lr' is 710.0, which makes lr inf: .*lower the outer",
        ),
        ({"lr": 0.1}, -800.0, "makes lr 0.0: rounding gives a bound of the log scale"),
        ({"lr": 0.1}, float("nan"), "makes lr nan"),
        ({"momentum": 0.5}, 40.0, "'logit_momentum' is 40.0, which makes momentum 1.0"),
    ],
)
def test_a_setting_that_an_outer_step_threw_too_far(
    given: Any, held: float, says: str
) -> None:
    opt = BilevelOptimizer(
        Line(),
        loss,
        estimator=make_estimator("unrolled", num_steps=1),
        inner_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        inner_settings=given,
    )
    (lam,) = opt.problem.outer_params.values()
    with torch.no_grad():
        lam.fill_(held)
    with pytest.raises(HypergradError, match=says):
        opt.inner_step(0.0)
    assert opt.problem.inner_params["w"].item() == 4.0
    with torch.no_grad():
        lam.fill_(0.0)
    opt.inner_step(0.0)


def test_the_state_of_a_problem_that_learns_something_else() -> None:
    def made(**more: Any) -> BilevelOptimizer:
        problem = BilevelProblem(
            lambda i, o, b: (i["w"] - sum(o.values())) ** 2 / 2,
            lambda i, o, b: i["w"] ** 2,
            {"w": torch.tensor(4.0, dtype=F64, requires_grad=True)},
            {
                n: torch.tensor(0.0, dtype=F64, requires_grad=True)
                for n in more.pop("names", ("lam",))
            },
            **more,
        )
        opt = BilevelOptimizer(
            problem,
            estimator=make_estimator("unrolled", num_steps=1),
            inner_optimizer=partial(torch.optim.SGD, lr=0.5, weight_decay=0.1),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_warmup=0,
        )
        opt.step(None, None)
        return opt

    plain, rate = made(), made(inner_settings={"lr": 0.1})
    decay = made(inner_settings={"weight_decay": 0.1})
    short, long = (made(inner_settings={"schedule": [1.0] * n}) for n in (4, 6))
    for mine, theirs, says in (
        (
            plain,
            rate,
            r"learns \['log_lr'\] of the inner run, and this one learns noth",
        ),
        (rate, plain, r"learns nothing of the inner run, and this one learns \['log_l"),
        (rate, decay, r"learns \['log_weight_decay'\] of .* one learns \['log_lr'\]"),
        (
            rate,
            made(inner_settings={"lr": [0.1]}),
            r"\{'log_lr': \[1\]\}, .*_lr': \[\]\}",
        ),
        (short, long, r"other shapes: \{'log_schedule': \[6\]\}, and here .*\[4\]"),
        (plain, made(names=("mu",)), r"other outer parameters .*\(mu; here: lam\)"),
    ):
        before = snapshot_of(dict(mine.problem.outer_params))
        with pytest.raises(ValueError, match=says):
            mine.load_state_dict(theirs.state_dict())
        assert snapshot_of(dict(mine.problem.outer_params)) == before
        mine.step(None, None)


def test_a_comparison_without_steps_says_what_to_pass() -> None:
    opt = line(inner_settings={"lr": 0.5})
    unrolled = make_estimator("unrolled", num_steps=2, rule=SGD(0.5))
    compare = partial(compare_estimators, opt.problem, {"mine": unrolled}, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"'auto' cannot answer for log_lr: .*`steps`"):
        compare(repeats=1)
    for _ in range(2):
        opt.inner_step(0.0)
    with torch.no_grad():
        opt.problem.inner_params["w"].fill_(4.0)  # where the virtual steps begin
    assert not compare(repeats=1, reference=unrolled).rows[0].failure
    assert not compare(repeats=1, steps=opt.recorded_steps).rows[0].failure


def test_a_run_that_is_not_seen_whole() -> None:
    opt = line(learn_start=True)
    opt.inner_step(0.0)
    with pytest.raises(HypergradError, match="looks back at 2 inner steps but 1 were"):
        opt.outer_step(0.0)
    opt.inner_step(0.0)
    opt.inner_step(0.0)
    before = opt.problem.outer_params["start of w"].item()
    says = r"is number 2 of the run.*`outer_warmup` of no more.*`begin_run`"
    with pytest.raises(HypergradError, match=says):
        opt.outer_step(0.0)
    assert opt.problem.outer_params["start of w"].item() == before


def test_outer_steps_keep_the_time_of_the_run() -> None:
    """Every second step of a run is one, also of a run after one of three steps."""
    opt = line(inner_settings={"lr": 0.1})
    taken: list[list[bool]] = []
    for steps in (3, 5, 2):
        opt.begin_run()
        taken.append([opt.step(0.0, 0.0).outer_step for _ in range(steps)])
    assert taken == [
        [False, True, False],
        [False, True, False, True, False],
        [False, True],
    ]


def test_auto_does_not_reach_the_start_of_a_run() -> None:
    with pytest.raises(
        HypergradError, match=r"Auto cannot answer for start of w.*Unrol"
    ):
        line("auto", learn_start=True)


def test_decay_of_what_is_learned_is_told() -> None:
    def made(decay: float, **learned: Any) -> BilevelOptimizer:
        return BilevelOptimizer(
            Line(),
            loss,
            outer=None if learned else "w",
            estimator=make_estimator("unrolled", num_steps=2),
            inner_optimizer=partial(torch.optim.SGD, lr=0.5),
            outer_optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=decay),
            **learned,
        )

    with pytest.warns(
        NumericalWarning, match=r"weight_decay=0\.01 pulls log_lr towards"
    ):
        made(0.01, inner_settings={"lr": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(0.0, inner_settings={"lr": 0.1})
        made(0.01, learn_start=True)


def test_a_rate_that_a_hand_made_negative() -> None:
    opt = line(inner_settings={"momentum": 0.5})
    opt.inner.param_groups[0]["lr"] = -0.05
    with pytest.raises(
        ValueError, match=r"group 0 of the SGD .* lr=-0\.05 .*scheduler"
    ):
        opt.step(0.0, 0.0)


def test_a_schedule_of_numpy() -> None:
    opt = line(inner_settings={"schedule": np.array([1.0, 0.5])})
    assert opt.problem.outer_params["log_schedule"].exp().tolist() == [1.0, 0.5]


def test_a_schedule_that_ends_or_is_not_recorded() -> None:
    opt = line(inner_settings={"schedule": [1.0, 1.0]})
    opt.step(0.0, 0.0)
    opt.step(0.0, 0.0)
    here = opt.problem.inner_params["w"].item()
    with pytest.raises(HypergradError, match=r"has 2 factors, and this is step 3 of"):
        opt.inner_step(0.0)
    assert opt.problem.inner_params["w"].item() == here
    steps = [replace(step, number=None) for step in opt.recorded_steps]
    with pytest.raises(
        HypergradError, match=r"log_schedule.*does not say which it was"
    ):
        opt.estimator.estimate(
            opt.problem, inner_batch=None, outer_batch=0.0, steps=steps
        )
    opt.begin_run()
    opt.inner_step(0.0)


def test_names_that_are_taken() -> None:
    log_lr = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="log_lr"):
        BilevelProblem(
            lambda i, o, b: i["w"] * o["log_lr"],
            lambda i, o, b: i["w"],
            {"w": torch.zeros((), requires_grad=True)},
            {"log_lr": log_lr},
            inner_settings={"lr": 0.1},
        )


def test_an_outer_loss_of_constants_is_still_an_error() -> None:
    made = BilevelProblem(
        lambda i, o, b: i["w"] ** 2,
        lambda i, o, b: torch.ones(()),
        {"w": torch.ones((), requires_grad=True)},
        {},
        inner_settings={"lr": 0.1},
    )
    with pytest.raises(HypergradError, match="outer loss depends on no parameter"):
        make_estimator("unrolled", num_steps=1, rule=SGD(0.1)).estimate(
            made, inner_batch=None, outer_batch=None
        )
