"""What an estimator may ask of its point: losses and gradients anywhere, counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelProblem,
    HypergradError,
    HypergradEstimator,
    Needs,
    NonFiniteError,
    Point,
    Terms,
    make_estimator,
    tree,
)
from hypergrad.batches import Accumulated, as_micro_batches
from hypergrad.testing import quadratic, relative_error
from hypergrad.testing.snapshot import differences, snapshot

F64 = torch.float64


def half(inner: Any, outer: Any, batch: Any) -> Tensor:
    """(w - λ)²/2 times what comes as a batch."""
    scale = 1.0 if batch is None else batch
    return scale * (inner["w"] - outer["lam"]) ** 2 / 2


def problem(w: float = 4.0, lam: float = 1.0) -> BilevelProblem:
    return BilevelProblem(
        half,
        lambda i, o, b: i["w"] ** 2 + 0 * (o["lam"] if b == "λ" else 0.0),
        {"w": torch.tensor(w, dtype=F64, requires_grad=True)},
        {"lam": torch.tensor(lam, dtype=F64, requires_grad=True)},
    )


def point(made: BilevelProblem, inner: Any = None, outer: Any = None) -> Point:
    return Point(made, as_micro_batches(inner), as_micro_batches(outer))


def test_values_by_hand() -> None:
    here = point(problem())
    assert here.value("inner").item() == 4.5
    assert here.value("outer").item() == 16.0
    elsewhere = {"w": torch.tensor(2.0, dtype=F64), "lam": torch.tensor(0.0, dtype=F64)}
    assert here.value("inner", at=elsewhere).item() == 2.0
    assert here.value("inner", at={"lam": elsewhere["lam"]}).item() == 8.0
    assert here.problem.inner_params["w"].item() == 4.0
    assert (here.tally.n_forward, here.tally.n_backward) == (4, 0)


def test_gradients_by_hand() -> None:
    here = point(problem())
    both = here.gradients("inner")
    assert both.inner is not None
    assert both.outer is not None
    assert (both.loss, both.inner["w"].item(), both.outer["lam"].item()) == (4.5, 3, -3)
    inner = here.gradients("inner", "inner", at={"w": torch.tensor(2.0, dtype=F64)})
    assert inner.inner is not None
    assert (inner.inner["w"].item(), inner.outer) == (1.0, None)
    outer = here.gradients("outer", "outer")
    assert (outer.inner, outer.unused) == (None, {"lam"})
    assert (here.tally.n_forward, here.tally.n_backward) == (3, 3)


def test_micro_batches_are_added_up() -> None:
    data = Accumulated([2.0, 4.0], [0.5, 0.25])
    here = point(problem(), inner=data)
    assert here.value("inner").item() == 2 * 4.5
    assert here.gradients("inner").loss == 2 * 4.5
    assert here.tally.n_forward == 4


def test_unused_is_what_no_evaluation_was_connected_to() -> None:
    here = point(problem())
    assert here.unused("outer") == here.asked("outer") == set()
    here.gradients("outer")
    assert here.unused("outer") == {"lam"}
    here.gradients("inner")
    assert here.unused("inner") == set()
    assert here.asked("inner") == {"w", "lam"}
    used = point(problem(), outer="λ")
    used.gradients("outer")
    assert used.unused("outer") == set()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=F64)
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.linspace(1, 2, 3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop(self.norm(x)) * self.weight).square().mean()


@dataclass(frozen=True)
class Slope(HypergradEstimator):
    """Differences of values alone; both sides see the same dropout masks."""

    name = "slope"
    radius: float = 1e-5

    @property
    def needs(self) -> Needs:
        return Needs(order=0, v=False)

    @property
    def answers(self) -> str:
        return "how the outer loss changes at fixed w, by differences"

    def terms(self, point: Point) -> Terms:
        lam = point.problem.outer_params
        direct = tree.zeros_like(lam)
        for name, t in lam.items():
            for i in range(t.numel()):
                step = torch.zeros_like(t).reshape(-1)
                step[i] = self.radius
                high = point.value("outer", {name: t + step.reshape(t.shape)})
                low = point.value("outer", {name: t - step.reshape(t.shape)})
                direct[name].reshape(-1)[i] = (high - low) / (2 * self.radius)
        return Terms(direct, tree.zeros_like(lam), info={"reason": "by values"})


def test_values_see_the_same_random_numbers_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = Noisy()
    made = BilevelProblem.from_module(model, lambda m, x: m(x), outer="norm.bias")
    x = torch.randn(8, 3, dtype=F64)
    before = snapshot(made)
    result = Slope().estimate(made, inner_batch=x, outer_batch=x)
    assert not differences(before, snapshot(made))
    first = make_estimator("first-order").estimate(made, inner_batch=x, outer_batch=x)
    # Another mask on one side would be off by a hundred thousand.
    assert relative_error(result.outer_grads, first.outer_grads) < 1e-9
    assert result.outer_loss == first.outer_loss
    # Six differences' sides, and f itself, which no side evaluated.
    assert (result.info.n_forward, result.info.n_backward) == (7, 0)
    assert result.info.reason == "by values"
    assert result.info.unused == ()


def test_terms_give_both_terms_and_the_loss_is_not_evaluated_twice() -> None:
    class Penalty(HypergradEstimator):
        def terms(self, point: Point) -> Terms:
            f = point.gradients("outer", "outer")
            g = point.gradients("inner", "outer")
            return Terms(f.outer or {}, g.outer or {}, {"y": dict(g.outer or {})})

    made = problem()
    result = Penalty().estimate(made, inner_batch=None, outer_batch=None)
    assert (result.direct["lam"].item(), result.indirect["lam"].item()) == (0.0, -3.0)
    assert result.outer_loss == 16.0
    assert result.info.n_forward == 2
    assert result.info.unused == ("outer_loss: lam",)
    assert result.state["y"]["lam"].item() == -3.0


def zeros(point: Point) -> Terms:
    found = tree.zeros_like(point.problem.outer_params)
    return Terms(found, found)


@pytest.mark.parametrize(
    ("terms", "error", "text"),
    [
        (None, HypergradError, r"implements neither `indirect` nor `terms`"),
        (lambda p: 3, TypeError, r"\.terms returned a int.*Return Terms"),
        (
            lambda p: Terms({}, tree.zeros_like(p.problem.outer_params)),
            ValueError,
            r"returned direct for \[\]; the outer parameters are \['lam'\]",
        ),
        (
            lambda p: Terms(
                tree.zeros_like(p.problem.outer_params),
                {"lam": torch.zeros(3)},
            ),
            ValueError,
            r"returned shape \(3,\) for 'lam', whose shape is \(\)",
        ),
        (
            lambda p: replace(zeros(p), state={"step": 3}),
            TypeError,
            r"returned 3 as state 'step'.*torch\.tensor",
        ),
        (
            lambda p: replace(zeros(p), state={"y": dict(p.problem.inner_params)}),
            TypeError,
            r"a tensor with a graph as state 'w'.*detached",
        ),
    ],
)
def test_bad_terms(terms: Any, error: Any, text: str) -> None:
    class Mine(HypergradEstimator):
        pass

    if terms is not None:
        Mine.terms = lambda self, point: terms(point)
    with pytest.raises(error, match=text):
        Mine().estimate(problem(), inner_batch=None, outer_batch=None)


def test_bad_places() -> None:
    here = point(problem())
    with pytest.raises(ValueError, match="'v' is not one of the inner parameters"):
        here.value("inner", at={"v": torch.zeros(())})
    with pytest.raises(ValueError, match=r"'lam' has shape \(2,\)"):
        here.gradients("inner", at={"lam": torch.zeros(2)})
    for ask in (here.value, here.gradients, here.unused, here.asked):
        bad: Any = "iner"
        with pytest.raises(
            ValueError, match="level='iner' must be one of 'inner', 'ou"
        ):
            ask(bad)
    bad = "w"
    with pytest.raises(ValueError, match="wrt='w' must be one of 'inner', 'outer', 'b"):
        here.gradients("inner", bad)
    nothing = Point(here.problem, here.inner_batches, ())
    with pytest.raises(HypergradError, match=r"no outer batch here.*each_step=True"):
        nothing.value("outer")


def test_a_value_that_is_not_finite_is_told_at_the_end() -> None:
    class Values(Slope):
        def terms(self, point: Point) -> Terms:
            zeros = tree.zeros_like(point.problem.outer_params)
            point.value("inner", at={"lam": torch.tensor(float("nan"), dtype=F64)})
            return Terms(zeros, zeros)

    with pytest.raises(NonFiniteError, match="the inner loss is nan"):
        Values().estimate(problem(), inner_batch=None, outer_batch=None)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"lookback": -1}, ValueError, "lookback=-1"),
        ({"lookback": 1.5}, TypeError, "lookback=1.5"),
        ({"order": 3}, ValueError, "order=3 must be 0, 1 or 2"),
        ({"v": "yes"}, TypeError, "v='yes'"),
    ],
)
def test_needs_that_make_no_sense(settings: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        Needs(**settings)


def test_what_each_estimator_needs_and_answers() -> None:
    unrolled = make_estimator("unrolled", num_steps=3, snapshots=4)
    assert unrolled.needs == Needs(lookback=3, gradients=False, snapshots=4)
    assert make_estimator("darts").needs == Needs(lookback=1, order=1)
    exact = make_estimator("sama", product="exact").needs
    assert exact == Needs(lookback=1, graph=True)
    forward = make_estimator("darts", product="forward-difference").needs
    assert forward == Needs(lookback=1, order=1, byproduct=True)
    assert make_estimator("first-order").needs == Needs(order=1, v=False)
    assert make_estimator("cg").needs == Needs()
    answers = {n: make_estimator(n).answers for n in ("sama", "cg", "first-order")}
    assert answers == {"sama": "steps", "cg": "minimum", "first-order": "neither"}
    known = quadratic()
    assert Slope().resolve(known.problem, None, None).estimator == Slope()
