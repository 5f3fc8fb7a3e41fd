"""How large what is carried through inner steps becomes, and whether it explodes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from hypergrad import tree
from hypergrad.point import Point
from hypergrad.reporting import report
from hypergrad.tree import Params

__all__ = ["AdjointNorms", "TangentNorms"]

_LOOK_EVERY = 64
"""Steps from one look at the device to the next. What waits to be looked at stays
bounded, an overflow ends the walk early, and a short one has no look of its own."""
_BEGINNING = 3
"""Steps in which a tangent begins."""
_REMEDY = (
    "so that the hypergradient holds for no change of λ that is seen. The inner steps "
    "amplify, usually because their learning rate is too high: lower it, clip inner "
    "gradients (max_grad_norm), or look through fewer steps."
)


class _Norms(ABC):
    """Norms that are read with other numbers, so that no step waits for the device.

    Args:
        point: where the estimate is taken.
        num_steps: how many inner steps it goes through.
    """

    way: ClassVar[str]

    def __init__(self, point: Point, num_steps: int) -> None:
        self._tally = point.tally
        self._num_steps = num_steps
        kinds = {t.dtype for t in point.problem.inner_params.values()}
        self._dtype = max(kinds, key=lambda kind: torch.finfo(kind).eps)
        self._eps = torch.finfo(self._dtype).eps
        self._watched = 0

    def _watch(self, each: Sequence[Params], found: Sequence[list[float]]) -> None:
        """Have norms read with what is read next, each into a list of its own."""
        for params, norms in zip(each, found, strict=True):
            self._tally.watch([tree.size(params)], norms.extend)
        self._watched += 1
        if self._watched % _LOOK_EVERY == 0:
            self._tally.read()

    def says_where(self, number: int) -> Callable[[str], str]:
        """Return what makes of a message one that names a step.

        Args:
            number: of the step, 0 for the oldest.
        """

        def where(message: str) -> str:
            place = f"{self.way}, at inner step {number + 1} of {self._num_steps}"
            return f"{place}: {message} {self._explosion()}".strip()

        return where

    def warn(self) -> str:
        """Warn of what exploded; return what was said, or nothing."""
        said = self._explosion()
        if said:
            report(said)
        return said

    @abstractmethod
    def _explosion(self) -> str:
        """Return what to say of an explosion in what was read; nothing without one."""


class AdjointNorms(_Norms):
    """Norms of ∂f/∂w at the end of each inner step that is walked back through.

    Args:
        point: where the estimate is taken; `point.v` is the newest adjoint.
        num_steps: how many steps are walked back through.
    """

    way: ClassVar[str] = "walking back"

    def __init__(self, point: Point, num_steps: int) -> None:
        super().__init__(point, num_steps)
        self._newest_first: list[float] = []
        self._at_start: list[float] = []
        self.watch(point.v)

    def watch(self, adjoint: Params) -> None:
        """Have the norm after a step read with what is read next."""
        self._watch([adjoint], [self._newest_first])

    def watch_start(self, adjoint: Params) -> None:
        """Likewise before the oldest step, where that is an answer itself."""
        self._watch([adjoint], [self._at_start])

    def oldest_first(self) -> tuple[float, ...]:
        """Return those after each step that were read."""
        return tuple(reversed(self._newest_first))

    def _explosion(self) -> str:
        # Newest first, so that the first of the largest is where it came to be so large.
        norms = self._newest_first + self._at_start
        first, largest = norms[0], max(norms)
        if not 0.0 < first < math.inf or not self._eps * largest > first:
            return ""
        number = self._num_steps - norms.index(largest)
        place = f"after step {number}" if number else "at their start"
        return (
            f"The adjoint ∂f/∂w grew {largest / first:.2g}-fold, from {first:.2g} at the "
            f"end of the {self._num_steps} inner steps to {largest:.2g} {place}: "
            f"by more than 1/ε = {1 / self._eps:.2g} of {self._dtype}. One "
            "rounding of w there changes the outer loss as much as a move of the last w "
            f"by its own size, {_REMEDY}"
        )


class TangentNorms(_Norms):
    """Norms of how w changes along directions of λ, after each inner step.

    A tangent begins where λ first acts, at the largest of the few norms from there: the
    first alone may be next to nothing, as Adam's first step hardly depends on what scales
    its gradient. From there to its largest, each step adds one of its own, so that n of
    them reach n times the first where nothing amplifies.

    Args:
        point: where the estimate is taken.
        num_steps: how many steps are gone through.
        directions: how many directions go through them together.
    """

    way: ClassVar[str] = "going forward"

    def __init__(self, point: Point, num_steps: int, directions: int) -> None:
        super().__init__(point, num_steps)
        self._oldest_first: list[list[float]] = [[] for _ in range(directions)]

    def watch(self, tangents: Sequence[Params]) -> None:
        """Have the norms after a step read with what is read next."""
        self._watch(tangents, self._oldest_first)

    def _explosion(self) -> str:
        worst, said = 1.0, ""
        for norms in self._oldest_first:
            begun = next((i for i, norm in enumerate(norms) if norm), None)
            if begun is None:
                continue
            few = norms[begun : begun + _BEGINNING]
            first, largest = max(few), max(norms)
            begun, number = begun + few.index(first), norms.index(largest)
            growth = largest / first
            excess = self._eps * growth / (number - begun + 1)
            if not excess > worst or not math.isfinite(growth):
                continue
            worst = excess
            said = (
                f"The derivative of w along a direction of λ grew {growth:.2g}-fold, from "
                f"{first:.2g} after inner step {begun + 1} to {largest:.2g} after step "
                f"{number + 1} of {self._num_steps}: by more than 1/ε = "
                f"{1 / self._eps:.2g} of {self._dtype} for each step. One rounding of w "
                f"before changes w there by its own size, {_REMEDY}"
            )
        return said
