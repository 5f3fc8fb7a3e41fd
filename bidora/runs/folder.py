"""The folder of a run: claimed once, written whole files at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from bidora._files import write_whole
from bidora.errors import UserError

__all__ = ["RunFolder"]

MARKER = "settings.json"
"""The first file of a run; a folder with it holds one."""

RUN_FILES = (
    "settings.json",
    "task.json",
    "split.json",
    "metrics.json",
    "history.jsonl",
    "generated.jsonl",
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
        resume: Whether the run in it goes on.
        look: Whether nothing will be written, so that it may hold anything.

    Raises:
        UserError: If the folder holds an earlier run, or files of something else; with
            `resume`, if it holds no run or a finished one.
    """

    def __init__(
        self,
        path: str | Path,
        overwrite: bool = False,
        *,
        resume: bool = False,
        look: bool = False,
    ) -> None:
        """Check the folder; nothing is written before `open`."""
        self.path = Path(path).expanduser()
        self.resume = resume
        self._history: IO[str] | None = None
        if look:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(
                f"--output-dir {self.path} is a file; name a folder that does not "
                "exist yet."
            )
        if resume:
            self._check_unfinished()
            return
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
                "replace the run with --overwrite, or go on with it by --resume if it "
                "was stopped."
            )

    def _check_unfinished(self) -> None:
        if not (self.path / MARKER).is_file():
            raise UserError(
                f"--resume: {self.path} holds no run of bidora; name its folder with "
                "--output-dir, or leave out --resume."
            )
        if (self.path / "metrics.json").is_file():
            raise UserError(
                f"--resume: the run in {self.path} is finished; there is nothing left to "
                "do. To train again, name another folder or use --overwrite."
            )

    def open(self) -> None:
        """Make the folder and remove an earlier run's files from it.

        A run that goes on keeps its files.

        Raises:
            UserError: If the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                for name in self._files_of_earlier_run():
                    (self.path / name).unlink(missing_ok=True)
                self.remove_checkpoints()
            shutil.rmtree(self._staging, ignore_errors=True)
            mode = "a" if self.resume else "w"
            self._history = (self.path / "history.jsonl").open(mode, encoding="utf-8")
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

    def cut_history(self, reached: tuple[str, int] | None) -> list[dict[str, Any]]:
        """Forget what was recorded after a checkpoint, which the run will do again.

        Args:
            reached: Phase and step of the checkpoint; None to forget everything.

        Returns:
            The records that stay.
        """
        self.close()
        path = self.path / "history.jsonl"
        kept: list[dict[str, Any]] = []
        for line in path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run was stopped
            if reached is None:
                break
            phase, step = reached
            if entry["phase"] == phase and entry.get("step", step + 1) > step:
                break
            kept.append(entry)
        write_whole(path, "".join(json.dumps(e) + "\n" for e in kept))
        self._history = path.open("a", encoding="utf-8")
        return kept

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints until the run is finished."""
        return self.path / "checkpoints"

    def remove_checkpoints(self) -> None:
        """Delete them."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_whole(self.path / name, text)

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a jsonl file."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_whole(self.path / name, "".join(lines))

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
