"""The folder of a comparison: its grid, a record a run, and who writes into it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from bidora._files import write_whole
from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.study.grid import Grid
from bidora.study.records import Cell, Record, read_records
from bidora.study.worker import as_recorded, first_line
from bidora.trainer.lock import LOCK_FILE, FolderLock

__all__ = ["StudyFolder"]

MARKER = "grid.yaml"
"""What a folder with a comparison in it holds."""

ONE_AT_A_TIME = (
    "two would train the same runs twice. Wait for it, or choose another --output-dir."
)
TORN = (json.JSONDecodeError, UnicodeDecodeError)
"""What a file that was half written raises when it is read."""

SHOWN = 3
"""Methods on tasks that a message names; it counts the others."""

UNIMPORTANT = ("output_dir", "overwrite", "record_weights")
"""Settings that change nothing of what a run comes to."""


class StudyFolder:
    """The files of a comparison.

    Args:
        path: The folder.

    Raises:
        UserError: If it is a file, or holds files of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(
                f"--output-dir {path} is a file; name a folder that does not exist yet."
            )
        # Not those with a dot: systems leave some, and so does a start that was killed.
        held = path.is_dir() and {
            entry.name
            for entry in path.iterdir()
            if entry.name != LOCK_FILE and not entry.name.startswith(".")
        }
        if held and MARKER not in held:
            raise UserError(
                f"--output-dir {path} holds files that are not from a comparison, and "
                "they are left alone; name a folder that is empty or does not exist yet."
            )

    @property
    def runs(self) -> Path:
        """Where the records are."""
        return self.path / "runs"

    @property
    def scratch(self) -> Path:
        """Where runs train; it is deleted at the end, and before the next start."""
        return self.path / ".running"

    @property
    def log(self) -> Path:
        """What the workers print, and why runs failed in full."""
        return self.path / "log.txt"

    def lock(self) -> FolderLock:
        """Return what holds the folder for one comparison.

        Raises:
            UserError: If the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path} cannot be written ({error.strerror}); name a "
                "folder in a place of your own."
            ) from error
        return FolderLock(self.path, holder="comparison", why=ONE_AT_A_TIME)

    def clear(self) -> None:
        """Delete the records of an earlier comparison.

        Its grid stays until another takes its place: by it, the folder is known for one
        of a comparison, whenever this is stopped.
        """
        shutil.rmtree(self.runs, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def open(self, grid: Grid, torn: Sequence[Path] = ()) -> None:
        """Write the grid down, and make the places of records and runs.

        Args:
            grid: What is compared.
            torn: Files that `read` found half written; they are deleted.
        """
        import yaml

        text = yaml.safe_dump(grid.to_dict(), sort_keys=False, allow_unicode=True)
        write_whole(self.path / MARKER, text)  # first: a killed start leaves it behind
        self.close()
        for folder in (self.runs, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        for path in (*torn, *self.runs.rglob(".*.partial")):
            path.unlink()

    def close(self) -> None:
        """Delete what runs left that did not come to their end."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def record_path(self, cell: Cell) -> Path:
        """Return where the record of a run is.

        Args:
            cell: What the run is of.

        Example:
            >>> cell = Cell("sst2", "lora", 100, 1, "steps")
            >>> StudyFolder(Path("out")).record_path(cell).as_posix()
            'out/runs/sst2/lora/steps-100-seed1.json'
        """
        name = f"{cell.purpose}-{cell.size or 'all'}-seed{cell.seed}"
        if cell.trial:
            text = json.dumps(cell.trial, sort_keys=True)
            name += f"-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        return self.runs / cell.task / cell.method / f"{name}.json"

    def read(self, listener: Listener) -> tuple[list[Record], list[Path]]:
        """Read the records; nothing is deleted, since the grid may yet be refused.

        Args:
            listener: Told of torn files.

        Returns:
            The records, and the torn files, whose runs are due again.

        Raises:
            UserError: If a whole file is no record that this version knows.
        """
        records, unread = read_records(self.runs)
        for path, error in unread:
            if not isinstance(error, TORN):
                raise UserError(
                    f"{path} is whole and holds no record that this version can read "
                    f"({first_line(error)}); another version may have written it, or "
                    "somebody changed it. Go on with that version, name another folder, "
                    "or delete the file to run it again."
                )
        if unread:
            listener.message(
                f"Torn   {len(unread)} record(s) half written, such as {unread[0][0]}: "
                "to be run again"
            )
        return records, [path for path, _ in unread]

    def check(self, grid: Grid, records: Sequence[Record], listener: Listener) -> None:
        """Refuse a grid of another comparison, or of other settings for what was run.

        Args:
            grid: What is asked for now.
            records: What is there.
            listener: Told of recorded runs that the grid has left out, and of those at
                the time of another reference.

        Raises:
            UserError: If the grid has no method and task that is recorded, or a setting
                that the method uses differs; it names the first.
        """
        self._tell_of_others(grid, records, listener)
        self._tell_of_times(grid, records, listener)
        usual = as_recorded(TrainSettings())
        # What failed comes last: its remedy is none where other runs differ too.
        for record in sorted(records, key=lambda record: record.failed):
            cell = record.cell
            if not grid.has(cell.task, cell.method):
                continue
            settings = grid.settings_of(cell)
            wanted = as_recorded(settings)
            ignored = {*UNIMPORTANT, *METHODS.get(settings.method).unused(settings)}
            if cell.purpose == "time":
                ignored.add("max_steps")
            for name, value in wanted.items():
                # What records have besides settings has no default: earlier ones lack it.
                found = record.settings.get(name, usual.get(name, value))
                if name in ignored or found == value:
                    continue
                run = f"{'failed run' if record.failed else 'run'} of {cell.method}"
                remedy = (
                    "Run again what failed with --retry-failed; or name another folder "
                    "with --output-dir."
                    if record.failed
                    else "Name another folder with --output-dir, or delete what is there "
                    "with --overwrite."
                )
                raise UserError(
                    f"{self.path} has a {run} on {cell.task} (seed {cell.seed}) with "
                    f"{name}: {found}, and the grid gives it {value} now; they cannot "
                    f"stand in one comparison. {remedy}"
                )

    def _tell_of_times(
        self, grid: Grid, records: Sequence[Record], listener: Listener
    ) -> None:
        """Say which runs of equal time no longer count, since the reference is another."""
        others = [
            record.settings["reference"]
            for record in records
            if not grid.counts(record)
            and grid.has(record.cell.task, record.cell.method)
            and grid.is_timed(record.cell.task, record.cell.method)
        ]
        if others:
            names = ", ".join(sorted(set(others)))
            listener.message(
                f"Time   {len(others)} recorded run(s) took the time of {names}, and the "
                f"reference is {grid.reference} now: they no longer count, and where "
                "its time is another, they are run again"
            )

    def _tell_of_others(
        self, grid: Grid, records: Sequence[Record], listener: Listener
    ) -> None:
        """Say what the report will leave out; where that is all, refuse the grid."""
        cells = [record.cell for record in records]
        others = [cell for cell in cells if not grid.has(cell.task, cell.method)]
        if not others:
            return
        pairs = list(dict.fromkeys(f"{cell.method} on {cell.task}" for cell in others))
        more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        shown = f"{', '.join(pairs[:SHOWN])}{more}"
        if len(others) == len(cells):
            raise UserError(
                f"{self.path} has {len(others)} recorded run(s), of {shown}, and the grid "
                "has none of these: it is of another comparison, and would take the "
                "place of its grid and report. Name another folder with --output-dir, or "
                "delete what is there with --overwrite."
            )
        listener.message(
            f"Apart  {len(others)} recorded run(s), of {shown}, are not in the grid: they "
            "stay in the folder, and the report leaves them out"
        )
