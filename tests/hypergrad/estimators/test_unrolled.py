"""Unrolling against plain autograd through hand-written optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import BilevelProblem, make_estimator
from hypergrad.rules import SGD, AdamW, TorchOptRule
from hypergrad.testing import relative_error
from tests.hypergrad.estimators.truths import (
    HANDS,
    conditioning,
    estimate,
    hand_run,
    indirect_truth,
    network_case,
    real_run,
    softmax_case,
)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("warm", [0, 30])
@pytest.mark.parametrize("hand", HANDS)
def test_equals_plain_unrolling(hand: str, warm: int, num_steps: int) -> None:
    case, n = network_case(), warm + num_steps
    estimator = make_estimator("unrolled", num_steps=num_steps)
    opt = real_run(case, HANDS[hand], estimator, n)
    result = estimate(opt, case)
    truth = indirect_truth(case, HANDS[hand], n, num_steps)
    assert relative_error(result.indirect, truth) < conditioning(hand, n)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("hand", ["momentum", "adamw-clip"])
def test_float32_is_right_to_its_rounding(hand: str, num_steps: int) -> None:
    n = 100 + num_steps
    estimator = make_estimator("unrolled", num_steps=num_steps)
    case32 = network_case().to(torch.float32)
    result = estimate(real_run(case32, HANDS[hand], estimator, n), case32)
    truth = indirect_truth(network_case(), HANDS[hand], n, num_steps)
    # 100 float32 steps drift by about 1e-6 from the float64 trajectory.
    assert relative_error(result.indirect, truth) < 2e-5
    assert result.outer_grads["scale"].dtype == torch.float32


@pytest.mark.parametrize("hand", ["sgd", "momentum", "adamw"])
def test_real_data_long_unrolling(hand: str) -> None:
    case = softmax_case()
    opt = real_run(case, HANDS[hand], make_estimator("unrolled", num_steps=40), 40)
    truth = indirect_truth(case, HANDS[hand], 40, 40)
    assert relative_error(estimate(opt, case).indirect, truth) < 1e-12


def test_moved_outer_parameters_give_the_derivative_of_a_common_shift() -> None:
    case, hand = network_case(), HANDS["adamw"]
    opt = real_run(case, hand, make_estimator("unrolled", num_steps=4), 0)
    start = {n: t.detach().clone() for n, t in opt.problem.outer_params.items()}
    for k in range(4):
        opt.inner.param_groups[0]["lr"] = 0.05 * (1 + 0.5 * (k % 3))
        opt.inner_step(case.batch(k))
        with torch.no_grad():
            for t in opt.problem.outer_params.values():
                t.add_(0.1)
    result = estimate(opt, case)
    lam = {n: (t + 0.4).requires_grad_() for n, t in start.items()}
    value = hand_run(case, hand, 4, 4, lam, shifts=[-0.4, -0.3, -0.2, -0.1])
    truth = dict(zip(lam, torch.autograd.grad(value, list(lam.values())), strict=True))
    assert relative_error(result.outer_grads, truth) < 1e-12
    assert "common shift" in result.info.reason


@pytest.mark.parametrize("hand", ["sgd", "adamw"])
def test_kept_graph_equals_recomputed(hand: str) -> None:
    case = network_case()
    results = []
    for reuse in (True, False):
        estimator = make_estimator("unrolled", num_steps=1)
        opt = real_run(case, HANDS[hand], estimator, 12, reuse_graph=reuse)
        assert (opt.recorded_steps[-1].graph is not None) is reuse
        results.append(estimate(opt, case))
    kept, recomputed = results
    assert relative_error(kept.indirect, recomputed.indirect) < 1e-15
    # The kept graph saves the forward and backward that rebuild it.
    assert recomputed.info.n_forward - kept.info.n_forward == 1
    assert recomputed.info.n_backward - kept.info.n_backward == 1


def test_cost_is_one_forward_and_two_backwards_a_step() -> None:
    case = network_case()
    for k in (1, 3, 7):
        opt = real_run(case, HANDS["adamw"], make_estimator("unrolled", num_steps=k), k)
        opt.reuse_graph = False
        info = estimate(opt, case).info
        assert info.n_forward == 1 + k
        assert info.n_backward == 1 + 2 * k
        assert info.n_hvp == k


@pytest.mark.parametrize("rule", [SGD(0.05, momentum=0.9), AdamW(0.05)])
def test_virtual_steps_equal_recorded_ones(rule: Any) -> None:
    case = network_case()
    problem = case.problem()
    virtual = make_estimator("unrolled", num_steps=3, rule=rule).estimate(
        problem, inner_batch=case.batch(0), outer_batch=case.outer_batch
    )
    kind: Any = torch.optim.SGD if isinstance(rule, SGD) else torch.optim.AdamW
    settings = {"momentum": 0.9} if isinstance(rule, SGD) else {}
    tensors = list(problem.inner_params.values())
    opt = kind(tensors, lr=0.05, **settings)
    for _ in range(3):
        opt.zero_grad()
        case.inner_loss(
            problem.inner_params, problem.outer_params, case.batch(0)
        ).backward()
        opt.step()
    f = problem.outer_loss(problem.inner_params, problem.outer_params, case.outer_batch)
    assert abs(virtual.outer_loss - f.item()) < 1e-14


def test_torchopt_momentum_is_exact() -> None:
    import torchopt

    case = network_case()
    ours, theirs = (
        make_estimator("unrolled", num_steps=4, rule=rule).estimate(
            case.problem(), inner_batch=case.batch(0), outer_batch=case.outer_batch
        )
        for rule in (
            SGD(0.05, momentum=0.9),
            TorchOptRule(torchopt.sgd(0.05, momentum=0.9)),
        )
    )
    assert relative_error(theirs.outer_grads, ours.outer_grads) < 1e-14


def test_too_few_steps_says_how_many() -> None:
    case = network_case()
    opt = real_run(case, HANDS["sgd"], make_estimator("unrolled", num_steps=2), 1)
    with pytest.raises(ValueError, match=r"looks back at 2 inner steps.*holds 1"):
        estimate(opt, case)


def test_without_steps_or_rule_says_what_to_set() -> None:
    problem: BilevelProblem = network_case().problem()
    with pytest.raises(ValueError, match="set rule="):
        make_estimator("unrolled").estimate(problem, inner_batch=None, outer_batch=None)


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (1.5, TypeError)])
def test_number_of_steps_out_of_range(value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"num_steps"):
        make_estimator("unrolled", num_steps=value)
