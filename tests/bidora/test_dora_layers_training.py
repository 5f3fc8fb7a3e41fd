"""BiDoRA trains adapters of an embedding and of convolutions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bidora import BiDoRAOptimizer
from bidora.dora import exact_dora_layers, magnitudes

ENTRIES = 7


class Net(nn.Module):
    """Words, convolutions over them, one of them depthwise, and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ENTRIES, 8)
        self.wide = nn.Conv1d(8, 8, 3, padding=1)
        self.deep = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).transpose(1, 2)
        x = torch.tanh(self.deep(torch.relu(self.wide(x))))
        return self.head(x.mean(2))


@pytest.mark.parametrize("estimator", ["darts", "sama"])
def test_bidora_trains_them(estimator: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        use_dora=True,
        target_modules=["words", "wide", "deep"],
        modules_to_save=["head"],
    )
    model = get_peft_model(cast(Any, Net()), config)
    ids, labels = torch.randint(0, ENTRIES, (12, 6)), torch.arange(12) % 2

    def loss(model: nn.Module, rows: slice) -> Tensor:
        return F.cross_entropy(model(ids[rows]), labels[rows])

    opt = BiDoRAOptimizer(
        model,
        estimator,
        loss_fn=loss,
        inner_lr=5e-2,
        outer_lr=2e-2,
        outer_every=2,
        outer_warmup=2,
        orthogonality=0.0,
    )
    assert len(exact_dora_layers(model)) == len(magnitudes(model)) == 3
    inner = outer = slice(0, 12)
    first = loss(model, slice(0, 12)).item()
    for _ in range(30):
        before = {n: p.detach().clone() for n, p in magnitudes(model).items()}
        report = opt.step(inner, outer)
        for name, p in magnitudes(model).items():
            assert torch.equal(p, before[name]) != report.outer_step, name
    assert loss(model, slice(0, 12)).item() < 0.5 * first
