"""What is due next in a comparison, from its grid and what was recorded so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, median

from bidora.study.grid import Grid, Group, Trial
from bidora.study.records import Cell, Record

__all__ = ["Plan", "Study"]

CLOSE_ENOUGH = 0.10
"""Runs whose seconds differ by this part at most are of equal time already."""

PURPOSES = ("sweep", "steps", "time")


@dataclass(frozen=True)
class Study:
    """A comparison as far as it came: all that a report needs.

    Args:
        grid: What it is of.
        records: What the runs came to, sorted by cell. Some stand for a run: where
            `served` has the group, copies of its `steps` records with the purpose
            `time`; where every trial of a sweep failed, a failed record for each seed.
        notes: What a reader must know, a sentence each.
        chosen: The swept settings that validation examples chose, by group; () where
            nothing is swept.
        served: The groups whose runs of equal steps took the reference's time as well.
    """

    grid: Grid
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    chosen: dict[Group, Trial] = field(default_factory=dict)
    served: frozenset[Group] = frozenset()


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
        """The records by what they are of."""
        return {record.cell: record for record in self.records}

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

    def seconds(self, group: Group) -> float | None:
        """Return the median training seconds of a group's runs of equal steps.

        Args:
            group: Task, method and size.

        Returns:
            The median of those that ended well; None before all are over, or if none did.
        """
        cells = self.finals(group, "steps")
        found = [self.by_cell[cell] for cell in cells if cell in self.by_cell]
        well = [record.seconds for record in found if not record.failed]
        return median(well) if well and len(found) == len(cells) else None

    def takes_steps(self, group: Group) -> bool:
        """Return whether a group's runs took steps; a probe takes none."""
        found = [self.by_cell.get(cell) for cell in self.finals(group, "steps")]
        return any(record is not None and record.steps > 0 for record in found)

    @cached_property
    def steps_in_time(self) -> dict[Group, int | None]:
        """Steps that take a group the reference's time, where that is known.

        None stands for a group whose runs of equal steps serve: they take that time
        already, or no time that steps change. What was once begun is not changed again,
        though further seeds may move the medians a little.
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
                found[group] = None
                continue
            if (known := replace(cells[0], seed=0)) in begun:
                found[group] = begun[known]
                continue
            wanted = self.seconds((group[0], self.grid.reference, group[2]))
            own = self.seconds(group)
            if wanted is None or own is None:
                continue
            if not self.takes_steps(group) or abs(own / wanted - 1) <= CLOSE_ENOUGH:
                found[group] = None
            else:
                steps = self.grid.settings_of(cells[0]).max_steps
                found[group] = max(1, round(steps * wanted / own))
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
        left = sum(cell not in self.by_cell for cell in self.sweep(group))
        if group in self.outcomes and self.outcomes[group] is None:
            return left  # nothing was chosen, so nothing follows
        if group not in self.outcomes:
            return left + len(self._seeds(group)) * self._kinds(group)
        left += sum(c not in self.by_cell for c in self.finals(group, "steps"))
        if self._kinds(group) == 2:
            if group in self.steps_in_time:
                left += sum(c not in self.by_cell for c in self.timed(group))
            elif not self._never_timed(group):
                left += len(self._seeds(group))
        return left

    def _never_timed(self, group: Group) -> bool:
        """Return whether equal time has no meaning: nothing was measured, or will be."""
        reference = (group[0], self.grid.reference, group[2])
        if not self.grid.has(*reference[:2]):
            return True
        for one in (group, reference):
            if one not in self.outcomes:
                continue
            cells = self.finals(one, "steps")
            if all(cell in self.by_cell for cell in cells) and not self.seconds(one):
                return True
        return False

    def _seeds(self, group: Group) -> tuple[int, ...]:
        return self.grid.task(group[0]).seeds

    def _kinds(self, group: Group) -> int:
        return 2 if self.grid.is_timed(group[0], group[1]) else 1

    def settings_notes(self) -> Iterable[str]:
        """Say what grid and tasks give, and a method has no use for."""
        seen: dict[tuple[str, ...], list[str]] = {}
        for task, method, _ in self.grid.groups():
            unused = tuple(sorted(self.grid.unused(task, method)))
            if unused and method not in seen.setdefault(unused, []):
                seen[unused].append(method)
        for names, methods in seen.items():
            yield (
                f"{_words(methods)} {'have' if len(methods) > 1 else 'has'} no use for "
                f"{_words(names)}, and ran without."
            )

    def sweep_notes(self) -> Iterable[str]:
        """Say where methods were not tried equally often, or not in all combinations."""
        grid = self.grid
        swept = [method for method in grid.methods if method.sweep]
        tried = {method.name: len(grid.trials_of(method.name)) for method in swept}
        budget = grid.trials or max(tried.values(), default=1)
        for method in swept:
            if tried[method.name] < method.combinations:
                yield (
                    f"{method.name}: {tried[method.name]} of the {method.combinations} "
                    "combinations of its swept settings were tried, drawn by a fixed seed."
                )
            if tried[method.name] < budget:
                yield (
                    f"{method.name} has {tried[method.name]} combination"
                    f"{'s' if tried[method.name] > 1 else ''} of its swept settings, fewer "
                    f"than the {budget} trials that a method may have."
                )
        plain = [method.name for method in grid.methods if not method.sweep]
        if swept and plain:
            yield f"Nothing was swept for {_words(plain)}."

    def run_notes(self) -> Iterable[str]:
        """Say what failed, what is not compared, and what is still to do."""
        for group, trial in self.outcomes.items():
            if trial is None:
                yield f"{_of(group)}: {self._all_failed(group)}."
        failed = [record for record in self._own() if record.failed]
        if failed:
            first = failed[0]
            yield (
                f"{len(failed)} of {len(self._own())} runs failed, such as "
                f"{_of(first.cell)}: {first.error}"
            )
        without = [
            task.name
            for task in self.grid.tasks
            if "time" in self.grid.equal_on(task.name)
            and not self.grid.has(task.name, self.grid.reference)
        ]
        if without:
            yield (
                f"{self.grid.reference} is not run on {_words(without)}, so that "
                "nothing is compared there at its time."
            )
        if self.remaining:
            yield f"{self.remaining} of {self.total} runs are still to do."

    def _all_failed(self, group: Group) -> str:
        records = [self.by_cell[cell] for cell in self.sweep(group)]
        why = next((record.error for record in records if record.failed), "")
        return (
            "no trial of the sweep ended with a finite score on validation examples"
            + (f", the first failing with {why}" if why else "")
        )

    def _own(self) -> list[Record]:
        """Return the records of the grid's runs: sweeps, and finals as they were chosen."""
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
        own = self._own()
        stand_ins: list[Record] = []
        served = {g for g, steps in self.steps_in_time.items() if steps is None}
        for group in served:
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
                            Record(cell, {}, error=self._all_failed(group))
                        )
        left_out = len(self.by_cell) - len(own)
        if left_out:
            notes = (
                *notes,
                f"{left_out} record{'s' if left_out > 1 else ''} of this folder belong"
                f"{'' if left_out > 1 else 's'} to no run of the grid as it is now, and "
                "are left out.",
            )
        records = sorted([*own, *stand_ins], key=lambda r: _order(r.cell))
        return Study(
            self.grid,
            tuple(records),
            (*notes, *self.settings_notes(), *self.sweep_notes(), *self.run_notes()),
            self.chosen,
            frozenset(served),
        )


def _order(cell: Cell) -> tuple[str, ...]:
    """Return a key that any cells can be sorted by; trials may hold words and numbers."""
    numbers = f"{cell.size:012d}", f"{cell.seed:012d}"
    return cell.task, cell.method, *numbers, cell.purpose, repr(cell.trial)


def _of(group: Group | Cell) -> str:
    if isinstance(group, Cell):
        return f"{_of((group.task, group.method, group.size))}, seed {group.seed}"
    task, method, size = group
    return f"{method} on {task}" + (f" with {size} examples" if size else "")


def _words(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
