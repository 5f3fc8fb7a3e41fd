"""torch's operations on whole lists of tensors, which have no public names.

The only file that touches them. Each takes lists of equal length and returns one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "absolute",
    "add",
    "addcdiv",
    "addcmul",
    "clamp_max",
    "clamp_min",
    "clone",
    "copy_",
    "div",
    "lerp",
    "maximum",
    "mul",
    "neg",
    "norm",
    "sign",
    "sqrt",
    "sub",
]

_torch: Any = torch
Tensors = Sequence[Tensor]


def absolute(a: Tensors) -> list[Tensor]:
    """Return absolute values."""
    return list(_torch._foreach_abs(a))


def add(a: Tensors, b: Any, alpha: float = 1.0) -> list[Tensor]:
    """Return sums; `b` may be a number."""
    if isinstance(b, (int, float)):
        return list(_torch._foreach_add(a, b))
    return list(_torch._foreach_add(a, b, alpha=alpha))


def addcdiv(
    a: Tensors, b: Tensors, c: Tensors, factors: Sequence[float]
) -> list[Tensor]:
    """Return a + factor · b / c."""
    return list(_torch._foreach_addcdiv(a, b, c, factors))


def addcmul(a: Tensors, b: Tensors, c: Tensors, factor: float) -> list[Tensor]:
    """Return a + factor · b · c."""
    return list(_torch._foreach_addcmul(a, b, c, factor))


def clamp_max(a: Tensors, most: float) -> list[Tensor]:
    """Return entries of at most a number."""
    return list(_torch._foreach_clamp_max(a, most))


def clamp_min(a: Tensors, least: float) -> list[Tensor]:
    """Return entries of at least a number."""
    return list(_torch._foreach_clamp_min(a, least))


def clone(a: Tensors) -> list[Tensor]:
    """Return copies."""
    return list(_torch._foreach_clone(a))


def div(a: Tensors, b: Any) -> list[Tensor]:
    """Return quotients; `b` may be numbers or a tensor of one entry."""
    return list(_torch._foreach_div(a, b))


def lerp(a: Tensors, b: Tensors, weight: float) -> list[Tensor]:
    """Return a + weight · (b - a)."""
    return list(_torch._foreach_lerp(a, b, weight))


def maximum(a: Tensors, b: Any) -> list[Tensor]:
    """Return larger entries."""
    return list(_torch._foreach_maximum(a, b))


def mul(a: Tensors, b: Any) -> list[Tensor]:
    """Return products; `b` may be numbers or a tensor of one entry."""
    return list(_torch._foreach_mul(a, b))


def neg(a: Tensors) -> list[Tensor]:
    """Return entries with the other sign."""
    return list(_torch._foreach_neg(a))


def norm(
    a: Tensors, order: float = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return norms, each a tensor of one entry."""
    return list(_torch._foreach_norm(a, order, dtype=dtype))


def sign(a: Tensors) -> list[Tensor]:
    """Return signs."""
    return list(_torch._foreach_sign(a))


def sqrt(a: Tensors) -> list[Tensor]:
    """Return square roots."""
    return list(_torch._foreach_sqrt(a))


def sub(a: Tensors, b: Any) -> list[Tensor]:
    """Return differences."""
    return list(_torch._foreach_sub(a, b))


def copy_(targets: Tensors, values: Tensors) -> None:
    """Copy values into tensors in place."""
    _torch._foreach_copy_(targets, values)
