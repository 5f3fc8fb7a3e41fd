"""What unrolling costs, keeps and refuses; `test_bars_unrolled` has its accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import BilevelProblem, make_estimator
from hypergrad.rules import SGD, AdamW, TorchOptRule
from hypergrad.testing import relative_error
from tests.hypergrad.estimators.truths import (
    HANDS,
    estimate,
    indirect_truth,
    network_case,
    real_run,
    softmax_case,
)


@pytest.mark.parametrize("hand", ["sgd", "momentum", "adamw"])
def test_real_data_long_unrolling(hand: str) -> None:
    case = softmax_case()
    opt = real_run(case, HANDS[hand], make_estimator("unrolled", num_steps=40), 40)
    truth = indirect_truth(case, HANDS[hand], 40, 40)
    assert relative_error(estimate(opt, case).indirect, truth) < 1e-12


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
