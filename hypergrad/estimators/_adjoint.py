"""How large the adjoint is on its way back through inner steps, and whether it explodes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hypergrad import tree
from hypergrad.point import Point
from hypergrad.reporting import report
from hypergrad.tree import Params

__all__ = ["AdjointNorms"]

_LOOK_EVERY = 64
"""Steps back from one look at the device to the next. What waits to be looked at stays
bounded, an overflow ends the walk early, and a short one has no look of its own."""


class AdjointNorms:
    """Norms of ∂f/∂w at the end of each inner step that is walked back through.

    They are read with other numbers of the estimate, so that no step waits for the
    device.

    Args:
        point: where the estimate is taken; `point.v` is the newest adjoint.
        num_steps: how many steps are walked back through.
    """

    def __init__(self, point: Point, num_steps: int) -> None:
        self._tally = point.tally
        self._num_steps = num_steps
        kinds = {t.dtype for t in point.problem.inner_params.values()}
        self._dtype = max(kinds, key=lambda kind: torch.finfo(kind).eps)
        self._newest_first: list[float] = []
        self._watched = 0
        self.watch(point.v)

    def watch(self, adjoint: Params) -> None:
        """Have a norm read with what is read next."""
        self._tally.watch([tree.size(adjoint)], self._newest_first.extend)
        self._watched += 1
        if self._watched % _LOOK_EVERY == 0:
            self._tally.read()

    def says_where(self, number: int) -> Callable[[str], str]:
        """Return what makes of a message one that names a step.

        Args:
            number: of the step, 0 for the oldest.
        """

        def where(message: str) -> str:
            place = f"walking back, at inner step {number + 1} of {self._num_steps}"
            return f"{place}: {message} {self._explosion()}".strip()

        return where

    def oldest_first(self) -> tuple[float, ...]:
        """Return those that were read."""
        return tuple(reversed(self._newest_first))

    def warn(self) -> str:
        """Warn of an adjoint that exploded; return what was said, or nothing."""
        said = self._explosion()
        if said:
            report(said)
        return said

    def _explosion(self) -> str:
        # Newest first, so that the first of the largest is where it came to be so large.
        first, largest = self._newest_first[0], max(self._newest_first, default=0.0)
        eps = torch.finfo(self._dtype).eps
        if not 0.0 < first < math.inf or not eps * largest > first:
            return ""
        number = self._num_steps - self._newest_first.index(largest)
        return (
            f"The adjoint ∂f/∂w grew {largest / first:.2g}-fold, from {first:.2g} at the "
            f"end of the {self._num_steps} inner steps to {largest:.2g} after step "
            f"{number}: by more than 1/ε = {1 / eps:.2g} of {self._dtype}. One rounding of "
            "w there changes the outer loss as much as a move of the last w by its own "
            "size, so that the hypergradient holds for no change of λ that is seen. The "
            "inner steps amplify, usually because their learning rate is too high: lower "
            "it, clip inner gradients (max_grad_norm), or look through fewer steps."
        )
