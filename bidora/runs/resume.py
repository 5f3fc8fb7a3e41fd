"""A run that was stopped: with which settings it goes on, and where its data is now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bidora.data.files import is_table_file
from bidora.errors import UserError
from bidora.runs.settings import TrainSettings

__all__ = ["as_found", "settings_of_run"]

PATHS = ("task", "data_dir", "validation_file", "test_file", "model")
"""Settings that may be paths."""

FILES = ("data_dir", "validation_file", "test_file")
"""Those that are nothing else."""


def settings_of_run(**given: Any) -> TrainSettings:
    """Return the settings that a stopped run was started with.

    Args:
        given: Options by name. `output_dir` says which run; another one may be given
            again, with the value that the run has. `PATHS` may have moved: what is given
            for them goes before what is saved.

    Returns:
        The settings.

    Raises:
        UserError: If there is no run, its settings cannot be read, its data is not where
            it was, or an option has another value than the run.
    """
    if given.pop("overwrite", False):
        raise UserError(
            "--resume goes on with a run and --overwrite replaces it; leave one out."
        )
    given = _as_settings(given)
    folder = given.pop("output_dir", None) or TrainSettings.from_dict(given).folder
    file = Path(folder).expanduser() / "settings.json"
    try:
        values = json.loads(file.read_text("utf-8"))
        started_in = values.pop("started_in", None)
        # Where the folder was moved or named otherwise, it is still this one.
        saved = TrainSettings.from_dict(
            {**values, "output_dir": str(folder), "overwrite": False}
        )
    except OSError as error:
        raise UserError(
            f"--resume: {folder} holds no run of bidora ({error.strerror}); name its "
            "folder with --output-dir, or leave out --resume."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--resume: {file} cannot be read as the settings of a run ({error}); it was "
            "changed, or written by another version. Start anew with --overwrite."
        ) from error
    moved = {n: given.pop(n) for n in PATHS if n in given and _is_path(given[n])}
    other = [
        f"--{name.replace('_', '-')} was {getattr(saved, name)!r}, not {value!r}"
        for name, value in given.items()
        if getattr(saved, name) != value
    ]
    if other:
        raise UserError(
            f"--resume: {'; '.join(other)}. A run goes on with the settings it was "
            "started with; leave the options out, or start anew in another folder."
        )
    found = {
        n: _find(n, getattr(saved, n), started_in) for n in PATHS if n not in moved
    }
    return TrainSettings.from_dict({**saved.as_dict(), **found, **moved})


def _as_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return what was given as settings hold it, each of them checked."""
    checked = TrainSettings.from_dict(given)
    return {name: getattr(checked, name) for name in given}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and Path(value).expanduser().exists()


def as_found(path: str, started_in: str | None) -> str:
    """Return a path of a run as it is found from this folder.

    Args:
        path: As it was given when the run was started; it may be a name instead.
        started_in: The folder in which that was.

    Returns:
        The path from there, where nothing is here and something there; else `path`.
    """
    if started_in is None or Path(path).expanduser().exists():
        return path
    there = Path(started_in) / Path(path).expanduser()
    return str(there) if there.exists() else path


def _find(name: str, value: str | None, started_in: str | None) -> str | None:
    """Return where a file of the run is now, seen from this folder."""
    if value is None or started_in is None:
        return value
    found = as_found(value, started_in)
    if found != value or Path(value).expanduser().exists():
        return found
    there = Path(started_in) / Path(value).expanduser()
    if name in FILES or _looks_like_file(name, value):
        raise UserError(
            f"--resume: the run was started in {started_in} with --"
            f"{name.replace('_', '-')} {value}, and neither {there} nor "
            f"{Path(value).expanduser().absolute()} is there. Say where it is now: --"
            f"{name.replace('_', '-')} PATH."
        )
    return value


def _looks_like_file(name: str, value: str) -> bool:
    """Say whether it is no name of the Hub, where names have dots and one slash."""
    if value.startswith((".", "/", "~")) or value.count("/") > 1:
        return True
    return name == "task" and is_table_file(value)
