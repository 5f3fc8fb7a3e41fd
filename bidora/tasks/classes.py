"""One class for each example, whatever examples are: classes found, read, told, scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table, same_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.labelled import SKIP, LabelledTask
from bidora.tasks.labels import (
    BadValueError,
    alike,
    class_names_of,
    class_of,
    count_text,
    is_number,
    nearest,
    ordered,
    shown,
    some_of,
    whole_number,
)
from bidora.tasks.metrics import (
    CLASSIFICATION_METRICS,
    choose_metric,
    classification_scores,
    outputs,
    softmax,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["OneClass"]


@dataclass(frozen=True, kw_only=True)
class OneClass(LabelledTask):
    """What tasks share whose labels are classes that exclude each other.

    Labels are words, whole numbers or truth values. Their order is the source's own
    where it has one, else that of numbers by size and of words by the alphabet.

    Args:
        label_column: Column of the class; None for one with a usual name.
        metric: `accuracy`, `f1_macro`, `matthews_correlation`, or `f1` of class 1 of
            two; None for the data set's own, or else accuracy.
        min_examples_per_class: Classes with fewer examples in train are left out.
    """

    main_metric: ClassVar[str] = "accuracy"

    min_examples_per_class: int = 1

    def schema(self, source: Source) -> Schema:
        """Find the columns and the classes."""
        columns = self.columns(source)
        column = columns["label_column"]
        counts = {
            part: _count(_names(table, column))
            for part, table in source.parts.items()
            if column in table.columns
        }
        given = class_names_of(source.train, column)
        _refuse_mixed(source.train, column)
        # Words such as 1.0 are numbers only where every label is one.
        if given is None and all(is_number(whole_number(n)) for n in counts["train"]):
            counts = {part: _as_whole(found) for part, found in counts.items()}
        train = counts["train"]
        names = list(given) if given is not None else ordered(train)
        rare = [n for n in names if 0 < train[n] < self.min_examples_per_class]
        kept = [n for n in names if n not in rare]
        self._check(source.train, column, kept, train)
        metric = self.metric or source.hints.get("metric") or self.main_metric
        choose_metric(metric, CLASSIFICATION_METRICS)
        if metric == "f1" and len(kept) != 2:
            raise UserError(
                f"the metric f1 is that of class 1 of two, and column {column!r} has "
                f"{len(kept)} classes; choose f1_macro or accuracy with --metric."
            )
        known = {*kept, *rare}
        return Schema(
            self.name,
            {**columns, "min_examples_per_class": self.min_examples_per_class},
            tuple(kept),
            metric,
            {
                "rare": {n: {p: c[n] for p, c in counts.items()} for n in rare},
                "unknown": {
                    part: unknown
                    for part, found in counts.items()
                    if part != "train"
                    and (unknown := {n: c for n, c in found.items() if n not in known})
                },
            },
        )

    def _check(
        self, table: Table, column: str, names: Sequence[str], counts: Counter[str]
    ) -> None:
        used = [n for n in names if counts[n]]
        total = sum(counts[n] for n in used)
        if len(used) < 2:
            found = f"only {shown(used[0])!r}" if used else "no class"
            fewest = self.min_examples_per_class
            rarer = f" with at least {fewest} examples" if fewest > 1 else ""
            raise UserError(
                f"{table.origin}: column {column!r} holds {found}{rarer}, and a "
                "classification needs two classes or more. Choose another column with "
                "--label-column, or add examples of other classes."
            )
        if len(used) > max(2, total // 2):
            raise UserError(
                f"{table.origin}: column {column!r} has {len(used)} different values in "
                f"{total} rows, which looks like text or a measurement rather than a "
                "class. Choose another column with --label-column"
                f"{self.other_type(used)}, or leave rare classes out with "
                "--min-examples-per-class."
            )

    def other_type(self, names: Sequence[str]) -> str:
        """Return which type of task may suit values of which there are too many.

        Args:
            names: The values.

        Returns:
            The middle of a remedy, with a comma in front of it; nothing without one.
        """
        del names
        return ""

    def read_labels(self, table: Table, schema: Schema) -> Sequence[Any]:
        """Return the index of each row's class."""
        names = schema.label_names
        column = same_column(table, schema.settings["label_column"])
        known: dict[str, Any] = {name: i for i, name in enumerate(names)}
        known |= dict.fromkeys(schema.details["rare"], SKIP)
        found = _names(table, column)
        counts = _count(found)
        unknown: dict[str, BadValueError] = {}

        def index(name: str | BadValueError) -> Any:
            if isinstance(name, BadValueError):
                return name
            for spelling in (name, whole_number(name)):
                if spelling in known:
                    return known[spelling]
            if name not in unknown:
                count = counts[name]
                others = f" ({count:,} rows do)" if count > 1 else ""
                # A search for the nearest name takes a while where there are many.
                near = nearest(name, names) if len(unknown) < 20 else ""
                unknown[name] = BadValueError(
                    f"column {column!r} holds {shown(name)!r}{others}, which is no class "
                    f"of the training examples: {some_of(names)}.{near}"
                )
            return unknown[name]

        return [index(name) for name in found]

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell columns, classes with their counts, and what looks odd."""
        names = schema.label_names
        counts = {
            part: Counter(names[i] for i in read.columns["labels"])
            for part, read in rows.items()
            if "labels" in read.columns
        }
        lines = super().describe(rows, schema)
        lines.insert(1, f"{len(names)} classes: {count_text(counts, names)}")
        if schema.metric == "f1":
            lines.append(f"f1 is that of class {shown(names[1])!r}.")
        return [*lines, *self._contradicting(rows), *_oddities(counts, schema)]

    def _contradicting(self, rows: Mapping[str, Rows]) -> list[str]:
        """Warn of training examples that stand there twice, with different labels."""
        if "train" not in rows or "labels" not in rows["train"].columns:
            return []
        train = rows["train"]
        labels: dict[Hashable, set[int]] = {}
        contents = self.contents(train)
        for content, label in zip(contents, train.columns["labels"], strict=True):
            labels.setdefault(content, set()).add(label)
        torn = [content for content, found in labels.items() if len(found) > 1]
        if not torn:
            return []
        return [
            f"warning: {len(torn):,} {self.noun}(s) of train have several labels in "
            f"several rows, such as {self.spelled(train, contents.index(torn[0]))}; no "
            "model can learn both."
        ]

    def strata(self, rows: Rows, schema: Schema) -> Sequence[Hashable]:
        """Return the classes."""
        del schema
        return rows.columns["labels"]

    def model_kwargs(self, schema: Schema) -> dict[str, Any]:
        """Return the number of classes, their names, and cross-entropy."""
        names = schema.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            # Said always: a base that was fine-tuned before has its own.
            "problem_type": "single_label_classification",
        }

    def metrics(
        self, predictions: np.ndarray, labels: np.ndarray, schema: Schema
    ) -> dict[str, float]:
        """Return accuracy, macro F1 and the main metric."""
        chosen = outputs(predictions).argmax(axis=-1)
        return classification_scores(chosen, labels, schema.metric)

    def answers(
        self,
        predictions: np.ndarray,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Return the class, its probability `p`, and `p(NAME)` for every class."""
        del rows, labels
        names = schema.label_names
        return [
            {
                "label": names[int(p.argmax())],
                "probability": float(p.max()),
                **{f"p({name})": float(p[i]) for i, name in enumerate(names)},
            }
            for p in softmax(outputs(predictions))
        ]


def _names(table: Table, column: str) -> list[str | BadValueError]:
    given = class_names_of(table, column)
    found: list[str | BadValueError] = []
    for value in table.values(column):
        try:
            found.append(class_of(value, given))
        except BadValueError as error:
            found.append(BadValueError(f"column {column!r} {error}"))
    return found


def _count(found: Sequence[str | BadValueError]) -> Counter[str]:
    # What is wrong with the others is told by `rows`, with their places.
    return Counter(name for name in found if isinstance(name, str))


def _as_whole(counts: Counter[str]) -> Counter[str]:
    whole: Counter[str] = Counter()
    for name, count in counts.items():
        whole[whole_number(name)] += count
    return whole


def _refuse_mixed(table: Table, column: str) -> None:
    values = table.values(column)
    truths = sum(isinstance(v, bool) for v in values)
    numbers = sum(isinstance(v, int | float) for v in values) - truths
    if truths and numbers:
        raise UserError(
            f"{table.origin}: column {column!r} holds {truths} truth values (true, "
            f"false) and {numbers} numbers, and whether true is 1 can't be known. Write "
            "the classes in one way."
        )


def _oddities(counts: Mapping[str, Counter[str]], schema: Schema) -> list[str]:
    names = schema.label_names
    train = counts.get("train", Counter())
    told: list[str] = []
    if schema.details["rare"]:
        rare = schema.details["rare"]
        fewest = schema.settings["min_examples_per_class"]
        total = sum(sum(parts.values()) for parts in rare.values())
        told.append(
            f"classes with fewer than {fewest} examples in train are left out, with all "
            f"their {total:,} examples: {some_of(ordered(rare))}."
        )
    for part, unknown in schema.details["unknown"].items():
        some = ", ".join(f"{shown(n)!r} ({c:,})" for n, c in list(unknown.items())[:8])
        told.append(f"warning: {part} has classes that train lacks: {some}.")
    for group in alike(dict.fromkeys(names, 0)):
        some = ", ".join(f"{n!r} ({train[n]:,})" for n in group)
        told.append(
            f"warning: the classes {some} differ in spelling alone; if they are one, "
            "write them in one way."
        )
    empty = [n for n in names if train and not train[n]]
    if empty:
        told.append(f"warning: no example of {some_of(empty)} in train.")
    return told
