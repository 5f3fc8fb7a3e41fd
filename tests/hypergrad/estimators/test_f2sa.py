"""F²SA: its order on a closed form that is no quadratic, and its sequences by hand."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
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
from hypergrad.estimators._penalised import stencil
from hypergrad.rules import SGD
from hypergrad.testing import quadratic
from tests.hypergrad.estimators.curved import batch, inner_loss, outer_loss

F64 = torch.float64
LAM, SLOPE = 2.0, 0.8


def exponential() -> BilevelProblem:
    """Return g = e^w - λ w and f = a w, at the minimum of g, w = ln λ.

    That of g + νf is ln(λ - ν a), and ∂g/∂λ = -w: the truth is a / λ.
    """
    lam = torch.tensor(LAM, dtype=F64, requires_grad=True)
    return BilevelProblem(
        lambda i, o, b: i["w"].exp() - o["lam"] * i["w"],
        lambda i, o, b: SLOPE * i["w"],
        {"w": lam.detach().log().requires_grad_()},
        {"lam": lam},
    )


def closed_form(order: int, nu: float) -> float:
    ends = {j: math.log(LAM - j * nu * SLOPE) for j in stencil(order)}
    return -sum(c * ends[j] for j, c in stencil(order).items()) / nu


# -- the rate -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_error_is_of_order_p(order: int) -> None:
    errors = []
    for nu in (0.2, 0.1, 0.05):
        result = make_estimator(
            "f2sa",
            sigma=1 / nu,
            growth=0.0,
            num_points=order,
            num_steps=60,
            rule=SGD(0.4),
        ).estimate(exponential(), inner_batch=None, outer_batch=None)
        found = result.indirect["lam"].item()
        assert abs(found - closed_form(order, nu)) < 1e-13 / nu
        errors.append(abs(found - SLOPE / LAM))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    # The next power of ν is some ten per cent of the error.
    assert all(abs(slope - order) < 0.25 for slope in slopes), slopes
    assert abs(slopes[1] - order) < abs(slopes[0] - order)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_run_settles_at_the_closed_form(order: int) -> None:
    nu, opts = 0.1, []
    for name in ("f2sa", "cg"):
        more = {"sigma": 1 / nu, "growth": 0.0, "num_points": order}
        opts.append(
            BilevelOptimizer(
                exponential(),
                estimator=make_estimator(name, **(more if name == "f2sa" else {})),
                inner_optimizer=partial(torch.optim.SGD, lr=0.4),
                outer_optimizer=partial(torch.optim.SGD, lr=0.0),
            )
        )
        with torch.no_grad():
            opts[-1].problem.inner_params["w"].add_(0.3)
    report = [[opt.step(None, None) for opt in opts] for _ in range(80)][-1][0]
    assert report.hypergrad_norm is not None
    assert abs(report.hypergrad_norm - closed_form(order, nu)) < 1e-12
    assert report.own is not None
    assert report.own.n_backward == 2 * order
    assert report.info is not None
    assert report.info.n_backward == 2 * order + (1 if order % 2 == 0 else 2)
    # f has no part in w.
    mine, plain = (opt.problem.inner_params["w"] for opt in opts)
    assert torch.equal(mine, plain)


def test_without_sequences_it_is_the_penalty() -> None:
    """With p = 1 and as many virtual steps."""
    known, rule = quadratic(), SGD(0.1)
    first = make_estimator("f2sa", sigma=4.0, growth=0.0, num_steps=3, rule=rule)
    second = make_estimator("penalty", gamma=0.25, num_steps=3, rule=rule)
    found = [
        e.estimate(known.problem, inner_batch=None, outer_batch=None).outer_grads
        for e in (first, second)
    ]
    assert torch.allclose(found[0]["shift"], found[1]["shift"], rtol=1e-12)


# -- the sequences ------------------------------------------------------------------------


def made(inner: Any, **settings: Any) -> BilevelOptimizer:
    w = torch.tensor([0.5, -0.4, 0.8], dtype=F64, requires_grad=True)
    lam = torch.tensor([-1.0, -2.0, -1.5], dtype=F64, requires_grad=True)
    return BilevelOptimizer(
        BilevelProblem(inner_loss, outer_loss, {"w": w}, {"lam": lam}),
        estimator=make_estimator("f2sa", **settings),
        inner_optimizer=inner,
        outer_optimizer=partial(torch.optim.SGD, lr=0.5),
        outer_warmup=0,
        outer_every=3,
    )


def test_sequences_take_the_optimizers_steps_under_a_growing_multiplier() -> None:
    """Three torch optimizers by hand, on g, g + ν f and g - ν f; λ moves at the end."""
    adam = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    sigma, growth = 5.0, 0.5
    opt = made(adam, sigma=sigma, growth=growth, num_points=2)
    lam = opt.problem.outer_params["lam"].detach().clone().requires_grad_()
    copies = {
        j: opt.problem.inner_params["w"].detach().clone().requires_grad_()
        for j in (0, 1, -1)
    }
    by_hand = {j: adam([copy]) for j, copy in copies.items()}
    nu, reports = 0.0, []
    for k in range(3):
        reports.append(opt.step(batch(k), batch(10 + k)))
        nu = 1 / (sigma * (1 + k) ** growth)
        for j, copy in copies.items():
            loss = inner_loss({"w": copy}, {"lam": lam}, batch(k))
            loss = loss + j * nu * outer_loss({"w": copy}, {"lam": lam}, batch(10 + k))
            (copy.grad,) = torch.autograd.grad(loss, [copy])
            by_hand[j].step()
        points = opt._run.estimator_state["points"]
        for j in (1, -1):
            assert torch.allclose(points[str(j)]["w"], copies[j], rtol=1e-13)
    ends = [
        torch.autograd.grad(inner_loss({"w": copies[j]}, {"lam": lam}, batch(2)), lam)[
            0
        ]
        for j in (1, -1)
    ]
    truth = (ends[0] - ends[1]) / (2 * nu)
    assert [report.outer_step for report in reports] == [False, False, True]
    assert reports[-1].hypergrad_norm is not None
    assert abs(reports[-1].hypergrad_norm - truth.norm().item()) < 1e-11
    moved = opt.problem.outer_params["lam"] - lam
    assert torch.allclose(moved, -0.5 * truth, rtol=1e-10)


def test_a_new_run_begins_anew() -> None:
    opt = made(partial(torch.optim.SGD, lr=0.1))
    for k in range(2):
        opt.step(batch(k), batch(k))
    opt.begin_run()
    assert opt._run.estimator_state == {}
    opt.step(batch(0), batch(0))
    assert opt.recorded_steps[-1].number == 0  # σ is that of the first step again
    assert list(opt._run.estimator_state["points"]) == ["1"]


def test_audits_and_comparisons() -> None:
    opt = made(partial(torch.optim.SGD, lr=0.1), sigma=50.0)
    for _ in range(200):
        opt.inner_step(batch(0), batch(1))
    found = compare_estimators(
        opt.problem,
        {"own": opt.estimator, "four": make_estimator("f2sa", num_points=4)},
        batch(0),
        batch(1),
        steps=opt.recorded_steps,
        reference="dense",
        repeats=1,
    )
    assert all(not row.failure for row in found.rows)
    assert all((row.indirect_cosine or 0) > 0.5 for row in found.rows)
    audited = BilevelOptimizer(
        opt.problem,
        estimator="f2sa",
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
        ({"sigma": 0.0}, r"sigma=0\.0 must be positive and finite: .* Pass e\.g"),
        ({"sigma": -1}, "sigma=-1 must be positive"),
        ({"sigma": math.nan}, "sigma=nan must be positive"),
        ({"sigma": math.inf}, "sigma=inf must be positive"),
        ({"growth": -0.1}, r"growth=-0\.1 must be in \[0, 1\]: .* Pass 0"),
        ({"growth": math.nan}, "growth=nan must be in"),
        ({"num_points": 0}, "num_points=0 must be at least 1"),
        ({"num_points": 9}, "num_points=9 must be at most 8: .* Pass 1 or 2"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
    ],
)
def test_a_setting_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_estimator("f2sa", **settings)


def test_no_steps_and_no_rule() -> None:
    with pytest.raises(ValueError, match=r"F2SA looks back .* or set rule="):
        make_estimator("f2sa").estimate(
            quadratic().problem, inner_batch=None, outer_batch=None
        )


def test_an_inner_step_without_an_outer_batch() -> None:
    model = torch.nn.Linear(3, 1)
    opt = BilevelOptimizer(
        model,
        lambda m, x: m(x).square().mean(),
        outer="bias",
        estimator="f2sa",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    with pytest.raises(HypergradError, match="at each inner step"):
        opt.inner_step(torch.ones(2, 3))
