"""One training a folder: a file that says which process writes into it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bidora.errors import UserError

__all__ = ["LOCK_FILE", "FolderLock", "held_folder"]

logger = logging.getLogger(__name__)

OF_TRAINING = (
    "two would overwrite each other's checkpoints. Wait for it, or choose another "
    "output_dir. A launcher that starts several processes which do not know of each other "
    "leads here too: start them by torchrun, or one alone."
)

LOCK_FILE = "_bidora.lock"
"""The underscore keeps it from the Hub: the Trainer uploads no such names."""


class FolderLock:
    """Hold a folder for one training, from `with` to its end.

    The file is made only where there is none, so two processes never both have it. One
    that a dead process of this machine left is taken over.

    Args:
        folder: The folder.
        wanted: Whether this process is the one that writes there; others hold nothing.
        holder: What holds it, for messages.
        why: Why one is enough, and what to do, as the end of a sentence.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with FolderLock(folder):
        ...     (Path(folder) / LOCK_FILE).is_file()
        True
        >>> (Path(folder) / LOCK_FILE).exists()
        False
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        wanted: bool = True,
        holder: str = "training",
        why: str = OF_TRAINING,
    ) -> None:
        self.path = Path(folder) / LOCK_FILE
        self.wanted = wanted
        self.holder, self.why = holder, why
        self.held = False

    def __enter__(self) -> FolderLock:
        """Take the folder.

        Returns:
            The lock.

        Raises:
            UserError: Another one writes into it.
        """
        if not self.wanted:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        patience = 500  # hundredths of a second
        while not self._made():
            holder = _read(self.path)
            if holder is None:
                continue  # it was given back in between
            patience -= 1
            if not patience or not _is_dead(holder):
                raise UserError(self._in_use(holder))
            if self._removed(holder):
                logger.warning(
                    "%s was left by process %s, which is dead: the folder is taken over.",
                    self.path,
                    holder.get("pid"),
                )
        self.held = True
        return self

    def __exit__(self, *args: object) -> None:
        """Give the folder back."""
        if self.held:
            self.path.unlink(missing_ok=True)
        self.held = False

    def _in_use(self, holder: dict[str, Any]) -> str:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        return (
            f"{self.path.parent} is in use by another {self.holder} ({who}, since "
            f"{holder.get('since', '?')}): {self.why} If that {self.holder} is gone, "
            f"delete {self.path}."
        )

    def _removed(self, holder: dict[str, Any]) -> bool:
        """Remove the file of a dead process; not one that replaced it in between."""
        # One at a time, so that the file is the same from this look to its end.
        removing = self.path.with_name(f"{LOCK_FILE}.removing")
        try:
            removing.open("x").close()
        except FileExistsError:
            time.sleep(0.01)
            return False
        try:
            same = _read(self.path) == holder
            if same:
                self.path.unlink()
            return same
        finally:
            removing.unlink()

    def _made(self) -> bool:
        pid = os.getpid()
        content = {
            "pid": pid,
            "started": _started(pid),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            # One call makes the file and tells whether it was there.
            with self.path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
        except FileExistsError:
            return False
        return True


def _read(path: Path) -> dict[str, Any] | None:
    """Return who holds a folder; None where the file is gone."""
    for _ in range(20):
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.05)  # it is being written
            continue
        return content if isinstance(content, dict) else {}
    return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return whether the process is known not to run any more."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or type(pid) is not int or pid < 1:
        return False
    if os.name != "posix":
        return False  # there, signal 0 is no question
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # it runs, for another user
    # Another process may have its number by now, and in a container has it always.
    return _started(pid) != holder.get("started")


def _started(pid: int) -> str | None:
    """Return when a process was started, in the kernel's own count; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19]


@contextmanager
def held_folder(args: Any, claim: Callable[[], None]) -> Iterator[None]:
    """Hold the folder of a training on all of its ranks, or refuse on all of them.

    Args:
        args: the training arguments.
        claim: makes the folder ready, on the ranks that write; it may refuse too.

    Yields:
        Control, while the folder is held.

    Raises:
        UserError: Another training writes into the folder.
        ValueError: What `claim` refuses.
    """
    lock = FolderLock(args.output_dir, wanted=args.should_save)
    try:
        refusal: Exception | None = None
        try:
            lock.__enter__()
            if args.should_save:
                claim()
        except ValueError as error:
            refusal = error
        refusal = _of_any_rank(args, refusal)
        if refusal is not None:
            raise refusal
        yield
    finally:
        lock.__exit__()


def _of_any_rank(args: Any, refusal: Exception | None) -> Exception | None:
    """Return the first refusal of all ranks, so that none waits for one that is gone."""
    if args.world_size == 1:
        return refusal
    from accelerate.utils import gather_object

    said = gather_object([None if refusal is None else str(refusal)])
    found = next((text for text in said if text is not None), None)
    return refusal or (None if found is None else UserError(found))
