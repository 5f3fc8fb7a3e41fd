"""The numbers of a comparison's report: means, intervals, paired differences, verdicts.

All of it follows from the records. A table is of one purpose and one size; within it, a
method is compared with the probe and with the reference on each task and on the average
over tasks. Where a purpose has several sizes, it is compared over all of them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bidora.study.records import Cell, Purpose, Record
from bidora.study.results import (
    Estimate,
    Failure,
    Overall,
    Result,
    Summary,
    Table,
    Tried,
)
from bidora.study.statistics import score_of, time_ratio
from bidora.study.verdicts import (
    LEVEL,
    averages,
    estimate,
    is_probe,
    kind_of,
    middle,
    over_all_sizes,
    over_probe,
    over_reference,
    with_verdicts,
)

__all__ = ["summarise"]

PURPOSES: tuple[Purpose, ...] = ("steps", "time")
"""Of the runs that are reported, in the order of the page."""

ROUNDING = 1e-9
"""Scores that differ by no more are the same."""


def summarise(
    records: Iterable[Record],
    *,
    reference: str = "",
    notes: Sequence[str] = (),
    chosen: Mapping[tuple[str, str, int], Any] | None = None,
    tasks: Iterable[str] = (),
    methods: Iterable[str] = (),
    missing: Iterable[Cell] = (),
) -> Summary:
    """Work out what records show.

    Args:
        records: Of runs, in any order.
        reference: The method that others are compared with; empty for none.
        notes: What a reader must know besides.
        chosen: The settings that a sweep chose, by task, method and size.
        tasks: Their order; others follow by name.
        methods: Their order; others follow by name.
        missing: Planned runs that are not done yet; those of a sweep don't count.

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
    due = [cell for cell in missing if cell.purpose != "sweep"]
    names = _ordered(methods, (r.cell.method for r in kept))
    jobs = _ordered(tasks, (r.cell.task for r in kept))
    sizes = sorted({r.cell.size for r in kept}, key=lambda s: (s == 0, s))
    tables: list[Table] = []
    overall: list[Overall | None] = []
    for purpose in PURPOSES:
        own = [r for r in final if r.cell.purpose == purpose]
        parts = {size: [r for r in own if r.cell.size == size] for size in sizes}
        made = [
            _table(part, purpose, size, jobs, names, reference, due)
            for size, part in parts.items()
            if part
        ]
        tables += made
        overall.append(over_all_sizes(own, names, reference, made))
    return Summary(
        reference=reference if reference in names else "",
        tasks=jobs,
        methods=names,
        sizes=tuple(sizes),
        metrics={r.cell.task: r.metric for r in reversed(kept) if r.metric},
        outer=tuple(n for n in names if any(_searches(r) for r in kept if _is(r, n))),
        tables=tuple(tables),
        overall=tuple(one for one in overall if one is not None),
        sweep=_sweep(kept, settled, jobs, names),
        chosen=_chosen(settled, jobs, names),
        failures=_failures(kept),
        missing=len(due),
        notes=tuple(remarks),
        level=LEVEL,
    )


def _searches(record: Record) -> bool:
    """Return whether it is of the bidora family, whatever the grid calls it."""
    return kind_of(record).startswith("bidora")


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


def _validated(record: Record) -> float | None:
    return None if record.failed else _number(record.validation, record.metric)


def _failures(records: Iterable[Record]) -> tuple[Failure, ...]:
    """Return the runs without a score that they were made for, those of a sweep last."""
    final: list[Failure] = []
    swept: list[Failure] = []
    for r in records:
        if r.cell.purpose != "sweep" and score_of(r) is None:
            why = r.error or "the test score is missing or not finite"
            final.append(Failure(r.cell, why))
        elif r.cell.purpose == "sweep" and _validated(r) is None:
            why = r.error or "the validation score is missing or not finite"
            swept.append(Failure(r.cell, why))
    return (*final, *swept)


def _table(
    records: Sequence[Record],
    purpose: Purpose,
    size: int,
    tasks: Sequence[str],
    methods: Sequence[str],
    reference: str,
    due: Sequence[Cell],
) -> Table:
    tasks = [t for t in tasks if any(r.cell.task == t for r in records)]
    methods = [m for m in methods if any(_is(r, m) for r in records)]
    results: dict[tuple[str, int], list[Result]] = {}
    for task in tasks:
        rows: list[Result] = []
        for method in methods:
            own = [r for r in records if _is(r, method) and r.cell.task == task]
            here = task, method, size, purpose
            left = sum((c.task, c.method, c.size, c.purpose) == here for c in due)
            if own or left:
                rows.append(_result(records, own, task, method, reference, left))
        results[task, size] = with_verdicts(rows)
    return Table(
        purpose=purpose,
        size=size,
        tasks=tuple(tasks),
        methods=tuple(methods),
        results=tuple(result for rows in results.values() for result in rows),
        averages=tuple(averages(records, methods, reference, results)),
        probe=_anchors(
            records,
            tasks,
            lambda r: _number(r.probe or (r.test if is_probe(r) else {}), r.metric),
        ),
        constant=_anchors(records, tasks, lambda r: _number(r.baseline, r.metric)),
        probes=tuple(
            m for m in methods if any(is_probe(r) for r in records if _is(r, m))
        ),
    )


def _result(
    records: Sequence[Record],
    own: Sequence[Record],
    task: str,
    method: str,
    reference: str,
    missing: int,
) -> Result:
    """Return what a method came to on a task, by its own records and the reference's."""
    done = [r for r in own if score_of(r) is not None]
    here = [r for r in records if r.cell.task == task]
    return Result(
        task=task,
        method=method,
        score=estimate([s for r in done if (s := score_of(r)) is not None]),
        failed=len(own) - len(done),
        missing=missing,
        collapsed=sum(r.collapsed for r in done),
        seconds=middle(r.seconds for r in done if math.isfinite(r.seconds)),
        time_ratio=time_ratio(here, method, reference),
        steps=middle(r.steps for r in done),
        trained_parameters=max((r.trained_parameters for r in done), default=None),
        over_probe=over_probe(records, method, task),
        over_reference=over_reference(records, method, reference, task),
    )


def _anchors(
    records: Sequence[Record], tasks: Sequence[str], value: Any
) -> dict[str, Estimate]:
    """Return the scores of what needs no fine-tuning: one a seed, whatever the method.

    None on a task where methods differ in it, as with another model: whose would it be?
    """
    found: dict[str, Estimate] = {}
    for task in tasks:
        by_seed: dict[int, set[float]] = {}
        for r in records:
            if r.cell.task == task and (score := value(r)) is not None:
                by_seed.setdefault(r.cell.seed, set()).add(score)
        if any(max(own) - min(own) > ROUNDING for own in by_seed.values()):
            continue
        one = estimate([max(by_seed[seed]) for seed in sorted(by_seed)])
        if one is not None:
            found[task] = one
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
        scores = [s for r in runs if (s := _validated(r)) is not None]
        trials.append(
            Tried(
                task=task,
                method=method,
                size=size,
                settings=settings,
                validation=estimate(scores),
                failed=len(runs) - len(scores),
                chosen=chosen.get((task, method, size)) == settings,
            )
        )
    return _in_order(trials, tasks, methods)
