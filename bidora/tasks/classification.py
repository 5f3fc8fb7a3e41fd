"""One class for each text, or for each pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bidora.data.source import Source
from bidora.tasks.base import Rows, Schema
from bidora.tasks.classes import OneClass
from bidora.tasks.labels import is_number, joined_names, some_of
from bidora.tasks.text import TextTask

__all__ = ["Classification"]


@dataclass(frozen=True, kw_only=True)
class Classification(OneClass, TextTask):
    """Classes that exclude each other.

    Labels are words, whole numbers or truth values. Their order is the source's own
    where it has one, else that of numbers by size and of words by the alphabet.

    Args:
        text_column: Column of the text; None for one with a usual name.
        text_pair_column: Column of the second text; None for none, unless both columns
            have usual names.
        label_column: Column of the class; None for one with a usual name.
        metric: `accuracy`, `f1_macro`, `matthews_correlation`, or `f1` of class 1 of
            two; None for the data set's own, or else accuracy.
        min_examples_per_class: Classes with fewer examples in train are left out.

    Example:
        >>> from bidora.data.table import Table
        >>> rows = tuple((f"text {i}", "ab"[i % 2]) for i in range(8))
        >>> places = tuple(f"line {i + 1}" for i in range(8))
        >>> table = Table("t.csv", ("text", "label"), rows, places)
        >>> Classification().schema(Source("t.csv", {"train": table})).label_names
        ('a', 'b')
    """

    name: ClassVar[str] = "classification"

    def schema(self, source: Source) -> Schema:
        """Find the columns and the classes, and whether texts are proteins."""
        found = super().schema(source)
        proteins = self.holds_proteins(source, found.settings)
        return replace(found, settings={**found.settings, "proteins": proteins})

    def other_type(self, names: Sequence[str]) -> str:
        """Return the type of task of numbers, or of several labels."""
        other = "regression" if all(map(is_number, names)) else "multilabel"
        return f", another kind of task with --task-type {other}"

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell columns, classes with their counts, and what looks odd."""
        return [*super().describe(rows, schema), *_other_types(schema.label_names)]


def _other_types(names: Sequence[str]) -> list[str]:
    """Tell of names that look like those of another type of task."""
    told: list[str] = []
    numbers = [n for n in names if is_number(n)]
    if len(numbers) > 5 and len(numbers) == len(names):
        told.append(
            f"warning: all {len(names)} classes are numbers ({some_of(names)}); if they "
            "measure something, use --task-type regression."
        )
    joined = joined_names(names)
    if joined:
        told.append(
            f"warning: {len(joined)} classes look like several labels joined "
            f"({some_of(joined)}); if they are, use --task-type multilabel."
        )
    return told
