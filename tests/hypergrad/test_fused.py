"""Fused optimizers move parameters without raising their version."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from hypergrad import BilevelProblem
from hypergrad.estimators import Unrolled
from hypergrad.optimizer import BilevelOptimizer


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
def test_records_hold_the_outer_parameters_of_their_own_step(cls: type) -> None:
    """After each step, the record of it has λ as it was before the outer step."""
    torch.manual_seed(0)
    w, lam = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    made = partial(cls, lr=0.1, fused=True)
    opt = BilevelOptimizer(
        BilevelProblem(
            lambda i, o, b: (i["w"] - o["lam"]).square().sum(),
            lambda i, o, b: i["w"].square().sum() + o["lam"].sum(),
            {"w": w},
            {"lam": lam},
        ),
        estimator=Unrolled(1),
        inner_optimizer=made,
        outer_optimizer=made,
        outer_warmup=0,
    )
    for _ in range(3):
        before = lam.detach().clone()
        report = opt.step(None, None)
        assert report.outer_step
        assert not torch.equal(lam, before)
        assert torch.equal(opt.recorded_steps[-1].outer_params["lam"], before)
