"""Arithmetic on dictionaries of tensors, the vectors of this library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

__all__ = [
    "Params",
    "add",
    "all_finite",
    "clone",
    "dot",
    "map_params",
    "norm",
    "scale",
    "sub",
    "wide",
    "zeros_like",
]

Params = dict[str, Tensor]
"""Named tensors: `inner_params`, `outer_params`, and every vector shaped like them."""


def map_params(fn: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Params:
    """Apply `fn` to the tensors of equal name."""
    return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


def zeros_like(tree: Mapping[str, Tensor]) -> Params:
    """Return zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(t.detach()) for name, t in tree.items()}


def clone(tree: Mapping[str, Tensor]) -> Params:
    """Return detached copies that share no memory with `tree`."""
    return {name: t.detach().clone() for name, t in tree.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float = 1.0) -> Params:
    """Return `a + alpha * b`."""
    return {name: torch.add(a[name], b[name], alpha=alpha) for name in a}


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Params:
    """Return `a - b`."""
    return {name: a[name] - b[name] for name in a}


def scale(tree: Mapping[str, Tensor], factor: float) -> Params:
    """Return `factor * tree`."""
    return {name: t * factor for name, t in tree.items()}


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` detached, in float64 (float32 on MPS, which has no float64)."""
    tensor = tensor.detach()
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _total(parts: list[Tensor]) -> float:
    # One transfer from the device, not one for each tensor.
    return float(torch.stack([p.to(parts[0].device) for p in parts]).sum())


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product, accumulated in float64.

    Example:
        >>> import torch
        >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
        11.0
    """
    parts = [torch.dot(_flat(a[name]), _flat(b[name])) for name in a]
    return _total(parts) if parts else 0.0


def norm(tree: Mapping[str, Tensor] | Iterable[Tensor]) -> float:
    """Return the Euclidean norm; it neither overflows nor vanishes on its way.

    Squares are taken in float64 after division by the largest entry, so that norms
    between 1e-300 and 1e300 are right to rounding. NaN and infinity come through.

    Example:
        >>> import torch
        >>> f"{norm({'w': torch.tensor([3e30, 4e30])}):.6g}"
        '5e+30'
    """
    tensors = tree.values() if isinstance(tree, Mapping) else tree
    parts = [_flat(t) for t in tensors if t.numel()]
    if not parts:
        return 0.0
    peaks = torch.stack([p.abs().max().to(parts[0].device) for p in parts])
    largest = float(peaks.max())
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(_total([(p / largest).square().sum() for p in parts]))


def all_finite(tree: Mapping[str, Tensor]) -> bool:
    """Return whether no entry is NaN or infinite."""
    parts = [torch.isfinite(t).all() for t in tree.values()]
    if not parts:
        return True
    return bool(torch.stack([p.to(parts[0].device) for p in parts]).all())


def _flat(tensor: Tensor) -> Tensor:
    return wide(tensor).reshape(-1)
