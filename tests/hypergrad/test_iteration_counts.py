"""What one iteration evaluates and differentiates, counted from outside the library.

The losses write down where they are called, and `torch.autograd.grad` what it is asked for:
nothing is computed twice, and nothing is differentiated that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hypergrad import BilevelProblem, Info, make_estimator
from hypergrad.batches import Accumulated
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.products import FiniteDifference

Params = dict[str, Tensor]
F64 = torch.float64


class Ledger:
    """Two losses of w = (a, b) and λ, and a list of all that is done with them.

    Entries: `g(w)` and `f(w+)` are calls of a loss before the inner step and after it,
    `g(.)` elsewhere. `d w`, `d wλ`, `d λ` are backward passes of a loss for those
    tensors, with `*` where the result can be differentiated again; `p w`, `p wλ`, `p λ`
    are products of a direction with second derivatives. `|` is where an optimizer stepped
    w: what follows is the outer step.
    """

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make, dtype=F64).requires_grad_()

        self.inner = {"a": draw(3, 4), "b": draw(4)}
        self.outer = {"lam": draw(4)}
        self.x = torch.randn(6, 3, generator=make, dtype=F64)
        self.log: list[str] = []
        self.before = self.after = self._values(self.inner)
        self.problem = BilevelProblem(self.g, self.f, self.inner, self.outer)

    def g(self, inner: Params, outer: Params, batch: Any) -> Tensor:
        self.log.append(f"g({self._where(inner)})")
        fit = torch.tanh(self.x @ inner["a"]) * outer["lam"] + inner["b"]
        weights = 1 + (outer["lam"] ** 2)
        decay = (weights * inner["a"] ** 2).sum() + (weights * inner["b"] ** 2).sum()
        return fit.square().mean() * batch + decay

    def f(self, inner: Params, outer: Params, batch: Any) -> Tensor:
        self.log.append(f"f({self._where(inner)})")
        fit = torch.tanh(self.x @ inner["a"]) * outer["lam"] + inner["b"] - 1
        return fit.square().mean() * batch

    def stepped(self, optimizer: Any, *args: Any) -> None:
        ours = isinstance(optimizer, BilevelOptimizer)
        if not ours and optimizer.param_groups[0]["params"][0] is self.inner["a"]:
            self.before, self.after = self.after, self._values(self.inner)
            self.log.append("|")

    def grad(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, **how: Any
    ) -> Any:
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        asked = list(inputs)
        lam = {id(t) for t in self.outer.values()}
        n = sum(id(t) in lam for t in asked)
        assert n in (0, len(lam)), "all of λ or nothing of it"
        assert len(asked) - n in (0, len(self.inner)), "all of w or nothing of it"
        what = ("w" if len(asked) > n else "") + ("λ" if n else "")
        product = grad_outputs is not None
        again = "*" if how.get("create_graph") else ""
        self.log.append(f"{'p' if product else 'd'} {what}{again}")
        return _GRAD(outputs, inputs, grad_outputs, **how)

    def _where(self, inner: Params) -> str:
        now = self._values(inner)
        if all(torch.equal(now[n], self.after[n]) for n in now):
            return "w+" if "|" in self.log else "w"
        return "w" if all(torch.equal(now[n], self.before[n]) for n in now) else "."

    @staticmethod
    def _values(inner: Params) -> Params:
        return {n: t.detach().clone() for n, t in inner.items()}


_GRAD = torch.autograd.grad


def refused(*args: Any, **how: Any) -> None:
    raise AssertionError("Tensor.backward differentiates in every leaf there is")


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    made = Ledger()
    monkeypatch.setattr(torch.autograd, "grad", made.grad)
    monkeypatch.setattr(torch.autograd, "backward", refused)
    hook = register_optimizer_step_post_hook(made.stepped)
    yield made
    hook.remove()


def make(ledger: Ledger, name: str, more: Any = None, **settings: Any) -> Any:
    return BilevelOptimizer(
        ledger.problem,
        estimator=make_estimator(name, **settings),
        inner_optimizer=partial(torch.optim.AdamW, lr=1e-2),
        outer_optimizer=partial(torch.optim.SGD, lr=1e-3),
        **{"outer_warmup": 0, "outer_every": 1, **(more or {})},
    )


def iteration(ledger: Ledger, opt: Any, batch: Any = 1.0) -> tuple[str, str, Info]:
    """Return what the second iteration does: inner step, outer step, and its own word.

    In the first one the library looks through each graph, at no cost in passes.
    """
    opt.step(batch, batch)
    ledger.log.clear()
    report = opt.step(batch, batch)
    inner, _, outer = ", ".join(ledger.log).partition("|")
    return inner.strip(", "), outer.strip(", "), report.info


def check_info(outer: str, info: Info) -> None:
    entries = outer.split(", ")
    assert info.n_forward == sum(e[0] in "gf" for e in entries)
    assert info.n_backward == sum(e[0] in "dp" for e in entries)


# What an estimator does: in the inner step, and in the outer step after f's own gradient.
# Differences of the first order; the numbers are those of DESIGN's table, in gradients.
ONE_STEP = {
    "forward: the inner backward's by-product, and one more gradient": (
        {"product": FiniteDifference("forward")},
        "g(w), d wλ",
        "g(.), d λ",
    ),
    "central: two gradients": ({}, "g(w), d w", "g(.), d λ, g(.), d λ"),
    "richardson: four": (
        {"product": FiniteDifference("richardson")},
        "g(w), d w",
        "g(.), d λ, g(.), d λ, g(.), d λ, g(.), d λ",
    ),
    "exact, kept: one product in the inner step's own graph": (
        {"product": "exact"},
        "g(w), d w*",
        "p λ",
    ),
    "part of the batch keeps nothing": (
        {"product": "exact", "product_fraction": 0.5},
        "g(w), d w",
        "g(w), d w*, p λ",
    ),
}


@pytest.mark.parametrize("case", ONE_STEP)
@pytest.mark.parametrize("name", ["darts", "sama"])
def test_one_step_back(ledger: Ledger, name: str, case: str) -> None:
    settings, inner_step, product = ONE_STEP[case]
    batch = torch.ones(2, dtype=F64) if "product_fraction" in settings else 1.0
    if "product_fraction" in settings:  # a batch that can be divided
        g, f = ledger.g, ledger.f
        ledger.problem = BilevelProblem(
            lambda i, o, b: g(i, o, b.mean()),
            lambda i, o, b: f(i, o, b.mean()),
            ledger.inner,
            ledger.outer,
        )
    opt = make(ledger, name, **settings)
    inner, outer, info = iteration(ledger, opt, batch)
    assert inner == inner_step
    assert outer == f"f(w+), d wλ, {product}"
    check_info(outer, info)


@pytest.mark.parametrize("name", ["darts", "sama"])
def test_exact_recomputed_is_one_gradient_more(ledger: Ledger, name: str) -> None:
    opt = make(ledger, name, {"reuse_graph": False}, product="exact")
    inner, outer, info = iteration(ledger, opt)
    assert inner == "g(w), d w"
    assert outer == "f(w+), d wλ, g(w), d w*, p λ"
    check_info(outer, info)


def test_exact_on_two_micro_batches(ledger: Ledger) -> None:
    opt = make(ledger, "darts", product="exact")
    inner, outer, _ = iteration(ledger, opt, Accumulated([1.0, 2.0]))
    assert inner == "g(w), d w, g(w), d w"
    assert outer == "f(w+), d wλ, f(w+), d wλ, " + ", ".join(["g(w), d w*, p λ"] * 2)


def test_first_order_takes_the_direct_term_alone(ledger: Ledger) -> None:
    inner, outer, info = iteration(ledger, make(ledger, "first-order"))
    assert inner == "g(w), d w"
    assert outer == "f(w+), d λ"
    check_info(outer, info)


def test_unrolled_one_step(ledger: Ledger) -> None:
    inner, outer, info = iteration(ledger, make(ledger, "unrolled", num_steps=1))
    assert inner == "g(w), d w*"
    assert outer == "f(w+), d wλ, p λ"
    check_info(outer, info)


@pytest.mark.parametrize("micro", [1, 2])
def test_unrolled_is_one_gradient_and_one_product_a_step(
    ledger: Ledger, micro: int
) -> None:
    """Not a pass more for the gradients that are not on record."""
    opt = make(ledger, "unrolled", {"outer_every": None}, num_steps=3)
    batch = Accumulated([1.0] * micro)
    for _ in range(5):
        opt.step(batch, 1.0)
    assert all(bool(s.grads) is (micro > 1) for s in opt.recorded_steps)
    ledger.log.clear()
    info = opt.step(batch, 1.0).info
    inner, _, outer = ", ".join(ledger.log).partition("|")
    assert inner == ", ".join(["g(w), d w"] * micro) + ", "
    # The newest step starts at the w before the last inner step, the oldest two at
    # others; only the oldest needs no adjoint of its w.
    steps = [("g(w)", "p wλ"), ("g(.)", "p wλ"), ("g(.)", "p λ")]
    walk = [f"{g}, d w*, {p}" for g, p in steps for _ in range(micro)]
    assert outer.strip(", ") == "f(w+), d wλ, " + ", ".join(walk)
    check_info(outer.strip(", "), info)


# One graph of g at w+, a product in w for each term, one in λ at the end.
IMPLICIT: dict[str, tuple[str, dict[str, Any], int]] = {
    "neumann": ("neumann", {"num_terms": 3}, 3),
    "neumann at a given scale": ("neumann", {"num_terms": 3, "scale": 0.01}, 3),
    "neumann of no terms": ("neumann", {"num_terms": 0, "scale": 0.01}, 0),
    "cg": ("cg", {"max_iter": 4, "rtol": 1e-300}, 4),
}


@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
@pytest.mark.parametrize("case", IMPLICIT)
def test_implicit(ledger: Ledger, case: str) -> None:
    name, settings, products = IMPLICIT[case]
    inner, outer, info = iteration(ledger, make(ledger, name, **settings))
    assert inner == "g(w), d w"
    in_w = "p w, " * products
    assert outer == f"f(w+), d wλ, g(w+), d w*, {in_w}p λ"
    check_info(outer, info)
    assert info.n_hvp == products + 1


@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
def test_nystrom_takes_its_columns_eight_at_a_time(ledger: Ledger) -> None:
    opt = make(ledger, "nystrom", rank=10)
    _, outer, info = iteration(ledger, opt)
    # Ten columns in two passes, the residual, and the product in λ.
    assert outer == "f(w+), d wλ, g(w+), d w*, p w, p w, p w, p λ"
    assert info.n_hvp == 12


@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
@pytest.mark.parametrize("scheme", ["central", "forward"])
def test_implicit_by_differences(ledger: Ledger, scheme: Any) -> None:
    how = {"product": FiniteDifference(scheme)}
    opt = make(ledger, "neumann", num_terms=2, **how)
    inner, outer, info = iteration(ledger, opt)
    assert inner == "g(w), d w"
    if scheme == "central":
        walk = "g(.), d w, g(.), d w, " * 2 + "g(.), d λ, g(.), d λ"
    else:  # the other side of each is g's gradient at w+, taken once for both
        walk = "g(.), d w, g(w+), d wλ, g(.), d w, g(.), d λ"
    assert outer == f"f(w+), d wλ, {walk}"
    check_info(outer, info)


@pytest.mark.parametrize(
    "name", ["first-order", "darts", "unrolled", "neumann", "auto"]
)
def test_between_outer_steps_an_iteration_is_plain_training(
    ledger: Ledger, name: str
) -> None:
    opt = make(ledger, name, {"outer_every": 100})
    for _ in range(3):
        opt.step(1.0, 1.0)
    ledger.log.clear()
    opt.step(1.0, 1.0)
    assert ledger.log == ["g(w)", "d w", "|"]


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_frozen_outer_parameters_cost_nothing(ledger: Ledger, scheme: Any) -> None:
    opt = make(ledger, "darts", product=FiniteDifference(scheme))
    opt.step(1.0, 1.0)
    opt.freeze_outer()
    ledger.log.clear()
    opt.step(1.0, lambda: pytest.fail("no outer batch is drawn"))
    assert ledger.log == ["g(w)", "d w", "|"]
    assert opt.recorded_steps == ()
