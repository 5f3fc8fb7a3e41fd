"""The value-function method: closed forms, its rate in γ, and its steps."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    compare_estimators,
    make_estimator,
)
from hypergrad.estimators._penalised import stencil
from hypergrad.rules import SGD
from hypergrad.testing import KnownProblem, quadratic, relative_error
from hypergrad.tree import Params
from tests.hypergrad.estimators.curved import batch, inner_loss, outer_loss

F64 = torch.float64


def estimate(known: KnownProblem, **settings: Any) -> Params:
    estimator = make_estimator("penalty", **settings)
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    assert torch.equal(result.direct["shift"], known.direct["shift"])
    return result.indirect


# -- closed forms -------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "steps"), [(0.5, 1), (0.5, 3), (1e-3, 12)])
def test_a_quadratic_by_its_closed_form(gamma: float, steps: int) -> None:
    """f has the Hessian I there: α Σ_{j<K} (I - α (H + γ I))^j stands for H⁻¹."""
    known, rate = quadratic(), 0.15
    one = torch.eye(3, dtype=F64)
    shrunk = one - rate * (known.hessian + gamma * one)
    terms = [torch.linalg.matrix_power(shrunk, j) for j in range(steps)]
    truth = known.indirect_by(rate * torch.stack(terms).sum(0))
    found = estimate(known, gamma=gamma, num_steps=steps, rule=SGD(rate))
    # ∂g/∂λ is rounded, and that is divided by γ.
    assert relative_error(found, truth) < 100 * torch.finfo(F64).eps / gamma


def test_the_error_is_of_first_order_in_gamma() -> None:
    """At the minima (H + γ I)⁻¹ stands for H⁻¹, so the error halves with γ."""
    known = quadratic()
    errors = [
        relative_error(
            estimate(known, gamma=gamma, num_steps=200, rule=SGD(0.3)), known.indirect
        )
        for gamma in (0.02, 0.01, 0.005)
    ]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(slope - 1) < 0.02 for slope in slopes), slopes


def test_it_is_the_derivative_of_the_penalty_where_f_has_lambda_too() -> None:
    """g = e^w - λ w and f = λ w: min (e^w - c w) = c - c ln c, at w = ln c.

    So the penalty is ((1-γ) λ (1 - ln((1-γ) λ)) - λ (1 - ln λ)) / γ.
    """
    lam, gamma = torch.tensor(2.0, dtype=F64, requires_grad=True), 0.25
    w = lam.detach().log().requires_grad_()
    problem = BilevelProblem(
        lambda i, o, b: i["w"].exp() - o["lam"] * i["w"],
        lambda i, o, b: i["w"] * o["lam"],
        {"w": w},
        {"lam": lam},
    )
    result = make_estimator(
        "penalty", gamma=gamma, num_steps=80, rule=SGD(0.4)
    ).estimate(problem, inner_batch=None, outer_batch=None)
    c = (1 - gamma) * 2.0
    truth = (-(1 - gamma) * math.log(c) + math.log(2.0)) / gamma
    assert abs(result.outer_grads["lam"].item() - truth) < 1e-13
    assert abs(result.direct["lam"].item() - math.log(2.0)) < 1e-15


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_a_stencil_is_exact_on_polynomials(order: int) -> None:
    found = stencil(order)
    for power in range(order + 1):
        value = sum(c * float(j) ** power for j, c in found.items())
        assert abs(value - (power == 1)) < 1e-14
    assert len(set(found) - {0}) == order


# -- its steps ----------------------------------------------------------------------------


def made(inner: Any, **settings: Any) -> BilevelOptimizer:
    w = torch.tensor([0.5, -0.4, 0.8], dtype=F64, requires_grad=True)
    lam = torch.tensor([-1.0, -2.0, -1.5], dtype=F64, requires_grad=True)
    return BilevelOptimizer(
        BilevelProblem(inner_loss, outer_loss, {"w": w}, {"lam": lam}),
        estimator=make_estimator("penalty", **settings),
        inner_optimizer=inner,
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
        outer_warmup=0,
    )


def test_it_goes_on_as_the_inner_optimizer() -> None:
    """Two torch optimizers, with the state after the last step, take its steps by hand."""
    adam, gamma, steps = partial(torch.optim.AdamW, lr=0.05), 0.2, 4
    opt = made(adam, gamma=gamma, num_steps=steps)
    for k in range(3):
        opt.inner_step(batch(k))
    result = opt.estimator.estimate(
        opt.problem,
        inner_batch=batch(2),
        outer_batch=batch(9),
        steps=opt.recorded_steps,
    )
    lam = opt.problem.outer_params["lam"]
    w = opt.problem.inner_params["w"]
    slopes: list[Tensor] = []
    for weight in (0.0, gamma):
        copy = w.detach().clone().requires_grad_()
        by_hand = adam([copy])
        held = {n: t.clone() for n, t in opt.inner.state[w].items()}
        by_hand.state[copy] = held
        for _ in range(steps):
            loss = inner_loss({"w": copy}, {"lam": lam}, batch(2))
            loss = loss + weight * outer_loss({"w": copy}, {"lam": lam}, batch(9))
            (copy.grad,) = torch.autograd.grad(loss, [copy])
            by_hand.step()
        loss = inner_loss({"w": copy}, {"lam": lam}, batch(2))
        slopes += torch.autograd.grad(loss, [lam])
    truth = (slopes[1] - slopes[0]) / gamma
    assert (result.indirect["lam"] - truth).norm() < 1e-12 * truth.norm()
    counts = result.info.n_forward, result.info.n_backward, result.info.n_hvp
    assert counts == (3 * steps + 2, 3 * steps + 2, 0)


def test_a_rule_of_its_own_asks_nothing_of_the_inner_optimizer() -> None:
    opt = made(partial(torch.optim.Rprop, lr=0.01), rule=SGD(0.1))
    report = opt.step(batch(0), batch(1))
    assert report.outer_step
    assert opt.recorded_steps == ()


def test_audits_and_comparisons() -> None:
    opt = made(partial(torch.optim.SGD, lr=0.1), num_steps=30)
    for _ in range(200):
        opt.inner_step(batch(0))
    rows = compare_estimators(
        opt.problem,
        {"far": opt.estimator, "near": make_estimator("penalty", gamma=1e-3)},
        batch(0),
        batch(1),
        steps=opt.recorded_steps,
        reference="dense",
        repeats=1,
    )
    errors = {row.label: row.indirect_error for row in rows.rows}
    assert all(not row.failure for row in rows.rows)
    assert errors["far"] is not None
    assert errors["far"] < 0.5
    audited = made(partial(torch.optim.SGD, lr=0.1))
    audited = BilevelOptimizer(
        audited.problem,
        estimator="penalty",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
        audit_every=1,
    )
    audit = audited.step(batch(0), batch(1)).audit
    assert audit is not None
    assert audit.reference == "unrolled"  # its inner steps are plain ones
    assert audit.indirect_cosine is not None


# -- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gamma": 0.0}, r"gamma=0\.0 must be positive and finite: .* Pass e\.g"),
        ({"gamma": -1}, "gamma=-1 must be positive"),
        ({"gamma": math.nan}, "gamma=nan must be positive"),
        ({"gamma": math.inf}, "gamma=inf must be positive"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ],
)
def test_a_setting_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_estimator("penalty", **settings)


def test_no_steps_and_no_rule() -> None:
    with pytest.raises(ValueError, match=r"Penalty looks back .* or set rule="):
        make_estimator("penalty").estimate(
            quadratic().problem, inner_batch=None, outer_batch=None
        )
