"""Which method is better than the probe or the reference: paired differences, judged.

A method is compared with another in pairs of the same task, size and seed. Those of a
column are judged together, since who compares ten methods finds a difference somewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import TypeVar

from bidora.study.records import Record
from bidora.study.results import (
    Average,
    Difference,
    Estimate,
    Overall,
    Result,
    Table,
    Verdict,
)
from bidora.study.statistics import POINTS, holm, interval, paired, score_of

__all__ = [
    "LEVEL",
    "averages",
    "estimate",
    "is_probe",
    "kind_of",
    "middle",
    "over_all_sizes",
    "over_probe",
    "over_reference",
    "with_verdicts",
]

LEVEL = 0.95
"""Of intervals; an adjusted p below 1 − LEVEL shows a difference."""

PROBE = ""
"""Stands for the probe where pairs are made; no method of a grid has no name."""

Place = tuple[str, int]
"""A task and a size."""


def kind_of(record: Record) -> str:
    """Return the method that was run, whatever the grid calls it.

    Args:
        record: Of a run.
    """
    return str(record.settings.get("method", record.cell.method))


def is_probe(record: Record) -> bool:
    """Return whether a run is the probe, which every other run is compared with.

    Args:
        record: Of a run.
    """
    return kind_of(record) == "probe"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of scores, in points.

    Args:
        values: Scores as fractions.
    """
    if not values:
        return None
    points = [POINTS * value for value in values]
    low, high = interval(points, LEVEL)
    return Estimate(fmean(points), low, high, len(points))


def middle(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known.

    Args:
        values: Numbers, or None where one is not known.
    """
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None


def over_probe(
    records: Sequence[Record], method: str, task: str | None = None
) -> Difference | None:
    """Compare a method with the probe that its own runs began with.

    A run without one, as of a method that trains in a way of its own, is compared with
    the probe that was run as a method, on the same task, size and seed.

    Args:
        records: Of one purpose.
        method: The method.
        task: The task; None for all of them.

    Returns:
        The difference, not judged yet; None without a pair. The probe is not compared
        with itself, which would cost the other methods a step of Holm's correction.
    """
    own = [r for r in records if r.cell.method == method]
    if any(is_probe(r) for r in own):
        return None
    run = {_at(r): r.test for r in records if is_probe(r) and not r.failed}
    probes = [
        dataclasses.replace(
            r,
            cell=dataclasses.replace(r.cell, method=PROBE),
            test=r.probe or run.get(_at(r), {}),
        )
        for r in own
        # A task without a probe has no pair; a run that failed has one that failed.
        if r.probe or r.failed or _at(r) in run
    ]
    return _difference([*own, *probes], method, PROBE, task)


def _at(record: Record) -> tuple[str, int, int]:
    return record.cell.task, record.cell.size, record.cell.seed


def over_reference(
    records: Sequence[Record], method: str, reference: str, task: str | None = None
) -> Difference | None:
    """Compare a method with the reference.

    Args:
        records: Of one purpose.
        method: The method.
        reference: The other one.
        task: The task; None for all of them.

    Returns:
        The difference, not judged yet; None without a pair, and for the reference.
    """
    if method == reference:
        return None
    return _difference(records, method, reference, task)


def _difference(
    records: Sequence[Record], method: str, other: str, task: str | None
) -> Difference | None:
    if not records:
        return None
    found = paired(records, method, other, records[0].cell.purpose, task)
    if found.mean is None:
        return None
    return Difference(
        mean=found.mean,
        low=found.low,
        high=found.high,
        n=len(found.differences),
        p=found.sign_flips if len(found.differences) > 1 else None,
        adjusted=None,
        wins=found.wins,
        ties=found.ties,
        losses=found.losses,
        verdict="no difference shown",
        failed=found.spoilt,
    )


Row = TypeVar("Row", Result, Average)


def with_verdicts(rows: Sequence[Row]) -> list[Row]:
    """Judge the differences of a column, one a method, to the probe and the reference.

    Args:
        rows: All methods of a task, or of an average.

    Returns:
        The same with adjusted p and verdicts.
    """
    to_probe = _judged([row.over_probe for row in rows])
    to_reference = _judged([row.over_reference for row in rows])
    return [
        dataclasses.replace(row, over_probe=p, over_reference=r)
        for row, p, r in zip(rows, to_probe, to_reference, strict=True)
    ]


def _judged(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Add adjusted p and verdict, over the methods that are compared with one."""
    tested = [d for d in differences if d is not None and d.p is not None]
    adjusted = iter(holm([d.p for d in tested if d.p is not None]))
    # A tie is the same with either sign, so it makes no p smaller.
    least = iter(holm([2.0 ** (1 - d.n + d.ties) for d in tested]))
    judged: list[Difference | None] = []
    for one in differences:
        if one is None or one.p is None:
            judged.append(one)
            continue
        p = next(adjusted)
        verdict: Verdict = "no difference shown"
        if p < 1.0 - LEVEL and one.mean:
            verdict = "better" if one.mean > 0 else "worse"
        # Signs that are drawn can give a p that is a little below the least.
        decidable = next(least) < 1.0 - LEVEL or verdict != "no difference shown"
        judged.append(
            dataclasses.replace(one, adjusted=p, verdict=verdict, decidable=decidable)
        )
    return judged


def averages(
    records: Sequence[Record],
    methods: Sequence[str],
    reference: str,
    results: Mapping[Place, Sequence[Result]],
) -> list[Average]:
    """Compare methods on average over cells, and judge them together.

    A difference needs a pair in each cell that any method has one in.

    Args:
        records: Of one purpose.
        methods: Their order.
        reference: The method that others are compared with.
        results: What methods came to in each cell.

    Returns:
        One a method.
    """
    scores = {m: _complete(records, m, list(results)) for m in methods}
    probed = _compared(results, "over_probe")
    referred = _compared(results, "over_reference")
    ratios = {
        m: [r.time_ratio for those in results.values() for r in those if r.method == m]
        for m in methods
    }
    return with_verdicts(
        [
            Average(
                method=m,
                score=estimate(list(scores[m].values())),
                over_probe=over_probe(records, m) if m in probed else None,
                over_reference=over_reference(records, m, reference)
                if m in referred
                else None,
                time_ratio=middle(ratios[m]),
                by_seed={s: POINTS * score for s, score in scores[m].items()},
            )
            for m in methods
        ]
    )


def _compared(results: Mapping[Place, Sequence[Result]], attribute: str) -> set[str]:
    """Return the methods with a difference in each cell that any method has one in."""
    places: dict[str, set[Place]] = {}
    for place, those in results.items():
        for result in those:
            if getattr(result, attribute) is not None:
                places.setdefault(result.method, set()).add(place)
    every = set().union(*places.values())
    return {method for method, own in places.items() if own == every}


def over_all_sizes(
    records: Sequence[Record],
    methods: Sequence[str],
    reference: str,
    tables: Sequence[Table],
) -> Overall | None:
    """Compare methods over all sizes of one purpose.

    Args:
        records: Of that purpose.
        methods: Their order.
        reference: The method that others are compared with.
        tables: The purpose's tables, one a size.

    Returns:
        The comparison; None where there is one size, or nothing to compare.
    """
    if len(tables) < 2:
        return None
    results = {
        (task, table.size): [r for r in table.results if r.task == task]
        for table in tables
        for task in table.tasks
    }
    there = [m for m in methods if any(m in table.methods for table in tables)]
    found = averages(records, there, reference, results)
    if not any(one.over_probe or one.over_reference for one in found):
        return None
    return Overall(tables[0].purpose, tuple(results), tuple(found))


def _complete(
    records: Sequence[Record], method: str, places: Sequence[Place]
) -> dict[int, float]:
    """Average over cells with each seed that has them all."""
    scores = {
        (r.cell.task, r.cell.size, r.cell.seed): score
        for r in records
        if r.cell.method == method and (score := score_of(r)) is not None
    }
    seeds = sorted({seed for _, _, seed in scores})
    rows = {s: [scores.get((*place, s)) for place in places] for s in seeds}
    return {
        seed: fmean(v for v in row if v is not None)
        for seed, row in rows.items()
        if None not in row
    }
