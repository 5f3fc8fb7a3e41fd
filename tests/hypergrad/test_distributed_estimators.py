"""Two ranks with half of the data each give what one process gives with all of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hypergrad import make_estimator
from hypergrad.optimizer import BilevelOptimizer

pytestmark = pytest.mark.distributed

NAMES: dict[str, dict[str, Any]] = {
    "first-order": {},
    "darts": {},
    "sama": {},
    "unrolled": {"num_steps": 3},
    "cg": {"on_failure": "return"},
    "neumann": {"on_failure": "return"},
}


def trained(name: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=make, dtype=p.dtype) / 2)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def part() -> Any:
        x = torch.randn(8, 4, generator=make, dtype=torch.float64)
        y = torch.randint(0, 3, (8,), generator=make)
        size = 8 // ranks
        return x[rank * size :][:size], y[rank * size :][:size]

    opt = BilevelOptimizer(
        model,
        loss_fn,
        outer="0.bias",
        estimator=make_estimator(name, **NAMES[name]),
        inner_optimizer=partial(torch.optim.AdamW, lr=0.05),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=2,
        max_grad_norm=0.2,
    )
    for _ in range(7):
        opt.step(part(), part())
    assert opt.n_outer_steps >= 2
    return {n: t.detach().clone() for n, t in model.named_parameters()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    for name in NAMES:
        torch.save(trained(name, rank, 2), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for name in NAMES:
        alone = trained(name, 0, 1)
        ranks = [
            torch.load(tmp_path / f"{name}-{r}.pt", weights_only=True) for r in (0, 1)
        ]
        for n, value in alone.items():
            assert torch.equal(ranks[0][n], ranks[1][n]), (name, n)
            # The order of sums differs; finite differences divide that by the radius.
            torch.testing.assert_close(ranks[0][n], value, rtol=1e-8, atol=1e-9)
