"""Any number of labels for each text, or for each pair of texts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table, name_column, same_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.labels import (
    SEPARATORS,
    BadValueError,
    alike,
    as_list,
    class_names_of,
    class_of,
    count_text,
    guess_separator,
    indicator_columns,
    ordered,
    shown,
    some_of,
    truth,
)
from bidora.tasks.metrics import (
    MULTILABEL_METRICS,
    choose_metric,
    multilabel_scores,
    outputs,
)
from bidora.tasks.text import LABEL_COLUMNS, TextTask

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MultiLabel", "iterative_split"]


@dataclass(frozen=True, kw_only=True)
class MultiLabel(TextTask):
    """Labels that do not exclude each other, such as the topics of an article.

    They are lists in a jsonl file, words joined by a separator in one column, or one
    column of zeros and ones for each label. A label is predicted where its probability
    is above one half.

    Args:
        text_column: Column of the text; None for one with a usual name.
        text_pair_column: Column of the second text; None for none, unless both columns
            have usual names.
        label_column: Column of the labels; None for one with a usual name.
        label_columns: Columns of zeros and ones, one a label; None to find them where
            there is no `label_column`.
        label_separator: What joins labels in one column; None for that of `;`, `|`
            and `,` that seems to.
        metric: `f1_micro` or `f1_macro`; None for the data set's own, or else micro F1.
        min_examples_per_class: Labels with fewer examples in train are left out; their
            examples stay, without them.
        allow_empty: Whether an example may have no label; None for yes where labels are
            lists or columns, and no where an empty cell may be a missing one.

    Example:
        >>> rows = tuple((f"text {i}", ["a;b", "b"][i % 2]) for i in range(4))
        >>> places = tuple(f"line {i + 2}" for i in range(4))
        >>> table = Table("t.csv", ("text", "label"), rows, places)
        >>> MultiLabel().schema(Source("t.csv", {"train": table})).label_names
        ('a', 'b')
    """

    name: ClassVar[str] = "multilabel"
    main_metric: ClassVar[str] = "f1_micro"
    usual_label_columns: ClassVar[Sequence[str]] = (
        "labels",
        "topics",
        "tags",
        "categories",
        *LABEL_COLUMNS,
    )

    label_columns: Sequence[str] | None = None
    label_separator: str | None = None
    min_examples_per_class: int = 1
    allow_empty: bool | None = None

    def schema(self, source: Source) -> Schema:
        """Find the columns, the form of the labels, and the labels of train."""
        settings, given = self._form(source)
        counts = {
            part: _count(table, settings)
            for part, table in source.parts.items()
            if _has_labels(table, settings)
        }
        train = counts["train"]
        names = list(given) if given is not None else ordered(train)
        rare = [n for n in names if 0 < train[n] < self.min_examples_per_class]
        kept = [n for n in names if n not in rare]
        if not any(train[n] for n in kept):
            raise UserError(
                f"{source.train.origin} has no label with at least "
                f"{self.min_examples_per_class} examples; choose another column with "
                "--label-column, or a smaller number with --min-examples-per-class."
            )
        metric = self.metric or source.hints.get("metric") or self.main_metric
        known = {*kept, *rare}
        return Schema(
            self.name,
            {
                **settings,
                "proteins": self.holds_proteins(source, settings),
                "min_examples_per_class": self.min_examples_per_class,
            },
            tuple(kept),
            choose_metric(metric, MULTILABEL_METRICS),
            {
                "rare": {n: {p: c[n] for p, c in counts.items()} for n in rare},
                "unknown": {
                    part: unknown
                    for part, found in counts.items()
                    if (unknown := {n: c for n, c in found.items() if n not in known})
                },
            },
        )

    def _form(self, source: Source) -> tuple[dict[str, Any], Sequence[str] | None]:
        """Return the settings that say how labels are written, and their given order."""
        table, hints = source.train, source.hints
        several = self.label_columns or hints.get("label_columns")
        column = self.label_column or hints.get("label_column")
        if column is None and several is None:
            texts = set(self.text_columns(source).values())
            there = (set(self.usual_label_columns) & set(table.columns)) - texts
            several = None if there else indicator_columns(table, texts)
        if several:
            several = [name_column(table, n, "--label-columns", ()) for n in several]
            empty = True if self.allow_empty is None else self.allow_empty
            texts = self.text_columns(source)
            return {**texts, "label_columns": several, "allow_empty": empty}, several
        columns = self.columns(source)
        column = columns["label_column"]
        values = table.values(column)
        given = class_names_of(table, column)
        is_list = any(as_list(v) is not None for v in values)
        empty = is_list if self.allow_empty is None else self.allow_empty
        settings = {**columns, "allow_empty": empty}
        if is_list:
            return settings, given
        separator = self.label_separator or hints.get("label_separator")
        separator = separator or guess_separator(values)
        if separator is None:
            raise UserError(
                f"{table.origin}: no value of column {column!r} is a list, and none holds "
                f"one of {' '.join(SEPARATORS)}, which join several labels. Name what "
                "joins them with --label-separator, or use --task-type classification."
            )
        return {**settings, "label_separator": separator}, given

    def read_labels(self, table: Table, schema: Schema) -> Sequence[Any]:
        """Return the sorted indices of each row's labels, without those left out."""
        index = {name: i for i, name in enumerate(schema.label_names)}
        return [
            found
            if isinstance(found, BadValueError)
            else sorted(index[name] for name in found if name in index)
            for found in _read(table, schema.settings)
        ]

    def targets(self, labels: Sequence[Any], schema: Schema) -> list[Any]:
        """Return one number a label: 1.0 where it holds, as the loss takes it."""
        made = [[0.0] * len(schema.label_names) for _ in labels]
        for row, held in zip(made, labels, strict=True):
            for label in held:
                row[label] = 1.0
        return made

    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that pads texts, and gives labels as the loss takes them."""
        return partial(_as_floats, super().collator(processor))

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell columns, labels with their counts, and what looks odd."""
        names = schema.label_names
        labels = {
            p: r.columns["labels"] for p, r in rows.items() if "labels" in r.columns
        }
        counts = {
            part: Counter(names[i] for held in found for i in held)
            for part, found in labels.items()
        }
        train = counts.get("train", Counter())
        often = sorted(names, key=lambda n: -train[n])
        lines = super().describe(rows, schema)
        lines.insert(1, f"{len(names)} labels: {count_text(counts, often)}")
        for part, found in labels.items():
            none = sum(not held for held in found)
            each = sum(map(len, found)) / max(1, len(found))
            lines.append(
                f"{part}: {each:.2f} labels an example; {none:,} of {len(found):,} "
                "have none."
            )
        return [*lines, *_oddities(counts, schema)]

    def split(
        self, rows: Rows, schema: Schema, fraction: float, seed: int
    ) -> tuple[list[int], list[int]]:
        """Split examples so that every label keeps its share, as far as that goes."""
        del schema
        return iterative_split(rows.columns["labels"], fraction, seed)

    def model_kwargs(self, schema: Schema) -> dict[str, Any]:
        """Return the number of labels, their names, and binary cross-entropy."""
        names = schema.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "multi_label_classification",
        }

    def metrics(
        self, predictions: np.ndarray, labels: np.ndarray, schema: Schema
    ) -> dict[str, float]:
        """Return micro and macro F1 of the labels with a probability above one half."""
        del schema
        # A probability above one half is a positive score before the sigmoid.
        return multilabel_scores((outputs(predictions) > 0).astype(int), labels)

    def answers(
        self,
        predictions: np.ndarray,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Return the labels, and `p(NAME)`, the probability of each."""
        from scipy.special import expit

        del rows, labels
        names = schema.label_names
        return [
            {
                "labels": [n for n, p in zip(names, row, strict=True) if p > 0.5],
                **{f"p({n})": float(p) for n, p in zip(names, row, strict=True)},
            }
            for row in expit(outputs(predictions))
        ]


def iterative_split(
    labels: Sequence[Sequence[int]], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split examples in two parts that keep each label's share, rare labels first.

    Iterative stratification [STV11, Algorithm 1]. Differs from it in two things. Each
    example goes where the counts of its labels, and that of all examples, come nearest
    to their shares in squares; there, it goes where the rarest label is lacking in
    number, so that rare labels all go to the larger part. And examples are dealt in
    random order: in the file's order, the second part would be its end.

    Where no example has two labels, each count is within one of its share.

    Args:
        labels: The labels of each example.
        fraction: Share of the second part, in (0, 1).
        seed: Equal seeds give equal splits.

    Returns:
        Sorted indices of the first and of the second part.

    Raises:
        UserError: If `fraction` is out of range, or a part would be empty.

    Example:
        >>> first, second = iterative_split([[0], [0], [1], [1]], 0.5, seed=0)
        >>> len(first), len(second)
        (2, 2)
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"a validation fraction of {fraction} leaves one part empty; choose a "
            "number between 0 and 1, such as 0.2."
        )
    dealer = random.Random(seed)
    order = list(range(len(labels)))
    dealer.shuffle(order)
    left: dict[int, dict[int, None]] = {}
    for example in order:
        for label in labels[example]:
            left.setdefault(label, {})[example] = None
    # How many more went to the second part than its share is, by label and of all.
    excess: dict[int | None, float] = dict.fromkeys((None, *left), 0.0)
    parts: tuple[list[int], list[int]] = ([], [])

    def deal(example: int) -> None:
        counts = (None, *labels[example])
        # (e + 1 - f)² < (e - f)², summed, is: the mean of e is below f - 1/2.
        mean = sum(excess[c] for c in counts) / len(counts)
        side = int(mean < fraction - 0.5)
        parts[side].append(example)
        for count in counts:
            excess[count] += side - fraction
        for label in labels[example]:
            del left[label][example]

    # The dict's order is random: labels of like number come in no order of names.
    while rest := [label for label in left if left[label]]:
        for example in list(left[min(rest, key=lambda label: len(left[label]))]):
            deal(example)
    for example in order:
        if not labels[example]:
            deal(example)
    if not all(parts):
        raise UserError(
            f"{len(labels)} examples are too few to hold a share of {fraction} back; "
            "add examples, or choose another fraction."
        )
    return sorted(parts[0]), sorted(parts[1])


def _as_floats(
    pad: Callable[[list[Any]], dict[str, Any]], features: list[Any]
) -> dict[str, Any]:
    batch = pad(features)
    # `Dataset.map` keeps the type of a column that was there: lists of whole numbers.
    if "labels" in batch:
        batch["labels"] = batch["labels"].float()
    return batch


def _has_labels(table: Table, settings: Mapping[str, Any]) -> bool:
    wanted = settings.get("label_columns") or [settings["label_column"]]
    return set(wanted) <= set(table.columns)


def _read(table: Table, settings: Mapping[str, Any]) -> list[Any]:
    """Return the set of names in each row, or what is wrong with it."""
    if "label_columns" in settings:
        columns = settings["label_columns"]
        for column in columns:
            same_column(table, column)
        rows = zip(*(table.values(column) for column in columns), strict=True)
        return [_held(columns, values, settings) for values in rows]
    column = same_column(table, settings["label_column"])
    given = class_names_of(table, column)
    read: list[Any] = []
    for value in table.values(column):
        try:
            read.append(_several(value, given, settings))
        except BadValueError as error:
            read.append(BadValueError(f"column {column!r} {error}"))
    return read


def _held(
    columns: Sequence[str], values: Sequence[Any], settings: Mapping[str, Any]
) -> set[str] | BadValueError:
    truths = [truth(value) for value in values]
    if None in truths:
        at = truths.index(None)
        return BadValueError(
            f"column {columns[at]!r} holds {shown(repr(values[at]))}, and not 0 or 1"
        )
    held = {column for column, truth in zip(columns, truths, strict=True) if truth}
    if not held and not settings["allow_empty"]:
        return BadValueError("no label holds")
    return held


def _several(
    value: Any, given: Sequence[str] | None, settings: Mapping[str, Any]
) -> set[str]:
    separator = settings.get("label_separator")
    found = as_list(value)
    if found is None and isinstance(value, str) and separator:
        found = [part for part in value.split(separator) if part.strip()]
    if found is None:
        found = [value]
    if not found and not settings["allow_empty"]:
        raise BadValueError("holds no label")
    return {class_of(one, given) for one in found}


def _count(table: Table, settings: Mapping[str, Any]) -> Counter[str]:
    read = _read(table, settings)
    return Counter(n for held in read if isinstance(held, set) for n in held)


def _oddities(counts: Mapping[str, Counter[str]], schema: Schema) -> list[str]:
    names, rare = schema.label_names, schema.details["rare"]
    told: list[str] = []
    if rare:
        fewest = schema.settings["min_examples_per_class"]
        told.append(
            f"labels with fewer than {fewest} examples in train are left out: "
            f"{some_of(ordered(rare))}; their examples stay, without them."
        )
    for part, unknown in schema.details["unknown"].items():
        some = ", ".join(f"{shown(n)!r} ({c:,})" for n, c in list(unknown.items())[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        told.append(
            f"{part} has labels that train lacks: {some}{more}. No model can learn them; "
            "they are left out of the truth, as is usual, and their examples stay."
        )
    for part, found in counts.items():
        missing = [n for n in names if not found[n]]
        if missing:
            told.append(
                f"{len(missing)} of {len(names)} labels have no example in {part}; each "
                "counts 0 in its macro F1."
            )
    for group in alike(dict.fromkeys(names, 0)):
        some = ", ".join(f"{n!r} ({counts['train'][n]:,})" for n in group)
        told.append(
            f"warning: the labels {some} differ in spelling alone; if they are one, "
            "write them in one way."
        )
    return told
