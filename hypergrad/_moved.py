"""Parameters that are elsewhere for a block, and then where they were, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hypergrad import _foreach as foreach
from hypergrad import tree
from hypergrad._checks import some
from hypergrad.tree import Params

__all__ = ["moved"]


@contextmanager
def moved(
    own: Mapping[str, Params], wanted: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[None]:
    """Move parameters in place for the block.

    Args:
        own: the parameters, by level and name.
        wanted: values of some of them, likewise.

    Raises:
        TypeError: a value that is not a tensor.
        ValueError: a name that there is not, or another shape.
    """
    targets, values = _fitting(own, wanted)
    with torch.inference_mode(mode=False), torch.no_grad():
        saved = list(foreach.clone(targets)) if targets else []
        # A value may be a view of what is about to move (two that change places).
        held = {_storage(t) for t in targets if t.numel()}
        values = [v.detach().clone() if _storage(v) in held else v for v in values]
    try:
        _copy(targets, values)
        del values, wanted  # whose memory may be free now
        yield
    finally:
        _copy(targets, saved)


def _fitting(
    own: Mapping[str, Params], wanted: Mapping[str, Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what moves, and where to, after a look at names, kinds and shapes."""
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for level, given in wanted.items():
        for name, value in given.items():
            _check_fits(level, name, value, own[level])
            targets.append(own[level][name])
            values.append(value)
    return targets, values


def _check_fits(level: str, name: str, value: object, own: Params) -> None:
    if name not in own:
        msg = (
            f"{name!r} is not one of the {level} parameters ({some(own)}). Use the "
            "problem's own names."
        )
        raise ValueError(msg)
    if not isinstance(value, Tensor):
        msg = (
            f"the value for {level} parameter {name!r} is a {type(value).__name__}. Pass "
            "a tensor."
        )
        raise TypeError(msg)
    if own[name].shape != value.shape:
        msg = (
            f"the value for {level} parameter {name!r} has shape {tuple(value.shape)}, "
            f"the parameter {tuple(own[name].shape)}. Pass a tensor of its shape."
        )
        raise ValueError(msg)


def _storage(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    # Never through .data: that hides the move from autograd, and a graph kept across
    # it is then silently wrong.
    with torch.inference_mode(mode=False):
        tree.copy(targets, values)
