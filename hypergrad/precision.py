"""How finely a loss computes: what its gradients are rounded to on their way.

Adapters in float32 over a bfloat16 base have gradients of bfloat16's precision: whatever
takes part counts, and the coarsest decides. It is read from the graph of a loss, which
knows the dtype of everything that was computed on the way to it, and from what a graph
does not show: frozen weights, autocast, and matrix products in TensorFloat-32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hypergrad._graph import nodes

if TYPE_CHECKING:
    from hypergrad.problem import BilevelProblem

__all__ = [
    "FLOAT32",
    "autocast_dtypes",
    "coarsest",
    "graph_unit",
    "settings_unit",
    "unit",
]

FLOAT32 = torch.finfo(torch.float32).eps
"""Spacing of float32's numbers at 1: above it, a loss counts as computed coarsely."""
_TF32 = 2.0**-10


def unit(dtype: torch.dtype) -> float:
    """Return the spacing of a dtype's numbers at 1; 0 where they are not of floating point.

    Example:
        >>> unit(torch.bfloat16), unit(torch.int64)
        (0.0078125, 0.0)
    """
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def coarsest(tensors: Iterable[Tensor]) -> float:
    """Return the largest unit among the dtypes of some tensors."""
    return max((unit(t.dtype) for t in tensors), default=0.0)


def graph_unit(loss: Tensor) -> float:
    """Return the largest unit among all that a loss was computed from.

    Args:
        loss: with its graph; what does not require grad is not in it.
    """
    found = {loss.dtype}
    for node in nodes(loss):
        # One entry for each of the results that the node belongs to.
        shown: Iterable[Any] = getattr(node, "_input_metadata", ())
        shown = tuple(shown)
        # A result that a custom function marked as not differentiable is shown as a
        # float32 scalar, whatever it is.
        found |= {
            each.dtype
            for each in shown
            if each.dtype is not None and (len(shown) == 1 or len(each.shape))
        }
    return max(unit(dtype) for dtype in found)


def autocast_dtypes(problem: BilevelProblem) -> tuple[tuple[str, torch.dtype], ...]:
    """Return the autocast that is on around the call, by device type."""
    kinds = sorted({t.device.type for t in problem.tensors})
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.is_autocast_enabled(kind)
    )


def settings_unit(problem: BilevelProblem) -> float:
    """Return the largest unit that weights, autocast and TensorFloat-32 say of."""
    units = [coarsest(problem.inner_params.values())]
    units += [unit(dtype) for _, dtype in autocast_dtypes(problem)]
    units += [coarsest(_weights(problem.module))]
    units += [_product_unit(kind, problem.module) for kind in _kinds(problem)]
    return max(units)


def _weights(module: nn.Module | None) -> Iterator[Tensor]:
    """Yield the frozen weights that take part, which no graph shows by itself."""
    if module is not None:
        yield from (p for p in module.parameters() if p.dim() > 1)


def _kinds(problem: BilevelProblem) -> set[str]:
    params = problem.inner_params.values()
    return {p.device.type for p in params if p.dtype == torch.float32}


def _product_unit(kind: str, module: nn.Module | None) -> float:
    """Return the unit of products of float32 matrices on a kind of device."""
    precision = torch.get_float32_matmul_precision()
    if kind == "cuda":
        convolves = module is not None and any(
            isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()
        )
        if precision != "highest" or (convolves and torch.backends.cudnn.allow_tf32):
            return _TF32
    if kind == "cpu" and precision == "medium":
        return unit(torch.bfloat16)
    return 0.0
