"""From named columns of a table to labelled examples, with errors that teach."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bidora.errors import UserError
from bidora.tasks.base import Examples

__all__ = ["Columns", "Table", "label_names_of", "to_examples"]

TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "review")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True)
class Table:
    """Rows with named columns, and where each row stands in its source.

    Args:
        origin: File or data set, as the user named it.
        columns: Column names, in order.
        rows: One value for each column and row.
        lines: A word for the place of each row, such as `line 3`.
    """

    origin: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    lines: tuple[str, ...]

    def values(self, column: str) -> list[Any]:
        """Return a column's values, one a row."""
        index = self.columns.index(column)
        return [row[index] for row in self.rows]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None means "find it by its usual name".

    Args:
        text: Column of the text.
        pair: Column of the second text, for sentence pairs.
        label: Column of the label.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None

    def resolve(self, table: Table) -> Columns:
        """Return the columns by name, each of them in the table.

        Raises:
            UserError: If a column is not there or cannot be guessed.

        Example:
            >>> table = Table("t.csv", ("id", "text", "label"), (), ())
            >>> Columns().resolve(table).text
            'text'
        """
        text = _pick(table, self.text, "--text-column", TEXT_COLUMNS)
        pair = self.pair
        if pair is not None:
            pair = _pick(table, pair, "--text-pair-column", ())
        elif self.text is None and text == "sentence1" and "sentence2" in table.columns:
            pair = "sentence2"
        label = _pick(table, self.label, "--label-column", LABEL_COLUMNS)
        chosen = [name for name in (text, pair, label) if name is not None]
        if len(set(chosen)) < len(chosen):
            raise UserError(
                f"{table.origin}: one column serves twice ({', '.join(chosen)}). The "
                "text, the second text and the label need a column each; name them "
                "with --text-column, --text-pair-column and --label-column."
            )
        return Columns(text, pair, label)

    @property
    def names(self) -> tuple[str, ...]:
        """The text column, or both, for the record."""
        return tuple(name for name in (self.text, self.pair) if name is not None)


def label_names_of(table: Table, column: str) -> tuple[str, ...]:
    """Return the distinct labels: numbers in order of size, words by the alphabet.

    Raises:
        UserError: If a label is missing, or nearly every row has its own.

    Example:
        >>> label_names_of(Table("t", ("y",), (("10",), ("9",)) * 9, ("",) * 18), "y")
        ('9', '10')
    """
    counts = Counter(_labels(table, column))
    if len(counts) > max(2, len(table.rows) // 2):
        raise UserError(
            f"{table.origin}: column {column!r} has {len(counts)} different values in "
            f"{len(table.rows)} rows, which looks like text or a measurement rather "
            "than a class. Name the column of classes with --label-column; "
            "regression is not in this version."
        )
    return tuple(sorted(counts, key=_label_order))


def to_examples(table: Table, columns: Columns, label_names: Sequence[str]) -> Examples:
    """Return the table's examples; `columns` must be resolved.

    Raises:
        UserError: If a text or label is missing, or a label is not in `label_names`.
        ValueError: If the columns were not resolved.
    """
    if columns.text is None or columns.label is None:
        raise ValueError("resolve the columns against the table first")
    if not table.rows:
        raise UserError(f"{table.origin} has no rows; give a file with examples.")
    index = {name: i for i, name in enumerate(label_names)}
    names = _labels(table, columns.label)
    unknown = sorted(set(names) - set(index))
    if unknown:
        raise UserError(
            f"{table.origin}: label(s) {', '.join(unknown[:8])} do not occur in the "
            f"training examples, whose labels are {', '.join(label_names)}. Training "
            "and test file must use the same labels in column "
            f"{columns.label!r}."
        )
    return Examples(
        texts=_texts(table, columns.text),
        labels=tuple(index[name] for name in names),
        pairs=None if columns.pair is None else _texts(table, columns.pair),
    )


def _pick(table: Table, wanted: str | None, option: str, usual: tuple[str, ...]) -> str:
    available = ", ".join(repr(name) for name in table.columns) or "none"
    if wanted is not None:
        if wanted in table.columns:
            return wanted
        raise UserError(
            f"{table.origin} has no column {wanted!r} ({option}); its columns are "
            f"{available}."
        )
    for name in usual:
        if name in table.columns:
            return name
    raise UserError(
        f"{table.origin} has no column with a usual name ({', '.join(usual)}); its "
        f"columns are {available}. Choose one with {option}, or, if the first line "
        "holds no names, give them with --column-names."
    )


def _texts(table: Table, column: str) -> tuple[str, ...]:
    texts = []
    for place, value in zip(table.lines, table.values(column), strict=True):
        text = "" if _missing(value) else str(value).strip()
        if not text:
            raise UserError(
                f"{table.origin}, {place}: column {column!r} is empty. Remove such "
                "rows, or choose another column with --text-column."
            )
        texts.append(text)
    return tuple(texts)


def _labels(table: Table, column: str) -> list[str]:
    labels = []
    for place, value in zip(table.lines, table.values(column), strict=True):
        if isinstance(value, list | dict):
            raise UserError(
                f"{table.origin}, {place}: column {column!r} holds a "
                f"{type(value).__name__}, and a class is a word or a whole number. "
                "Choose another column with --label-column."
            )
        label = "" if _missing(value) else str(value).strip()
        if label.lower() in ("", "nan"):
            raise UserError(
                f"{table.origin}, {place}: column {column!r} has no label "
                f"({value!r}). Remove rows without one, or choose another column "
                "with --label-column."
            )
        labels.append(label)
    return labels


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _label_order(label: str) -> tuple[int, int, str]:
    whole = label.removeprefix("-")
    if whole.isascii() and whole.isdigit():
        return (0, int(label), label)
    return (1, 0, label)
