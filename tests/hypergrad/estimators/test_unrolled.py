"""What unrolling costs, keeps and refuses; `test_bars_unrolled` has its accuracy."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hypergrad import (
    BilevelProblem,
    HypergradEstimator,
    Indirect,
    Needs,
    Point,
    make_estimator,
    tree,
)
from hypergrad.batches import Accumulated
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.products import Tally
from hypergrad.rules import SGD, AdamW, TorchOptRule
from hypergrad.steps import with_grads
from hypergrad.testing import relative_error
from tests.hypergrad.estimators.truths import (
    HANDS,
    Case,
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


# -- gradients that are not on record ---------------------------------------------------


class Seen(HypergradEstimator):
    """Looks at the gradient of the last step; there is no more to it."""

    grads: ClassVar[dict[str, Tensor]] = {}

    @property
    def needs(self) -> Needs:
        return Needs(lookback=1)

    def indirect(self, point: Point) -> Indirect:
        self.grads.update(point.steps[-1].grads)
        return Indirect(tree.zeros_like(point.problem.outer_params))


def recorded(batch: Any) -> tuple[Case, BilevelOptimizer]:
    """Take clipped steps with decay, the last two of them on `batch`."""
    case = network_case()
    opt = BilevelOptimizer(
        case.problem(),
        estimator=make_estimator("unrolled", num_steps=3),
        inner_optimizer=partial(torch.optim.AdamW, lr=0.05),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        max_grad_norm=0.1,
        reuse_graph=False,
    )
    opt.inner_step(case.batch(0))
    opt.inner_step(batch)
    opt.inner_step(batch)
    return case, opt


WEIGHTED = Accumulated([network_case().batch(1)], weights=[0.3])


def test_records_without_gradients_give_the_same_derivative() -> None:
    case, opt = recorded(WEIGHTED)
    steps = opt.recorded_steps
    assert not any(step.grads for step in steps)
    without = estimate(opt, case)
    whole = [with_grads(opt.problem, step, Tally()) for step in steps]
    with_them = opt.estimator.estimate(
        opt.problem, inner_batch=None, outer_batch=case.outer_batch, steps=whole
    )
    # One gradient, computed with its graph and without: the same sums.
    assert relative_error(without.outer_grads, with_them.outer_grads) < 1e-14
    assert without.info == with_them.info  # and not a pass more


def test_an_estimator_that_reads_gradients_is_given_them() -> None:
    case, opt = recorded(WEIGHTED)
    last = opt.recorded_steps[-1]
    before = tree.clone(opt.problem.inner_params)
    info = (
        Seen()
        .estimate(
            opt.problem,
            inner_batch=None,
            outer_batch=case.outer_batch,
            steps=opt.recorded_steps,
        )
        .info
    )
    assert (info.n_forward, info.n_backward) == (2, 2)
    w = {n: t.clone().requires_grad_() for n, t in last.inner_params.items()}
    loss = 0.3 * case.inner_loss(w, last.outer_params, case.batch(1))
    truth = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    assert relative_error(Seen.grads, truth) < 1e-15
    now = opt.problem.inner_params
    assert all(torch.equal(now[n], before[n]) for n in now)


def test_gradients_of_several_micro_batches_stay_on_record() -> None:
    parts = Accumulated([network_case().batch(1), network_case().batch(2)])
    _, opt = recorded(parts)
    assert [bool(step.grads) for step in opt.recorded_steps] == [False, True, True]


def test_a_checkpoint_of_records_without_gradients() -> None:
    case, opt = recorded(WEIGHTED)
    _, other = recorded(case.batch(2))
    other.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for name, tensor in opt.problem.inner_params.items():
            other.problem.inner_params[name].copy_(tensor)
    first, second = estimate(opt, case), estimate(other, case)
    for name, value in first.outer_grads.items():
        assert torch.equal(second.outer_grads[name], value)


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
