"""How far one hypergradient is from another, in float64."""

from __future__ import annotations

from torch import Tensor

from hypergrad import tree
from hypergrad.estimator import Hypergradient
from hypergrad.tree import Params

__all__ = ["cosine_of", "error_of", "indirect_share"]


def error_of(value: Params, truth: Params) -> float:
    """Return the relative L2 distance; infinite where only the truth is 0."""
    off = tree.norm(tree.sub(_wide(value), _wide(truth)))
    size = tree.norm(truth)
    if size == 0.0:
        return 0.0 if off == 0.0 else float("inf")
    return off / size


def cosine_of(value: Params, truth: Params) -> float | None:
    """Return the cosine of the angle between two, None where one is 0."""
    sizes = tree.norm(value), tree.norm(truth)
    if 0.0 in sizes:
        return None
    units = (
        {n: t / size for n, t in _wide(one).items()}
        for one, size in zip((value, truth), sizes, strict=True)
    )
    return max(-1.0, min(1.0, tree.dot(*units)))


def _wide(params: Params) -> Params:
    return {n: _on_cpu(t) for n, t in params.items()}


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def indirect_share(truth: Hypergradient) -> float:
    """Return the norm of the indirect term over that of the total."""
    size, indirect = tree.norm(truth.outer_grads), tree.norm(truth.indirect)
    if size == 0.0:
        return 0.0 if indirect == 0.0 else float("inf")
    return indirect / size
