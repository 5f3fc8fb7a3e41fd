"""What a comparison is of: tasks, methods, sizes, seeds, and what is swept."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from bidora.errors import UserError
from bidora.methods.registry import METHODS, make_method
from bidora.runs.settings import TrainSettings
from bidora.study.records import Cell, Purpose, Record

__all__ = ["Grid", "GridMethod", "GridTask", "Group", "Trial"]

Trial = tuple[tuple[str, Any], ...]
"""Swept settings, as sorted pairs of name and value."""

Group = tuple[str, str, int]
"""Task, method and size: what one choice of settings is made for."""

SUBSET_SEED = 0
"""Of the order that combinations are tried in, where there are more than trials."""


@dataclass(frozen=True)
class GridTask:
    """A task of the grid.

    Args:
        name: What it is called there, and its folder.
        settings: Of its runs, over those of the grid.
        sizes: Training examples, 0 for all there are.
        seeds: Of the runs that are reported.
        equal: What is held equal on it; None for what is in the grid.
    """

    name: str
    settings: Mapping[str, Any]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    equal: tuple[Purpose, ...] | None = None


@dataclass(frozen=True)
class GridMethod:
    """A method of the grid.

    Args:
        name: What it is called there, and its folder.
        settings: Of its runs, over those of grid and task; `method` is among them.
        sweep: Values to choose from, by setting: all combinations within an entry, of
            one entry after the other.
        tasks: Names of the tasks that it is run on; None for all.
    """

    name: str
    settings: Mapping[str, Any]
    sweep: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    tasks: tuple[str, ...] | None = None

    @property
    def entries(self) -> tuple[Mapping[str, tuple[Any, ...]], ...]:
        """The entries of the sweep; one without settings where nothing is swept."""
        return self.sweep or ({},)

    @property
    def combinations(self) -> int:
        """How many there are of the swept values; 1 where nothing is swept."""
        return sum(prod(len(v) for v in entry.values()) for entry in self.entries)

    def trials(self, most: int | None) -> tuple[Trial, ...]:
        """Return the combinations that are tried.

        More than `most` are drawn from by a fixed seed: they are the same for every task,
        and those of a smaller `most` are among them.

        Args:
            most: How many at most; None for all.

        Example:
            >>> GridMethod("lora", {}, ({"lora_r": (2, 4)},)).trials(None)
            ((('lora_r', 2),), (('lora_r', 4),))
            >>> GridMethod("lora", {}).trials(None)
            ((),)
        """
        every = [
            tuple(zip(sorted(entry), values, strict=True))
            for entry in self.entries
            for values in product(*(entry[name] for name in sorted(entry)))
        ]
        if most is None or most >= len(every):
            return tuple(every)
        order = list(range(len(every)))
        random.Random(SUBSET_SEED).shuffle(order)
        return tuple(every[i] for i in sorted(order[:most]))

    def is_of(self, task: str) -> bool:
        """Return whether it is run on that task."""
        return self.tasks is None or task in self.tasks


@dataclass(frozen=True)
class Grid:
    """A whole comparison; `bidora.study.read_grid` reads one from a file.

    Args:
        tasks: What the methods are compared on.
        methods: What is compared.
        settings: Of every run, fields of `TrainSettings`.
        sweep_seeds: Of the runs that settings are chosen by.
        trials: Combinations that a method may try; None for all of its own.
        equal: What is held equal: `steps`, `time`, or both in turn.
        reference: The method that the others are tested against, and whose time counts.
        processes: Runs at a time.

    Example:
        >>> grid = Grid(
        ...     (GridTask("docstrings", {}, (0,), (0, 1)),),
        ...     (GridMethod("lora", {"method": "lora"}),),
        ...     {"max_steps": 20},
        ... )
        >>> cell = Cell("docstrings", "lora", 0, 1, "steps")
        >>> settings = grid.settings_of(cell)
        >>> settings.task, settings.method, settings.seed, settings.max_steps
        ('docstrings', 'lora', 1, 20)
    """

    tasks: tuple[GridTask, ...]
    methods: tuple[GridMethod, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sweep_seeds: tuple[int, ...] = (100,)
    trials: int | None = None
    equal: tuple[Purpose, ...] = ("steps",)
    reference: str = ""
    processes: int = 1

    def task(self, name: str) -> GridTask:
        """Return the task of that name."""
        return next(task for task in self.tasks if task.name == name)

    def method(self, name: str) -> GridMethod:
        """Return the method of that name."""
        return next(method for method in self.methods if method.name == name)

    def has(self, task: str, method: str) -> bool:
        """Return whether that method is run on that task."""
        names = {t.name for t in self.tasks}
        return task in names and any(
            m.name == method and m.is_of(task) for m in self.methods
        )

    def trials_of(self, method: str) -> tuple[Trial, ...]:
        """Return what is tried of a method."""
        return self.method(method).trials(self.trials)

    def equal_on(self, task: str) -> tuple[Purpose, ...]:
        """Return what is held equal on that task."""
        own = self.task(task).equal
        return self.equal if own is None else own

    def is_timed(self, task: str, method: str) -> bool:
        """Return whether that method is run at the reference's time on that task."""
        return "time" in self.equal_on(task) and method != self.reference

    def counts(self, record: Record) -> bool:
        """Return whether a run is not one at the time of another reference.

        Records of before the reference was kept are taken to be of this one.
        """
        return record.settings.get("reference", self.reference) == self.reference

    def sweeps(self, method: str) -> bool:
        """Return whether settings of that method are chosen by a sweep."""
        return len(self.trials_of(method)) > 1

    def groups(self) -> Iterator[Group]:
        """Yield what a choice is made for: all sizes of the first task, then the next.

        Yields:
            Task, method and size.
        """
        for task in self.tasks:
            for size in task.sizes:
                for method in self.methods:
                    if method.is_of(task.name):
                        yield task.name, method.name, size

    def settings_of(self, cell: Cell, max_steps: int | None = None) -> TrainSettings:
        """Return the settings of a run.

        Those of the method go before those of the task, and these before the grid's. What
        grid and task give, and the method has no use for or fixes itself, is left out.

        Args:
            cell: The run.
            max_steps: Its steps, where they are not those of the grid.

        Raises:
            UserError: If a setting is out of range, or does not fit the method.
        """
        task, method = self.task(cell.task), self.method(cell.method)
        shared = {"task": task.name, **self.settings, **task.settings}
        for name in self.unused(cell.task, cell.method):
            del shared[name]
        given = {
            "method": method.name,
            **shared,
            **method.settings,
            **dict(cell.trial),
            "seed": cell.seed,
        }
        if cell.size:
            given["max_train_samples"] = cell.size
        if max_steps is not None:
            given["max_steps"] = max_steps
        return TrainSettings.from_dict(given)

    def unused(self, task: str, method: str) -> list[str]:
        """Return which settings of grid and task mean nothing to a method."""
        name = self.method(method).settings.get("method", method)
        kind = METHODS.get(name)
        foreign = {*kind.ignores, *kind.preset}
        shared = {**self.settings, **self.task(task).settings}
        return [name for name in shared if name in foreign]

    def check(self) -> None:
        """Make the settings of every kind of run once, so that none fails hours later.

        Raises:
            UserError: If a setting is out of range, or does not fit its method.
        """
        for task, method, size in self.groups():
            for trial in self.trials_of(method):
                cell = Cell(task, method, size, 0, "steps", trial)
                try:
                    settings = self.settings_of(cell)
                    make_method(settings.method).check(settings)
                except UserError as error:
                    swept = ", ".join(f"{n}={v}" for n, v in trial)
                    where = f"methods.{method} on tasks.{task}"
                    where += f" with {swept}" if swept else ""
                    raise UserError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return what `grid_from_dict` makes the same grid of, for YAML."""
        return {
            "settings": dict(self.settings),
            "tasks": {
                task.name: {
                    **task.settings,
                    "sizes": [size or "all" for size in task.sizes],
                    "seeds": [*task.seeds],
                    **({} if task.equal is None else {"equal": [*task.equal]}),
                }
                for task in self.tasks
            },
            "methods": {
                method.name: {
                    **method.settings,
                    **({"tasks": [*method.tasks]} if method.tasks is not None else {}),
                    **(
                        {"sweep": _plain(method.sweep[0])}
                        if len(method.sweep) == 1
                        else {"sweep": _plain(method.sweep)}
                        if method.sweep
                        else {}
                    ),
                }
                for method in self.methods
            },
            "sweep": {
                "seeds": [*self.sweep_seeds],
                **({} if self.trials is None else {"trials": self.trials}),
            },
            "equal": [*self.equal],
            **({"reference": self.reference} if self.reference else {}),
            "processes": self.processes,
        }


def _plain(value: Any) -> Any:
    """Return lists for tuples, which YAML has no plain form of."""
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
