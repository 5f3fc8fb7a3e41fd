"""Splits and draws of examples: by strata, whose shares they keep, or by whole groups."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from bidora.errors import UserError

__all__ = ["draw_groups", "draw_in_proportion", "grouped_split", "stratified_split"]


def stratified_split(
    strata: Sequence[Any],
    fraction: float,
    seed: int,
    names: Mapping[Any, str] | None = None,
) -> tuple[list[int], list[int]]:
    """Split indices in two parts that keep the shares of the strata.

    Args:
        strata: The stratum of each example.
        fraction: Share of the examples in the second part, in (0, 1). At least as
            many examples as there are strata go there.
        seed: Equal seeds give equal splits.
        names: Names of the strata, for the error message.

    Returns:
        Sorted indices of the first and of the second part.

    Raises:
        UserError: If `fraction` is out of range, a stratum has a single example, or
            there are too few examples for one of every stratum in each part.

    Example:
        >>> stratified_split([0, 0, 1, 1], 0.5, seed=0)[1].__len__()
        2
    """
    from sklearn.model_selection import train_test_split

    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"a validation fraction of {fraction} leaves one part empty; choose a "
            "number between 0 and 1, such as 0.2."
        )
    counts = Counter(strata)
    names = {s: str(names[s]) if names else str(s) for s in counts}
    lonely = sorted(names[s] for s, n in counts.items() if n < 2)
    if lonely:
        raise UserError(
            f"class(es) with a single example: {', '.join(lonely[:8])}. A stratified "
            "split needs one for each part; add examples of them, or drop them with "
            "--min-examples-per-class."
        )
    held = max(math.ceil(fraction * len(strata)), len(counts))
    if len(strata) - held < len(counts):
        raise UserError(
            f"{len(strata)} examples of {len(counts)} classes are too few to hold "
            f"{held} of them back; add examples, or choose a smaller fraction than "
            f"{fraction}."
        )
    first, second = train_test_split(
        list(range(len(strata))),
        test_size=held,
        stratify=list(strata),
        random_state=seed,
    )
    return sorted(first), sorted(second)


def draw_in_proportion(strata: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Draw indices, each stratum by its share and at least once.

    Shares are rounded down, and what is left goes to those that lost most by it.

    Args:
        strata: The stratum of each example.
        count: How many to draw, fewer than there are.
        seed: Equal seeds give equal draws.

    Returns:
        Sorted indices.

    Raises:
        UserError: If that is fewer than one of each stratum.

    Example:
        >>> drawn = draw_in_proportion(["a"] * 6 + ["b"] * 3 + ["c"], 5, seed=0)
        >>> [sum(i in part for i in drawn) for part in (range(6), range(6, 9), [9])]
        [3, 1, 1]
    """
    places: dict[Hashable, list[int]] = {}
    for place, stratum in enumerate(strata):
        places.setdefault(stratum, []).append(place)
    if len(places) > count:
        raise UserError(
            f"{count} of {len(strata)} examples are too few for one of each of the "
            f"{len(places)} classes. Ask for more."
        )
    shares = {s: len(found) * count / len(strata) for s, found in places.items()}
    taken = {s: max(1, int(share)) for s, share in shares.items()}
    while (left := count - sum(taken.values())) != 0:
        lost = {s: shares[s] - taken[s] for s in shares}
        if left > 0:
            taken[max(lost, key=lost.__getitem__)] += 1
        else:  # to have one of each, the strata with most above their share give
            taken[min((s for s in lost if taken[s] > 1), key=lost.__getitem__)] -= 1
    dealer = random.Random(seed)
    return sorted(i for s, n in taken.items() for i in dealer.sample(places[s], n))


def grouped_split(
    groups: Sequence[Hashable], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split indices in two parts, of which each has all or nothing of a group.

    Args:
        groups: The group of each example.
        fraction: Share of the groups in the second part, in (0, 1), rounded up.
        seed: Equal seeds give equal splits.

    Returns:
        Sorted indices of the first and of the second part.

    Raises:
        UserError: If `fraction` is out of range, or one part would be empty.

    Example:
        >>> first, second = grouped_split(["a", "a", "b", "b"], 0.5, seed=0)
        >>> sorted([first, second])
        [[0, 1], [2, 3]]
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"a validation fraction of {fraction} leaves one part empty; choose a "
            "number between 0 and 1, such as 0.2."
        )
    names = list(dict.fromkeys(groups))
    held = math.ceil(fraction * len(names))
    if held >= len(names):
        raise UserError(
            f"{len(groups)} examples of {len(names)} different inputs are too few to hold "
            f"{held} of these back, and those of one input stay together; add examples, or "
            f"choose a smaller fraction than {fraction}."
        )
    chosen = set(random.Random(seed).sample(names, held))
    parts: tuple[list[int], list[int]] = [], []
    for index, group in enumerate(groups):
        parts[group in chosen].append(index)
    return parts


def draw_groups(groups: Sequence[Hashable], count: int, seed: int) -> list[int]:
    """Draw whole groups in an order at random, as many as fit.

    Args:
        groups: The group of each example.
        count: The most examples to draw.
        seed: Equal seeds give equal draws.

    Returns:
        Sorted indices.

    Raises:
        UserError: If no group is as small as `count`.

    Example:
        >>> draw_groups(["a", "a", "b", "b"], 3, seed=0) in ([0, 1], [2, 3])
        True
    """
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    order = list(places)
    random.Random(seed).shuffle(order)
    drawn: list[int] = []
    for group in order:
        if len(drawn) + len(places[group]) <= count:
            drawn += places[group]
    if not drawn:
        raise UserError(
            f"{count} of {len(groups)} examples are too few: those of one input stay "
            f"together, and the smallest such group has "
            f"{min(map(len, places.values()))}. Ask for more."
        )
    return sorted(drawn)
