"""Records of comparisons that nobody ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from bidora.study.records import Cell, Point, Record


def record(
    method: str,
    score: float | None = None,
    *,
    task: str = "sst2",
    size: int = 100,
    seed: int = 0,
    purpose: Any = "steps",
    trial: tuple[tuple[str, Any], ...] = (),
    probe: float | None = 0.5,
    constant: float | None = 0.25,
    validation: float | None = None,
    seconds: float = 10.0,
    error: str = "",
    curve: Sequence[tuple[float, float]] = (),
    **changed: Any,
) -> Record:
    """Return a record with accuracies; a score of None is a run without one."""

    def scores(value: float | None) -> dict[str, float]:
        return {} if value is None else {"accuracy": value}

    return Record(
        cell=Cell(task, method, size, seed, purpose, trial),
        settings=changed.pop("settings", {"method": method, "seed": seed}),
        error=error,
        metric="accuracy",
        test=scores(score),
        validation=scores(validation),
        probe=scores(probe),
        baseline=scores(constant),
        steps=changed.pop("steps", 240),
        seconds=seconds,
        total_seconds=seconds + 1,
        trained_parameters=changed.pop("trained_parameters", 24576),
        curve=tuple(Point("train", i, s, v) for i, (s, v) in enumerate(curve)),
        environment=changed.pop("environment", {"torch": "2.13.0"}),
        **changed,
    )


def study(
    records: Sequence[Record],
    reference: str = "lora",
    notes: Sequence[str] = (),
    chosen: dict[tuple[str, str, int], Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Any:
    """Return what a report is made from; groups with a run have all of the seeds."""
    tasks = dict.fromkeys(r.cell.task for r in records)
    methods = dict.fromkeys(r.cell.method for r in records)
    grid = SimpleNamespace(
        tasks=[SimpleNamespace(name=name) for name in tasks],
        methods=[SimpleNamespace(name=name) for name in methods],
        reference=reference,
    )
    final = [replace(r.cell, trial=()) for r in records if r.cell.purpose != "sweep"]
    planned = {replace(cell, seed=seed) for cell in final for seed in seeds}
    return SimpleNamespace(
        grid=grid,
        records=records,
        notes=notes,
        chosen=chosen or {},
        stand_ins=frozenset(),
        missing=sorted(planned - {*final}),
    )


def full_study() -> Any:
    """Return a comparison with all that a report can show."""
    records = [
        record(
            method,
            0.25
            if (method, task, seed) == ("full", "cola", 2)
            else 0.6 + gain + jitter,
            task=task,
            seed=seed,
            size=size,
            purpose=purpose,
            validation=0.6,
            seconds=10.0 * (1 + gain),
            curve=((1.0, 0.5), (2.0, 0.6 + gain)),
        )
        for purpose, size in (("steps", 100), ("time", 0))
        for task in ("sst2", "cola")
        for seed, jitter in enumerate((0.0, 0.01, 0.03))
        for method, gain in (("lora", 0.0), ("full", 0.02), ("bidora", 0.1 + jitter))
    ]
    records.append(record("dora", task="sst2", error="ValueError: loss is not finite"))
    trials = [
        record(
            "lora",
            size=100,
            seed=100,
            purpose="sweep",
            trial=(("learning_rate", rate),),
            validation=value,
            probe=None,
            constant=None,
        )
        for rate, value in ((0.001, 0.6), (0.01, 0.7))
    ]
    return study(
        [*records, *trials],
        notes=["Equal time means the reference’s."],
        chosen={("sst2", "lora", 100): (("learning_rate", 0.01),)},
    )
