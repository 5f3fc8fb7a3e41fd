"""The job of `bidora analyze`: ΔM against ΔD of the weights that runs recorded."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidora._files import write_whole
from bidora.analysis import Line, fit_line
from bidora.errors import UserError
from bidora.methods import METHODS
from bidora.methods.base import OF_WEIGHTS
from bidora.runs.predict import read_run
from bidora.runs.results import environment
from bidora.runs.settings import TrainSettings
from bidora.tasks.registry import TASKS

__all__ = ["AnalyzedRun", "Fit", "Point", "analyze", "kinds_of", "table"]

FILES = ("analysis.png", "analysis.csv", "analysis.json")

AGAIN = "copy it from where the run was made, or train again with --record-weights"
"""The remedy for a file of a run that is missing or broken."""


@dataclass(frozen=True)
class Point:
    """One layer after one step.

    Attributes:
        phase: The phase of the run.
        step: Its step in the phase.
        layer: Name of the layer in the base model.
        kind: Kind of layer, see `kinds_of`.
        delta_m: ΔM.
        delta_d: ΔD.
    """

    phase: str
    step: int
    layer: str
    kind: str
    delta_m: float
    delta_d: float


@dataclass(frozen=True)
class Fit:
    """The line through the points of one kind of layer in one phase.

    Attributes:
        phase: The phase.
        kind: The kind.
        steps: The steps that the points are of.
        line: Slope and correlation, or why there are none.
    """

    phase: str
    kind: str
    steps: tuple[int, ...]
    line: Line


@dataclass(frozen=True)
class AnalyzedRun:
    """What one run comes to.

    Attributes:
        folder: The run's folder.
        settings: What it was trained with.
        metric: What its evaluations judge by, as in its own `curves.png`.
        points: All of them.
        fits: A line a phase and kind.
        notes: What was left out, and why.
        history: Its records.
        environment: Of the run.
    """

    folder: Path
    settings: TrainSettings
    metric: str
    points: tuple[Point, ...]
    fits: tuple[Fit, ...]
    notes: tuple[str, ...]
    history: tuple[dict[str, Any], ...]
    environment: dict[str, Any]

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that have points, in order."""
        return tuple(dict.fromkeys(fit.phase for fit in self.fits))

    def to_dict(self) -> dict[str, Any]:
        """Return what `analysis.json` holds of the run."""
        return {
            "run": str(self.folder),
            "method": self.settings.method,
            "task": self.settings.task,
            "seed": self.settings.seed,
            "fits": [
                {
                    "phase": fit.phase,
                    "kind": fit.kind,
                    "steps": list(fit.steps),
                    **dataclasses.asdict(fit.line),
                }
                for fit in self.fits
            ],
            "points": [dataclasses.asdict(point) for point in self.points],
            "notes": list(self.notes),
            "environment": self.environment,
        }


def analyze(
    runs: Sequence[str | Path], output: str | Path, *, overwrite: bool = False
) -> tuple[AnalyzedRun, ...]:
    """Write table, numbers and picture of how runs changed their weights.

    A point is a layer after a step, as `--record-weights` keeps it. The line through the
    points of a kind of layer, over all layers and steps of a phase, is that of the DoRA
    and BiDoRA papers. The phases stand apart: a fresh retraining starts its directions
    again.

    Args:
        runs: Folders of finished runs, of one base model.
        output: Folder to write `analysis.json`, `analysis.csv` and `analysis.png` to;
            other files in it are left alone.
        overwrite: Whether an earlier analysis there is replaced.

    Returns:
        The runs, in the given order.

    Raises:
        UserError: If a run has no recorded weights or its files cannot be read, no run
            moved a weight, runs differ in their base model, or an analysis is there
            already.
    """
    folders = [Path(run).expanduser() for run in runs]
    target = Path(output).expanduser()
    _refuse_target(target, overwrite=overwrite)
    _refuse_doubles(folders)
    read = [(folder, *_read(folder)) for folder in folders]
    _refuse_other_bases([(folder, settings) for folder, settings, *_ in read])
    kinds = kinds_of(
        layer for *_, history in read for r in history for layer in r.get("weights", ())
    )
    analyzed = tuple(_analyzed(*parts, kinds) for parts in read)
    if not any(run.points for run in analyzed):
        raise UserError(
            "\n".join(
                f"{run.folder} has nothing to draw: {' '.join(run.notes)}"
                for run in analyzed
            )
        )
    _write(target, analyzed)
    return analyzed


def kinds_of(layers: Iterable[str]) -> dict[str, str]:
    """Return the kind of each layer: the last part of its name where that is enough.

    Where layers at several places of a block end alike, such as `dense` in BERT, it is
    what comes after the number of the block.

    Args:
        layers: Names of layers.

    Example:
        >>> names = ["h.0.query", "h.1.query", "h.0.output.dense", "h.0.up.dense"]
        >>> list(kinds_of(names).values())
        ['query', 'query', 'output.dense', 'up.dense']
    """
    paths: dict[str, str] = {}
    for name in layers:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        # A layer that is a number itself, as in a Sequential, keeps its whole name.
        begin = numbers[-1] + 1 if numbers and numbers[-1] + 1 < len(parts) else 0
        paths[name] = ".".join(parts[begin:])
    ends: dict[str, set[str]] = {}
    for path in paths.values():
        ends.setdefault(path.rpartition(".")[2], set()).add(path)
    return {
        name: end if len(ends[end := path.rpartition(".")[2]]) == 1 else path
        for name, path in paths.items()
    }


def table(runs: Sequence[AnalyzedRun]) -> str:
    """Return the lines of the runs as text.

    Args:
        runs: What `analyze` returned.
    """
    head = ("run", "method", "phase", "layers", "points", "slope", "correlation")
    rows: list[tuple[str, ...]] = [head]
    for run in runs:
        for fit in run.fits:
            line = fit.line
            rows.append(
                (
                    str(run.folder),
                    run.settings.method,
                    fit.phase,
                    fit.kind,
                    str(line.points),
                    "n/a" if line.slope is None else f"{line.slope:.4g}",
                    "n/a" if line.correlation is None else f"{line.correlation:.3f}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 4  # words to the left, numbers to the right
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _refuse_target(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {target} is a file; name a folder.")
    there = [name for name in FILES if (target / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"--output {target} holds {there[0]} already; name another folder, or add "
            "--overwrite."
        )


def _refuse_doubles(folders: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"the run {folder} is given twice; leave one out.")
        seen.add(folder.resolve())


def _refuse_other_bases(runs: Sequence[tuple[Path, TrainSettings]]) -> None:
    """Refuse runs whose weights began elsewhere: their sizes do not compare."""
    first, settings = runs[0]
    for folder, other in runs[1:]:
        if _place(other.model) != _place(settings.model):
            raise UserError(
                f"{first} was trained from {settings.model} and {folder} from "
                f"{other.model}: the norms of their weights differ from the start, so "
                "their slopes do not compare. Analyse them one at a time."
            )


def _place(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _read(
    folder: Path,
) -> tuple[TrainSettings, dict[str, Any], list[dict[str, Any]]]:
    """Return settings, metrics and history of a run."""
    settings, schema = read_run(folder)
    file, log = folder / "metrics.json", folder / "history.jsonl"
    metrics = _object(_text(file), ("metric", "environment"), str(file))
    history = [
        _record(line, f"line {number} of {log}")
        for number, line in enumerate(_text(log).splitlines(), 1)
    ]
    if not any("weights" in record for record in history):
        raise UserError(f"{folder} has no record of its weights. {_remedy(settings)}")
    # Evaluations on the way may leave out the main metric, which is then no curve.
    metrics["metric"] = TASKS.get(schema.task).judged_by or metrics["metric"]
    return settings, metrics, history


def _text(file: Path) -> str:
    """Return the text of a finished run's file; what is no text gives no JSON."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}), though the run is finished: it "
            f"was moved, or left behind when the folder was copied; {AGAIN}."
        ) from error


def _object(text: str, keys: Sequence[str], place: str) -> dict[str, Any]:
    """Return the object that a text holds, with these keys at least."""
    found: Any = None
    why = ""
    try:
        found = json.loads(text)
    except ValueError as error:
        why = str(error)
    lacking = [k for k in keys if not isinstance(found, dict) or k not in found]
    if lacking:
        raise _changed(place, why or f"no {lacking[0]}")
    return found


def _changed(place: str, why: str) -> UserError:
    return UserError(
        f"{place} is not what a run writes ({why}): the file was cut off or changed; "
        f"{AGAIN}."
    )


def _record(text: str, place: str) -> dict[str, Any]:
    """Return a record of the history, with all that points and curves are made of."""
    record = _object(text, ("phase",), place)
    weights = record.get("weights", {})
    if not isinstance(weights, dict):
        raise _changed(place, f"weights: {weights!r}")
    if (weights or "step" in record) and not isinstance(record.get("step"), int):
        raise _changed(place, f"step: {record.get('step')!r}")
    for layer, change in weights.items():
        for key in ("delta_m", "delta_d"):
            value = change.get(key) if isinstance(change, dict) else None
            if not isinstance(value, int | float):
                raise _changed(place, f"{key} of {layer}: {value!r}")
    return record


def _remedy(settings: TrainSettings) -> str:
    if set(OF_WEIGHTS) & set(METHODS.get(settings.method).ignores):
        return (
            f"Method {settings.method} changes none of the base model's; leave the run "
            "out."
        )
    return (
        "It was trained without --record-weights: train it again with the same options "
        "and that one, which changes nothing of what is trained."
    )


def _analyzed(
    folder: Path,
    settings: TrainSettings,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    kinds: dict[str, str],
) -> AnalyzedRun:
    every = [
        Point(r["phase"], r["step"], layer, kinds[layer], w["delta_m"], w["delta_d"])
        for r in history
        for layer, w in r.get("weights", {}).items()
    ]
    finite = [p for p in every if math.isfinite(p.delta_m + p.delta_d)]
    points = [p for p in finite if p.delta_m or p.delta_d]
    notes = []
    if len(finite) < len(every):
        lost = next(p for p in every if p not in finite)
        notes.append(
            f"{len(every) - len(finite)} point(s) are not finite and left out, the first "
            f"is {lost.layer} at step {lost.step} ({lost.phase}); the run diverged."
        )
    still = [p for p in finite if not (p.delta_m or p.delta_d)]
    if still and not points:
        notes.append(
            f"no weight moved: {len(still)} point(s) of {len({p.layer for p in still})} "
            f"layer(s), up to step {max(p.step for p in still)}, are the base model's; "
            "train for more steps, or at a higher --learning-rate."
        )
    elif still:
        notes.append(
            f"{len(still)} point(s) of weights that are still the base model's are left "
            f"out, such as {still[0].layer} at step {still[0].step} ({still[0].phase})."
        )
    zero = {
        layer: w["zero_rows"]
        for r in history
        for layer, w in r.get("weights", {}).items()
        if w.get("zero_rows")
    }
    if zero:
        layer, rows = next(iter(zero.items()))
        notes.append(
            f"{len(zero)} layer(s) have rows of zeros, which have no direction and are "
            f"left out of the means, such as {rows} row(s) of {layer}."
        )
    fits = tuple(_fits(points))
    notes += [
        f"{fit.kind} ({fit.phase}): n/a, for {fit.line.reason}."
        for fit in fits
        if fit.line.reason
    ]
    return AnalyzedRun(
        folder,
        settings,
        metrics["metric"],
        tuple(points),
        fits,
        tuple(notes),
        tuple(history),
        metrics["environment"],
    )


def _fits(points: Sequence[Point]) -> Iterable[Fit]:
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.phase, point.kind), []).append(point)
    for (phase, kind), own in groups.items():
        line = fit_line([p.delta_d for p in own], [p.delta_m for p in own])
        yield Fit(phase, kind, tuple(dict.fromkeys(p.step for p in own)), line)


def _write(target: Path, runs: Sequence[AnalyzedRun]) -> None:
    """Write the picture, the points, and last the numbers; each file whole."""
    from bidora.runs.analysis_plot import draw_analysis

    picture = target / f".{FILES[0]}.partial"
    try:
        target.mkdir(parents=True, exist_ok=True)
        draw_analysis(runs, picture)
        os.replace(picture, target / FILES[0])
        write_whole(target / FILES[1], _as_csv(runs))
        content = {
            "model": runs[0].settings.model,
            "runs": [run.to_dict() for run in runs],
            "environment": environment("cpu"),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_whole(target / FILES[2], text)
    except OSError as error:
        raise UserError(
            f"--output {target} cannot be written ({error.strerror}); name a folder in a "
            "place of your own."
        ) from error
    finally:
        picture.unlink(missing_ok=True)


def _as_csv(runs: Sequence[AnalyzedRun]) -> str:
    text = io.StringIO()
    names = [f.name for f in dataclasses.fields(Point)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "method", *names])
    for run in runs:
        for point in run.points:
            row = dataclasses.astuple(point)
            writer.writerow([run.folder, run.settings.method, *row])
    return text.getvalue()
