"""An estimator's own part of an inner step: a direction, a state, and their undoing."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    HypergradEstimator,
    InnerStep,
    Needs,
    NonFiniteError,
    Point,
    Terms,
    make_estimator,
    register_estimator,
    tree,
)
from hypergrad.batches import Accumulated
from hypergrad.estimator import EstimatorState
from hypergrad.estimators import registry
from hypergrad.testing.snapshot import differences, snapshot, snapshot_of
from hypergrad.tree import Params

F64 = torch.float64


@dataclass(frozen=True)
class Pulled(HypergradEstimator):
    """Step along ∂g/∂w + pull ∂f/∂w, and keep a second sequence y that follows f too.

    λ's derivative is that of g at w less that at y: a penalty method in small.
    """

    name = "pulled"
    pull: float = 0.5
    decay: float = 0.9

    @property
    def needs(self) -> Needs:
        return Needs(order=1, v=False, outer_batch_each_step=True)

    @property
    def answers(self) -> str:
        return "penalty at its multiplier"

    def inner_direction(self, point: Point, gradient: Params) -> Params:
        f = point.gradients("outer", "inner")
        return tree.add(gradient, f.inner or {}, alpha=self.pull)

    def after_inner_step(self, point: Point, step: InnerStep) -> EstimatorState:
        y = point.state.get("y") or tree.clone(step.inner_params)
        g = point.gradients("inner", "inner", at=y)
        moved, slots = step.rule.apply(y, point.state.get("slots", {}), g.inner or {})
        count = point.state.get("count", torch.zeros(())) + 1
        return {"y": moved, "slots": slots, "count": count}

    def terms(self, point: Point) -> Terms:
        f = point.gradients("outer", "outer")
        high = point.gradients("inner", "outer")
        low = point.gradients("inner", "outer", at=point.state.get("y"))
        indirect = tree.sub(high.outer or {}, low.outer or {})
        return Terms(f.outer or {}, indirect, dict(point.state))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, dtype=F64))
        self.first = nn.Linear(3, 4, dtype=F64)
        self.norm = nn.BatchNorm1d(4, dtype=F64)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4, 1, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)) * self.gain)
        return self.last(self.drop(hidden)).square().mean()


def batch(seed: int) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


def made(estimator: Any = None, inner: Any = None, **more: Any) -> BilevelOptimizer:
    torch.manual_seed(0)
    settings = {
        "outer_optimizer": partial(torch.optim.Adam, lr=0.1),
        "outer_every": 2,
        "outer_warmup": 0,
        "max_grad_norm": 0.7,
        **more,
    }
    return BilevelOptimizer(
        Net(),
        lambda m, x: m(x),
        outer="gain",
        estimator=estimator or Pulled(),
        inner_optimizer=inner or partial(torch.optim.AdamW, lr=0.05),
        **settings,
    )


@pytest.fixture(autouse=True)
def _registered() -> Any:
    register_estimator("pulled", Pulled)
    yield
    del registry._registry["pulled"]


# -- what they do -------------------------------------------------------------------------


def test_the_direction_and_the_sequence_by_hand() -> None:
    """g = (w - λ)²/2, f = w²/2, rate 1/2, pull 1/2: all numbers are quarters."""
    w = torch.tensor(4.0, dtype=F64, requires_grad=True)
    lam = torch.tensor(2.0, dtype=F64, requires_grad=True)
    opt = BilevelOptimizer(
        BilevelProblem(
            lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
            lambda i, o, b: i["w"] ** 2 / 2,
            {"w": w},
            {"lam": lam},
        ),
        estimator=Pulled(),
        inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        outer_every=2,
        outer_warmup=0,
    )
    # Along (4 - 2) + 4/2 = 4: w = 2. y starts at the old w = 4, and goes to 3.
    report = opt.step(None, None)
    assert w.item() == 2.0
    assert opt._run.estimator_state["y"]["w"].item() == 3.0
    assert report.own is not None
    assert (report.own.n_forward, report.own.n_backward) == (2, 2)
    # Along 0 + 2/2: w = 3/2; y = 5/2. Then λ's: (λ - w) - (λ - y) = 1/2 + 1/2.
    report = opt.step(None, None)
    assert w.item() == 1.5
    assert opt._run.estimator_state["y"]["w"].item() == 2.5
    assert report.outer_step
    assert lam.item() == 2.0 - 1.0
    assert opt._run.estimator_state["count"].item() == 2
    assert report.own is not None
    assert report.grad_norm == 0.0


def test_the_direction_is_what_is_clipped() -> None:
    """As above, the direction 4 clipped to 1: a step of half of that."""
    w = torch.tensor(4.0, dtype=F64, requires_grad=True)
    lam = torch.tensor(2.0, dtype=F64, requires_grad=True)
    opt = BilevelOptimizer(
        BilevelProblem(
            lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
            lambda i, o, b: i["w"] ** 2 / 2,
            {"w": w},
            {"lam": lam},
        ),
        estimator=Pulled(),
        inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        max_grad_norm=1.0,
    )
    report = opt.inner_step(None)
    assert abs(w.item() - 3.5) < 1e-6
    assert report.grad_norm == 2.0


def test_an_outer_batch_is_drawn_once_for_each_step() -> None:
    opt, drawn = made(), []

    def draw() -> Tensor:
        drawn.append(len(drawn))
        return batch(100 + len(drawn))

    for k in range(4):
        opt.step(batch(k), draw)
    assert drawn == [0, 1, 2, 3]
    assert opt.n_outer_steps == 2
    plain = made("cg")
    for k in range(4):
        plain.step(batch(k), draw)
    assert len(drawn) == 6


def test_they_end_with_the_search() -> None:
    opt = made()
    opt.step(batch(0), batch(1))
    opt.freeze_outer()
    assert opt._run.estimator_state == {}
    report = opt.step(batch(1))
    assert (report.own, opt._run.estimator_state) == (None, {})


def test_the_random_state_of_a_run_is_that_of_plain_training() -> None:
    """Hooks draw nothing of the run's own random numbers."""
    opt, plain = made(), made("cg")
    torch.manual_seed(3)
    opt.inner_step(batch(0), batch(1))
    mine = torch.get_rng_state()
    torch.manual_seed(3)
    plain.inner_step(batch(0))
    assert torch.equal(mine, torch.get_rng_state())
    norms = [dict(o.problem.module.named_buffers()) for o in (opt, plain)]  # pyright: ignore[reportOptionalMemberAccess]
    assert all(torch.equal(t, norms[1][n]) for n, t in norms[0].items())


# -- undone, saved ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(Pulled):
    """Fails in one place from some step on."""

    name = "fails"
    where: str = ""
    what: str = "raises"

    def _fail(self, where: str, point: Point, value: Any) -> Any:
        if where != self.where or not point.state.get("count", 0) > 1:
            return value
        if self.what == "raises":
            torch.rand(3)
            raise RuntimeError("on purpose")
        if self.what == "in place":
            point.state["y"]["first.weight"].mul_(2)
        if self.what == "nan":
            return tree.scale(value, float("nan"))
        return {} if self.what == "names" else value

    def inner_direction(self, point: Point, gradient: Params) -> Params:
        found = super().inner_direction(point, gradient)
        return self._fail("direction", point, found)

    def after_inner_step(self, point: Point, step: InnerStep) -> EstimatorState:
        found = super().after_inner_step(point, step)
        return self._fail("state", point, found)


def whole(opt: BilevelOptimizer) -> dict[str, Any]:
    state = opt.state_dict()
    return {"process": snapshot(opt.problem), "state": snapshot_of(state)}


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("where", ["direction", "state"])
def test_a_hook_that_raises_is_undone(where: str, accumulated: bool) -> None:
    opt = made(Fails(where=where))
    data = Accumulated([batch(0), batch(1)]) if accumulated else batch(0)
    for _ in range(2):
        opt.step(data, batch(2))
    before = whole(opt)
    with pytest.raises(RuntimeError, match="on purpose"):
        opt.step(data, batch(2))
    assert not differences(before["process"], whole(opt)["process"])
    assert before["state"] == whole(opt)["state"]
    with pytest.raises(RuntimeError, match="on purpose"):
        opt.inner_step(data, batch(2))
    assert before["state"] == whole(opt)["state"]


@pytest.mark.parametrize(
    ("where", "what", "kind", "text"),
    [
        ("direction", "nan", NonFiniteError, "returned a direction of norm nan"),
        ("direction", "names", ValueError, r"returned a direction for \[\]; the inner"),
        ("direction", "in place", HypergradError, "changed its state in place"),
        ("state", "in place", HypergradError, "changed its state in place"),
    ],
)
def test_what_a_hook_must_not_do(where: str, what: str, kind: Any, text: str) -> None:
    opt = made(Fails(where=where, what=what))
    for _ in range(2):
        opt.step(batch(0), batch(2))
    before = {n: t.detach().clone() for n, t in opt.problem.inner_params.items()}
    with pytest.raises(kind, match=text):
        opt.step(batch(0), batch(2))
    after = opt.problem.inner_params
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_a_state_that_is_no_tensors() -> None:
    class Counts(Pulled):
        def after_inner_step(self, point: Point, step: InnerStep) -> EstimatorState:
            return {"count": 3}

    opt = made(Counts())
    with pytest.raises(
        TypeError, match=r"after_inner_step returned 3 as state 'count'"
    ):
        opt.inner_step(batch(0), batch(1))


@pytest.mark.parametrize("what", ["record", "parameters"])
def test_a_state_that_is_the_steps_own_memory(what: str) -> None:
    """It keeps w of the first step, however many follow."""

    class First(Pulled):
        def after_inner_step(self, point: Point, step: InnerStep) -> EstimatorState:
            live = {n: t.detach() for n, t in point.problem.inner_params.items()}
            own = live if what == "parameters" else step.inner_params
            return dict(point.state) or {"nested": {"first": own}}

    opt = made(First(), partial(torch.optim.SGD, lr=0.1))
    first = None
    for k in range(4):
        if first is None and what == "record":
            first = tree.clone(opt.problem.inner_params)
        opt.inner_step(batch(k), batch(50))
        first = first or tree.clone(opt.problem.inner_params)
        held = opt._run.estimator_state["nested"]["first"]
        assert snapshot_of(held) == snapshot_of(first)


def test_state_resumes_bit_for_bit() -> None:
    def go_on(opt: BilevelOptimizer, first: int) -> None:
        torch.manual_seed(first)
        for k in range(first, first + 3):
            opt.step(batch(k), batch(50 + k))

    opt = made()
    go_on(opt, 0)
    file = io.BytesIO()
    held = {"opt": opt.state_dict(), "model": opt.problem.module.state_dict()}  # pyright: ignore[reportOptionalMemberAccess]
    torch.save(held, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = made()
    other.problem.module.load_state_dict(loaded["model"])  # pyright: ignore[reportOptionalMemberAccess]
    other.load_state_dict(loaded["opt"])
    for o in (opt, other):
        go_on(o, 3)
    assert snapshot_of(opt._run.estimator_state) == snapshot_of(
        other._run.estimator_state
    )
    mine, theirs = opt.problem.tensors, other.problem.tensors
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# -- with others --------------------------------------------------------------------------


def test_an_inner_optimizer_without_a_rule() -> None:
    with pytest.raises(TypeError, match="Rprop has no rule"):
        made(inner=partial(torch.optim.Rprop, lr=0.01))

    class Only(HypergradEstimator):
        def inner_direction(self, point: Point, gradient: Params) -> Params:
            return tree.scale(gradient, 2.0)

        def terms(self, point: Point) -> Terms:
            zeros = tree.zeros_like(point.problem.outer_params)
            return Terms(zeros, zeros)

    opt = made(Only(), partial(torch.optim.Rprop, lr=0.01))
    assert opt.inner_step(batch(0)).own is not None


def test_no_outer_batch_where_one_is_needed() -> None:
    opt = made()
    with pytest.raises(HypergradError, match=r"at each inner step.*Pass outer_batch"):
        opt.inner_step(batch(0))
    with pytest.raises(HypergradError, match=r"at each inner step.*Pass outer_batch"):
        opt.step(batch(0))


def test_steps_along_a_direction_cannot_be_looked_back_at() -> None:
    @dataclass(frozen=True)
    class Looks(Pulled):
        @property
        def needs(self) -> Needs:
            return Needs(lookback=1, order=1, v=False, outer_batch_each_step=True)

    opt = made(Looks(), audit_every=1, audit_reference="unrolled")
    opt.inner_step(batch(0), batch(1))
    (step,) = opt.recorded_steps
    assert step.directed
    assert step.grads
    with pytest.raises(
        HypergradError, match="went along a direction of an estimator's"
    ):
        make_estimator("unrolled", num_steps=1).estimate(
            opt.problem, inner_batch=batch(0), outer_batch=batch(1), steps=[step]
        )
    held = opt.state_dict()
    other = made(Looks())
    other.load_state_dict(held)
    assert other.recorded_steps[0].directed


def test_an_audit_solves_where_steps_went_along_a_direction() -> None:
    opt = made(audit_every=1)
    report = [opt.step(batch(0), batch(1)) for _ in range(2)][-1]
    assert report.audit is not None
    assert report.audit.reference == "implicit"
    assert report.audit.reason == "" or "amping" in report.audit.reason
