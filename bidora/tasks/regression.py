"""A number for each text, or for each pair of texts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table, same_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.labels import BadValueError, has_decimal_commas, read_number
from bidora.tasks.metrics import (
    REGRESSION_METRICS,
    choose_metric,
    outputs,
    regression_scores,
)
from bidora.tasks.splits import draw_in_proportion, stratified_split
from bidora.tasks.text import TextTask

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Regression"]

BINS = 10


@dataclass(frozen=True, kw_only=True)
class Regression(TextTask):
    """Numbers that measure something, such as a similarity from 0 to 5.

    The model learns `(label - mean) / deviation`, with the mean and the standard
    deviation of the training labels, which the schema keeps: a head that begins near
    zero would need many steps to reach labels near 100. Scores and answers are in the
    labels' own units. Who loads the saved model without `bidora predict` gets numbers
    that are still to be multiplied by the deviation and added to the mean.

    Args:
        text_column: Column of the text; None for one with a usual name.
        text_pair_column: Column of the second text; None for none, unless both columns
            have usual names.
        label_column: Column of the number; None for one with a usual name.
        metric: `pearson` or `spearman`; None for the data set's own, or else Pearson's
            correlation.

    Example:
        >>> rows = tuple((f"text {i}", f"{i}.5") for i in range(3))
        >>> table = Table(
        ...     "t.csv", ("text", "score"), rows, ("line 2", "line 3", "line 4")
        ... )
        >>> Regression().schema(Source("t.csv", {"train": table})).details["mean"]
        1.5
    """

    name: ClassVar[str] = "regression"
    main_metric: ClassVar[str] = "pearson"
    usual_label_columns: ClassVar[Sequence[str]] = (
        "label",
        "labels",
        "score",
        "similarity",
        "similarity_score",
        "rating",
        "target",
        "value",
    )

    def schema(self, source: Source) -> Schema:
        """Find the columns, and the labels' range, mean and standard deviation."""
        columns = self.columns(source)
        column = columns["label_column"]
        table = source.train
        read = _numbers(table, column)
        numbers = [n for n in read if not isinstance(n, BadValueError)]
        if 2 * len(numbers) < len(read):
            first = next(n for n in read if isinstance(n, BadValueError))
            raise UserError(
                f"{table.origin}: {len(read) - len(numbers)} of {len(read)} values are "
                f"no numbers, which a regression needs ({first}). Choose another column "
                "with --label-column, or another kind of task, such as --task-type "
                "classification."
            )
        mean = math.fsum(numbers) / len(numbers)
        deviation = math.sqrt(
            math.fsum((n - mean) ** 2 for n in numbers) / len(numbers)
        )
        if min(numbers) == max(numbers) or deviation == 0:
            raise UserError(
                f"{table.origin}: every number in column {column!r} is {numbers[0]:g}, so "
                "there is nothing to learn. Choose another column with --label-column."
            )
        metric = self.metric or source.hints.get("metric") or self.main_metric
        return Schema(
            self.name,
            {**columns, "proteins": self.holds_proteins(source, columns)},
            (),
            choose_metric(metric, REGRESSION_METRICS),
            {
                "min": min(numbers),
                "max": max(numbers),
                "mean": mean,
                "deviation": deviation,
                "decimal_commas": has_decimal_commas(table.values(column)),
            },
        )

    def read_labels(self, table: Table, schema: Schema) -> Sequence[Any]:
        """Return each row's number."""
        return _numbers(table, same_column(table, schema.settings["label_column"]))

    def targets(self, labels: Sequence[Any], schema: Schema) -> list[Any]:
        """Return labels less their mean, over their standard deviation."""
        mean, deviation = schema.details["mean"], schema.details["deviation"]
        return [(label - mean) / deviation for label in labels]

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell columns, the range of the labels, and what looks odd."""
        known = schema.details
        column = schema.settings["label_column"]
        labels = {
            p: r.columns["labels"] for p, r in rows.items() if "labels" in r.columns
        }
        counts = ", ".join(f"{part} {len(found):,}" for part, found in labels.items())
        lines = super().describe(rows, schema)
        lines.insert(
            1,
            f"numbers from {known['min']:g} to {known['max']:g}, mean "
            f"{known['mean']:.4g}, standard deviation {known['deviation']:.4g} ({counts})",
        )
        if known["decimal_commas"]:
            lines.append(f"column {column!r} is read with a decimal comma: 3,5 is 3.5.")
        distinct = set(labels.get("train", ()))
        if 0 < len(distinct) < 6:
            some = ", ".join(f"{n:g}" for n in sorted(distinct))
            lines.append(
                f"warning: column {column!r} has {len(distinct)} different numbers alone "
                f"({some}); if they name classes, use --task-type classification."
            )
        for part, found in labels.items():
            outside = sum(not known["min"] <= n <= known["max"] for n in found)
            if outside:
                lines.append(
                    f"warning: {outside:,} of {len(found):,} numbers of {part} lie "
                    "outside the range of train."
                )
        return lines

    def strata(self, rows: Rows, schema: Schema) -> Sequence[Hashable]:
        """Return the bin of each label: as many examples in each, in order of size."""
        del schema
        return _bins(rows.columns["labels"], max(1, min(BINS, len(rows) // 10)))

    def split(
        self, rows: Rows, schema: Schema, fraction: float, seed: int
    ) -> tuple[list[int], list[int]]:
        """Split examples so that small and large labels are in both parts."""
        del schema
        fewest = min(fraction, 1 - fraction) * len(rows)
        bins = max(1, min(BINS, int(fewest)))
        return stratified_split(_bins(rows.columns["labels"], bins), fraction, seed)

    def draw(self, rows: Rows, schema: Schema, count: int, seed: int) -> list[int]:
        """Draw examples, small and large labels among them."""
        del schema
        if count >= len(rows):
            return list(range(len(rows)))
        bins = _bins(rows.columns["labels"], min(BINS, count))
        return draw_in_proportion(bins, count, seed)

    def model_kwargs(self, schema: Schema) -> dict[str, Any]:
        """Return one output, and the squared error."""
        del schema
        return {"num_labels": 1, "problem_type": "regression"}

    def metrics(
        self, predictions: np.ndarray, labels: np.ndarray, schema: Schema
    ) -> dict[str, float]:
        """Return both correlations, and the mean squared error in the labels' units."""
        return regression_scores(_scaled(predictions, schema), _scaled(labels, schema))

    def answers(
        self,
        predictions: np.ndarray,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Return the predicted number."""
        del rows, labels
        return [{"prediction": float(n)} for n in _scaled(predictions, schema)]


def _numbers(table: Table, column: str) -> list[float | BadValueError]:
    values = table.values(column)
    comma = has_decimal_commas(values)
    numbers: list[float | BadValueError] = []
    for value in values:
        try:
            numbers.append(read_number(value, comma=comma))
        except BadValueError as error:
            numbers.append(BadValueError(f"column {column!r} {error}"))
    return numbers


def _bins(labels: Sequence[float], count: int) -> list[int]:
    """Return bins of like size, whatever the ties: equal labels may be in two bins."""
    order = sorted(range(len(labels)), key=labels.__getitem__)
    bins = [0] * len(labels)
    for rank, example in enumerate(order):
        bins[example] = rank * count // len(labels)
    return bins


def _scaled(standardised: Any, schema: Schema) -> np.ndarray:
    mean, deviation = schema.details["mean"], schema.details["deviation"]
    return outputs(standardised).reshape(-1) * deviation + mean
