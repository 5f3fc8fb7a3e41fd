"""Counts of evaluations, and device numbers that are looked at together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypergrad import _foreach as foreach
from hypergrad import tree
from hypergrad.errors import NonFiniteError

__all__ = ["Tally", "check_finite_loss", "direction_not_finite"]

Look = Callable[[float], None]
"""Called with a number once it is read; raises where it is not as it should be."""


@dataclass
class Tally:
    """Count evaluations of the model, and gather what has to be looked at.

    A look at a number of the device makes the host wait for it. So numbers are handed to
    `watch` as they are computed, and looked at where a number is needed anyway.

    Attributes:
        n_forward: forward passes on one (micro-)batch.
        n_backward: backward passes, first and second order alike.
        n_hvp: second-derivative products.

    Example:
        >>> tally = Tally()
        >>> tally.watch_loss("inner", torch.tensor(2.0))
        >>> tally.read(torch.tensor(3.0))
        [3.0]
    """

    n_forward: int = 0
    n_backward: int = 0
    n_hvp: int = 0
    _pending: list[tuple[Tensor, Look]] = field(
        default_factory=list, repr=False, compare=False
    )

    def watch(self, number: Tensor, look: Look) -> None:
        """Have a number looked at with the next ones that are read.

        Args:
            number: a tensor of one entry.
            look: called with its value.
        """
        self._pending.append((number, look))

    def watch_loss(self, level: str, loss: Tensor) -> None:
        """Have a loss looked at: it must be finite."""
        self.watch(loss, lambda value: check_finite_loss(level, value))

    def watch_direction(self, direction: Mapping[str, Tensor]) -> None:
        """Have the direction of a product looked at: it must be finite."""
        tensors = [t for t in direction.values() if t.numel()]
        if not tensors:
            return

        def look(value: float) -> None:
            if not math.isfinite(value):
                raise NonFiniteError(direction_not_finite(value))

        self.watch(_largest(_peaks(tensors)), look)

    def watch_finite(
        self, names: Sequence[str], tensors: Sequence[Tensor], say: Callable[[str], str]
    ) -> None:
        """Have tensors looked at: no entry may be NaN or infinite.

        Args:
            names: their names.
            tensors: what to look at.
            say: makes the message of the names of those that are not finite.
        """
        pairs = [(n, t) for n, t in zip(names, tensors, strict=True) if t.numel()]
        if not pairs:
            return
        names, peaks = [n for n, _ in pairs], _peaks([t for _, t in pairs])

        def look(value: float) -> None:
            if math.isfinite(value):
                return
            each = zip(names, tree.read(peaks), strict=True)
            bad = [n for n, peak in each if not math.isfinite(peak)]
            raise NonFiniteError(say(", ".join(bad[:6])))

        self.watch(_largest(peaks), look)

    def read(self, *numbers: Tensor | float) -> list[float]:
        """Return numbers of the device, and look at all that is watched.

        Args:
            *numbers: tensors of one entry.

        Returns:
            Their values; the host waits once.

        Raises:
            NonFiniteError: the first of what is watched that is not as it should be.
        """
        pending, self._pending = self._pending, []
        found = tree.read([*(number for number, _ in pending), *numbers])
        for (_, look), value in zip(pending, found, strict=False):
            look(value)
        return found[len(pending) :]


def _peaks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest size of an entry of each tensor; NaN where there is a NaN."""
    with torch.no_grad():
        peaks = list(foreach.norm(list(tensors), math.inf))
        first = peaks[0]
        if any(p.dtype != first.dtype or p.device != first.device for p in peaks):
            kind = tree.wide_dtype(first.device)
            peaks = [p.to(first.device, kind) for p in peaks]
    return peaks


def _largest(peaks: list[Tensor]) -> Tensor:
    return peaks[0] if len(peaks) == 1 else torch.stack(peaks).max()


def direction_not_finite(size: float) -> str:
    """Return what to say of the direction of a product with a norm of NaN or infinity."""
    return (
        f"the direction of a second-derivative product has norm {size}. The outer "
        "gradient or a solver's iterate overflowed, perhaps: scale the outer loss down, "
        "or raise damping."
    )


def check_finite_loss(level: str, loss: float) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        NonFiniteError: with its value.
    """
    if not math.isfinite(loss):
        msg = (
            f"the {level} loss is {loss}: a NaN or infinity in the batch or the "
            "parameters, or an overflow, is the usual cause. Check the batch; lower the "
            "learning rate of the level that diverged."
        )
        raise NonFiniteError(msg)
