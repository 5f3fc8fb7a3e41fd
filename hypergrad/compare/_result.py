"""What a comparison says: a row for each estimator, and ways to look at them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Comparison", "Cost", "Reference", "Row"]

Cost = Literal["forwards", "inner_gradients", "seconds", "peak_bytes"]
"""What an estimate may be priced in; columns of a `Row`."""


@dataclass(frozen=True)
class Row:
    """One estimator: how far from the reference, and at what cost.

    A number that could not be had is None.

    Attributes:
        label: what it is called here.
        estimator: its settings; what `auto` chose.
        answers: which question: `"steps"` (what the inner steps do), `"minimum"` (where
            the minimum of the inner loss goes), `"neither"` (no indirect term at all), or
            the estimator's own words.
        failure: why there is no estimate; empty where there is one.
        error: relative L2 distance of the total from the reference's.
        cosine: of the angle between the two.
        indirect_error: as `error`, of the indirect terms.
        indirect_cosine: as `cosine`, of the indirect terms; None where one is zero.
        forwards: cost by count, in forward passes of the inner model on a batch.
        n_forward: forward passes.
        n_backward: backward passes.
        n_hvp: second-derivative products.
        seconds: median over the repeats.
        seconds_min: the least of them.
        seconds_max: the most.
        inner_gradients: median of the ratios, repeat by repeat, to the seconds of one
            inner gradient.
        peak_bytes: tensors held at once beyond those before the call.
        residual_norm: as in `Info`.
        converged: as in `Info`.
        fd_error: as in `Info`.
        reason: as in `Info`, or that the steps were virtual.
    """

    label: str
    estimator: str
    answers: str
    failure: str = ""
    error: float | None = None
    cosine: float | None = None
    indirect_error: float | None = None
    indirect_cosine: float | None = None
    forwards: float | None = None
    n_forward: int | None = None
    n_backward: int | None = None
    n_hvp: int | None = None
    seconds: float | None = None
    seconds_min: float | None = None
    seconds_max: float | None = None
    inner_gradients: float | None = None
    peak_bytes: int | None = None
    residual_norm: float | None = None
    converged: bool | None = None
    fd_error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Reference:
    """What the rows are measured against.

    Attributes:
        estimator: its settings, or that tensors were passed.
        why: why it is that one.
        answers: as in `Row`, or `"given"`.
        indirect_share: norm of its indirect term over that of its total; above 1 where
            the terms cancel.
        forwards: its cost by count; None where it was passed.
        n_hvp: its products.
        residual_norm: as in `Info`.
        converged: as in `Info`.
        reason: as in `Info`: how far to trust it.
        damping: as in `Info`.
    """

    estimator: str
    why: str
    answers: str
    indirect_share: float
    forwards: float | None = None
    n_hvp: int | None = None
    residual_norm: float | None = None
    converged: bool | None = None
    reason: str = ""
    damping: float | None = None

    @property
    def is_trusted(self) -> bool:
        """Whether it solved what it was asked for: converged, damping not raised."""
        return self.converged is not False and "Damping was raised" not in self.reason


@dataclass(frozen=True)
class Comparison:
    """Estimators side by side; made by `compare_estimators`.

    Attributes:
        rows: one for each estimator: the nearest to the reference in the indirect term
            first, failures last.
        reference: what they are measured against.
        inner_gradient_seconds: median seconds of one gradient of the inner loss.
        settings: what it was made with, and the size of the problem.
        environment: versions, device and threads.
    """

    rows: tuple[Row, ...]
    reference: Reference
    inner_gradient_seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, label: str) -> Row:
        """Return the row of that label."""
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(label)

    def __str__(self) -> str:
        return self.table()

    def pareto(self, cost: Cost = "forwards") -> list[str]:
        """Return the labels that none beats in both cost and indirect error.

        Args:
            cost: which cost.

        Returns:
            Labels, the cheapest first.

        Raises:
            ValueError: an unknown cost.

        Example:
            >>> rows = [
            ...     Row("a", "", "steps", indirect_error=0.5, forwards=2.0),
            ...     Row("b", "", "steps", indirect_error=0.1, forwards=6.0),
            ...     Row("c", "", "steps", indirect_error=0.2, forwards=9.0),
            ... ]
            >>> against = Reference("Unrolled(5)", "it was passed", "steps", 1.0)
            >>> Comparison(tuple(rows), against, 1.0).pareto()
            ['a', 'b']
        """
        points = self.points(cost)
        front = [
            (x, y, label)
            for label, x, y in points
            if not any(u <= x and v <= y and (u, v) != (x, y) for _, u, v in points)
        ]
        return [label for _, _, label in sorted(front)]

    def points(self, cost: Cost = "forwards") -> list[tuple[str, float, float]]:
        """Return label, cost and indirect error of each row that has both.

        Args:
            cost: which cost.

        Returns:
            What `pareto` and `plot` are about.

        Raises:
            ValueError: an unknown cost.
        """
        if cost not in get_args(Cost):
            known = ", ".join(map(repr, get_args(Cost)))
            raise ValueError(f"cost={cost!r} is unknown; choose one of {known}.")
        found = []
        for row in self.rows:
            x, y = getattr(row, cost), row.indirect_error
            if x is not None and y is not None and math.isfinite(y):
                found.append((row.label, float(x), y))
        return found

    def recommend(self, cosine: float = 0.99, cost: Cost = "forwards") -> str | None:
        """Return the cheapest estimator whose indirect term points the right way.

        Judged by direction, because the length of a hypergradient is a learning rate.
        It holds for this problem, at this point, on these batches, and only where the
        reference answers the question that you have. There is no recommendation where the
        reference is not to be trusted: where it raised its damping, or did not converge,
        it solved another problem, and `reference.reason` says so.

        Args:
            cosine: least cosine to the reference's indirect term.
            cost: which cost.

        Returns:
            A label; None where none comes that near, or the reference did not converge.

        Raises:
            ValueError: an unknown cost.
        """
        if not self.reference.is_trusted:
            return None
        near = []
        for label, x, _ in self.points(cost):
            got = self[label].indirect_cosine
            if got is not None and got >= cosine:
                near.append((x, -got, label))
        return min(near)[2] if near else None

    def table(self, width: int = 100) -> str:
        """Return a table for a terminal.

        Args:
            width: columns of the terminal; 90 or more.

        Returns:
            Lines of at most that width.
        """
        from hypergrad.compare._table import table

        return table(self, width)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it; infinite numbers are None.

        Returns:
            Rows and what they stand on.
        """
        return {
            "reference": _finite(asdict(self.reference)),
            "inner_gradient_seconds": self.inner_gradient_seconds,
            "pareto": self.pareto(),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "rows": [_finite(asdict(row)) for row in self.rows],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to a file where one is named.

        Args:
            path: the file.

        Returns:
            The text.
        """
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a pandas DataFrame, a column for each field of `Row`.

        Returns:
            The frame, in the order of the rows.
        """
        import pandas as pd

        columns: Sequence[str] = [f.name for f in fields(Row)]
        frame = pd.DataFrame([asdict(row) for row in self.rows], columns=columns)
        # A count that is missing would make a column of floats of its neighbours.
        counts = ("n_forward", "n_backward", "n_hvp", "peak_bytes")
        return frame.astype(dict.fromkeys(counts, "Int64"))

    def plot(self, path: str | Path | None = None, cost: Cost = "forwards") -> Figure:
        """Draw error of the indirect term against cost, with the Pareto front.

        Args:
            path: a file to write the picture to, in the format of its ending.
            cost: which cost.

        Returns:
            The matplotlib figure; no display is needed.

        Raises:
            ValueError: an unknown cost, or no row with a cost and an error.
        """
        from hypergrad.compare._plot import plot

        return plot(self, path, cost)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(v, float) and not math.isfinite(v) else v
        for key, v in values.items()
    }
