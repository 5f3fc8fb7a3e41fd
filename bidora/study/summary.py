"""The numbers of a comparison's report: means, intervals, paired differences, verdicts.

All of it follows from the records. A table is of one purpose and one size; within it, a
method is compared with the probe and with the reference on each task and on the average
over tasks, always in pairs: the same task, the same size, the same seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, TypeVar

from bidora.study.records import Purpose, Record
from bidora.study.results import (
    Average,
    Difference,
    Estimate,
    Failure,
    Result,
    Summary,
    Table,
    Tried,
    Verdict,
)
from bidora.study.statistics import holm, interval, paired

__all__ = ["LEVEL", "summarise"]

LEVEL = 0.95
"""Of intervals; an adjusted p below 1 − LEVEL shows a difference."""

POINTS = 100.0
"""Scores are fractions; a report tells them, and differences, in points."""

PROBE = ""
"""Stands for the probe where pairs are made; no method of a grid has no name."""


def summarise(
    records: Iterable[Record],
    *,
    reference: str = "",
    notes: Sequence[str] = (),
    chosen: Mapping[tuple[str, str, int], Any] | None = None,
    tasks: Iterable[str] = (),
    methods: Iterable[str] = (),
    seeds: Mapping[str, Iterable[int]] | None = None,
) -> Summary:
    """Work out what records show.

    Args:
        records: Of runs, in any order.
        reference: The method that others are compared with; empty for none.
        notes: What a reader must know besides.
        chosen: The settings that a sweep chose, by task, method and size.
        tasks: Their order; others follow by name.
        methods: Their order; others follow by name.
        seeds: Those planned, by task, so that missing runs can be counted.

    Returns:
        The numbers.

    Example:
        >>> from bidora.study.records import Cell, Record
        >>> scores = {"lora": (0.5, 0.6), "bidora": (0.6, 0.8)}
        >>> summary = summarise(
        ...     (
        ...         Record(
        ...             Cell("sst2", name, 100, seed, "steps"),
        ...             {},
        ...             metric="accuracy",
        ...             test={"accuracy": score},
        ...         )
        ...         for name, both in scores.items()
        ...         for seed, score in enumerate(both)
        ...     ),
        ...     reference="lora",
        ... )
        >>> difference = summary.tables[0].result("sst2", "bidora").over_reference
        >>> round(difference.mean, 9), difference.wins
        (15.0, 2)
    """
    settled = {key: _trial(value) for key, value in (chosen or {}).items()}
    kept, set_aside = _one_each(records, settled)
    remarks = list(notes)
    if set_aside:
        remarks.append(
            f"{set_aside} {'run' if set_aside == 1 else 'runs'} with settings other "
            "than the chosen ones, or done twice, are set aside."
        )
    final = [r for r in kept if r.cell.purpose != "sweep"]
    planned = {task: frozenset(those) for task, those in (seeds or {}).items()}
    names = _ordered(methods, (r.cell.method for r in kept))
    jobs = _ordered(tasks, (r.cell.task for r in kept))
    sizes = sorted({r.cell.size for r in kept}, key=lambda s: (s == 0, s))
    tables = []
    for purpose in ("steps", "time"):
        for size in sizes:
            part = [
                r for r in final if (r.cell.purpose, r.cell.size) == (purpose, size)
            ]
            if part:
                tables.append(
                    _table(part, purpose, size, jobs, names, reference, planned)
                )
    return Summary(
        reference=reference if reference in names else "",
        tasks=jobs,
        methods=names,
        sizes=tuple(sizes),
        metrics={r.cell.task: r.metric for r in reversed(kept) if r.metric},
        outer=tuple(n for n in names if any(_searches(r) for r in kept if _is(r, n))),
        tables=tuple(tables),
        sweep=_sweep(kept, settled, jobs, names),
        chosen=_chosen(settled, jobs, names),
        failures=tuple(
            Failure(r.cell, r.error or "the test score is missing or not finite")
            for r in final
            if _score(r) is None
        ),
        notes=tuple(remarks),
        level=LEVEL,
    )


def _searches(record: Record) -> bool:
    """Return whether it is of the bidora family, whatever the grid calls it."""
    return str(record.settings.get("method", record.cell.method)).startswith("bidora")


def _is(record: Record, method: str) -> bool:
    return record.cell.method == method


def _trial(value: Any) -> tuple[tuple[str, Any], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple(sorted((str(name), setting) for name, setting in pairs))


def _ordered(wanted: Iterable[str], found: Iterable[str]) -> tuple[str, ...]:
    """Return the names found: those wanted in their order, then the others by name."""
    there = set(found)
    first = [name for name in dict.fromkeys(wanted) if name in there]
    return (*first, *sorted(there - set(first)))


def _one_each(
    records: Iterable[Record], chosen: Mapping[tuple[str, str, int], Any]
) -> tuple[list[Record], int]:
    """Keep one run a seed, as pairs need; a sweep keeps one a seed and trial.

    Returns:
        The records by cell, and how many were set aside.
    """
    kept: dict[Any, Record] = {}
    count = 0
    for record in records:
        count += 1
        cell = record.cell
        where = (cell.task, cell.method, cell.size)
        swept = cell.trial if cell.purpose == "sweep" else ()
        key = (*where, cell.seed, cell.purpose, repr(swept))
        if cell.purpose != "sweep" and key in kept:
            old_fits = _trial(kept[key].cell.trial) == chosen.get(where, None)
            new_fits = _trial(cell.trial) == chosen.get(where, None)
            if old_fits and not new_fits:
                continue
        kept[key] = record
    ordered = sorted(kept.items(), key=lambda item: item[0])
    return [record for _, record in ordered], count - len(kept)


def _number(scores: Mapping[str, float], metric: str) -> float | None:
    value = scores.get(metric)
    return value if value is not None and math.isfinite(value) else None


def _score(record: Record) -> float | None:
    return None if record.failed else _number(record.test, record.metric)


def _estimate(values: Sequence[float]) -> Estimate | None:
    """Return the mean of scores, in points."""
    if not values:
        return None
    points = [POINTS * value for value in values]
    low, high = interval(points, LEVEL)
    return Estimate(fmean(points), low, high, len(points))


def _difference(
    records: Sequence[Record], method: str, other: str, task: str | None = None
) -> Difference | None:
    """Compare a method with another; the verdict waits for the others of the table."""
    if not records or method == other:
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
    )


def _as_probe(records: Sequence[Record]) -> list[Record]:
    """Return what the probe scores in the place of each run."""
    return [
        dataclasses.replace(
            r, cell=dataclasses.replace(r.cell, method=PROBE), test=r.probe
        )
        for r in records
    ]


def _judged(
    differences: Sequence[Difference | None],
) -> list[Difference | None]:
    """Add adjusted p and verdict, over the methods that a table compares with one."""
    tested = [d for d in differences if d is not None and d.p is not None]
    adjusted = iter(holm([d.p for d in tested if d.p is not None]))
    least = iter(holm([2.0 ** (1 - d.n) for d in tested]))
    judged: list[Difference | None] = []
    for one in differences:
        if one is None or one.p is None:
            judged.append(one)
            continue
        p = next(adjusted)
        verdict: Verdict = "no difference shown"
        if p < 1.0 - LEVEL and one.mean:
            verdict = "better" if one.mean > 0 else "worse"
        decidable = next(least) < 1.0 - LEVEL
        judged.append(
            dataclasses.replace(one, adjusted=p, verdict=verdict, decidable=decidable)
        )
    return judged


def _table(
    records: Sequence[Record],
    purpose: Purpose,
    size: int,
    tasks: Sequence[str],
    methods: Sequence[str],
    reference: str,
    seeds: Mapping[str, frozenset[int]],
) -> Table:
    tasks = [t for t in tasks if any(r.cell.task == t for r in records)]
    methods = [m for m in methods if any(_is(r, m) for r in records)]
    with_probe = {m: _with_probe(records, m) for m in methods}
    results: list[Result] = []
    for task in tasks:
        rows = [
            _result(
                [r for r in records if _is(r, m) and r.cell.task == task],
                _difference(with_probe[m], m, PROBE, task),
                _difference(records, m, reference, task),
                seeds.get(task, frozenset()),
            )
            for m in methods
            if any(_is(r, m) and r.cell.task == task for r in records)
        ]
        results += _with_verdicts(_with_ratios(rows, reference))
    to_probe = {(r.task, r.method) for r in results if r.over_probe}
    to_reference = {(r.task, r.method) for r in results if r.over_reference}
    averages = [
        Average(
            method=m,
            score=_estimate(_complete(records, m, tasks)),
            over_probe=_difference(with_probe[m], m, PROBE)
            if _everywhere(m, to_probe)
            else None,
            over_reference=_difference(records, m, reference)
            if _everywhere(m, to_reference)
            else None,
            time_ratio=_median(r.time_ratio for r in results if r.method == m),
        )
        for m in methods
    ]
    return Table(
        purpose=purpose,
        size=size,
        tasks=tuple(tasks),
        methods=tuple(methods),
        results=tuple(results),
        averages=tuple(_with_verdicts(averages)),
        probe=_anchors(records, tasks, lambda r: _number(r.probe, r.metric)),
        constant=_anchors(records, tasks, lambda r: _number(r.baseline, r.metric)),
    )


def _with_probe(records: Sequence[Record], method: str) -> list[Record]:
    own = [r for r in records if _is(r, method)]
    return [*own, *_as_probe(own)]


def _everywhere(method: str, compared: set[tuple[str, str]]) -> bool:
    """Return whether a method has a pair on each task that any method has one on."""
    return all((task, method) in compared for task, _ in compared)


def _complete(
    records: Sequence[Record], method: str, tasks: Sequence[str]
) -> list[float]:
    """Average over tasks with each seed that has them all."""
    scores = {
        (r.cell.task, r.cell.seed): score
        for r in records
        if _is(r, method) and (score := _score(r)) is not None
    }
    seeds = sorted({seed for _, seed in scores})
    rows = [[scores.get((task, seed)) for task in tasks] for seed in seeds]
    return [fmean(v for v in row if v is not None) for row in rows if None not in row]


def _result(
    records: Sequence[Record],
    over_probe: Difference | None,
    over_reference: Difference | None,
    seeds: frozenset[int],
) -> Result:
    cell = records[0].cell
    done = [r for r in records if _score(r) is not None]
    return Result(
        task=cell.task,
        method=cell.method,
        score=_estimate([s for r in done if (s := _score(r)) is not None]),
        failed=len(records) - len(done),
        missing=len(seeds - {r.cell.seed for r in records}),
        collapsed=sum(r.collapsed for r in done),
        seconds=_median(r.seconds for r in done),
        time_ratio=None,
        steps=_median(r.steps for r in done),
        trained_parameters=max((r.trained_parameters for r in done), default=None),
        over_probe=over_probe,
        over_reference=over_reference,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return float(median(known)) if known else None


def _with_ratios(rows: list[Result], reference: str) -> list[Result]:
    base = next((r.seconds for r in rows if r.method == reference), None)
    if not base:
        return rows
    return [
        row
        if row.seconds is None
        else dataclasses.replace(row, time_ratio=row.seconds / base)
        for row in rows
    ]


Row = TypeVar("Row", Result, Average)


def _with_verdicts(rows: list[Row]) -> list[Row]:
    over_probe = _judged([row.over_probe for row in rows])
    over_reference = _judged([row.over_reference for row in rows])
    return [
        dataclasses.replace(row, over_probe=p, over_reference=r)
        for row, p, r in zip(rows, over_probe, over_reference, strict=True)
    ]


def _anchors(
    records: Sequence[Record], tasks: Sequence[str], value: Any
) -> dict[str, Estimate]:
    """Return the scores of what needs no fine-tuning: one a seed, whatever the method."""
    found: dict[str, Estimate] = {}
    for task in tasks:
        by_seed = {
            r.cell.seed: score
            for r in records
            if r.cell.task == task and (score := value(r)) is not None
        }
        estimate = _estimate([by_seed[seed] for seed in sorted(by_seed)])
        if estimate is not None:
            found[task] = estimate
    return found


def _chosen(
    settled: Mapping[tuple[str, str, int], Any],
    tasks: Sequence[str],
    methods: Sequence[str],
) -> tuple[Tried, ...]:
    found = [
        Tried(*key, settings=value, validation=None, failed=0, chosen=True)
        for key, value in settled.items()
        if key[0] in tasks and key[1] in methods
    ]
    return _in_order(found, tasks, methods)


def _in_order(
    trials: Iterable[Tried], tasks: Sequence[str], methods: Sequence[str]
) -> tuple[Tried, ...]:
    def place(one: Tried) -> Any:
        where = (tasks.index(one.task), methods.index(one.method))
        return (*where, one.size == 0, one.size)

    return tuple(sorted(trials, key=place))


def _sweep(
    records: Sequence[Record],
    chosen: Mapping[tuple[str, str, int], Any],
    tasks: Sequence[str],
    methods: Sequence[str],
) -> tuple[Tried, ...]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        c = record.cell
        if c.purpose == "sweep":
            key = (c.task, c.method, c.size, _trial(c.trial))
            groups.setdefault(key, []).append(record)
    trials: list[Tried] = []
    for (task, method, size, settings), runs in groups.items():
        scores = [
            s
            for r in runs
            if not r.failed and (s := _number(r.validation, r.metric)) is not None
        ]
        trials.append(
            Tried(
                task=task,
                method=method,
                size=size,
                settings=settings,
                validation=_estimate(scores),
                failed=len(runs) - len(scores),
                chosen=chosen.get((task, method, size)) == settings,
            )
        )
    return _in_order(trials, tasks, methods)
