"""What an inner step copies: nothing that is not used again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad import BilevelOptimizer
from hypergrad.compare._measure import peak_bytes

CPU = [torch.device("cpu")]


def loss_fn(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))


def optimizer(model: nn.Module, estimator: Any) -> BilevelOptimizer:
    return BilevelOptimizer(
        model,
        loss_fn,
        outer="0.bias",
        estimator=estimator,
        inner_optimizer=partial(torch.optim.AdamW, lr=1e-3, foreach=False),
        outer_optimizer=partial(torch.optim.SGD, lr=1e-3),
        outer_warmup=100,
    )


def test_an_implicit_estimator_copies_into_the_same_memory_each_step() -> None:
    opt = optimizer(wide(), "neumann")
    places = []
    for _ in range(4):
        opt.inner_step(torch.ones(4, 512))
        copies = opt._workspace.levels[opt.inner]._memory
        places.append([t.data_ptr() for t in copies])
    assert places[1] == places[2] == places[3]  # the first one has no moments yet
    assert opt._run.window == ()


def test_peak_memory_of_training_is_that_of_adamw_and_one_copy() -> None:
    x = torch.ones(4, 512)
    model = wide()
    model.get_parameter("0.bias").requires_grad_(False)
    plain = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False
    )

    def train() -> None:
        plain.zero_grad()
        loss_fn(model, x).backward()
        plain.step()

    opt = optimizer(wide(), "neumann")
    n = sum(t.numel() * t.element_size() for t in opt.problem.inner_params.values())
    for _ in range(2):
        train()
        opt.inner_step(x)
    plain.zero_grad()
    alone = peak_bytes(train, CPU)
    ours = peak_bytes(lambda: opt.inner_step(x), CPU)
    assert alone is not None
    assert ours is not None
    # What stays between steps: w and two moments, and ours a copy of all three.
    kept = 3 * n
    assert kept + kept + ours <= 1.1 * (kept + alone) + kept


def test_records_own_their_memory() -> None:
    opt = optimizer(wide(), "unrolled")
    for _ in range(3):
        opt.inner_step(torch.ones(4, 512))
    places = {
        t.data_ptr() for step in opt._run.window for t in step.inner_params.values()
    }
    assert len(places) == 3 * len(opt.problem.inner_params)
