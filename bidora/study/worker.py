"""One run of a comparison, in a process of its own: trained, recorded, thrown away."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidora.runs.settings import TrainSettings
from bidora.study.reading import PATHS, PERHAPS_PATHS
from bidora.study.records import Cell, Point, Record, write_record

if TYPE_CHECKING:
    from bidora.runs.results import RunResult

__all__ = [
    "Order",
    "Train",
    "as_recorded",
    "begin",
    "first_line",
    "ready",
    "record_of",
    "work",
]

Train = Callable[..., Any]
"""What trains: called as `bidora.train`, with settings, `score_test`, `score_probe`."""

LONGEST_ERROR = 300

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
"""How files with weights end."""

PIECES, PIECE = 16, 4096
"""Of a file with weights, so many pieces of so many bytes tell it from others."""


@dataclass(frozen=True)
class Order:
    """What a worker is to do.

    Args:
        cell: What the run is of.
        settings: Of the run, without a folder.
        path: Where its record goes.
        scratch: Folder that the run's own folder is made in, and deleted.
        train: What trains; None for `bidora.train`.
        data: What the task's examples are recognised by.
        reference: Whose time a run of equal time takes.
    """

    cell: Cell
    settings: TrainSettings
    path: Path
    scratch: Path
    train: Train | None = None
    data: str = ""
    reference: str = ""

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as the record has them; of equal time, with whose time it is."""
        found = as_recorded(self.settings)
        if self.cell.purpose == "time":
            found["reference"] = self.reference
        return found


def begin(log: str) -> None:
    """Make this process a worker: what it prints goes to a file, and it ends with others.

    Args:
        log: The file.
    """
    # Ctrl-C reaches every process of a terminal; the one that gave the orders decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(out, stream.fileno())
    os.close(out)


def ready() -> bool:
    """Return that this process runs."""
    return True


def work(order: Order) -> Record:
    """Train, write the record of it, and return it.

    An error of the run is its record, also one that would end the process.

    Args:
        order: What to do.

    Returns:
        The record.

    Raises:
        UserError: If the record cannot be written.
    """
    started = time.perf_counter()
    try:
        record = _trained(order)
    except (Exception, SystemExit) as error:
        sys.stderr.write(f"--- {order.path.name} of {order.cell.method}, ")
        sys.stderr.write(f"{order.cell.task}:\n{traceback.format_exc()}")
        sys.stderr.flush()
        record = Record(
            order.cell,
            {},
            error=first_line(error),
            total_seconds=time.perf_counter() - started,
        )
    record = dataclasses.replace(record, settings=order.recorded, data=order.data)
    write_record(order.path, record)
    return record


def as_recorded(settings: TrainSettings) -> dict[str, Any]:
    """Return settings as a record has them, which another machine can read and compare.

    Tuples are lists, as in a file that was read; of a path, the last name is kept. A model
    in a folder has `model_files` besides, which tells it from another of that name.

    Args:
        settings: Of a run.

    Example:
        >>> given = TrainSettings(target_modules=("query",), data_dir="/data/SST-2")
        >>> found = as_recorded(given)
        >>> found["target_modules"], found["data_dir"]
        (['query'], 'SST-2')
    """
    found = json.loads(json.dumps(settings.as_dict()))
    if Path(settings.model).is_absolute() and (files := _digest(Path(settings.model))):
        found["model_files"] = files
    for name in (*PATHS, *PERHAPS_PATHS):
        value = found[name]
        if value and (name in PATHS or Path(value).is_absolute()):
            found[name] = Path(value).name
    return found


def _digest(folder: Path) -> str:
    """Return what a model is recognised by; nothing where there is none.

    Of weights, which may be many gigabytes, it takes names, sizes and some pieces: two
    trainings of one model differ by the values alone.
    """
    try:
        found = hashlib.sha256((folder / "config.json").read_bytes())
        for path in sorted(folder.iterdir()):
            if path.suffix in WEIGHTS and path.is_file():
                size = path.stat().st_size
                found.update(repr((path.name, size)).encode("utf-8", "replace"))
                with path.open("rb") as file:
                    for i in range(PIECES):  # from the first bytes to the last
                        file.seek(max(0, size - PIECE) * i // (PIECES - 1))
                        found.update(file.read(PIECE))
    except OSError:
        return ""
    return f"sha256 {found.hexdigest()[:16]}"


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of what it says, as UTF-8 can hold.

    Args:
        error: The error.

    Example:
        >>> first_line(ValueError("too few"))
        'ValueError: too few'
    """
    lines = str(error).strip().splitlines()
    said = f": {lines[0][:LONGEST_ERROR]}" if lines else ""
    # Of a path that is no UTF-8, Python's text has halves of characters.
    text = f"{type(error).__name__}{said}"
    return text.encode("utf-8", "backslashreplace").decode()


def _trained(order: Order) -> Record:
    train: Train
    if order.train is None:
        from bidora.runs.job import train as own

        train = functools.partial(own, for_record=True)
    else:
        train = order.train
    is_sweep = order.cell.purpose == "sweep"
    with tempfile.TemporaryDirectory(dir=order.scratch) as place:
        folder = Path(place) / "run"
        settings = dataclasses.replace(order.settings, output_dir=str(folder))
        result = train(settings, score_test=not is_sweep, score_probe=not is_sweep)
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        history = (folder / "history.jsonl").read_text("utf-8").splitlines()
    return record_of(
        order.cell, order.settings, result, metrics, [json.loads(h) for h in history]
    )


def record_of(
    cell: Cell,
    settings: TrainSettings,
    result: RunResult,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
) -> Record:
    """Return the record of a run that ended well.

    Args:
        cell: What it was of.
        settings: Of the run.
        result: What it returned.
        metrics: What its `metrics.json` holds.
        history: What its `history.jsonl` holds, line by line.
    """
    scores = result.phases[-1].scores if result.phases else {}
    is_sweep = cell.purpose == "sweep"
    probe = result.probe.scores if result.probe else {}
    return Record(
        cell,
        as_recorded(settings),
        metric=result.metric,
        test={} if is_sweep else scores.get("test", {}),
        validation=scores.get("validation", {}),
        probe={} if is_sweep else probe.get("test", {}),
        baseline={} if is_sweep else result.baseline.get("test", {}),
        steps=sum(phase.steps for phase in result.phases),
        seconds=sum(phase.seconds for phase in result.phases),
        total_seconds=result.seconds,
        trained_parameters=result.trained_parameters,
        curve=_curve(history, result.metric),
        environment=metrics["environment"],
    )


def _curve(history: list[dict[str, Any]], metric: str) -> tuple[Point, ...]:
    """Return the points of the validation curve; a step comes before its evaluation."""
    points: list[Point] = []
    seconds = 0.0
    for entry in history:
        seconds += entry.get("seconds", 0.0)
        scores = entry.get("evaluation", {}).get("validation", {})
        if metric in scores:
            point = Point(entry["phase"], entry["step"], seconds, scores[metric])
            points.append(point)
    return tuple(points)


def _end_with_parent() -> None:
    """End when the process that gives the orders is gone, in whatever way."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a thread cannot end its process otherwise
