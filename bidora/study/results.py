"""What a comparison of methods came to, as its report shows it; `summarise` fills it.

Scores are in points, hundredths of the metric, and so are their differences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from bidora.study.records import Cell, Purpose

__all__ = [
    "Average",
    "Difference",
    "Estimate",
    "Failure",
    "Overall",
    "Result",
    "Summary",
    "Table",
    "Tried",
    "Verdict",
]

Verdict = Literal["better", "worse", "no difference shown"]
"""What a paired test shows of a method, after Holm's correction."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        low: Lower end of its interval; None with one seed.
        high: Upper end.
        n: Seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A method's score minus another's, over the runs that both have.

    Args:
        mean: Mean of the differences.
        low: Lower end of its interval, not adjusted; None with one pair.
        high: Upper end.
        n: Pairs with a score on both sides.
        p: Of the permutation test that flips signs; None with one pair.
        adjusted: p after Holm's correction over the methods of the table.
        wins: Pairs in which the method is ahead.
        ties: Pairs of equal scores.
        losses: Pairs in which it is behind.
        verdict: What is shown, by the adjusted p.
        decidable: Whether so many pairs, and methods, could show a difference at all:
            flipping the signs of n differences that are not zero gives no p below
            2^(1 − n).
        failed: Pairs that were run, and have no score on a side.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None
    adjusted: float | None
    wins: int
    ties: int
    losses: int
    verdict: Verdict
    decidable: bool = False
    failed: int = 0


@dataclass(frozen=True)
class Result:
    """What a method came to on a task.

    Args:
        task: The task.
        method: The method.
        score: On test examples; None where no run ended well.
        failed: Runs that ended with an error or without a finite score.
        missing: Planned runs that are not done yet.
        collapsed: Runs that score exactly what a constant answer scores, by every metric.
        seconds: Median seconds of training.
        time_ratio: Seconds over the reference's: the median over seeds.
        steps: Median of optimizer steps.
        trained_parameters: The most that a run trained.
        over_probe: Score minus the probe's; None for the probe itself.
        over_reference: Score minus the reference's.
    """

    task: str
    method: str
    score: Estimate | None
    failed: int
    missing: int
    collapsed: int
    seconds: float | None
    time_ratio: float | None
    steps: float | None
    trained_parameters: int | None
    over_probe: Difference | None
    over_reference: Difference | None


@dataclass(frozen=True)
class Average:
    """What a method came to on average over cells: tasks, or tasks and sizes.

    No average rests on fewer cells than another. The score is taken within each seed that
    has all cells; differences count each pair of runs once.

    Args:
        method: The method.
        score: Mean of its scores over cells; None if no seed has them all.
        over_probe: Difference to the probe; None if a cell has no pair.
        over_reference: Difference to the reference, likewise.
        time_ratio: Median of its time ratios over cells.
        by_seed: Mean of its scores over cells, for each seed that has all cells. Means
            of methods are ranked over the seeds that they share.
    """

    method: str
    score: Estimate | None
    over_probe: Difference | None
    over_reference: Difference | None
    time_ratio: float | None
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Table:
    """All that was found for one purpose and size.

    Args:
        purpose: `steps` or `time`.
        size: Training examples; 0 for all.
        tasks: Tasks with a run.
        methods: Methods with a run.
        results: One each task and method that has a run, or is still to have one.
        averages: One a method, over tasks.
        probe: The probe's scores by task, where it has some and methods share it.
        constant: What a constant answer scores, by task.
        probes: Methods that are the probe, whatever the grid calls them.
    """

    purpose: Purpose
    size: int
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    results: tuple[Result, ...]
    averages: tuple[Average, ...]
    probe: dict[str, Estimate]
    constant: dict[str, Estimate]
    probes: tuple[str, ...] = ()

    @property
    def anchors(self) -> dict[str, dict[str, Estimate]]:
        """Scores of what needs no fine-tuning, by name and task.

        The probe is left out on tasks where a method is the probe, which has its own row.
        """
        own = {r.task for r in self.results if r.method in self.probes and r.score}
        probe = {task: one for task, one in self.probe.items() if task not in own}
        found = {"constant answer": self.constant, "probe": probe}
        return {name: scores for name, scores in found.items() if scores}

    @property
    def unlike_probes(self) -> tuple[str, ...]:
        """Tasks on which methods have probes that differ, so that none stands for all."""
        probed = {r.task for r in self.results if r.over_probe is not None}
        return tuple(t for t in self.tasks if t in probed and t not in self.probe)

    def result(self, task: str, method: str) -> Result | None:
        """Return the result of a method on a task; None without a run.

        Args:
            task: The task.
            method: The method.
        """
        found = (r for r in self.results if (r.task, r.method) == (task, method))
        return next(found, None)

    def average(self, method: str) -> Average:
        """Return a method's average over tasks.

        Args:
            method: One of `methods`.
        """
        return next(a for a in self.averages if a.method == method)


@dataclass(frozen=True)
class Overall:
    """Methods compared over all sizes at once, for one purpose.

    Pairs are of the same task, size and seed, as everywhere. Those that share a test set
    and a seed are not independent of each other, and p takes them to be.

    Args:
        purpose: `steps` or `time`.
        cells: Each task and size with a run.
        averages: One a method, over these cells.
    """

    purpose: Purpose
    cells: tuple[tuple[str, int], ...]
    averages: tuple[Average, ...]


@dataclass(frozen=True)
class Tried:
    """What settings of a sweep came to on validation examples.

    Args:
        task: The task.
        method: The method.
        size: Training examples; 0 for all.
        settings: The swept settings.
        validation: The main metric; None if no run has one.
        failed: Runs that ended with an error or without a finite score.
        chosen: Whether these settings were taken.
    """

    task: str
    method: str
    size: int
    settings: tuple[tuple[str, Any], ...]
    validation: Estimate | None
    failed: int
    chosen: bool


@dataclass(frozen=True)
class Failure:
    """A run without a score.

    Args:
        cell: What it was of.
        error: Why.
    """

    cell: Cell
    error: str


@dataclass(frozen=True)
class Summary:
    """All numbers of a report.

    Args:
        reference: The method that others are compared with; empty for none.
        tasks: In the order of the grid.
        methods: In the order of the grid.
        sizes: Ascending, all examples last.
        metrics: The main metric by task.
        outer: Methods that search on two levels: the bidora family.
        tables: One each purpose and size with a run.
        overall: One each purpose with a run at several sizes.
        sweep: The trials.
        chosen: Settings that were taken, where a sweep chose.
        failures: Runs without a score, those of the sweep last.
        missing: Planned runs that are not done yet, those of the sweep aside.
        notes: What a reader must know besides.
        level: Of all intervals.
    """

    reference: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    sizes: tuple[int, ...]
    metrics: dict[str, str]
    outer: tuple[str, ...]
    tables: tuple[Table, ...]
    overall: tuple[Overall, ...]
    sweep: tuple[Tried, ...]
    chosen: tuple[Tried, ...]
    failures: tuple[Failure, ...]
    missing: int
    notes: tuple[str, ...]
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)
