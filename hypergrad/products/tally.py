"""Counts of evaluations, and device numbers that are looked at together."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hypergrad import tree
from hypergrad.errors import NonFiniteError

__all__ = ["Tally", "check_finite_loss", "direction_not_finite"]

Look = Callable[[Sequence[float]], None]
"""Called with numbers once they are read; raises where one is not as it should be."""


@dataclass
class Tally:
    """Count evaluations of the model, and gather what has to be looked at.

    A look at a number of the device makes the host wait for it. So numbers are handed to
    `watch` as they are computed, and looked at where a number is needed anyway.

    Attributes:
        n_forward: forward passes on one (micro-)batch.
        n_backward: backward passes, first and second order alike.
        n_hvp: second-derivative products.
        where: makes of a message about what is watched from now on one that says where
            that was; None where there is nothing to say.

    Example:
        >>> import torch
        >>> tally = Tally()
        >>> tally.watch_loss("inner", torch.tensor(2.0))
        >>> tally.read(torch.tensor(3.0))
        [3.0]
    """

    n_forward: int = 0
    n_backward: int = 0
    n_hvp: int = 0
    where: Callable[[str], str] | None = field(default=None, repr=False, compare=False)
    _pending: list[tuple[Sequence[Tensor], Look, Callable[[str], str] | None]] = field(
        default_factory=list, repr=False, compare=False
    )
    _latest: tuple[Sequence[str], Sequence[Tensor], Callable[[str], str]] | None = (
        field(default=None, repr=False, compare=False)
    )

    def watch(self, numbers: Sequence[Tensor], look: Look) -> None:
        """Have numbers looked at with the next ones that are read.

        Args:
            numbers: tensors of one entry.
            look: called with their values.
        """
        self._name_latest()
        self._pending.append((numbers, look, self.where))

    def watch_loss(self, level: str, loss: Tensor) -> None:
        """Have a loss looked at: it must be finite."""
        self.watch([loss], lambda values: check_finite_loss(level, *values))

    def watch_direction(self, direction: Mapping[str, Tensor]) -> None:
        """Have the direction of a product looked at: it must be finite."""
        self._watch(
            list(direction),
            list(direction.values()),
            lambda _, size: direction_not_finite(size),
        )

    def watch_finite(
        self, names: Sequence[str], tensors: Sequence[Tensor], say: Callable[[str], str]
    ) -> list[Tensor]:
        """Have tensors looked at: no entry may be NaN or infinite.

        Args:
            names: their names.
            tensors: what to look at.
            say: makes the message of the names of those that are not finite.

        Returns:
            The norm of each, on its device.
        """
        return self._watch(names, tensors, lambda bad, _: say(bad))

    def watch_latest(
        self, names: Sequence[str], tensors: Sequence[Tensor], say: Callable[[str], str]
    ) -> None:
        """Have tensors looked at as `watch_finite` does, unless more of their kind follow.

        For products of a solver, which looks at each by numbers of its own: only one that
        it refuses has still to be named.

        Args:
            names: their names.
            tensors: what to look at.
            say: makes the message of the names of those that are not finite.
        """
        self._latest = names, tensors, say

    def _name_latest(self) -> None:
        """Have the latest product looked at in its turn."""
        latest, self._latest = self._latest, None
        if latest is not None:
            self.watch_finite(*latest)

    def _watch(
        self,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        say: Callable[[str, float], str],
    ) -> list[Tensor]:
        # Held weakly: what is large is not kept for the sake of a look at it.
        held = [weakref.ref(t) for t in tensors]

        def look(values: Sequence[float]) -> None:
            if all(map(math.isfinite, values)):
                return
            bad: list[str] = []
            worst = 0.0
            for name, size, reference in zip(names, values, held, strict=True):
                tensor = reference()
                if math.isinf(size) and tensor is not None and tensor.numel():
                    (size,) = tree.read([tensor.abs().max()])  # not its square
                if not math.isfinite(size):
                    bad.append(name)
                    worst = size
            if bad:
                raise NonFiniteError(say(", ".join(bad[:6]), worst))

        sizes = tree.sizes(tensors)
        self.watch(sizes, look)
        return sizes

    def read(self, *numbers: Tensor | float) -> list[float]:
        """Return numbers of the device, and look at all that is watched.

        Args:
            *numbers: tensors of one entry.

        Returns:
            Their values; the host waits once.

        Raises:
            NonFiniteError: the first of what is watched that is not as it should be.
        """
        self._name_latest()
        pending, self._pending = self._pending, []
        watched = [number for each, *_ in pending for number in each]
        found = tree.read([*watched, *numbers])
        start = 0
        for each, look, where in pending:
            try:
                look(found[start : start + len(each)])
            except NonFiniteError as error:
                if where is None:
                    raise
                raise NonFiniteError(where(str(error))) from error
            start += len(each)
        return found[start:]


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
