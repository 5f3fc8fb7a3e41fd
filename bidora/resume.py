"""The settings of a run that was stopped, so that it can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bidora.errors import UserError
from bidora.settings import TrainSettings, default_folder

__all__ = ["settings_of_run"]

SEQUENCES = ("column_names", "target_modules")
"""Settings that are tuples, which JSON holds as lists."""


def settings_of_run(**given: Any) -> TrainSettings:
    """Return the settings that a stopped run was started with.

    Args:
        given: Options by name. `output_dir` says which run; another one may be given
            again, with the value that the run has.

    Returns:
        The settings.

    Raises:
        UserError: If there is no run, its settings cannot be read, or an option has
            another value than the run.
    """
    if given.pop("overwrite", False):
        raise UserError(
            "--resume goes on with a run and --overwrite replaces it; leave one out."
        )
    folder = given.pop("output_dir", None) or default_folder(
        given.get("method", TrainSettings.method),
        given.get("task", TrainSettings.task),
        given.get("seed", TrainSettings.seed),
    )
    file = Path(folder).expanduser() / "settings.json"
    try:
        values = json.loads(file.read_text("utf-8"))
        for name in SEQUENCES:
            if values[name] is not None:
                values[name] = tuple(values[name])
        # Where the folder was moved or named otherwise, it is still this one.
        saved = TrainSettings(**{**values, "output_dir": folder, "overwrite": False})
    except OSError as error:
        raise UserError(
            f"--resume: {folder} holds no run of bidora ({error.strerror}); name its "
            "folder with --output-dir, or leave out --resume."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--resume: {file} cannot be read as the settings of a run ({error}); it was "
            "changed, or written by another version. Start anew with --overwrite."
        ) from error
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
    return saved
