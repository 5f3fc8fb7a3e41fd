"""What a comparison would do, and for how long: nothing is trained or written."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bidora.errors import UserError
from bidora.runs.results import Listener
from bidora.study.data import check_tasks
from bidora.study.folder import StudyFolder
from bidora.study.grid import Group
from bidora.study.notes import settings_notes, sweep_notes
from bidora.study.plan import Plan
from bidora.study.runner import expected_seconds
from bidora.study.settings import StudySettings

__all__ = ["Outlook", "look_ahead"]


@dataclass(frozen=True)
class Outlook:
    """What a comparison would do.

    Args:
        plan: With the records that are there already.
        seconds: About how long what remains will take.
        notes: What is worth knowing before, a sentence each.
    """

    plan: Plan
    seconds: float
    notes: tuple[str, ...]

    def table(self) -> str:
        """Return the runs of each task, method and size, and how many are to do."""
        head = ("task", "method", "size", "sweep", "steps", "time", "to do")
        rows = [head, *(self._row(group) for group in self.plan.groups)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def _row(self, group: Group) -> tuple[str, ...]:
        task, method, size = group
        grid = self.plan.grid
        seeds = len(grid.task(task).seeds)
        is_timed = grid.is_timed(task, method)
        sweep = len(self.plan.sweep(group))
        counts = sweep, seeds, seeds if is_timed else 0, self.plan.left(group)
        return task, method, str(size or "all"), *(str(n or "-") for n in counts)


def look_ahead(settings: StudySettings, listener: Listener | None = None) -> Outlook:
    """Check the grid and the data, and say what a comparison would do.

    Args:
        settings: Of the comparison.
        listener: Told what the data is.

    Returns:
        The runs, and about how long they will take: by those that are recorded, or else
        by a few steps of each method on each task.

    Raises:
        UserError: If the grid, the data or the folder can't be used.
    """
    listener = listener or Listener()
    grid = settings.read()
    folder = StudyFolder(settings.folder)
    records = [] if settings.overwrite else folder.read(listener)[0]
    if settings.retry_failed:
        records = [record for record in records if not record.failed]
    folder.check(grid, records, listener)
    plan = Plan(grid, tuple(records), settings.only_tasks, settings.only_methods)
    stopped = check_tasks(plan, listener).stopped
    notes = (*stopped.values(), *settings_notes(grid), *sweep_notes(grid))
    known = expected_seconds(plan)
    return Outlook(plan, _timed(plan, listener) if known is None else known, notes)


def _timed(plan: Plan, listener: Listener) -> float:
    """Time a few steps of each method on each task, and return what all runs take."""
    from bidora.runs.job import train

    listener.message("Time   a few steps of each method on each task are timed")
    spent: dict[tuple[str, str], float] = {}
    for cell in plan.due:
        if (cell.task, cell.method) in spent:
            continue
        started = time.perf_counter()
        try:
            settings = plan.grid.settings_of(cell)
            result = train(settings, dry_run=True, for_record=True)
        except UserError as error:
            raise UserError(f"{cell.method} on {cell.task}: {error}") from error
        # The rest of the clock is what every run begins with: data and model are loaded.
        loading = time.perf_counter() - started
        spent[cell.task, cell.method] = loading + result.facts["expected_seconds"]
    usual = sum(spent.values()) / max(1, len(spent))
    whole = sum(plan.left(group) * spent.get(group[:2], usual) for group in plan.groups)
    return whole / plan.grid.processes
