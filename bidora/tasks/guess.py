"""Which type of task some data is, where nobody has said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bidora.data.source import Source
from bidora.data.table import Table, name_column
from bidora.errors import UserError
from bidora.tasks.classification import Classification
from bidora.tasks.images import IMAGE_COLUMNS, holds_images
from bidora.tasks.labels import (
    SEPARATORS,
    BadValueError,
    as_list,
    class_name,
    class_names_of,
    has_decimal_commas,
    indicator_columns,
    ordered,
    parts_of,
    read_number,
    some_of,
)
from bidora.tasks.multilabel import MultiLabel
from bidora.tasks.regression import Regression

__all__ = ["guess_task_type"]

FEW = 5
"""Numbers that count classes from 0 are so few, or the user is asked."""

_WRITTEN = (
    ("instruction", ("messages",)),
    ("instruction", ("conversations",)),
    ("instruction", ("instruction", "input", "output")),
    ("instruction", ("prompt", "completion")),
    ("generation", ("mr", "ref")),
)
"""Names of columns that data with answers in words has, and hardly any other."""

_TOKENS = ("tokens", "words", "text", "sentence")
_TAGS = ("ner_tags", "tags", "pos_tags", "labels", "label")
_LABELS = tuple(
    dict.fromkeys(
        name
        for task in (Classification, Regression, MultiLabel)
        for name in task.usual_label_columns
    )
)


def guess_task_type(source: Source, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the type of task that the data is, and why it is taken for that.

    What the user chose goes first, then what is known of the data set, then its values.

    Args:
        source: The examples.
        settings: The user's settings by name; those that are None count as not given.

    Returns:
        A name of `TASKS`, and a reason for the user to read.

    Raises:
        UserError: If the label column is not found, or its values may be of two types:
            the message asks for `--task-type`.

    Example:
        >>> rows = tuple((f"text {i}", f"{i}.5") for i in range(9))
        >>> table = Table("t.csv", ("text", "score"), rows, ("",) * 9)
        >>> guess_task_type(Source("t.csv", {"train": table}), {})[0]
        'regression'
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if "task_type" in given:
        return given["task_type"], "chosen with --task-type"
    if "task_type" in source.hints:
        return source.hints["task_type"], f"known of {source.name}"
    for name in ("label_separator", "label_columns"):
        if name in given:
            return "multilabel", f"chosen with --{name.replace('_', '-')}"
    table = source.train
    known = {**source.hints, **given}
    tagged = _tagged(table, known)
    if tagged:
        return "tagging", tagged
    pictured = _pictured(table, given)
    if pictured:
        return "images", pictured
    for kind, columns in _WRITTEN:
        if set(columns) <= set(table.columns):
            return kind, f"the columns are called {' and '.join(columns)}"
    texts = _texts(source, given)
    label = known.get("label_column")
    if label is None and not (set(_LABELS) & set(table.columns)) - texts:
        several = indicator_columns(table, texts)
        if several:
            return "multilabel", f"{len(several)} columns hold 0 and 1 alone"
    usual = [name for name in _LABELS if name not in texts]
    column = name_column(table, label, "--label-column", usual)
    return _by_values(table, column)


def _texts(source: Source, given: Mapping[str, Any]) -> set[str]:
    task = Classification(
        text_column=given.get("text_column"),
        text_pair_column=given.get("text_pair_column"),
    )
    return set(task.text_columns(source).values())


def _tagged(table: Table, known: Mapping[str, Any]) -> str:
    """Return why the rows look like tagged sentences; nothing where they don't."""

    def first(name: str | None, usual: Sequence[str]) -> str | None:
        names = usual if name is None else (name,)
        return next((n for n in names if n in table.columns), None)

    tokens = first(known.get("text_column"), _TOKENS)
    tags = first(known.get("label_column"), _TAGS)
    if tokens is None or tags is None or tokens == tags:
        return ""
    pairs = list(zip(table.values(tokens), table.values(tags), strict=True))
    fitting = sum(
        isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b)
        for a, b in pairs
    )
    if 2 * fitting <= len(pairs):
        return ""
    return f"column {tags!r} holds a tag for each word of column {tokens!r}"


def _pictured(table: Table, given: Mapping[str, Any]) -> str:
    """Return why the examples look like images; nothing where they don't."""
    if given.get("image_column"):
        return "chosen with --image-column"
    if given.get("text_column"):
        return ""
    for name in IMAGE_COLUMNS:
        if name in table.columns and holds_images(table, name):
            return f"column {name!r} holds images"
    return ""


def _by_values(table: Table, column: str) -> tuple[str, str]:
    values = table.values(column)
    where = f"column {column!r}"
    lists = sum(as_list(value) is not None for value in values)
    if lists:
        return "multilabel", f"{where} holds lists ({lists:,} of {len(values):,} rows)"
    if class_names_of(table, column) is not None:
        return "classification", f"{where} counts classes that are known by name"
    numbers = _numbers(values)
    if numbers:
        return _by_numbers(table, where, numbers, len(values))
    names = Counter(_readable(values, class_name))
    joined = _by_parts(table, where, names)
    return joined or ("classification", f"{where} holds {len(names):,} different words")


def _readable(values: Sequence[Any], read: Callable[[Any], Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        try:
            found.append(read(value))
        except BadValueError:
            continue  # told with its place when the rows are read
    return found


def _numbers(values: Sequence[Any]) -> list[float]:
    """Return the numbers, if nearly all that is there is one."""
    comma = has_decimal_commas(values)
    there = [
        v
        for v in values
        if v is not None and not (isinstance(v, str) and not v.strip())
    ]
    numbers = _readable(there, lambda v: read_number(v, comma=comma))
    return numbers if len(numbers) >= 0.9 * len(there) else []


def _by_numbers(
    table: Table, where: str, numbers: Sequence[float], rows: int
) -> tuple[str, str]:
    distinct = sorted(set(numbers))
    low, high = distinct[0], distinct[-1]
    found = (
        f"{where} holds {len(distinct):,} different numbers from {low:g} to {high:g}"
    )
    is_whole = all(n.is_integer() for n in distinct)
    if len(distinct) <= 2 and is_whole:
        return "classification", found
    if len(distinct) > FEW and not is_whole:
        return "regression", f"{found}, with fractions"
    if len(distinct) > max(20, rows // 2):
        return "regression", f"{found} in {rows:,} rows"
    if (
        is_whole
        and low <= 0
        and high == low + len(distinct) - 1
        and len(distinct) <= FEW
    ):
        return "classification", f"{found}, all of them in between"
    raise UserError(
        f"{table.origin}: {found} in {rows:,} rows, and whether they name classes or "
        "measure something can't be known. Choose --task-type classification "
        f"({len(distinct)} classes) or --task-type regression (numbers from {low:g} to "
        f"{high:g})."
    )


def _by_parts(table: Table, where: str, names: Counter[str]) -> tuple[str, str] | None:
    """Say whether words are several labels, joined; ask where that is doubtful."""
    for separator in SEPARATORS:
        joined, again, labels = parts_of(names, separator)
        if not joined:
            continue
        rows = sum(names[name] for name in joined)
        found = (
            f"{where} holds {some_of(ordered(joined))} and such in {rows:,} of "
            f"{sum(names.values()):,} rows"
        )
        # A comma is part of many a name; a semicolon or a bar is of few.
        if 2 * len(again) >= len(joined) and (separator != "," or len(again) > 1):
            return "multilabel", f"{found}: labels joined by {separator!r}"
        if separator != ",":
            raise UserError(
                f"{table.origin}: {found}; whether {separator!r} joins several labels "
                f"can't be known. Choose --task-type multilabel ({len(labels)} labels) or "
                f"--task-type classification ({len(names)} classes)."
            )
    return None
