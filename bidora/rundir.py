"""The folder of a run: claimed once, written whole files at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from bidora.errors import UserError

__all__ = ["RunFolder"]

MARKER = "settings.json"
"""The first file of a run; a folder with it holds one."""

RUN_FILES = (
    "settings.json",
    "split.json",
    "metrics.json",
    "history.jsonl",
    "comparison.json",
    "comparison.csv",
    "comparison.png",
)


class RunFolder:
    """Write a run's files so that none is ever seen half written.

    Each file goes to a temporary name in the folder and is moved into place; the
    history alone grows line by line, each flushed at once.

    Args:
        path: The folder.
        overwrite: Whether an earlier run in it may be replaced.

    Raises:
        UserError: If the folder holds an earlier run, or files of something else.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        """Check the folder; nothing is written before `open`."""
        self.path = Path(path).expanduser()
        self._history: IO[str] | None = None
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"--output-dir {self.path} is a file; name a folder that does not "
                "exist yet."
            )
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not (self.path / MARKER).is_file():
            raise UserError(
                f"--output-dir {self.path} holds files that are not from a run of "
                "bidora, and they are left alone; name a folder that is empty or does "
                "not exist yet."
            )
        if not overwrite:
            raise UserError(
                f"--output-dir {self.path} holds an earlier run; name another folder, "
                "or replace the run with --overwrite."
            )

    def open(self) -> None:
        """Make the folder and remove an earlier run's files from it.

        Raises:
            UserError: If the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self._files_of_earlier_run():
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self._staging, ignore_errors=True)
            self._history = (self.path / "history.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); name "
                "a folder in a place of your own."
            ) from error

    def close(self) -> None:
        """Close the history."""
        if self._history is not None:
            self._history.close()
            self._history = None

    def append_history(self, record: dict[str, Any]) -> None:
        """Add one line to `history.jsonl`, on the disk when this returns."""
        if self._history is None:
            raise ValueError("open the run folder before writing to it")
        self._history.write(json.dumps(record) + "\n")
        self._history.flush()

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary = self.path / f".{name}.partial"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)

    def staging(self) -> Path:
        """Return an empty folder for files that `publish` moves into place."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        return self._staging

    def publish(self) -> list[str]:
        """Move the staged files into the run's folder and return their names."""
        names = sorted(entry.name for entry in self._staging.iterdir())
        for name in names:
            os.replace(self._staging / name, self.path / name)
        self._staging.rmdir()
        return names

    @property
    def _staging(self) -> Path:
        return self.path / ".partial"

    def _files_of_earlier_run(self) -> list[str]:
        """Return the names that an earlier run says it wrote."""
        names: set[str] = set(RUN_FILES)
        try:
            metrics = json.loads((self.path / "metrics.json").read_text("utf-8"))
            names.update(str(name) for name in metrics["files"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # an interrupted run: its other files were never moved into place
        return sorted(name for name in names if Path(name).name == name)
