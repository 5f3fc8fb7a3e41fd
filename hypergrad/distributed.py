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

    Every rank calls this with the same names, shapes and dtypes. One message is sent
    for each device and dtype, whatever the number of tensors; half precision is summed
    in float32.

    Example:
        >>> import torch
        >>> average({"w": torch.ones(2)})["w"]
        tensor([1., 1.])
    """
    ranks = world_size()
    if ranks == 1:
        return dict(tree)
    # Sorted, so that ranks agree on the order even where their dictionaries do not.
    buckets: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name in sorted(tree):
        tensor = tree[name]
        kind = torch.promote_types(tensor.dtype, torch.float32)
        buckets.setdefault((tensor.device, kind), []).append(name)
    means: Params = {}
    for (_, kind), names in buckets.items():
        flat = torch.cat([tree[name].reshape(-1).to(kind) for name in names])
        dist.all_reduce(flat)
        flat /= ranks
        parts = flat.split([tree[name].numel() for name in names])
        for name, part in zip(names, parts, strict=True):
            # A copy: each mean owns its memory.
            means[name] = part.reshape(tree[name].shape).to(tree[name].dtype, copy=True)
    return {name: means[name] for name in tree}
