"""The data of a comparison: read before hours are spent, and recognised later."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

from bidora.data.images import (
    BadImageError,
    image_path,
    is_image_file,
    open_picture,
)
from bidora.data.load import load_source
from bidora.data.source import Source
from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.study.grid import Grid
from bidora.study.plan import Plan
from bidora.study.records import Cell, Record

__all__ = ["Data", "check_tasks", "digest"]

DIGITS = 16
"""Of a digest that are kept: examples are told apart by them, not defended."""


@dataclass(frozen=True)
class Data:
    """What was found out about the data.

    Args:
        stopped: The tasks that have no validation examples to choose settings by, each
            with a sentence.
        digests: What the examples of a task are recognised by, see `digest`.
    """

    stopped: dict[str, str]
    digests: dict[str, str]


def check_tasks(plan: Plan, listener: Listener) -> Data:
    """Read the examples of each task that has runs to do, or that records can be held to.

    Args:
        plan: What is to be done.
        listener: Told what the data is.

    Returns:
        What was found.

    Raises:
        UserError: If the examples of a task can't be used, or are not those that its
            recorded runs saw.
    """
    from bidora.runs.examples import read_examples

    grid = plan.grid
    firsts: dict[tuple[str, int], Cell] = {}
    for cell in plan.due:
        firsts.setdefault((cell.task, cell.size), cell)
    stopped: dict[str, str] = {}
    told: set[str] = set()
    for (task, size), cell in firsts.items():
        methods = [m for t, m, s in plan.groups if (t, s) == (task, size)]
        kinds = [grid.method(name).settings.get("method", name) for name in methods]
        searches = any(METHODS.get(kind).holds_back for kind in kinds)
        hears = Listener() if task in told else listener
        told.add(task)
        try:
            found = read_examples(grid.settings_of(cell), hears, searches=searches)
            found.task.check_metric(found.schema)
        except UserError as error:
            raise UserError(f"tasks.{task}: {_in_grid_words(str(error))}") from error
        there = len(found.rows["train"])
        if there < size:
            raise UserError(
                f"tasks.{task}: `sizes` asks for {size} training examples, and there are "
                f"{there}; give this task `sizes` of its own, `all` among them if you like."
            )
        swept = [name for name in methods if grid.sweeps(name)]
        if swept and "validation" not in found.rows and task not in stopped:
            stopped[task] = (
                f"Nothing is run on {task}: the sweep of {', '.join(swept)} chooses on "
                "validation examples, and there are none. Name a `validation_file`; or "
                "give `max_validation_samples`, such as 50, which takes them from the "
                "training examples that `sizes` leaves out (`all` leaves none); or leave "
                "out the sweep."
            )
    return Data(stopped, _recognised(plan, told, listener))


def _in_grid_words(text: str) -> str:
    """Return what is said of options of `bidora train`, with the keys of a grid."""
    keys = {f.name: f.name for f in fields(TrainSettings)}
    keys["max_train_samples"] = "sizes"

    def key(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return f"`{keys[name]}`" if name in keys else option[0]

    return re.sub(r"--([a-z][\w-]*\w)", key, text)


def digest(source: Source) -> str:
    """Return what examples are recognised by: how many there are, and a hash of them.

    It is of all that a run may see, before any are drawn, so that runs of all sizes
    agree. An image stands for itself, whatever the folder it lies in.

    Args:
        source: The examples.

    Example:
        >>> from bidora.data.table import Table
        >>> rows = (("crow", "bird"), ("iron", "metal"))
        >>> table = Table("t.csv", ("text", "label"), rows, ("line 2", "line 3"))
        >>> digest(Source("t.csv", {"train": table}))
        '2 train, sha256 569dede68546fc4d'
    """
    found = hashlib.sha256()
    for part, table in source.parts.items():
        found.update(repr((part, table.columns, table.class_names)).encode())
        folder = Path(table.folder or Path(table.origin).parent)
        for row in table.rows:
            found.update(repr([_content(value, folder) for value in row]).encode())
    counts = ", ".join(f"{len(table)} {part}" for part, table in source.parts.items())
    return f"{counts}, sha256 {found.hexdigest()[:DIGITS]}"


def _content(value: Any, folder: Path) -> Any:
    """Return what stands for an image, and any other value as it is."""
    try:
        if isinstance(value, bytes):
            # By its pixels: those of digits are packed here, by every Pillow differently.
            return open_picture(value).digest
        if isinstance(value, str) and is_image_file(value.strip()):
            file = image_path(folder, value.strip())
            return hashlib.sha256(file.read_bytes()).hexdigest()
    except (BadImageError, OSError):
        pass  # no image, or none that a run sees
    return value


def _recognised(plan: Plan, due: set[str], listener: Listener) -> dict[str, str]:
    """Return the digests of tasks, and refuse records of other examples.

    Where nothing is due the data may be on another machine, and the report can be
    written all the same.

    Raises:
        UserError: If there are such records.
    """
    recorded: dict[str, list[Record]] = {}
    for record in plan.records:
        if record.data and plan.grid.has(record.cell.task, record.cell.method):
            recorded.setdefault(record.cell.task, []).append(record)
    digests: dict[str, str] = {}
    for task in [task.name for task in plan.grid.tasks]:
        if task not in due and task not in recorded:
            continue
        try:
            digests[task] = digest(_source(plan.grid, task))
        except UserError as error:
            listener.message(
                f"Data   {task} cannot be read, and its records are taken as they are: "
                f"{error}"
            )
            continue
        records = recorded.get(task, [])
        others = [record for record in records if record.data != digests[task]]
        if others:
            raise UserError(
                f"tasks.{task}: {len(others)} of its {len(records)} recorded runs saw "
                f"other examples ({others[0].data}) than there are now "
                f"({digests[task]}); they cannot stand in one comparison. Files have "
                "changed, or `task` leads to others; docstrings change with the version "
                "of Python. Bring the examples back, name another folder with "
                "--output-dir, or delete what is there with --overwrite."
            )
    return digests


def _source(grid: Grid, task: str) -> Source:
    """Return the examples of a task as the grid gives it, whatever a run's seed is.

    Docstrings and digits are split by the seed; the default one stands for all here.
    """
    given = {"task": task, **grid.settings, **grid.task(task).settings}
    known = signature(load_source).parameters
    return load_source(
        given["task"], **{name: given[name] for name in known if name in given}
    )
