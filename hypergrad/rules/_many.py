"""Several tensors that the same formula is for, as one operand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad import _foreach as foreach
from hypergrad import tree

__all__ = ["Many"]

Factor = "Many | float | Sequence[float]"


class Many:
    """Tensors that are computed with together: one operation for all of them.

    A number stands for every tensor, a list of numbers for one each.

    Args:
        tensors: at least one.

    Example:
        >>> both = Many([torch.ones(2), torch.ones(3)])
        >>> [t.tolist() for t in 2 * both + 1]
        [[3.0, 3.0], [3.0, 3.0, 3.0]]
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __add__(self, other: Many | float) -> Many:
        return self._with(foreach.add, other)

    def __sub__(self, other: Many | float) -> Many:
        return self._with(foreach.sub, other)

    def __mul__(self, other: Many | float | Sequence[float]) -> Many:
        return self._with(foreach.mul, other)

    def __truediv__(self, other: Many | float | Sequence[float]) -> Many:
        return self._with(foreach.div, other)

    def __neg__(self) -> Many:
        return Many(foreach.neg(self.tensors))

    __radd__ = __add__
    __rmul__ = __mul__

    def plus(self, other: Many, factor: float) -> Many:
        """Return `self + factor * other`, rounded as torch's optimizers do."""
        return Many(foreach.add(self.tensors, other.tensors, alpha=factor))

    def plus_product(self, a: Many, b: Many, factor: float) -> Many:
        """Return `self + factor * a * b`, likewise."""
        found = foreach.addcmul(self.tensors, a.tensors, b.tensors, factor)
        return Many(found)

    def plus_quotient(self, a: Many, b: Many, factors: Sequence[float]) -> Many:
        """Return `self + factors * a / b`, likewise."""
        found = foreach.addcdiv(self.tensors, a.tensors, b.tensors, list(factors))
        return Many(found)

    def lerp(self, end: Many, weight: float) -> Many:
        """Return `self + weight * (end - self)`, likewise."""
        return Many(foreach.lerp(self.tensors, end.tensors, weight))

    def sqrt(self) -> Many:
        """Return square roots."""
        return Many(foreach.sqrt(self.tensors))

    def maximum(self, other: Many) -> Many:
        """Return the larger entries."""
        return self._with(foreach.maximum, other)

    def at_least(self, least: float) -> Many:
        """Return entries of at least a number."""
        return Many(foreach.clamp_min(self.tensors, least))

    def is_at_least(self, other: Many) -> Many:
        """Return 1 where an entry is at least the other's, else 0."""
        sign = foreach.sign((self - other).tensors)
        return Many(foreach.clamp_min(foreach.add(sign, 1), 0)).at_most(1)

    def at_most(self, most: float) -> Many:
        """Return entries of at most a number."""
        return Many(foreach.clamp_max(self.tensors, most))

    def sums(self) -> list[Tensor]:
        """Return the sum of each tensor's entries."""
        return [t.sum() for t in self.tensors]

    def zeros(self) -> Many:
        """Return zeros of the same shapes."""
        return Many([torch.zeros_like(t) for t in self.tensors])

    def copies(self) -> Many:
        """Return copies."""
        return Many(foreach.clone(self.tensors))

    def widened(self) -> Many:
        """Return the tensors in the finest dtype of their device."""
        return Many(tree.widened(self.tensors))

    def like(self, other: Many) -> Many:
        """Return the tensors in the dtypes of others of the same shapes."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        if all(a.dtype == b.dtype for a, b in pairs):
            return self
        found = other.copies()
        foreach.copy_(found.tensors, self.tensors)
        return found

    def _with(self, fn: Callable[..., Any], other: Any) -> Many:
        if isinstance(other, Many):
            other = other.tensors
        elif not isinstance(other, (int, float)):
            other = list(other)
        return Many(fn(self.tensors, other))
