"""Two losses that are no quadratics, of three weights and a decay for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad.tree import Params

__all__ = ["batch", "inner_loss", "outer_loss"]


def inner_loss(i: Params, o: Params, b: Any) -> Tensor:
    return ((b @ i["w"]).tanh() - 0.3).square().mean() + (
        o["lam"].exp() * i["w"].square()
    ).sum()


def outer_loss(i: Params, o: Params, b: Any) -> Tensor:
    return ((b @ i["w"]).sin() + 0.2).square().mean()


def batch(seed: int) -> Tensor:
    return torch.randn(
        5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
