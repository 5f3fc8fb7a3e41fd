"""Averages over the ranks of a data-parallel run; the identity on one process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad.tree import Params

__all__ = ["average", "world_size"]


def world_size() -> int:
    """Return the number of ranks, 1 where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


@torch.no_grad()
def average(tree: Mapping[str, Tensor]) -> Params:
    r"""Return the mean of `tree` over all ranks, the same on each.

    With rank losses $g_r$ the loss of the run is $g = \tfrac1R\sum_r g_r$. Gradients
    and products are linear in g, so each is averaged where it is made, before it is
    used as a direction.

    Example:
        >>> import torch
        >>> average({"w": torch.ones(2)})["w"]
        tensor([1., 1.])
    """
    ranks = world_size()
    if ranks == 1:
        return dict(tree)
    out: Params = {}
    for name in tree:  # same order on each rank: dictionaries keep it
        tensor = tree[name].detach().clone()
        dist.all_reduce(tensor)
        out[name] = tensor.div_(ranks)
    return out
