"""What DARTS and SAMA take and reuse; `test_bars_difference` has their accuracy."""

from __future__ import annotations

import torch

from hypergrad import make_estimator
from hypergrad.products import FiniteDifference
from hypergrad.testing import relative_error
from tests.hypergrad.estimators.truths import (
    HANDS,
    estimate,
    indirect_truth,
    network_case,
    real_run,
)


def test_darts_is_not_the_step_of_adamw() -> None:
    case = network_case()
    opt = real_run(case, HANDS["adamw"], make_estimator("darts", product="exact"), 30)
    error = relative_error(
        estimate(opt, case).indirect, indirect_truth(case, HANDS["adamw"], 30, 1)
    )
    assert error > 0.1  # the documented difference: take 'sama' or 'unrolled' there


def test_forward_scheme_starts_from_the_steps_own_byproduct() -> None:
    case = network_case()
    opt = real_run(
        case,
        HANDS["sgd"],
        make_estimator("darts", product=FiniteDifference("forward")),
        5,
    )
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
