"""DARTS and SAMA against plain autograd, unrolling, and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import BilevelProblem, make_estimator, tree
from hypergrad.rules import SGD, AdamW
from hypergrad.testing import relative_error
from tests.hypergrad.estimators.truths import (
    HANDS,
    conditioning,
    estimate,
    indirect_truth,
    network_case,
    real_run,
    softmax_case,
)

EXACT = 1e-13  # algebra on a case of condition 10 or so, in float64


@pytest.mark.parametrize("hand", HANDS)
@pytest.mark.parametrize("n_steps", [1, 3, 30])
def test_exact_sama_equals_one_step_unrolling(hand: str, n_steps: int) -> None:
    case = network_case()
    results = []
    for name, settings in (
        ("sama", {"product": "exact"}),
        ("unrolled", {"num_steps": 1}),
    ):
        opt = real_run(case, HANDS[hand], make_estimator(name, **settings), n_steps)
        results.append(estimate(opt, case).indirect)
    assert relative_error(results[0], results[1]) < 1e-15
    truth = indirect_truth(case, HANDS[hand], n_steps, 1)
    assert relative_error(results[0], truth) < conditioning(hand, n_steps)


@pytest.mark.parametrize("product", ["exact", "forward-over-reverse"])
def test_exact_darts_equals_unrolling_through_sgd(product: str) -> None:
    case = network_case()
    estimator = make_estimator("darts", product=product)
    result = estimate(real_run(case, HANDS["sgd"], estimator, 10), case)
    assert relative_error(
        result.indirect, indirect_truth(case, HANDS["sgd"], 10, 1)
    ) < (EXACT)


def test_darts_is_not_the_step_of_adamw() -> None:
    case = network_case()
    opt = real_run(case, HANDS["adamw"], make_estimator("darts", product="exact"), 30)
    error = relative_error(
        estimate(opt, case).indirect, indirect_truth(case, HANDS["adamw"], 30, 1)
    )
    assert error > 0.1  # the documented difference: take 'sama' or 'unrolled' there


# Relative error of the mixed product along v = ∂f/∂w; see docs/decisions.md.
BARS = {
    ("central", torch.float64): 4e-10,
    ("forward", torch.float64): 1e-7,
    ("richardson", torch.float64): 1e-11,
    ("central", torch.float32): 2e-4,
    ("forward", torch.float32): 5e-3,
    ("richardson", torch.float32): 2e-4,
}


@pytest.mark.parametrize(("scheme", "dtype"), BARS)
@pytest.mark.parametrize("name", ["darts", "sama"])
def test_finite_differences_reach_their_bars(
    name: str, scheme: str, dtype: torch.dtype
) -> None:
    # SGD for both: the bar is the product's, not that of Adam's conditioning.
    case = network_case().to(dtype)
    opt = real_run(case, HANDS["sgd"], make_estimator(name, scheme=scheme), 10)
    truth = indirect_truth(network_case(), HANDS["sgd"], 10, 1)
    assert relative_error(estimate(opt, case).indirect, truth) < BARS[scheme, dtype]


@pytest.mark.parametrize("name", ["darts", "sama"])
def test_real_data(name: str) -> None:
    case = softmax_case()
    opt = real_run(case, HANDS["sgd"], make_estimator(name), 20)
    truth = indirect_truth(case, HANDS["sgd"], 20, 1)
    assert relative_error(estimate(opt, case).indirect, truth) < 4e-10


@pytest.mark.parametrize("hand", ["adamw", "adamw-clip"])
def test_sama_by_differences_through_adamw(hand: str) -> None:
    case = network_case()
    opt = real_run(case, HANDS[hand], make_estimator("sama"), 30)
    truth = indirect_truth(case, HANDS[hand], 30, 1)
    assert relative_error(estimate(opt, case).indirect, truth) < 1e-8


def dead_case() -> tuple[BilevelProblem, list[torch.Tensor]]:
    """A low-rank product with B = 0: A's gradient is exactly 0 at the first step."""
    make = torch.Generator().manual_seed(0)
    a = torch.randn(3, 6, generator=make, requires_grad=True)
    b = torch.zeros(4, 3, requires_grad=True)
    m = torch.rand(4, generator=make).add(0.5).requires_grad_()
    x = torch.randn(9, 6, generator=make)
    y = torch.randn(9, 4, generator=make)
    base = torch.randn(4, 6, generator=make)

    def loss(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        weight = outer["m"][:, None] * (base + inner["b"] @ inner["a"])
        return (x @ weight.T - y).square().mean()

    return BilevelProblem(loss, loss, {"a": a, "b": b}, {"m": m}), [a, b]


def test_first_step_from_zero_is_never_amplified_rounding() -> None:
    problem, _ = dead_case()
    estimator = make_estimator("sama", rule=AdamW(1e-3))
    result = estimator.estimate(problem, inner_batch=None, outer_batch=None)
    exact = make_estimator("sama", rule=AdamW(1e-3), product="exact").estimate(
        problem, inner_batch=None, outer_batch=None
    )
    assert result.info.dropped == 18  # every entry of A
    # Adam's first step hardly depends on the gradient's size: the term is tiny, and a
    # difference along A's 1/ε would be about 1e5 times the direct term instead.
    assert tree.norm(result.indirect) < 1e-4 * tree.norm(result.direct)
    assert tree.norm(exact.indirect) < 1e-4 * tree.norm(exact.direct)


def test_sgd_drops_nothing() -> None:
    problem, _ = dead_case()
    result = make_estimator("sama", rule=SGD(0.1)).estimate(
        problem, inner_batch=None, outer_batch=None
    )
    assert result.info.dropped == 0


def test_forward_scheme_starts_from_the_steps_own_byproduct() -> None:
    case = network_case()
    opt = real_run(case, HANDS["sgd"], make_estimator("darts", scheme="forward"), 5)
    assert opt.recorded_steps[-1].outer_grads is not None
    info = estimate(opt, case).info
    assert (info.n_forward, info.n_backward) == (2, 2)  # f, and g on one side
    central = real_run(case, HANDS["sgd"], make_estimator("darts"), 5)
    assert central.recorded_steps[-1].outer_grads is None
    info = estimate(central, case).info
    assert (info.n_forward, info.n_backward) == (3, 3)


def test_learning_rates_are_those_of_each_group() -> None:
    case = network_case()
    problem = case.problem()
    w = problem.inner_params
    from hypergrad.optimizer import BilevelOptimizer

    results = []
    for name in ("darts", "unrolled"):
        settings = {"product": "exact"} if name == "darts" else {"num_steps": 1}
        problem = case.problem()
        w = problem.inner_params
        opt = BilevelOptimizer(
            problem,
            estimator=make_estimator(name, **settings),
            inner_optimizer=torch.optim.SGD(
                [
                    {"params": [w["first"]], "lr": 0.3},
                    {"params": [w["bias"], w["second"]], "lr": 0.02},
                ],
                lr=1.0,
            ),
            outer_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )
        opt.inner_step(case.batch(0))
        results.append(estimate(opt, case).indirect)
    assert relative_error(results[0], results[1]) < 1e-15


def test_error_estimate_is_near_the_error() -> None:
    case = network_case()
    estimator = make_estimator("darts", radius=0.05, error_estimate=True)
    result = estimate(real_run(case, HANDS["sgd"], estimator, 10), case)
    truth = indirect_truth(case, HANDS["sgd"], 10, 1)
    error = relative_error(result.indirect, truth)
    assert result.info.fd_radius == 0.05
    assert result.info.fd_error is not None
    assert 0.1 * error < result.info.fd_error < 10 * error


@pytest.mark.parametrize("name", ["darts", "sama"])
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"product": "fd"}, "product='fd' is unknown; choose one of 'exact'"),
        ({"scheme": "backward"}, "scheme='backward' is unknown"),
        ({"radius": 0.0}, "radius=0.0 must be positive"),
        ({"radius": float("nan")}, "radius=nan must be positive"),
    ],
)
def test_settings_out_of_range(name: str, settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_estimator(name, **settings)


def test_inner_lr_out_of_range() -> None:
    with pytest.raises(ValueError, match="inner_lr=-1 must be positive"):
        make_estimator("darts", inner_lr=-1)
