"""The IOB schemes: `B-` and `I-` with a type for words of an entity, `O` for others.

In IOB2 every entity begins with `B-`. In IOB1 it begins with `I-`, and with `B-` where it
follows another one of its type at once. A reader need not know which of them it has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

__all__ = ["Entity", "entities_of", "is_iob", "odd_tags", "scheme_of", "to_iob2"]

Entity = tuple[str, int, int]
"""Type, first word, and the word after the last."""

_TAG = re.compile(r"O|[BI](?:-\S+)?")


def is_iob(tag: str) -> bool:
    """Return whether a tag is of the IOB schemes; the type may be left out.

    Example:
        >>> is_iob("B-PER"), is_iob("I"), is_iob("S-PER"), is_iob("NN")
        (True, True, False, False)
    """
    return _TAG.fullmatch(tag) is not None


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Return a sentence's tags with a `B-` at the beginning of every entity.

    Tags that are IOB2 already come back as they are.

    Args:
        tags: In either scheme.

    Example:
        >>> to_iob2(["I-PER", "I-PER", "B-PER", "O", "I-LOC"])
        ['B-PER', 'I-PER', 'B-PER', 'O', 'B-LOC']
    """
    return [
        f"B{tag[1:]}" if tag != "O" and _begins(before, tag) else tag
        for before, tag in zip(["O", *tags], tags, strict=False)
    ]


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """Return a sentence's entities, in either scheme, as conlleval reads them.

    Args:
        tags: One a word.

    Returns:
        Type, first word, and the word after the last, of each.

    Example:
        >>> entities_of(["B-PER", "I-PER", "O", "B-LOC"])
        [('PER', 0, 2), ('LOC', 3, 4)]
    """
    found: list[Entity] = []
    for index, (before, tag) in enumerate(zip(["O", *tags], tags, strict=False)):
        if tag == "O":
            continue
        start = index if _begins(before, tag) else found.pop()[1]
        found.append((tag[2:], start, index + 1))
    return found


def _begins(before: str, tag: str) -> bool:
    """Return whether an entity begins at `tag`; what follows `O` or another type does."""
    return tag[0] == "B" or before == "O" or before[1:] != tag[1:]


def scheme_of(sentences: Iterable[Sequence[str]]) -> Literal["IOB1", "IOB2"]:
    """Return the scheme that more tags agree with, by how entities begin.

    Args:
        sentences: The tags of each.

    Example:
        >>> scheme_of([["O", "I-LOC"]]), scheme_of([["O", "B-LOC"]])
        ('IOB1', 'IOB2')
    """
    letters = Counter(tag[0] for tags in sentences for tag in _first_tags(tags))
    return "IOB1" if letters["I"] > letters["B"] else "IOB2"


def odd_tags(tags: Sequence[str], scheme: str) -> int:
    """Return how many tags a scheme does not have where they stand.

    Args:
        tags: Of a sentence.
        scheme: `IOB1` or `IOB2`.

    Example:
        >>> odd_tags(["O", "I-LOC"], "IOB1"), odd_tags(["O", "I-LOC"], "IOB2")
        (0, 1)
    """
    letter = "I" if scheme == "IOB2" else "B"
    return sum(tag[0] == letter for tag in _first_tags(tags))


def _first_tags(tags: Sequence[str]) -> Iterator[str]:
    """Yield tags of entities that follow no word of their type: the schemes differ here."""
    for before, tag in zip(["O", *tags], tags, strict=False):
        if tag != "O" and (before == "O" or before[1:] != tag[1:]):
            yield tag
