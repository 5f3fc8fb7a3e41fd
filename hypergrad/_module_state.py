"""Leave a module as it was: buffers and train/eval modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad import tree
from hypergrad.errors import HypergradError

__all__ = [
    "LARGEST_COPIED_BUFFER",
    "BufferCopies",
    "ModuleState",
    "copy_of_buffer",
    "modes_of",
]

LARGEST_COPIED_BUFFER = 16 * 2**20
"""Bytes; larger buffers are packed weights, not state."""

_Place = tuple[nn.Module, dict[str, Tensor | None], dict[str, Any]]


def copy_of_buffer(buffer: Tensor) -> Tensor:
    """Return a copy for one evaluation; large buffers, and any in a graph, themselves."""
    return buffer.detach().clone() if _is_copied(buffer) else buffer


def modes_of(module: nn.Module) -> tuple[bool, ...]:
    """Return whether each submodule is in train mode, in the order of `modules()`."""
    return _shared(tuple([m.training for m in module.modules()]))


@lru_cache(maxsize=8)
def _shared(modes: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return one object for equal modes, of which a long run has one for each step."""
    return modes


def _is_copied(buffer: Tensor) -> bool:
    large = buffer.numel() * buffer.element_size() > LARGEST_COPIED_BUFFER
    return not large and not buffer.requires_grad


def _walk(module: nn.Module) -> tuple[list[tuple[nn.Module, bool]], list[_Place]]:
    """Return the modes of all modules, and those that hold buffers."""
    modes: list[tuple[nn.Module, bool]] = []
    places: list[_Place] = []
    for m in module.modules():
        modes.append((m, m.training))
        if m._buffers:
            places.append((m, dict(m._buffers), _plain(m)))
    return modes, places


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(module).items() if isinstance(v, kinds)}


class ModuleState:
    """Copies in the places of a module's buffers, until it is closed.

    Copies in their places, not saved values that are copied back: batch_norm changes its
    running statistics without counting a version, so that a change cannot be seen; and
    copying back would void a graph that saved the buffer.

    Args:
        module: the module; its modules and buffers are looked up once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modes, self._places = _walk(module)
        self.training = _shared(tuple([on for _, on in self._modes]))
        """Train/eval modes, as they were."""
        own: dict[int, Tensor] = {}  # one for each buffer, however many names it has
        for _, buffers, _ in self._places:
            own |= {id(b): b for b in buffers.values() if b is not None}
        self._copied = [b for b in own.values() if _is_copied(b)]
        self._versions = [
            (b, b._version)
            for b in own.values()
            if not _is_copied(b) and not b.is_inference()
        ]
        self._placed: list[Tensor] = []
        self._fresh = False
        self._replace()

    def _replace(self) -> None:
        """Put new copies into the places of the buffers."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self._placed = [b.detach().clone() for b in self._copied]
        copies = {id(b): c for b, c in zip(self._copied, self._placed, strict=True)}
        for m, buffers, _ in self._places:
            for name, buffer in buffers.items():
                if buffer is not None:
                    m._buffers[name] = copies.get(id(buffer), buffer)
        self._copies = copies
        self._fresh = True

    def rewind(self, *, keep: bool) -> None:
        """Make the copies what the buffers were.

        Args:
            keep: whether these copies must not be changed by a later `rewind`.
        """
        if not self._copied:
            return
        if not self._fresh:
            if not self._placed or self._was_replaced():
                self._put_back()
                self._replace()
            else:
                with torch.inference_mode(mode=False):
                    tree.copy(self._placed, self._copied)
        self._fresh = False
        if keep:
            self._placed = []

    def set_modes(self, training: tuple[bool, ...]) -> None:
        """Set train/eval modes.

        Args:
            training: as of `modes_of`.

        Raises:
            HypergradError: they are those of a module of another structure.
        """
        if len(training) != len(self._modes):
            msg = (
                f"the module has {len(self._modes)} submodules and had {len(training)} "
                "when the inner step was recorded, so that their train/eval modes cannot "
                "be set as they were. Take new inner steps after changing a module."
            )
            raise HypergradError(msg)
        for (m, _), on in zip(self._modes, training, strict=True):
            if m.training is not on:
                m.training = on

    def _was_replaced(self) -> bool:
        """Return whether an evaluation assigned a buffer anew."""
        for m, buffers, _ in self._places:
            if len(m._buffers) != len(buffers):
                return True
            for name, buffer in buffers.items():
                expected = (
                    None if buffer is None else self._copies.get(id(buffer), buffer)
                )
                if m._buffers.get(name) is not expected:
                    return True
        return False

    def _put_back(self) -> None:
        replaced = self._was_replaced()
        for m, buffers, plain in self._places:
            m._buffers.clear()
            m._buffers.update(buffers)
            if replaced:
                # A buffer that was assigned anew goes with the numbers beside it, such
                # as the length that a table of positions was computed for.
                vars(m).update(plain)

    def close(self) -> None:
        """Put buffers and modes back.

        Raises:
            HypergradError: a buffer too large to be copied was changed.
        """
        self._put_back()
        for m, training in self._modes:
            m.training = training
        changed = [b for b, version in self._versions if b._version != version]
        if changed:
            named = self._module.named_buffers()
            lost = [name for name, b in named if any(b is c for c in changed)]
            msg = (
                f"evaluating the loss changed the buffers {lost}, which were not copied "
                f"(above {LARGEST_COPIED_BUFFER} bytes, or part of a graph). Put those "
                "modules in eval mode while hypergradients are estimated."
            )
            raise HypergradError(msg)


class BufferCopies:
    """Copies of a module's buffers for what runs on the module itself; reused."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, module: nn.Module) -> tuple[tuple[bool, ...], Callable[[], None]]:
        """Copy buffers and train/eval modes.

        Args:
            module: the module.

        Returns:
            The modes, and a function that puts all back. Buffers too large to be copied,
            or part of a graph, stay as they are.
        """
        modes, places = _walk(module)
        own = {id(b): b for _, bs, _ in places for b in bs.values() if b is not None}
        kept = {i: b for i, b in own.items() if _is_copied(b) and not b.is_inference()}
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode(mode=False), torch.no_grad():
            for i, buffer in kept.items():
                held = self._copies.get(i)
                if held is None or not _alike(held[1], buffer) or held[0] is not buffer:
                    held = buffer, torch.empty_like(buffer)
                copies[i] = held
            tree.copy([c for _, c in copies.values()], [b for b, _ in copies.values()])
        self._copies = copies

        def put_back() -> None:
            for m, training in modes:
                m.training = training
            for m, buffers, plain in places:
                m._buffers.clear()
                m._buffers.update(buffers)
                vars(m).update(plain)
            with torch.inference_mode(mode=False):
                pairs = copies.values()
                tree.copy([buffer for buffer, _ in pairs], [c for _, c in pairs])

        return _shared(tuple([on for _, on in modes])), put_back


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
