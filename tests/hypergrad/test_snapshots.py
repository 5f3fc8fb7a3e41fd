"""The schedule that walks back over steps of which some are kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import pytest

from hypergrad._snapshots import LEAST, enough, n_retaken, spacing, walk_back


@cache
def fewest(length: int, free: int) -> float:
    """Return the fewest steps to take again, by trying every next state to hold."""
    if length <= 1:
        return 0
    if not free:
        return float("inf")
    return min(
        n + fewest(length - n, free - 1) + fewest(n, free) for n in range(1, length)
    )


@pytest.mark.parametrize("free", range(1, 7))
def test_the_formula_is_the_optimum(free: int) -> None:
    for length in range(1, 61):
        assert n_retaken(length, free) == fewest(length, free)


class State:
    """A number, and how many such there are."""

    alive: ClassVar[weakref.WeakSet[State]] = weakref.WeakSet()

    def __init__(self, at: int) -> None:
        self.at = at
        self.alive.add(self)


def walk(kept: list[int], n_steps: int, held: int) -> tuple[list[int], int, int]:
    """Return what was visited, how many were alive at most, and how many retaken."""
    states = [State(i) if i in kept else None for i in range(n_steps)]
    retaken: list[int] = []

    def advance(i: int, state: State) -> State:
        assert state.at == i
        most.append(len(State.alive))
        retaken.append(i)
        return State(i + 1)

    most, seen = [0], list[int]()
    back: Iterator[State] = walk_back(states, held, advance)
    for state in back:
        seen.append(state.at)
        most.append(len(State.alive))
        del state
    return seen, max(most), len(retaken)


CASES = [(n, held) for n in (1, 2, 3, 5, 20, 50) for held in (3, 4, 5, 8, 60)]


@pytest.mark.parametrize(("n_steps", "held"), CASES)
def test_a_walk_visits_each_once_in_order_and_keeps_to_its_room(
    n_steps: int, held: int
) -> None:
    every = spacing(n_steps, held)
    kept = list(range(0, n_steps, every))
    seen, most, retaken = walk(kept, n_steps, held)
    assert seen == list(range(n_steps))[::-1]
    assert most <= max(held, len(kept))
    free = held - len(kept)
    ends = [*kept[1:], n_steps]
    parts = [end - start for start, end in zip(kept, ends, strict=True)]
    assert retaken == (sum(n_retaken(n, free) for n in parts) if every > 1 else 0)
    if every > 1:
        assert free >= LEAST - 1


def test_snapshots_at_any_place_serve() -> None:
    for kept in ([0], [0, 1], [0, 13], [0, 3, 4, 17]):
        for held in (1, 3, 6):
            seen, most, _ = walk(kept, 20, held)
            assert seen == list(range(20))[::-1]
            assert most <= max(held, len(kept) + 1)


@pytest.mark.parametrize("held", [3, 4, 6])
def test_a_state_that_was_handed_out_is_not_held(held: int) -> None:
    kept: list[State | None] = [State(0), *[None] * 5]
    back = walk_back(kept, held, lambda _, state: State(state.at + 1))
    for at in (5, 4, 3, 2, 1):
        state = next(back)
        seen = weakref.ref(state)
        assert state.at == at
        del state
        assert seen() is None


def test_what_the_default_takes_again() -> None:
    for n in (2, 3, 4, 5, 10, 20, 50, 100, 1000):
        held = enough(n)
        kept = list(range(0, n, spacing(n, held)))
        assert LEAST <= held <= max(LEAST, 1.5 * n**0.5)
        parts = [min(spacing(n, held), n - i) for i in kept]
        free = held - len(kept)
        retaken = sum(n_retaken(p, free) for p in parts) if held < n else 0
        assert retaken <= 1.5 * n
