"""The accuracy of unrolling and of exact one-step estimators, over every kind of step.

Errors are those of the indirect term, relative, to plain autograd in float64 through
hand-written optimizers, from the very numbers that the run had before the window. The
learning rate changes at every step, the batch too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from hypergrad import make_estimator
from hypergrad.rules import SGD, AdamW, Clipped, Grouped, TorchOptRule
from tests.hypergrad.estimators.truths import (
    HANDS,
    Case,
    Start,
    cold,
    conditioning,
    estimate,
    hand_indirect,
    network_case,
    path_of,
    rate,
    real_run,
    warm,
)
from tests.tolerances import error

F64, F32 = torch.float64, torch.float32

dtypes = pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])


@cache
def begin(name: str, dtype: torch.dtype, state: str) -> tuple[Case, Start]:
    case = network_case().to(dtype)
    return case, cold(case) if state == "cold" else warm(case, HANDS[name])


@cache
def bar(name: str, state: str, dtype: torch.dtype, num_steps: int) -> float:
    """Return the error that is allowed.

    From states of 100 steps 1e-12, 5e-6 in float32. Adam's first step alone has the
    derivative lr ε/(|g| + ε)²: that of the smallest gradients, of which rounding takes
    most; in float64 too the truth itself is known to this. All float32 steps from
    nothing are held to what one rounding does to them, 10 times.
    """
    if state == "warm":
        return 1e-12 if dtype == F64 else 5e-6
    if dtype == F64 and not ("adam" in name and num_steps == 1):
        return 1e-12
    case, start = begin(name, dtype, state)
    path = path_of(case, num_steps, False)
    return 10 * conditioning(case, HANDS[name], start, path, case.outer, dtype)


@dtypes
@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", HANDS)
def test_unrolled(
    name: str, num_steps: int, state: str, moving: bool, dtype: torch.dtype
) -> None:
    case, start = begin(name, dtype, state)
    opt = real_run(
        case,
        HANDS[name],
        make_estimator("unrolled", num_steps=num_steps),
        num_steps,
        start=start,
        moving=moving,
    )
    result = estimate(opt, case)
    *path, end = path_of(case, num_steps + 1, moving)
    truth = hand_indirect(case, HANDS[name], start, path, end)
    assert error(result.indirect, truth) <= bar(name, state, dtype, num_steps)
    assert ("common shift" in result.info.reason) == moving
    assert {t.dtype for t in result.indirect.values()} == {dtype}


@pytest.mark.parametrize("name", ["sgd-decay-clip", "adamw-clip"])
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_clipping_binds_in_these_windows(name: str, state: str) -> None:
    case, start = begin(name, F64, state)
    opt = real_run(case, HANDS[name], make_estimator("first-order"), 0, start=start)
    bound, norms = HANDS[name].max_norm, []
    for t in range(start.t, start.t + 20):
        opt.inner.param_groups[0]["lr"] = rate(t)
        norms.append(opt.inner_step(case.batch(t)).grad_norm)
    assert bound is not None
    assert sum(norm > bound for norm in norms) >= 10


@dtypes
@pytest.mark.parametrize("state", ["cold", "warm"])
@pytest.mark.parametrize("name", HANDS)
def test_exact_sama_is_one_step_of_unrolling(
    name: str, state: str, dtype: torch.dtype
) -> None:
    case, start = begin(name, dtype, state)
    found = {}
    for kind, settings in (
        ("sama", {"product": "exact"}),
        ("unrolled", {"num_steps": 1}),
    ):
        estimator = make_estimator(kind, **settings)
        opt = real_run(case, HANDS[name], estimator, 1, start=start)
        found[kind] = estimate(opt, case).indirect
    # The same operations in the same order.
    assert error(found["sama"], found["unrolled"]) <= 1e-12
    truth = hand_indirect(case, HANDS[name], start, path_of(case, 1, False), case.outer)
    assert error(found["sama"], truth) <= bar(name, state, dtype, 1)


@pytest.mark.parametrize(
    "rule",
    [
        SGD(0.01, maximize=True, momentum=0.5),
        AdamW(0.05, amsgrad=True),
        Clipped(AdamW(0.05, maximize=True), 0.1),
        Grouped(((("first",), SGD(0.1)), (("bias", "second"), AdamW(0.01)))),
        TorchOptRule(torchopt.sgd(0.05, momentum=0.9)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_exact_sama_is_one_virtual_step_of_unrolling(rule: Any) -> None:
    case = network_case()
    sama, unrolled = (
        make_estimator(kind, rule=rule, **settings).estimate(
            case.problem(), inner_batch=case.batch(0), outer_batch=case.outer_batch
        )
        for kind, settings in (
            ("sama", {"product": "exact"}),
            ("unrolled", {"num_steps": 1}),
        )
    )
    assert error(sama.indirect, unrolled.indirect) <= 1e-12
    assert sama.outer_loss == unrolled.outer_loss


@dtypes
@pytest.mark.parametrize("product", ["exact", "forward-over-reverse"])
@pytest.mark.parametrize("seed", range(5))
def test_exact_darts(seed: int, product: str, dtype: torch.dtype) -> None:
    case = network_case(seed).to(dtype)
    start = warm(case, HANDS["sgd"], 10)
    opt = real_run(
        case, HANDS["sgd"], make_estimator("darts", product=product), 1, start=start
    )
    truth = hand_indirect(
        case, HANDS["sgd"], start, path_of(case, 1, False), case.outer
    )
    bound = 1e-12 if dtype == F64 else 1e-6
    assert error(estimate(opt, case).indirect, truth) <= bound


def test_the_truth_equals_differences_of_the_outer_loss() -> None:
    # The hand-written optimizers themselves, against central differences of real runs.
    case, name = network_case(), "adamw-clip"
    start = warm(case, HANDS[name])
    path = path_of(case, 3, False)
    truth = hand_indirect(case, HANDS[name], start, path, case.outer)
    moved: list[float] = []
    h = 1e-5
    for sign in (1, -1):
        outer: dict[str, Tensor] = {
            n: t + sign * h * (n == "shift") for n, t in case.outer.items()
        }
        other = Case(
            case.inner_loss,
            case.outer_loss,
            case.inner,
            outer,
            case.batches,
            case.outer_batch,
        )
        opt = real_run(
            other, HANDS[name], make_estimator("first-order"), 3, start=start
        )
        problem = opt.problem
        f = problem.outer_loss(problem.inner_params, case.outer, case.outer_batch)
        moved.append(f.item())
    difference = (moved[0] - moved[1]) / (2 * h)
    # truncation h² and rounding ε/h of a loss of about 1
    assert truth["shift"].item() == pytest.approx(difference, rel=1e-7)
