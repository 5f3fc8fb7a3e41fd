"""Audits: what they compare, and that they leave the run alone, bit for bit."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelProblem,
    HypergradError,
    HypergradEstimator,
    NumericalWarning,
    estimator_names,
    make_estimator,
)
from hypergrad.estimators import ConjugateGradient, Implicit, Unrolled
from hypergrad.optimizer import Audit, BilevelOptimizer, StepReport
from hypergrad.reference import choose_reference
from hypergrad.solvers import DenseSolver
from tests.faults import content, differences
from tests.tolerances import tol

F64 = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
AdamW = partial(torch.optim.AdamW, lr=1e-2)


class Net(nn.Module):
    """Dropout and batch norm beside a gate (outer)."""

    def __init__(self) -> None:
        super().__init__()
        make_random = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(6, 2)
        self.gate = nn.Parameter(torch.ones(6))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=make_random) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.norm(self.first(x)))) * self.gate)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    noise = random.random() + float(np.random.rand())
    return (model(x) - noise).square().mean()


def batch(seed: int) -> Tensor:
    make_random = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=make_random, dtype=F64)


def make(estimator: Any = "neumann", **settings: Any) -> BilevelOptimizer:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    given: dict[str, Any] = {
        "inner_optimizer": AdamW,
        "outer_optimizer": AdamW,
        "outer_warmup": 2,
        "outer_every": 2,
        "max_grad_norm": 1.0,
        **settings,
    }
    return BilevelOptimizer(Net(), loss_fn, outer="gate", estimator=estimator, **given)


def train(opt: BilevelOptimizer, steps: int = 8) -> list[StepReport]:
    return [opt.step(batch(i), lambda i=i: batch(100 + i)) for i in range(steps)]


def audits(reports: list[StepReport]) -> list[Audit]:
    return [r.audit for r in reports if r.audit is not None]


# -- the run is left alone --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
@pytest.mark.parametrize("reference", ["auto", "dense"])
@pytest.mark.parametrize("name", estimator_names())
def test_a_run_with_audits_is_the_run_without(name: str, reference: str) -> None:
    plain, audited = make(name), make(name, audit_every=2, audit_reference=reference)
    looks, reports = [], []
    for opt in (plain, audited):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        reports.append(train(opt))
        looks.append(content(opt.problem, opt))
    windows = [look.pop("window") for look in looks]
    assert not differences(*looks)  # random states and moments included
    assert [len(audits(r)) for r in reports] == [0, opt.n_outer_steps // 2]
    assert reports[0] == [replace(r, audit=None) for r in reports[1]]
    lookback = plain.estimator.needs.lookback
    seen = [len(opt.recorded_steps) for opt in (plain, audited)]
    assert seen == [lookback, lookback]
    if lookback:
        assert not differences(*(window[-lookback:] for window in windows))


def test_outer_steps_are_audited_by_their_number() -> None:
    reports = train(make("first-order", audit_every=3), 14)
    numbers = [i for i, r in enumerate(r for r in reports if r.outer_step) if r.audit]
    assert numbers == [2, 5]


def test_a_resumed_run_has_the_same_audits() -> None:
    whole = make("sama", audit_every=1, outer_every=3)
    expected = audits(train(whole, 9))
    first = make("sama", audit_every=1, outer_every=3)
    reports = train(first, 4)  # in the middle of a window
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    second = make("sama", audit_every=1, outer_every=3)
    assert isinstance(first.problem.module, nn.Module)
    assert isinstance(second.problem.module, nn.Module)
    second.problem.module.load_state_dict(first.problem.module.state_dict())
    second.load_state_dict(first.state_dict())
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    reports += [second.step(batch(i), lambda i=i: batch(100 + i)) for i in range(4, 9)]
    assert audits(reports) == expected


def test_a_longer_window_is_trimmed_where_nothing_needs_it() -> None:
    audited = make("unrolled", audit_every=1, audit_window=7, outer_every=5)
    train(audited, 8)
    assert len(audited.state_dict()["bilevel"]["window"]) == 7
    plain = make("unrolled", outer_every=5)
    plain.load_state_dict(audited.state_dict())
    assert len(plain.state_dict()["bilevel"]["window"]) == 5
    implicit = make("neumann", audit_every=1, audit_reference="cg")
    train(implicit, 4)
    assert implicit.state_dict()["bilevel"]["window"] == []


# -- what is compared -------------------------------------------------------------------


def quadratic(estimator: Any, **settings: Any) -> BilevelOptimizer:
    """g = 2 (w - λ)², f = w²/2, SGD of rate 0.1: a step keeps 0.6 of w - λ."""

    def inner_loss(i: Any, o: Any, b: Any) -> Tensor:
        return 2 * (i["w"] - o["lam"]) ** 2

    problem = BilevelProblem(
        inner_loss,
        lambda i, o, b: i["w"] ** 2 / 2 + 3 * o["lam"],
        {"w": torch.tensor(5.0, dtype=F64, requires_grad=True)},
        {"lam": torch.tensor(1.0, dtype=F64, requires_grad=True)},
    )
    given: dict[str, Any] = {
        "inner_optimizer": SGD,
        "outer_optimizer": SGD,
        "outer_warmup": 0,
        "outer_every": 3,
        "audit_every": 1,
        **settings,
    }
    return BilevelOptimizer(problem, estimator=estimator, **given)


def last_audit(opt: BilevelOptimizer, steps: int = 3) -> Audit:
    reports = [opt.step(None, None) for _ in range(steps)]
    audit = reports[-1].audit
    assert audit is not None
    return audit


# v = w = 1 + 4·0.6³ after three steps; direct term 3; through k steps dw/dλ = 1 - 0.6ᵏ.
V = 1 + 4 * 0.6**3


@pytest.mark.parametrize(
    ("settings", "factor", "reference", "why"),
    [
        ({}, 1 - 0.6**3, "unrolled", "the last 3 inner steps"),
        ({"audit_window": 2}, 1 - 0.6**2, "unrolled", "the last 2 inner steps"),
        ({"audit_reference": "unrolled"}, 1 - 0.6**3, "unrolled", "3 inner steps"),
        ({"audit_reference": Unrolled(1)}, 0.4, "unrolled", "that was asked for"),
        ({"audit_reference": "dense"}, 1.0, "implicit", "as a matrix, of 1 parameters"),
        ({"audit_reference": "cg"}, 1.0, "cg", "conjugate gradients"),
    ],
)
def test_numbers_of_an_audit(
    settings: Any, factor: float, reference: str, why: str
) -> None:
    audit = last_audit(quadratic(make_estimator("darts", product="exact"), **settings))
    assert audit.reference == reference
    assert why in audit.why
    assert audit.reason == ""
    bound = tol(F64, 10)
    # DARTS sees 0.4 of v, the reference `factor` of it; both add the direct term.
    indirect = abs(0.4 / factor - 1)
    total = abs(0.4 - factor) * V / (3 + factor * V)
    assert audit.indirect_error == pytest.approx(indirect, rel=bound, abs=bound)
    assert audit.error == pytest.approx(total, rel=bound, abs=bound)
    assert audit.cosine == pytest.approx(1.0, rel=bound)
    assert audit.indirect_cosine == pytest.approx(1.0, rel=bound)


def test_the_cost_is_that_of_the_reference() -> None:
    audit = last_audit(quadratic("first-order"))
    assert audit.info is not None
    # The outer gradient, and a graph and a product for each of three steps.
    assert (audit.info.n_forward, audit.info.n_backward, audit.info.n_hvp) == (4, 7, 3)


def test_an_indirect_term_of_zeros_is_all_wrong_and_points_nowhere() -> None:
    audit = last_audit(quadratic("first-order"))
    assert audit.indirect_error == 1.0
    assert audit.indirect_cosine is None
    assert audit.cosine == pytest.approx(1.0)


def test_an_estimator_that_points_the_other_way() -> None:
    class Reversed(Unrolled):
        def indirect(self, point: Any) -> Any:
            found = super().indirect(point)
            return replace(found, grads={n: -t for n, t in found.grads.items()})

    audit = last_audit(quadratic(Reversed(3)))
    assert audit.indirect_error == pytest.approx(2.0, rel=tol(F64, 10))
    assert audit.indirect_cosine == pytest.approx(-1.0, rel=tol(F64, 10))


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_sizes_whose_squares_no_float32_holds(size: float) -> None:
    """An unrolled estimate of one step of two: 0.4 against 0.64 of v, at any scale."""
    w = torch.tensor(5.0, requires_grad=True)
    lam = torch.tensor(1.0, requires_grad=True)
    opt = BilevelOptimizer(
        BilevelProblem(
            lambda i, o, b: 2 * (i["w"] - o["lam"]) ** 2,
            lambda i, o, b: size * i["w"] ** 2 / 2,
            {"w": w},
            {"lam": lam},
        ),
        estimator=Unrolled(1),
        inner_optimizer=SGD,
        outer_optimizer=SGD,
        outer_warmup=0,
        outer_every=2,
        audit_every=1,
    )
    audit = last_audit(opt, 2)
    assert audit.error == pytest.approx(1 - 0.4 / 0.64, rel=tol(torch.float32))
    assert audit.cosine == pytest.approx(1.0)


def test_an_exact_estimate_agrees() -> None:
    found = audits(train(make(Unrolled(2), audit_every=1)))
    assert found
    for audit in found:
        assert audit.error == 0.0  # the same computation, graphs apart
        assert audit.cosine == pytest.approx(1.0, abs=tol(F64))


def test_a_kept_graph_is_the_estimators() -> None:
    """It is used up by the estimate; the reference builds its own, to the same bits."""
    found = audits(train(make(Unrolled(1), audit_every=1, outer_every=1)))
    assert [audit.error for audit in found] == [0.0] * len(found)


# -- which reference --------------------------------------------------------------------


def test_an_inner_optimizer_without_a_rule() -> None:
    """Nothing is recorded, so that the inner Hessian is what remains."""
    rmsprop = partial(torch.optim.RMSprop, lr=1e-2)
    opt = make("neumann", inner_optimizer=rmsprop, audit_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        found = audits(train(opt, 4))
    assert found
    assert {audit.reference for audit in found} == {"implicit"}
    with pytest.raises(TypeError, match="RMSprop has no rule"):
        make("cg", inner_optimizer=rmsprop, audit_every=1, audit_reference="unrolled")
    with pytest.raises(TypeError, match="RMSprop has no rule"):
        make("cg", inner_optimizer=rmsprop, audit_every=1, audit_reference=Unrolled(2))


def test_choices_by_name_and_by_size() -> None:
    opt = quadratic("darts")
    opt.inner_step(None)
    problem, steps = opt.problem, opt.recorded_steps
    assert choose_reference(problem, steps * 4)[0] == Unrolled(4)
    assert choose_reference(problem)[0] == Implicit(DenseSolver(3000))
    assert choose_reference(problem, steps, "cg")[0] == ConjugateGradient(
        200, rtol=1e-10
    )
    assert choose_reference(problem, (), Unrolled(7))[0] == Unrolled(7)
    w = torch.zeros(3001, requires_grad=True)
    big = BilevelProblem(
        lambda i, o, b: (i["w"] - o["l"]).square().sum(),
        lambda i, o, b: i["w"].square().sum(),
        {"w": w},
        {"l": torch.zeros(1, requires_grad=True)},
    )
    assert isinstance(choose_reference(big)[0], ConjugateGradient)
    with pytest.raises(ValueError, match=r"3001 x 3001 Hessian.*'cg' or 'auto'"):
        choose_reference(big, None, "dense")
    with pytest.raises(ValueError, match="no inner steps to look back at"):
        choose_reference(big, None, "unrolled")


# -- references that fail ---------------------------------------------------------------


class Broken(HypergradEstimator):
    name = "broken"

    def indirect(self, point: Any) -> Any:
        raise HypergradError("no answer today")


def test_a_reference_that_fails_is_told_and_training_goes_on() -> None:
    opt = quadratic("darts", audit_reference=Broken())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = [opt.step(None, None) for _ in range(9)]
    found = audits(reports)
    assert len(found) == opt.n_outer_steps == 3
    for audit in found:
        assert audit.reason == "the reference failed: no answer today"
        assert (audit.error, audit.cosine, audit.info) == (None, None, None)
    told = [w for w in caught if w.category is NumericalWarning]
    assert [str(w.message) for w in told] == [
        "the audit of outer step 1 says: the reference failed: no answer today"
    ]


def test_an_error_of_another_kind_undoes_the_step() -> None:
    class Bug(Broken):
        def indirect(self, point: Any) -> Any:
            raise ZeroDivisionError

    opt = quadratic("darts", audit_reference=Bug())
    opt.step(None, None)
    opt.step(None, None)
    before = content(opt.problem, opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(None, None)
    assert not differences(before, content(opt.problem, opt))


def test_a_reference_that_looks_back_further_than_there_is() -> None:
    opt = quadratic("darts", audit_reference=Unrolled(5))
    with pytest.warns(
        NumericalWarning, match="looks back at 5 .* only 3 are on record"
    ):
        early = last_audit(opt, 3)
    assert early.error is None
    assert last_audit(opt, 3).indirect_error is not None


def test_no_step_to_unroll_through() -> None:
    opt = quadratic("first-order", audit_reference="unrolled")
    with pytest.warns(NumericalWarning, match="no inner steps to look back at"):
        report = opt.outer_step(None, 0)
    assert report.outer_step
    assert report.audit is not None
    assert report.audit.reference == "unrolled"


def test_what_a_reference_says_of_itself() -> None:
    opt = quadratic("darts", audit_reference=ConjugateGradient(1, damping=100.0))
    opt.problem.inner_params["w"].data.fill_(2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit = last_audit(opt)
    assert audit.info is not None
    assert audit.reason == audit.info.reason


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"audit_every": 0}, ValueError, "audit_every=0 must be at least 1"),
        ({"audit_every": 1.5}, TypeError, "audit_every=1.5 must be a whole number"),
        ({"audit_every": True}, TypeError, "audit_every=True"),
        ({"audit_window": -1}, ValueError, "audit_window=-1 must be at least 1"),
        ({"audit_reference": "newton"}, ValueError, "'newton' is unknown; choose one"),
        ({"audit_reference": 3}, TypeError, "reference=3 must be a name or"),
    ],
)
def test_settings_out_of_range(settings: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        quadratic("darts", **{"audit_every": 2, **settings})
