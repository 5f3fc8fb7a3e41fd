"""Which of many steps to keep, and how to walk back over the others.

To walk back over steps, the state before each is needed, newest first. Where only some
states are kept, those between are reached by taking steps again from the last one kept.
With room for `held` states at once, [GW08, Ch. 12] tells the fewest steps that have to
be taken again, and which states to hold on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import comb
from typing import TypeVar

__all__ = ["LEAST", "enough", "n_retaken", "spacing", "walk_back"]

LEAST = 3
"""Fewest states: one that is kept, and two on the way back from it."""
_MOST_RETAKEN = 1.5
_T = TypeVar("_T")


@cache
def n_retaken(length: int, free: int) -> int:
    """Return how many steps are taken again to walk back over `length` of them.

    Args:
        length: number of steps, of which the state before the first is kept.
        free: number of other states that may be held at once.

    Example:
        With room for one, each walk starts at the first: 3 + 2 + 1.

        >>> n_retaken(4, 1), n_retaken(4, 2), n_retaken(4, 3)
        (6, 4, 3)
    """
    times = 0
    while comb(free + times, free) < length:
        times += 1
    return times * length - comb(free + times, free + 1)


@cache
def _cut(length: int, free: int) -> int:
    """Return how many steps to go ahead before the next state is held."""
    if free == 1:
        return length - 1
    return min(
        range(1, length),
        key=lambda n: n + n_retaken(length - n, free - 1) + n_retaken(n, free),
    )


@cache
def spacing(n_steps: int, held: int) -> int:
    """Return from how many steps to keep one, where `held` states may be held at once.

    Two of them at least are left for the way back, in which states that are kept are not
    given up.

    Example:
        Of 20 steps two are kept, ten apart; three more are held on the way back.

        >>> spacing(20, 5)
        10
    """
    if held >= n_steps:
        return 1
    return min(
        range(-(-n_steps // (held - 2)), n_steps + 1),
        # The larger of two that are equally good: fewer are kept from step to step.
        key=lambda every: (_cost(n_steps, held, every), -every),
    )


def _cost(n_steps: int, held: int, every: int) -> int:
    parts, rest = divmod(n_steps, every)
    free = held - parts - bool(rest)
    cost = parts * n_retaken(every, free)
    return cost + n_retaken(rest, free) if rest else cost


@cache
def enough(n_steps: int) -> int:
    """Return how many states suffice to retake each step 1.5 times at most, on average.

    Example:
        >>> [enough(n) for n in (3, 5, 20, 50, 1000)]
        [3, 3, 5, 8, 43]
    """
    held = LEAST
    while held < n_steps:
        if _cost(n_steps, held, spacing(n_steps, held)) <= _MOST_RETAKEN * n_steps:
            break
        held += 1
    return held


def walk_back(
    kept: Sequence[_T | None], held: int, advance: Callable[[int, _T], _T]
) -> Iterator[_T]:
    """Yield the states before each step, newest first.

    Args:
        kept: the states; None for one that is reached again. The first is not None.
        held: how many states may be held at once, those of `kept` included. One on the
            way back is held in any case.
        advance: `(i, state before step i) -> state before step i + 1`.

    Yields:
        The states. To keep to `held`, drop each before asking for the next; it is not
        held here, so that its memory is free as soon as it is dropped.

    Example:
        >>> list(walk_back([0, None, None, 30, None], 4, lambda i, s: s + 10))
        [40, 30, 20, 10, 0]
    """
    free = max(1, held - sum(state is not None for state in kept))
    end = len(kept)
    for start in range(end - 1, -1, -1):
        state = kept[start]
        if state is not None:
            yield from _between(state, start, end, free, advance)
            end = start


def _between(
    state: _T, start: int, end: int, free: int, advance: Callable[[int, _T], _T]
) -> Iterator[_T]:
    while end - start > 1:
        cut = start + _cut(end - start, free)
        ahead = state
        for i in range(start, cut):
            ahead = advance(i, ahead)
        newer = _between(ahead, cut, end, free - 1, advance)
        del ahead
        yield from newer
        end = cut
    # What is handed out last is not held here any more.
    last = [state]
    del state
    yield last.pop()
