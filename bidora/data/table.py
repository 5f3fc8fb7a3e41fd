"""Rows that know where they stand in their source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from bidora.errors import UserError

__all__ = ["Table", "name_column", "same_column"]


@dataclass(frozen=True)
class Table:
    """Rows with named columns, and where each row stands in its source.

    Values are as the source has them: words from csv and tsv, what JSON has from jsonl,
    lists of words from column files. What they mean is the task's to say.

    Args:
        origin: File or data set, as the user named it.
        columns: Column names, in order.
        rows: One value for each column and row.
        lines: A word for the place of each row, such as `line 3`.
        class_names: Names of the classes that the values of a column count, for the
            columns whose source says so; their order is the source's own.
        bad: What is wrong with rows that could not be read, each with its place; such
            rows are not among `rows`.
        folder: Where paths in the rows start from; None for the folder of the file
            `origin`.
        remedy: How such a source comes to a column that it lacks.

    Example:
        >>> Table("t.csv", ("text",), (("one",),), ("line 2",)).place(0)
        't.csv, line 2'
    """

    origin: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    lines: tuple[str, ...]
    class_names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    bad: tuple[str, ...] = ()
    folder: str | None = None
    remedy: str = "if the first line holds no names, give them with --column-names"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        """Return a column's values, one a row."""
        index = self.columns.index(column)
        return [row[index] for row in self.rows]

    def place(self, row: int) -> str:
        """Return where a row stands, for a message."""
        return f"{self.origin}, {self.lines[row]}"

    def select(self, indices: Sequence[int]) -> Table:
        """Return the rows at `indices`, in that order."""
        return Table(
            self.origin,
            self.columns,
            tuple(self.rows[i] for i in indices),
            tuple(self.lines[i] for i in indices),
            self.class_names,
            folder=self.folder,
            remedy=self.remedy,
        )


def name_column(
    table: Table, given: str | None, option: str, usual: Sequence[str]
) -> str:
    """Return the column that was named, or the one with a usual name.

    Args:
        table: Where to look.
        given: What the user called it; None to look for a usual name.
        option: The setting that names it, for messages.
        usual: Usual names, the first that is there is taken.

    Returns:
        A name in `table.columns`.

    Raises:
        UserError: If there is no such column; it names the nearest.

    Example:
        >>> table = Table("t.csv", ("id", "text"), (), ())
        >>> name_column(table, None, "--text-column", ("text", "sentence"))
        'text'
    """
    available = ", ".join(map(repr, table.columns))
    if given is not None:
        if given in table.columns:
            return given
        near = get_close_matches(given, table.columns, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"{table.origin} has no column {given!r} ({option}); its columns are "
            f"{available}.{hint}"
        )
    for name in usual:
        if name in table.columns:
            return name
    raise UserError(
        f"{table.origin} has no column with a usual name ({', '.join(usual)}); its "
        f"columns are {available}. Choose one with {option}, or, {table.remedy}."
    )


def same_column(table: Table, column: str) -> str:
    """Return a column of the training data, which other rows must have too.

    No option names it: the training chose it.

    Args:
        table: Where to look.
        column: What the training data calls it.

    Returns:
        The name.

    Raises:
        UserError: If there is no such column; it says which one to rename.

    Example:
        >>> same_column(Table("new.csv", ("id", "text"), (), ()), "text")
        'text'
    """
    if column in table.columns:
        return column
    available = ", ".join(map(repr, table.columns))
    near = get_close_matches(column, table.columns, n=1)
    which = f"column {near[0]!r}" if near else "the column"
    nameless = table.origin.endswith((".csv", ".tsv"))
    raise UserError(
        f"{table.origin} has no column {column!r}; its columns are {available}. Rename "
        f"{which} to {column!r}, as in the training data"
        + (f", or, {Table.remedy}." if nameless else ".")
    )
