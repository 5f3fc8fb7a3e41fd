"""What is due next in a comparison, from its grid and what was recorded so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, median

from bidora.study.grid import Grid, Group, Trial
from bidora.study.notes import all_failed, run_notes, settings_notes, sweep_notes
from bidora.study.records import Cell, Record
from bidora.study.statistics import time_ratio

__all__ = ["Plan", "Study"]

CLOSE_ENOUGH = 0.10
"""Runs whose seconds differ by this part at most are of equal time already."""

PURPOSES = ("sweep", "steps", "time")


@dataclass(frozen=True)
class Study:
    """A comparison as far as it came: all that a report needs.

    Args:
        grid: What it is of.
        records: What the runs came to, sorted by cell, and what stands for a run.
        notes: What a reader must know, a sentence each.
        chosen: The swept settings that validation examples chose, by group; () where
            nothing is swept.
        stand_ins: The cells of records that stand for a run: copies of runs of equal
            steps that count at equal time too; where every trial of a sweep failed, a
            failed record for each seed.
        missing: The runs that are not done yet, as far as is known; their trial is ()
            where it is not chosen yet.
    """

    grid: Grid
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    chosen: dict[Group, Trial] = field(default_factory=dict)
    stand_ins: frozenset[Cell] = frozenset()
    missing: tuple[Cell, ...] = ()

    @property
    def served(self) -> frozenset[Group]:
        """The groups whose runs of equal steps count at equal time as well."""
        groups = ((c.task, c.method, c.size) for c in self.stand_ins)
        return frozenset(group for group in groups if group in self.chosen)


@dataclass(frozen=True)
class Plan:
    """What follows from the records of a grid; made anew after each run.

    Args:
        grid: What is compared.
        records: What was recorded; what belongs to no run of the grid is left aside.
        tasks: The tasks that runs are due of; None for all.
        methods: The methods that runs are due of; None for all.

    Example:
        >>> from bidora.study.reading import grid_from_dict
        >>> grid = grid_from_dict(
        ...     {
        ...         "tasks": {"docstrings": {}},
        ...         "methods": {"lora": {}, "dora": {"sweep": {"lora_r": [2, 4]}}},
        ...         "reference": "lora",
        ...     }
        ... )
        >>> [(cell.method, cell.purpose, cell.trial) for cell in Plan(grid).due]
        [('dora', 'sweep', (('lora_r', 2),)),
         ('dora', 'sweep', (('lora_r', 4),)),
         ('lora', 'steps', ())]
    """

    grid: Grid
    records: tuple[Record, ...] = ()
    tasks: Collection[str] | None = None
    methods: Collection[str] | None = None

    @cached_property
    def by_cell(self) -> dict[Cell, Record]:
        """The records by what they are of, without those of another reference's time."""
        return {r.cell: r for r in self.records if self.grid.counts(r)}

    @cached_property
    def groups(self) -> list[Group]:
        """The groups that runs are due of."""
        return [
            (task, method, size)
            for task, method, size in self.grid.groups()
            if (self.tasks is None or task in self.tasks)
            and (self.methods is None or method in self.methods)
        ]

    @cached_property
    def outcomes(self) -> dict[Group, Trial | None]:
        """The chosen trial of each group whose sweep is over; None where all failed."""
        found: dict[Group, Trial | None] = {}
        for group in self.grid.groups():
            trials = self.grid.trials_of(group[1])
            if len(trials) == 1:
                found[group] = trials[0]
            elif all(cell in self.by_cell for cell in self.sweep(group)):
                scores = [self.score(group, trial) for trial in trials]
                best = max(scores)
                lost = best == -math.inf
                found[group] = None if lost else trials[scores.index(best)]
        return found

    @property
    def chosen(self) -> dict[Group, Trial]:
        """The chosen trial of each group that has one."""
        return {g: trial for g, trial in self.outcomes.items() if trial is not None}

    def sweep(self, group: Group) -> list[Cell]:
        """Return the runs that a group's settings are chosen by."""
        if not self.grid.sweeps(group[1]):
            return []
        return [
            Cell(*group, seed, "sweep", trial)
            for seed in self.grid.sweep_seeds
            for trial in self.grid.trials_of(group[1])
        ]

    def score(self, group: Group, trial: Trial) -> float:
        """Return a trial's mean score on validation examples, over the seeds of sweeps.

        The scores on test examples, and the runs that are reported, have no part in it.

        Args:
            group: Task, method and size.
            trial: The settings.

        Returns:
            The mean; minus infinity if a run failed or came to nothing finite.
        """
        found = []
        for seed in self.grid.sweep_seeds:
            record = self.by_cell[Cell(*group, seed, "sweep", trial)]
            value = record.validation.get(record.metric, math.nan)
            if record.failed or not math.isfinite(value):
                return -math.inf
            found.append(value)
        return fmean(found)

    def finals(self, group: Group, purpose: str) -> list[Cell]:
        """Return the runs of a group that are reported; none before its sweep is over."""
        trial = self.outcomes.get(group)
        if trial is None:
            return []
        seeds = self.grid.task(group[0]).seeds
        known = "time" if purpose == "time" else "steps"
        return [Cell(*group, seed, known, trial) for seed in seeds]

    def ended_well(self, group: Group) -> list[Record] | None:
        """Return the runs of equal steps that did; None before all of them are over.

        Args:
            group: Task, method and size.
        """
        cells = self.finals(group, "steps")
        if group not in self.outcomes or any(c not in self.by_cell for c in cells):
            return None
        return [r for cell in cells if not (r := self.by_cell[cell]).failed]

    def time_ratio(self, group: Group) -> float | None:
        """Return how many times the reference's seconds a group's runs took.

        Args:
            group: Task, method and size.

        Returns:
            The median over the seeds of equal steps; None before all runs of both are
            over, or if no seed was measured on both sides.
        """
        own = self.ended_well(group)
        base = self.ended_well((group[0], self.grid.reference, group[2]))
        if own is None or base is None:
            return None
        return time_ratio([*own, *base], group[1], self.grid.reference)

    def takes_steps(self, group: Group) -> bool:
        """Return whether a group's runs took steps; a probe takes none."""
        return any(record.steps > 0 for record in self.ended_well(group) or ())

    def early_end(self, group: Group) -> float | None:
        """Return the step that early stopping ended a group's runs at.

        More steps would take such runs no more time.

        Args:
            group: Task, method and size.

        Returns:
            The median over seeds of equal steps; None where that is all steps.
        """
        own = self.ended_well(group)
        if not own:
            return None
        settings = self.grid.settings_of(own[0].cell)
        end = median(record.steps for record in own)
        stops = settings.early_stopping_patience is not None
        return end if stops and end < settings.max_steps else None

    @cached_property
    def steps_in_time(self) -> dict[Group, int | None]:
        """Steps that take a group the reference's time, where that is known.

        None stands for a group whose runs of equal steps serve: they take that time
        already, or no time that steps change. What was once begun is not changed again,
        though further seeds may move the median a little.
        """
        found: dict[Group, int | None] = {}
        begun = {
            replace(cell, seed=0): record.settings["max_steps"]
            for cell, record in self.by_cell.items()
            if cell.purpose == "time" and "max_steps" in record.settings
        }
        for group in self.grid.groups():
            cells = self.finals(group, "time")
            if not cells or "time" not in self.grid.equal_on(group[0]):
                continue
            if group[1] == self.grid.reference:
                well = self.ended_well(group)
                if well is None or any(record.seconds > 0 for record in well):
                    found[group] = None
                continue
            if (known := replace(cells[0], seed=0)) in begun:
                found[group] = begun[known]
                continue
            ratio = self.time_ratio(group)
            if ratio is None:
                continue
            is_fixed = (
                not ratio
                or not self.takes_steps(group)
                or self.early_end(group) is not None
            )
            if is_fixed or abs(ratio - 1) <= CLOSE_ENOUGH:
                found[group] = None
            else:
                steps = self.grid.settings_of(cells[0]).max_steps
                found[group] = max(1, round(steps / ratio))
        return found

    def timed(self, group: Group) -> list[Cell]:
        """Return the runs of equal time of a group, as far as their steps are known."""
        if self.steps_in_time.get(group) is None:
            return []
        return self.finals(group, "time")

    @cached_property
    def due(self) -> list[Cell]:
        """The runs that can begin now: sweeps first, then seed by seed over all groups."""
        cells = [
            cell
            for group in self.groups
            for cell in (
                *self.sweep(group),
                *self.finals(group, "steps"),
                *self.timed(group),
            )
            if cell not in self.by_cell
        ]
        # Sorting is stable: within a seed (and trial) the groups stay in their order.
        return sorted(cells, key=self._turn)

    def _turn(self, cell: Cell) -> tuple[int, int, int]:
        stage = PURPOSES.index(cell.purpose)
        if cell.purpose == "sweep":
            trials = self.grid.trials_of(cell.method)
            return (
                stage,
                self.grid.sweep_seeds.index(cell.seed),
                trials.index(cell.trial),
            )
        return stage, self.grid.task(cell.task).seeds.index(cell.seed), 0

    @cached_property
    def total(self) -> int:
        """Runs of all groups, at most: some may not be needed for equal time."""
        return sum(
            len(self.sweep(group)) + len(self._seeds(group)) * self._kinds(group)
            for group in self.groups
        )

    @cached_property
    def remaining(self) -> int:
        """Runs that are due, or will be as far as is known."""
        return sum(self.left(group) for group in self.groups)

    def left(self, group: Group) -> int:
        """Return how many runs of a group are due, or will be as far as is known."""
        return len(self.to_come(group))

    def to_come(self, group: Group) -> list[Cell]:
        """Return the runs of a group that are due, or will be as far as is known.

        Args:
            group: Task, method and size.

        Returns:
            Their cells, with the trial () where the sweep has not chosen it yet.
        """
        cells = self.sweep(group)
        trial = self.outcomes.get(group, ())
        if trial is not None:  # otherwise nothing was chosen, so nothing follows
            seeds = self._seeds(group)
            cells += [Cell(*group, seed, "steps", trial) for seed in seeds]
            if group in self.steps_in_time:
                cells += self.timed(group)
            elif self._kinds(group) == 2 and not self._never_timed(group):
                cells += [Cell(*group, seed, "time", trial) for seed in seeds]
        return [cell for cell in cells if cell not in self.by_cell]

    def _never_timed(self, group: Group) -> bool:
        """Return whether equal time has no meaning: nothing was measured, or will be."""
        reference = (group[0], self.grid.reference, group[2])
        if not self.grid.has(*reference[:2]):
            return True
        both = self.ended_well(group), self.ended_well(reference)
        if [] in both:
            return True
        return None not in both and self.time_ratio(group) is None

    def _seeds(self, group: Group) -> tuple[int, ...]:
        return self.grid.task(group[0]).seeds

    def _kinds(self, group: Group) -> int:
        return 2 if self.grid.is_timed(group[0], group[1]) else 1

    @cached_property
    def own(self) -> list[Record]:
        """The records of the grid's runs: sweeps, and finals as they were chosen."""
        cells = [
            cell
            for group in self.grid.groups()
            for cell in (
                *self.sweep(group),
                *self.finals(group, "steps"),
                *self.timed(group),
            )
        ]
        return [self.by_cell[cell] for cell in cells if cell in self.by_cell]

    def study(self, notes: Iterable[str] = ()) -> Study:
        """Return the comparison as far as it came.

        Args:
            notes: Sentences beside those that follow from grid and records.
        """
        own = self.own
        stand_ins: list[Record] = []
        for group, steps in self.steps_in_time.items():
            if steps is not None:
                continue
            for cell in self.finals(group, "steps"):
                if cell in self.by_cell:
                    of_time = replace(cell, purpose="time")
                    stand_ins.append(replace(self.by_cell[cell], cell=of_time))
        for group, trial in self.outcomes.items():
            if trial is None:
                for seed in self._seeds(group):
                    for purpose in self.grid.equal_on(group[0]):
                        cell = Cell(*group, seed, purpose)
                        stand_ins.append(
                            Record(cell, {}, error=all_failed(self, group))
                        )
        left_out = len({record.cell for record in self.records}) - len(own)
        if left_out:
            notes = (
                *notes,
                f"{left_out} record{'s' if left_out > 1 else ''} of this folder belong"
                f"{'' if left_out > 1 else 's'} to no run of the grid as it is now, and "
                f"{'are' if left_out > 1 else 'is'} left out.",
            )
        records = sorted([*own, *stand_ins], key=lambda r: _order(r.cell))
        return Study(
            self.grid,
            tuple(records),
            (
                *notes,
                *settings_notes(self.grid),
                *sweep_notes(self.grid),
                *run_notes(self),
            ),
            self.chosen,
            frozenset(record.cell for record in stand_ins),
            tuple(
                cell
                for group in self.grid.groups()
                for cell in self.to_come(group)
                if cell.purpose != "sweep"
            ),
        )


def _order(cell: Cell) -> tuple[str, ...]:
    """Return a key that any cells can be sorted by; trials may hold words and numbers."""
    numbers = f"{cell.size:012d}", f"{cell.seed:012d}"
    return cell.task, cell.method, *numbers, cell.purpose, repr(cell.trial)
