"""What differences between methods are worth: intervals, paired tests, corrections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from bidora.study.records import Purpose, Record

__all__ = [
    "POINTS",
    "Paired",
    "holm",
    "interval",
    "paired",
    "score_of",
    "sign_flips",
    "signed_rank",
    "time_ratio",
]

POINTS = 100.0
"""Scores are fractions; a report tells them, and differences, in points."""

DECIMALS = 9
"""Differences that are equal but for rounding are equal: ties and ranks depend on it."""

FLIPS = 99_999
"""Sign flips that are tried; up to 16 differences, that is all there are."""


@dataclass(frozen=True)
class Paired:
    """A method against a reference, run by run: the same task, size and seed.

    Args:
        method: The method.
        reference: What it is compared with.
        differences: Method less reference, in points of the main metric, one a pair.
        mean: Their mean; None without a pair.
        low: Lower end of the mean's interval; None with fewer than two pairs.
        high: Upper end.
        signed_rank: p of Wilcoxon's test; None without a pair.
        sign_flips: p of the permutation test; None without a pair.
        failed: Pairs that the method's failure spoils.
        reference_failed: Pairs that the reference's failure spoils.
        both_failed: Pairs that failed on both sides.
        unpaired: Runs of one of the two whose counterpart was not run.
    """

    method: str
    reference: str
    differences: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None
    signed_rank: float | None
    sign_flips: float | None
    failed: int = 0
    reference_failed: int = 0
    both_failed: int = 0
    unpaired: int = 0

    @property
    def spoilt(self) -> int:
        """Pairs without a difference, since a side failed."""
        return self.failed + self.reference_failed + self.both_failed

    @property
    def wins(self) -> int:
        """Pairs in which the method scores more."""
        return sum(difference > 0 for difference in self.differences)

    @property
    def ties(self) -> int:
        """Pairs of equal scores."""
        return sum(difference == 0 for difference in self.differences)

    @property
    def losses(self) -> int:
        """Pairs in which the method scores less."""
        return sum(difference < 0 for difference in self.differences)


def interval(
    values: Sequence[float], level: float = 0.95
) -> tuple[float | None, float | None]:
    r"""Return Student's interval of a mean, $\bar x \pm t_{n-1}\, s/\sqrt n$.

    It is exact for values that are normal and independent.

    Args:
        values: The values.
        level: How often it holds the true mean.

    Returns:
        Its ends; None for both with fewer than two values.

    Example:
        >>> low, high = interval([1.0, 3.0])  # t is 12.706, s / sqrt(2) is 1
        >>> round(low, 3), round(high, 3)
        (-10.706, 14.706)
    """
    if len(values) < 2:
        return None, None
    import numpy as np
    from scipy import stats

    middle = fmean(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * error
    return middle - reach, middle + reach


def signed_rank(differences: Sequence[float]) -> float | None:
    """Return p of Wilcoxon's signed-rank test, two-sided; zeros are left out.

    Exact up to 50 differences without ties, by a normal approximation beyond.

    Args:
        differences: One a pair.

    Returns:
        p; 1 where all are zero, None where there are none.

    Example:
        >>> signed_rank([1.0, 2.0, 3.0])  # two of the eight patterns of signs
        0.25
    """
    if not len(differences):
        return None
    if not any(differences):
        return 1.0
    from scipy import stats

    kept = [difference for difference in differences if difference]
    sizes = {abs(difference) for difference in kept}
    method = "exact" if len(sizes) == len(kept) <= 50 else "approx"
    found: Any = stats.wilcoxon(kept, method=method)
    return float(found.pvalue)


def sign_flips(differences: Sequence[float]) -> float | None:
    r"""Return p of the permutation test of a mean difference of zero, two-sided.

    If neither side is better, each difference may as well have the other sign. All $2^n$
    patterns of signs are tried up to 16 differences, and 99 999 drawn ones beyond. The
    least p of $n$ differences that are not zero is $2^{1-n}$: five can never be below
    0.05.

    Args:
        differences: One a pair.

    Returns:
        p; None where there are no differences.

    Example:
        >>> sign_flips([1.0, 2.0, 3.0])
        0.25
        >>> sign_flips([1.0, -1.0])
        1.0
        >>> sign_flips([0.0, 1.0, 2.0, 3.0])  # a zero has no sign to flip
        0.25
    """
    if len(differences) < 2:
        return 1.0 if differences else None  # both signs are as far from zero
    import numpy as np
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    seen = abs(values.sum())
    # Each difference is rounded, so sums that are equal can be as far apart as this.
    apart = len(values) * 10.0**-DECIMALS
    if seen <= apart:
        return 1.0  # no pattern is nearer to zero

    def total(signed: Any, axis: int) -> Any:
        sums = signed.sum(axis=axis)
        tied = abs(abs(sums) - seen) <= apart
        return np.where(tied, np.copysign(seen, sums), sums)

    test: Any = stats.permutation_test  # whose stubs do not know random_state
    found = test(
        (values,),
        total,
        permutation_type="samples",
        n_resamples=FLIPS,
        batch=1000,
        random_state=0,
    )
    return float(found.pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return p-values adjusted for being several, by Holm's step-down method.

    Those below a level reject with at most that chance of any false rejection, whatever
    depends on what.

    Args:
        pvalues: Of a family of tests.

    Returns:
        The adjusted ones, in the same order.

    Example:
        >>> holm(
        ...     [0.01, 0.04, 0.03]
        ... )  # 3 * 0.01, 2 * 0.03, and no less than the one before
        [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(pvalues)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        least = max(least, (len(pvalues) - rank) * pvalues[i])
        adjusted[i] = min(1.0, least)
    return adjusted


def paired(
    records: Iterable[Record],
    method: str,
    reference: str,
    purpose: Purpose,
    task: str | None = None,
) -> Paired:
    """Compare a method with a reference over all runs that they share.

    Args:
        records: Of a study.
        method: The method.
        reference: The other one.
        purpose: `steps` or `time`.
        task: The task; None for all of them, each pair counting once.

    Returns:
        The comparison. A pair that failed on a side is counted, not dropped in silence.

    Example:
        >>> from bidora.study.records import Cell
        >>> def run(method, seed, score):
        ...     cell = Cell("sst2", method, 0, seed, "steps")
        ...     return Record(cell, {}, metric="f1", test={"f1": score})
        >>> found = paired(
        ...     [
        ...         run("a", 0, 0.5),
        ...         run("b", 0, 0.25),
        ...         run("a", 1, 0.75),
        ...         run("b", 1, 0.75),
        ...     ],
        ...     "a",
        ...     "b",
        ...     "steps",
        ... )
        >>> found.differences, found.mean, found.wins, found.ties
        ((25.0, 0.0), 12.5, 1, 1)
    """
    sides: dict[tuple[str, int, int], dict[str, float | None]] = {}
    for record in records:
        cell = record.cell
        if cell.purpose != purpose or cell.method not in (method, reference):
            continue
        if task in (None, cell.task):
            where = cell.task, cell.size, cell.seed
            sides.setdefault(where, {})[cell.method] = score_of(record)
    differences: list[float] = []
    failed = reference_failed = both_failed = unpaired = 0
    for _, side in sorted(sides.items()):
        if len(side) < 2:
            unpaired += 1
            continue
        ours, theirs = side[method], side[reference]
        if ours is None or theirs is None:
            both_failed += ours is None and theirs is None
            failed += ours is None and theirs is not None
            reference_failed += ours is not None and theirs is None
        else:
            differences.append(round(POINTS * (ours - theirs), DECIMALS))
    low, high = interval(differences)
    return Paired(
        method,
        reference,
        tuple(differences),
        fmean(differences) if differences else None,
        low,
        high,
        signed_rank(differences),
        sign_flips(differences),
        failed,
        reference_failed,
        both_failed,
        unpaired,
    )


def time_ratio(records: Iterable[Record], method: str, reference: str) -> float | None:
    """Return how many times the reference's seconds of training a method took.

    It is the median of the ratios within a task, size and seed: runs of one seed train
    side by side, so that what slows the machine down slows both.

    Args:
        records: Of one purpose.
        method: The method.
        reference: The other one.

    Returns:
        The median; None if no pair was measured, such as with a reference of 0 seconds.

    Example:
        >>> from bidora.study.records import Cell
        >>> spent = {"a": (2.0, 9.0, 4.0), "b": (1.0, 6.0, 1.0)}
        >>> time_ratio(
        ...     [
        ...         Record(Cell("sst2", name, 0, i, "steps"), {}, seconds=seconds)
        ...         for name, those in spent.items()
        ...         for i, seconds in enumerate(those)
        ...     ],
        ...     "a",
        ...     "b",
        ... )
        2.0
    """
    spent: dict[str, dict[tuple[str, int, int], float]] = {method: {}, reference: {}}
    for record in records:
        cell = record.cell
        if cell.method in spent and not record.failed and math.isfinite(record.seconds):
            spent[cell.method][cell.task, cell.size, cell.seed] = record.seconds
    ratios = [
        spent[method][where] / base
        for where, base in spent[reference].items()
        if base > 0 and where in spent[method]
    ]
    return median(ratios) if ratios else None


def score_of(record: Record) -> float | None:
    """Return the test score; None for a run that failed or came to nothing finite.

    Args:
        record: Of a run.
    """
    score = record.score
    if record.failed or score is None or not math.isfinite(score):
        return None
    return score
