"""Leave a module as it was: buffers and train/eval modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad.errors import HypergradError

__all__ = ["LARGEST_COPIED_BUFFER", "copy_of_buffer", "module_untouched", "remember"]

LARGEST_COPIED_BUFFER = 16 * 2**20
"""Bytes; larger buffers are packed weights, not state."""


def copy_of_buffer(buffer: Tensor) -> Tensor:
    """Return a copy for one evaluation; large buffers, and any in a graph, themselves."""
    large = buffer.numel() * buffer.element_size() > LARGEST_COPIED_BUFFER
    return buffer if large or buffer.requires_grad else buffer.detach().clone()


@contextmanager
def module_untouched(module: nn.Module) -> Iterator[None]:
    """Run the block on copies of the module's buffers, then put the originals back.

    Copies in their places, not saved values that are copied back: batch_norm changes its
    running statistics without counting a version, so that a change cannot be seen; and
    copying back would void a graph that saved the buffer.

    Args:
        module: the module; buffers and train/eval modes are as before afterwards, also
            after an exception.

    Raises:
        HypergradError: the block changed a buffer too large to be copied.
    """
    modes = [(m, m.training) for m in module.modules()]
    saved = [(m, dict(m._buffers), _plain(m)) for m in module.modules() if m._buffers]
    copies: dict[int, Tensor] = {}  # one for each buffer, however many names it has
    versions: dict[str, tuple[Tensor, int]] = {}
    with torch.inference_mode(mode=False):
        for name, buffer in module.named_buffers():
            copies[id(buffer)] = copy_of_buffer(buffer)
            if copies[id(buffer)] is buffer and not buffer.is_inference():
                versions[name] = (buffer, buffer._version)
    for m, buffers, _ in saved:
        for name, buffer in buffers.items():
            if buffer is not None:
                m._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for m, buffers, plain in saved:
            placed = [None if b is None else copies[id(b)] for b in buffers.values()]
            replaced = len(placed) != len(m._buffers) or any(
                a is not b for a, b in zip(placed, m._buffers.values(), strict=True)
            )
            m._buffers.clear()
            m._buffers.update(buffers)
            if replaced:
                # A buffer that was assigned anew goes with the numbers beside it, such
                # as the length that a table of positions was computed for.
                vars(m).update(plain)
    lost = [name for name, (buffer, v) in versions.items() if buffer._version != v]
    if lost:
        msg = (
            f"evaluating the loss changed the buffers {lost}, which were not copied "
            f"(above {LARGEST_COPIED_BUFFER} bytes, or part of a graph). Put those "
            "modules in eval mode while hypergradients are estimated."
        )
        raise HypergradError(msg)


def remember(module: nn.Module) -> Callable[[], None]:
    """Copy buffers and train/eval modes, for what runs on the module itself.

    Args:
        module: the module.

    Returns:
        A function that puts them back. Buffers too large to be copied, or part of a
        graph, stay as they are.
    """
    modules = list(module.modules())
    modes = [(m, m.training) for m in modules]
    places = [(m, dict(m._buffers), _plain(m)) for m in modules if m._buffers]
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # one for each, whatever its names
    with torch.inference_mode(mode=False):
        for _, buffers, _ in places:
            for b in buffers.values():
                if b is not None and id(b) not in copies and not b.is_inference():
                    copies[id(b)] = (b, copy_of_buffer(b))

    def put_back() -> None:
        for m, training in modes:
            m.training = training
        for m, buffers, plain in places:
            m._buffers.clear()
            m._buffers.update(buffers)
            vars(m).update(plain)
        with torch.inference_mode(mode=False), torch.no_grad():
            for buffer, copy in copies.values():
                if copy is not buffer:
                    buffer.copy_(copy)

    return put_back


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(module).items() if isinstance(v, kinds)}
