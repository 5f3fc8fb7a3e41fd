"""What one run of a comparison was, and what it came to: one JSON file each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from bidora._files import write_whole
from bidora.errors import UserError

__all__ = ["Cell", "Point", "Purpose", "Record", "read_records", "write_record"]

Purpose = Literal["sweep", "steps", "time"]
"""To choose settings on validation examples; to compare at equal steps, or equal time."""

ERRORS = {"loss", "mse"}
"""Scores that depend on which number a constant answer gives: they cannot tell it."""


@dataclass(frozen=True, order=True)
class Cell:
    """What a run is of.

    Args:
        task: Name of the task in the grid.
        method: Name of the method in the grid.
        size: Training examples; 0 for all there are.
        seed: Of the run.
        purpose: See `Purpose`.
        trial: The swept settings, as sorted pairs of name and value; empty where
            nothing is swept.
    """

    task: str
    method: str
    size: int
    seed: int
    purpose: Purpose
    trial: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Point:
    """A point of a run's curve.

    Args:
        phase: `search`, `retrain` or `train`.
        step: Steps of the phase that were done.
        seconds: Seconds of training in all phases until then.
        validation: The main metric on validation examples.
    """

    phase: str
    step: int
    seconds: float
    validation: float


@dataclass(frozen=True)
class Record:
    """What a run came to.

    Args:
        cell: What it was of.
        settings: All settings of the run, as `TrainSettings.as_dict` has them, and what
            else it must not be mixed with: the reference of equal time, a hash of a
            local model.
        error: Why it failed; empty for a run that ended well.
        metric: The main metric, a key of the scores.
        test: Scores on test examples; empty in a sweep, which must not see them.
        validation: Scores on validation examples; empty where there are none.
        probe: The probe's scores on test examples; empty in a sweep.
        baseline: What a constant answer scores on test examples: the most common class
            of the training examples, their mean, no label.
        steps: Optimizer steps of all phases.
        seconds: Seconds of training in all phases.
        total_seconds: Seconds of the whole run.
        trained_parameters: Their number.
        curve: Points in the order of time.
        environment: Versions and machine.
        data: What the task's examples are recognised by, see `bidora.study.data`; empty
            in records of before it was kept, which are taken to be of the same ones.
    """

    cell: Cell
    settings: dict[str, Any]
    error: str = ""
    metric: str = ""
    test: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    probe: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    trained_parameters: int = 0
    curve: tuple[Point, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    @property
    def failed(self) -> bool:
        """Whether the run ended with an error."""
        return bool(self.error)

    @property
    def score(self) -> float | None:
        """The main metric on test examples; None where there is none."""
        return self.test.get(self.metric)

    @property
    def collapsed(self) -> bool:
        """Whether all test scores are exactly what the constant answer gets.

        One score may be so by chance, such as half of the answers right. A run that
        always gives another answer than that of `baseline` is not seen.
        """
        both = (self.test.keys() & self.baseline.keys()) - ERRORS
        return self.metric in both and all(
            math.isclose(self.test[m], self.baseline[m], rel_tol=0.0, abs_tol=1e-12)
            for m in both
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Return the record that `to_dict` was called on.

        Raises:
            KeyError: If a field is missing.
            TypeError: If there is one that is not known, or holds what it cannot.
            ValueError: If the file does not hold a record.

        Example:
            >>> one = Record(Cell("sst2", "lora", 100, 0, "steps", (("lr", 0.1),)), {})
            >>> Record.from_dict(json.loads(json.dumps(one.to_dict()))) == one
            True
        """
        cell = dict(values["cell"])
        cell["trial"] = tuple((name, _frozen(value)) for name, value in cell["trial"])
        curve = tuple(_checked(Point(**point)) for point in values["curve"])
        of = _checked(Cell(**cell))
        hash(of)  # cells are looked up by, so none may hold a mapping
        return _checked(cls(**{**values, "cell": of, "curve": curve}))


def write_record(path: Path, record: Record) -> None:
    """Write a record, so that it is never seen half written.

    Args:
        path: The file.
        record: What it will hold.

    Raises:
        UserError: If it cannot be written.
    """
    text = json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(
            f"the record {path} cannot be written ({error.strerror}), and its run is "
            "lost. Make room on the disk, or let the folder be written to; the same "
            "command then goes on."
        ) from error


def read_records(folder: Path) -> tuple[list[Record], list[tuple[Path, Exception]]]:
    """Read all records of a folder and those below it.

    Args:
        folder: Where they are.

    Returns:
        The records, sorted by cell as far as cells can be; and the files that hold none,
        each with the reason: `JSONDecodeError` or `UnicodeDecodeError` for a torn one.
    """
    found: list[Record] = []
    unread: list[tuple[Path, Exception]] = []
    for path in sorted(folder.rglob("*.json")):
        if path.is_dir():
            continue  # a task or method may be called that
        try:
            found.append(Record.from_dict(json.loads(path.read_text("utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            unread.append((path, error))
    return found, unread


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": _is_number,
    "Purpose": lambda value: value in get_args(Purpose),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "dict[str, float]": lambda value: (
        isinstance(value, dict) and all(map(_is_number, value.values()))
    ),
}
"""What a field can hold, by its type as it is written above."""

_Checked = TypeVar("_Checked", Cell, Point, Record)


def _checked(made: _Checked) -> _Checked:
    """Return what was made of a file, if each field holds what it can."""
    for one in dataclasses.fields(made):
        value = getattr(made, one.name)
        if one.type in KINDS and not KINDS[one.type](value):
            raise TypeError(f"{one.name} is {str(value)[:40]!r}, and no {one.type}")
    return made


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
