"""The job of `bidora compare`: every run of a grid once, some at a time, and the report."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from bidora.errors import UserError
from bidora.runs.results import Listener
from bidora.study.data import check_tasks
from bidora.study.folder import StudyFolder
from bidora.study.plan import Plan, Study
from bidora.study.pool import Slot, worker_environment
from bidora.study.records import Cell, Record, write_record
from bidora.study.settings import StudySettings
from bidora.study.worker import Order, Train

__all__ = ["compare"]


def compare(
    settings: StudySettings,
    listener: Listener | None = None,
    *,
    train: Train | None = None,
) -> Study:
    """Compare methods over the tasks, sizes and seeds of a grid, and write the report.

    Each run trains in another process, in a folder that is deleted, and leaves one
    record, `runs/TASK/METHOD/*.json` in the folder of the comparison. Started again, it
    goes on: what is recorded is not run again. A run that fails is recorded too, and the
    others go on. In a script, call it under `if __name__ == "__main__":`, because each
    process imports the script.

    Args:
        settings: What to compare, and where.
        listener: Told what happens.
        train: What trains, in place of `bidora.train`: a function of a module, which
            is called as that is and leaves the same files.

    Returns:
        The comparison as far as it came.

    Raises:
        UserError: If the grid, the data or the folder can't be used.
    """
    began = time.monotonic()
    listener = listener or Listener()
    grid = settings.read()
    if settings.processes is not None:
        grid = replace(grid, processes=settings.processes)
    folder = StudyFolder(settings.folder)
    with folder.lock():
        records, torn = ([], []) if settings.overwrite else folder.read(listener)
        failed = sum(record.failed for record in records)
        if settings.retry_failed:
            records = [record for record in records if not record.failed]
        elif failed:
            listener.message(
                f"Failed {failed} run(s) of an earlier start; --retry-failed would run "
                "them again"
            )
        folder.check(grid, records, listener)
        plan = Plan(grid, tuple(records), settings.only_tasks, settings.only_methods)
        data = check_tasks(plan, listener)
        if stopped := data.stopped:
            names = plan.tasks or [task.name for task in grid.tasks]
            plan = replace(plan, tasks=[name for name in names if name not in stopped])
            if not plan.tasks:
                raise UserError(" ".join(stopped.values()))
            listener.message(
                f"Apart  {', '.join(stopped)}: swept, and without validation examples, so "
                "that nothing is run there; a note at the end has the remedies"
            )
        if settings.overwrite:
            folder.clear()  # now that the new grid and its data are known to be good
        folder.open(grid, torn)
        limit = settings.time_limit
        deadline = None if limit is None else began + 60 * limit
        runner = _Runner(plan, folder, listener, train, deadline, data.digests)
        try:
            with worker_environment(grid.processes):
                runner.run()
        finally:
            # Also after Ctrl-C: what there is can be read at once.
            folder.close()
            study = runner.plan.study(stopped.values())
            _report(study, folder, listener)
    return study


def _report(study: Study, folder: StudyFolder, listener: Listener) -> None:
    """Write the report, and say where it is."""
    from bidora.study.report import write_report

    try:
        names = [Path(name).name for name in write_report(study, folder.path)]
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder.path} ({error.strerror}); the "
            "records of the runs that ended are there. Make room on the disk, or let the "
            "folder be written to; the same command then goes on."
        ) from error
    listener.message(f"Report {folder.path}: {', '.join(names)}")


@dataclass
class _Runner:
    """Run what is due until nothing is, some at a time.

    Args:
        plan: What is due; it is replaced after each run.
        folder: Where records go.
        listener: Told how far it is.
        train: What trains; None for `bidora.train`.
        deadline: No run is started after it, on the monotonic clock.
        digests: What the examples of each task are recognised by.
    """

    plan: Plan
    folder: StudyFolder
    listener: Listener
    train: Train | None
    deadline: float | None
    digests: dict[str, str]
    running: dict[Future[Record], tuple[Slot, Order]] = field(default_factory=dict)

    def run(self) -> None:
        """Run everything; when this ends, in whatever way, no process is left."""
        slots = [Slot(self.folder.log) for _ in range(self.plan.grid.processes)]
        idle = list(slots)
        if self.plan.due:
            self.listener.phase("compare", self.plan.total)
        try:
            while True:
                self.start_some(idle)
                if not self.running:
                    return
                over, _ = wait(self.running, return_when=FIRST_COMPLETED)
                for future in over:
                    slot, order = self.running.pop(future)
                    self.add(self.record_of(future, slot, order))
                    idle.append(slot)
        finally:
            for slot in slots:
                slot.release()
            for slot in slots:
                slot.end()

    def start_some(self, idle: list[Slot]) -> None:
        """Begin the runs that are due, as far as there are processes and time."""
        begun = {order.cell for _, order in self.running.values()}
        due = [cell for cell in self.plan.due if cell not in begun]
        while due and idle:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                if not self.running:
                    self.listener.message(
                        f"Time   the limit is reached with {self.plan.remaining} run(s) "
                        "to do; the same command goes on"
                    )
                return
            cell, slot = due.pop(0), idle.pop()
            group = (cell.task, cell.method, cell.size)
            steps = self.plan.steps_in_time[group] if cell.purpose == "time" else None
            order = Order(
                cell,
                self.plan.grid.settings_of(cell, steps),
                self.folder.record_path(cell),
                self.folder.scratch,
                self.train,
                self.digests.get(cell.task, ""),
                self.plan.grid.reference,
            )
            self.running[slot.submit(order)] = slot, order
            self.tell(cell)

    def record_of(self, future: Future[Record], slot: Slot, order: Order) -> Record:
        """Return what a run came to; one that ended its process has failed."""
        try:
            return future.result()
        except BrokenProcessPool:
            record = Record(
                order.cell,
                order.recorded,
                error=slot.why_it_ended(),
                data=order.data,
            )
            write_record(order.path, record)
            return record

    def add(self, record: Record) -> None:
        """Take a record in, and say if it is of a failed run."""
        self.plan = replace(self.plan, records=(*self.plan.records, record))
        if record.failed:
            cell = record.cell
            self.listener.message(
                f"Failed {cell.method} on {cell.task}, seed {cell.seed} "
                f"({cell.purpose}): {record.error}"
            )
        self.tell(record.cell)

    def tell(self, cell: Cell) -> None:
        """Say how far it is, and how long it will take."""
        text = f"{cell.task} {cell.method} seed {cell.seed}"
        left = expected_seconds(self.plan)
        if left:
            from bidora.runs.cost import duration

            text += f", about {duration(left)} left"
        self.listener.working_on(self.plan.total - self.plan.remaining, text)


def expected_seconds(plan: Plan) -> float | None:
    """Return about how long the runs that remain will take, from those that are over.

    Args:
        plan: With the records so far.

    Returns:
        The seconds, with as many runs at a time as the grid says; None before any run.
    """
    spent: dict[str, list[float]] = {}
    for record in plan.records:
        if not record.failed:
            spent.setdefault(record.cell.method, []).append(record.total_seconds)
    if not spent:
        return None
    usual = fmean(second for seconds in spent.values() for second in seconds)
    left = sum(
        plan.left(group) * fmean(spent.get(group[1], [usual])) for group in plan.groups
    )
    return left / plan.grid.processes
