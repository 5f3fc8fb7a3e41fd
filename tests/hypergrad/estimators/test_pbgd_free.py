"""PBGD-Free: where its steps settle, and what it leaves out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    compare_estimators,
    make_estimator,
)
from hypergrad.testing import quadratic

F64 = torch.float64
LAM = 3.0


def flat(delta: float) -> BilevelProblem:
    """Return g = (w - λ)²/2 and f = λ²/2 + δ λ w, whose slope in w is δ λ.

    At w* = λ the truth is λ + 2 δ λ.
    """
    lam = torch.tensor(LAM, dtype=F64, requires_grad=True)
    return BilevelProblem(
        lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        lambda i, o, b: o["lam"] ** 2 / 2 + delta * o["lam"] * i["w"],
        {"w": torch.tensor(1.0, dtype=F64, requires_grad=True)},
        {"lam": lam},
    )


def settled(delta: float, sigma: float, **more: Any) -> tuple[float, float]:
    """Return w and the hypergradient after a run in which λ stays."""
    problem = flat(delta)
    opt = BilevelOptimizer(
        problem,
        estimator=make_estimator("pbgd-free", sigma=sigma),
        inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
        **more,
    )
    report = [opt.step(None, None) for _ in range(70)][-1]
    assert report.hypergrad_norm is not None
    assert report.indirect_norm == 0.0
    assert report.own is not None
    assert (report.own.n_forward, report.own.n_backward) == (1, 1)
    return problem.inner_params["w"].item(), report.hypergrad_norm


@pytest.mark.parametrize("sigma", [2.0, 100.0])
def test_what_it_leaves_out_completes_the_derivative_of_the_penalty(
    sigma: float,
) -> None:
    """min_w f + σ g = λ²/2 + δ λ² - δ² λ² / 2σ, at w = λ (1 - δ/σ)."""
    delta = 0.5
    w, found = settled(delta, sigma)
    assert abs(w - LAM * (1 - delta / sigma)) < 1e-14
    left_out = sigma * ((LAM - w) - 0.0)  # ∂g/∂λ at w, and at the minimum of g
    truth = LAM + 2 * delta * LAM - delta**2 * LAM / sigma
    assert abs(found + left_out - truth) < 1e-12


def test_the_error_is_the_slope_of_f_whatever_sigma_is() -> None:
    """|λ + δ w - (λ + 2 δ λ)| = δ λ (1 + δ/σ): flatness makes it small, σ does not."""
    for sigma in (10.0, 1e4):
        for delta in (0.2, 0.02):
            _, found = settled(delta, sigma)
            error = abs(found - (LAM + 2 * delta * LAM))
            assert abs(error - delta * LAM * (1 + delta / sigma)) < 1e-12


def test_lambda_that_acts_through_w_alone_has_no_derivative() -> None:
    """At the minimum that a truth tells of: what `first-order` gives, and no more."""
    known = quadratic()
    found = compare_estimators(
        known.problem, ["pbgd-free", "first-order"], None, None, repeats=1
    )
    assert [row.failure for row in found.rows] == ["", ""]
    assert found.rows[0].error == found.rows[1].error
    assert {row.answers for row in found.rows} == {"neither"}


def test_audits_solve() -> None:
    opt = BilevelOptimizer(
        flat(0.5),
        estimator="pbgd-free",
        inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
        audit_every=1,
    )
    audit = opt.step(None, None).audit
    assert audit is not None
    assert audit.reference == "implicit"


@pytest.mark.parametrize("sigma", [0.0, -1, math.nan, math.inf])
def test_a_sigma_out_of_range(sigma: float) -> None:
    with pytest.raises(
        ValueError, match=rf"sigma={sigma} must be positive .* Pass e\.g"
    ):
        make_estimator("pbgd-free", sigma=sigma)


def test_an_inner_step_without_an_outer_batch() -> None:
    opt = BilevelOptimizer(
        torch.nn.Linear(3, 1),
        lambda m, x: m(x).square().mean(),
        outer="bias",
        estimator="pbgd-free",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(HypergradError, match="at each inner step"):
        opt.inner_step(torch.ones(2, 3))
