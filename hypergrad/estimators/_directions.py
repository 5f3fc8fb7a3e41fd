"""Directions of λ that a derivative is taken along: each entry, or random signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from hypergrad._checks import check_count
from hypergrad.answer import EstimatorState
from hypergrad.tree import Params

__all__ = [
    "ONE_DIRECTION",
    "Directions",
    "NumDirections",
    "check_directions",
    "draws_of",
]

NumDirections = int | Literal["all"]
"""How many random directions, or all entries, each by itself."""
ONE_DIRECTION = {"direction": "it points along the one random direction that it takes"}
"""The law that an estimate from a single direction does not have."""
_DRAWS = "draws"


@dataclass(frozen=True)
class Directions:
    r"""The directions of one estimate.

    Where λ has no more entries than directions are asked for, they are its entries $e_i$,
    and $\nabla_i = \nabla\cdot e_i$. Else they are m vectors u of independent random
    signs, and $\tfrac1m\sum_j(\nabla\cdot u_j)\,u_j$ has the expectation ∇ and
    $E\,\|\hat\nabla - \nabla\|^2 = \tfrac{n-1}{m}\|\nabla\|^2$, n being the number of
    entries.

    They follow from `seed` and the number of estimates before alone, so that all ranks
    and devices have the same, and no generator of the program is drawn from.

    Attributes:
        outer: λ.
        wanted: how many directions, or `"all"` for the entries.
        seed: of the random ones.
        draws: how many estimates drew before this one.

    Example:
        >>> lam = {"a": torch.zeros(2), "b": torch.zeros(())}
        >>> len(Directions(lam, 8, 0, 0)), len(Directions(lam, 2, 0, 0))
        (3, 2)
        >>> Directions(lam, "all", 0, 0)[1]
        {'a': tensor([0., 1.])}
    """

    outer: Params
    wanted: NumDirections
    seed: int
    draws: int

    @classmethod
    def of(
        cls,
        outer: Params,
        wanted: NumDirections,
        seed: int,
        state: Mapping[str, Any],
    ) -> Directions:
        """Return those that follow on an estimate whose `state` was handed on."""
        return cls(outer, wanted, seed, int(state.get(_DRAWS, 0)))

    @property
    def state(self) -> EstimatorState:
        """What the next estimate must find, so that it draws others."""
        return {_DRAWS: torch.tensor(self.draws + 1)} if self.random else {}

    @property
    def entries(self) -> int:
        """Number of entries of λ."""
        return sum(t.numel() for t in self.outer.values())

    @property
    def random(self) -> bool:
        """Whether the directions are random, and the result an estimate."""
        return self.wanted != "all" and self.wanted < self.entries

    def __len__(self) -> int:
        return int(self.wanted) if self.random else self.entries

    def __getitem__(self, number: int) -> Params:
        """Return a direction; one along an entry names that entry's tensor alone."""
        if self.random:
            flat = torch.from_numpy(self._signs(number))
            sizes = [t.numel() for t in self.outer.values()]
            parts = torch.split(flat, sizes)
            return {
                n: part.reshape(t.shape).to(t.device, t.dtype)
                for (n, t), part in zip(self.outer.items(), parts, strict=True)
            }
        for name, t in self.outer.items():
            if number < t.numel():
                # Not like t, whose strides may leave no flat view.
                one = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
                one[number] = 1
                return {name: one.reshape(t.shape)}
            number -= t.numel()
        raise IndexError(number)

    def sum(self, slopes: Sequence[float]) -> Params:
        """Return the gradient, or its estimate, of the slopes along the directions."""
        numbers = np.asarray(slopes, dtype=np.float64)
        if self.random:
            flat = np.zeros(self.entries)
            for number, slope in enumerate(numbers):
                flat += slope * self._signs(number)
            numbers = flat / len(self)
        parts = torch.split(
            torch.from_numpy(numbers), [t.numel() for t in self.outer.values()]
        )
        return {
            n: part.reshape(t.shape).to(t.dtype).to(t.device)
            for (n, t), part in zip(self.outer.items(), parts, strict=True)
        }

    def _signs(self, number: int) -> np.ndarray[Any, np.dtype[np.int8]]:
        make = np.random.default_rng([self.seed, self.draws, number])
        return 2 * make.integers(0, 2, self.entries, dtype=np.int8) - 1


def draws_of(state: Mapping[str, Any]) -> EstimatorState:
    """Return the part of a state that has the next estimate draw other directions.

    Args:
        state: of an estimate.
    """
    return {_DRAWS: state[_DRAWS]} if _DRAWS in state else {}


def check_directions(num_directions: Any, seed: Any) -> None:
    """Refuse a number of directions, or a seed, that is none.

    Raises:
        TypeError: not a whole number.
        ValueError: no direction at all, an unknown word, or a negative seed.
    """
    if isinstance(num_directions, str):
        if num_directions != "all":
            msg = (
                f"num_directions={num_directions!r} must be 'all' or a whole number: how "
                "many random directions of λ to take the derivative along."
            )
            raise ValueError(msg)
    else:
        check_count("num_directions", num_directions)
    check_count("seed", seed, least=0)
