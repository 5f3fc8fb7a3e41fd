"""What a value of a label column means, and names of classes that can be compared."""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from bidora.data.table import Table

__all__ = [
    "SEPARATORS",
    "BadValueError",
    "alike",
    "as_list",
    "class_name",
    "class_names_of",
    "class_of",
    "count_text",
    "guess_separator",
    "has_decimal_commas",
    "indicator_columns",
    "is_number",
    "joined_names",
    "nearest",
    "ordered",
    "parts_of",
    "plain",
    "read_number",
    "shown",
    "some_of",
    "truth",
    "whole_number",
]

LARGEST = 1e100
"""Numbers from here on are refused: their squares would leave what a float holds."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
SEPARATORS = (";", "|", ",")
"""What joins several labels in one cell, the likeliest first."""
_TRUTHS = {
    "0": False,
    "0.0": False,
    "false": False,
    "1": True,
    "1.0": True,
    "true": True,
}
_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_WHOLE = re.compile(r"([+-]?\d+)\.0+", re.ASCII)


class BadValueError(ValueError):
    """Report a value that can't be read; the row goes, and the others stay."""


def class_name(value: Any) -> str:
    """Return the name of the class that a value stands for.

    JSON has one kind of number, so `1` and `1.0` are one class; `true` is another.

    Args:
        value: What the source has: a word, a number, a truth value.

    Returns:
        A word without blanks around it.

    Raises:
        BadValueError: If it is missing, not finite, or holds several values.

    Example:
        >>> class_name(1.0), class_name(1), class_name(True), class_name(" a ")
        ('1', '1', 'true', 'a')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise BadValueError("holds no label")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isinf(value):
            raise BadValueError(f"holds {value}, which is no class")
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        try:
            return str(value)
        except ValueError:
            raise BadValueError("holds a number of too many digits") from None
    if isinstance(value, str):
        return plain(value, "label")
    raise BadValueError(
        f"holds a {type(value).__name__}, and a class is a word or a number"
    )


def class_of(value: Any, given: Sequence[str] | None) -> str:
    """Return the name of a value's class, where a source may list its classes.

    Args:
        value: What the source has; numbers count the classes that the source lists.
        given: Those classes, or None.

    Raises:
        BadValueError: If it is no class.

    Example:
        >>> class_of(1, ("no", "yes")), class_of("no", ("no", "yes")), class_of(1, None)
        ('yes', 'no', '1')
    """
    name = class_name(value)
    if given is None or (isinstance(value, str) and name in given):
        return name
    if not name.removeprefix("-").isdecimal() or len(name) > 9:
        return name
    index = int(name)
    if index == -1:
        raise BadValueError("holds -1, which stands for a hidden label")
    if not 0 <= index < len(given):
        raise BadValueError(f"holds {name}, and the classes are 0 to {len(given) - 1}")
    return given[index]


def read_number(value: Any, *, comma: bool = False) -> float:
    """Return the number that a value is.

    Args:
        value: What the source has: a number, or a word.
        comma: Whether words have a decimal comma.

    Raises:
        BadValueError: If it is none, or not finite.

    Example:
        >>> read_number("3.5"), read_number("3,5", comma=True), read_number(2)
        (3.5, 3.5, 2.0)
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadValueError("holds no number")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadValueError(f"holds {shown(repr(value))}, which is no number")
    word = value.strip() if isinstance(value, str) else value
    if isinstance(word, str) and comma and "." not in word:
        word = word.replace(",", ".")
    if (
        isinstance(word, str) and "_" in word
    ):  # Python's own spelling, and nobody's else
        raise BadValueError(f"holds {shown(repr(word))}, which is no number")
    try:
        number = float(word)
    except (ValueError, OverflowError):
        raise BadValueError(f"holds {shown(repr(value))}, which is no number") from None
    if not abs(number) < LARGEST:
        raise BadValueError(
            f"holds {shown(repr(value))}, which is not finite or too large"
        )
    return number


def has_decimal_commas(values: Iterable[Any]) -> bool:
    """Return whether words have a decimal comma: some do, and none has a point.

    Example:
        >>> has_decimal_commas(["3,5", "2"]), has_decimal_commas(["3,5", "2.5"])
        (True, False)
    """
    words = [v for v in values if isinstance(v, str)]
    return any(_COMMA.fullmatch(w.strip()) for w in words) and not any(
        is_number(w.strip()) and "." in w for w in words
    )


def plain(value: str, what: str) -> str:
    """Return a word without the blanks around it.

    Args:
        value: The word.
        what: What it is, for the message.

    Raises:
        BadValueError: If nothing is left, or it is no valid Unicode.
    """
    word = value.strip()
    if not word or (what == "label" and word.lower() == "nan"):
        raise BadValueError(f"holds no {what}")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise BadValueError(
            f"holds half a character (a lone surrogate) in its {what}"
        ) from None
    return word


def whole_number(name: str) -> str:
    """Return `1` for `1.0`, and other names as they are.

    Example:
        >>> whole_number("1.0"), whole_number("1.50"), whole_number("v1.0")
        ('1', '1.50', 'v1.0')
    """
    found = _WHOLE.fullmatch(name)
    return found[1] if found else name


def is_number(name: str) -> bool:
    """Return whether a name is spelled like a number."""
    return _NUMBER.fullmatch(name) is not None


def ordered(names: Iterable[str]) -> list[str]:
    """Return names in order: numbers by size, then words by the alphabet.

    Example:
        >>> ordered(["b", "10", "9", "a", "0.5"])
        ['0.5', '9', '10', 'a', 'b']
    """

    def key(name: str) -> tuple[int, Decimal, str]:
        # Not int(): Python refuses words of more than 4,300 digits.
        return (0, Decimal(name), name) if is_number(name) else (1, Decimal(0), name)

    return sorted(names, key=key)


def class_names_of(table: Table, column: str) -> tuple[str, ...] | None:
    """Return the classes that a column's source lists, in its order; None without."""
    return dict(table.class_names).get(column)


def indicator_columns(table: Table, texts: set[str]) -> list[str]:
    """Return the columns that hold zeros and ones alone, if there are several.

    Args:
        table: The rows.
        texts: Columns of texts, which are passed over.
    """
    found = [
        column
        for column in table.columns
        if column not in texts
        and {truth(v) for v in table.values(column)} == {False, True}
    ]
    return found if len(found) > 1 else []


def guess_separator(values: Sequence[Any]) -> str | None:
    """Return what seems to join the labels of some words; None where nothing does.

    Args:
        values: The words, or what else a column holds.

    Example:
        >>> guess_separator(["Law, tax;Energy", "Law, tax", "Energy"])
        ';'
    """
    words = [v for v in values if isinstance(v, str)]
    for separator in SEPARATORS:
        joined, again, _ = parts_of(words, separator)
        if joined and 2 * len(again) >= len(joined):
            return separator
    counts = {s: len(parts_of(words, s)[0]) for s in SEPARATORS}
    best = max(SEPARATORS, key=lambda s: counts[s])
    return best if counts[best] else None


def parts_of(
    names: Iterable[str], separator: str
) -> tuple[list[str], list[str], list[str]]:
    """Return what a separator makes of names.

    Args:
        names: Words of a label column.
        separator: What may join labels in them.

    Returns:
        The different names that have several parts; those of them whose parts all
        occur in other names too, as labels do; and the different parts.

    Example:
        >>> parts_of(["a;b", "a", "b", "c;d"], ";")
        (['a;b', 'c;d'], ['a;b'], ['a', 'b', 'c', 'd'])
    """
    parts = {
        name: {part for one in name.split(separator) if (part := one.strip())}
        for name in names
    }
    seen = Counter(part for found in parts.values() for part in found)
    joined = [name for name, found in parts.items() if len(found) > 1]
    again = [name for name in joined if all(seen[part] > 1 for part in parts[name])]
    return joined, again, ordered(seen)


def truth(value: Any) -> bool | None:
    """Return what 0, 1, true or false says; None for another value."""
    return _TRUTHS.get(str(value).strip().lower())


def as_list(value: Any) -> list[Any] | None:
    """Return a list, also one that a word spells; None for what is no list."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        return None
    word = value.strip()
    if word[:1] != "[" or word[-1:] != "]":
        return None
    for parse in (json.loads, ast.literal_eval):  # as JSON, and as Python, writes it
        try:
            found = parse(word)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) else None
    return None


def nearest(name: str, names: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?`, or nothing where no name is near."""
    if len(name) > 100:  # no slip of the pen, and slow to compare
        return ""
    folded = {_fold(n): n for n in names}
    found = get_close_matches(_fold(name), folded, n=1)
    return f" Did you mean {folded[found[0]]!r}?" if found else ""


def alike(counts: Mapping[str, int]) -> list[list[str]]:
    """Return groups of names that differ in case, blanks or hyphens alone.

    Example:
        >>> alike({"Billing": 3, "billing": 2, "other": 5})
        [['Billing', 'billing']]
    """
    groups: dict[str, list[str]] = {}
    for name in ordered(counts):
        groups.setdefault(_fold(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def shown(name: str, width: int = 40) -> str:
    """Return a name for a message, cut where it is long."""
    return name if len(name) <= width else f"{name[: width - 1]}…"


def count_text(parts: Mapping[str, Counter[str]], names: Sequence[str]) -> str:
    """Return names with their counts in each part, such as `a (train 3, test 1)`.

    Args:
        parts: Counts by name, by part.
        names: Names, in the order in which they are told.
    """
    told = [
        f"{shown(name)} ({', '.join(f'{p} {c[name]:,}' for p, c in parts.items())})"
        for name in names[:20]
    ]
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join(told + more)


def some_of(names: Sequence[str]) -> str:
    """Return the first names, quoted, and how many more there are."""
    few = ", ".join(repr(shown(n)) for n in names[:8])
    return few if len(names) <= 8 else f"{few} and {len(names) - 8} more"


def joined_names(names: Sequence[str]) -> list[str]:
    """Return the names that seem to be others, joined by one of `SEPARATORS`."""
    known = set(names)
    return [
        name
        for separator in SEPARATORS
        for name in parts_of(names, separator)[0]
        # A comma is part of many a name.
        if separator != "," or any(p.strip() in known for p in name.split(","))
    ]


def _fold(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold()
    # A number's sign and point are not punctuation: -1 is not 1.
    return folded if is_number(folded) else re.sub(r"[\s_\-./]+", " ", folded).strip()
