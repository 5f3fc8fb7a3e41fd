"""Processes that train, one run at a time each, and what happens when one dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from bidora._threads import brief_waiting
from bidora.errors import UserError
from bidora.study.records import Record
from bidora.study.worker import Order, begin, ready, work

__all__ = ["Slot", "cores", "worker_environment"]

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
"""What libraries read of how many threads to take, when they are loaded."""

QUIET = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")

PATIENCE = 10.0
"""Seconds that a process has to end, by itself or when it is told to."""


class Slot:
    """A process for runs, made when the first comes, and anew after one that ended it.

    It is a pool of one: of a pool of several, nobody could tell which run ended it.

    Args:
        log: File that the process prints to.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self._pool: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None
        self._last: Future[Record] | None = None

    def submit(self, order: Order) -> Future[Record]:
        """Begin a run.

        Args:
            order: The run.

        Returns:
            Its record, in the future; `BrokenProcessPool` if it ends the process.

        Raises:
            UserError: If no process could be made.
        """
        pool = self._pool or self._start()
        self._last = pool.submit(work, order)
        return self._last

    def _start(self) -> ProcessPoolExecutor:
        self._last = None
        before = set(active_children())
        # Spawned, not forked: a fork of a process with threads may hang, and CUDA does.
        pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=begin, initargs=(str(self.log),)
        )
        try:
            answer = pool.submit(ready)
            self._process = next(iter(set(active_children()) - before), None)
            answer.result()
        except BrokenProcessPool as error:
            pool.shutdown()
            raise UserError(
                "the processes that train cannot start. In a script, call "
                'bidora.compare under `if __name__ == "__main__":`, because each of them '
                f"imports the script; {self.log} may say more."
            ) from error
        except BaseException:
            self._pool = pool
            self.end()
            raise
        self._pool = pool
        return pool

    def why_it_ended(self) -> str:
        """Return how the process ended that was lost, and forget it."""
        if self._process is not None:
            self._process.join(5)
        if self._pool is not None:
            self._pool.shutdown()
        # Not before: the pool's own thread waits for the process too, and one of two that
        # do is told nothing until the other has ended.
        code = None if self._process is None else self._process.exitcode
        self._pool = self._process = None
        if code is None or code >= 0:
            return f"ProcessEnded: the process of the run ended by itself (exit {code})"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        memory = ", as systems do when memory runs out" if name == "SIGKILL" else ""
        return f"ProcessEnded: the process of the run was ended by {name}{memory}"

    def release(self) -> None:
        """Let an idle process end, and do not wait for it.

        One that ends by itself gives its semaphores back. Of one that is terminated,
        Python's resource tracker says at the end of a comparison that it leaked them.
        """
        if self._pool is not None and self._last is not None and self._last.done():
            self._pool.shutdown(wait=False)

    def end(self) -> None:
        """End the process, with the run that it is at; a released one has some time."""
        if self._process is not None:
            if self._last is not None and self._last.done():
                self._process.join(PATIENCE)
            if self._process.is_alive():
                self._process.terminate()
                self._process.join(PATIENCE)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._process = None


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def worker_environment(processes: int) -> Iterator[None]:
    """Set, for processes that are made meanwhile, their share of the cores.

    What the user set goes before. It is set here, because a new process may load torch
    before any line of ours runs in it.

    Args:
        processes: How many share the cores.

    Yields:
        Control.
    """
    share = str(max(1, cores() // processes))
    wanted = dict.fromkeys(THREADS, share) | dict.fromkeys(QUIET, "error")
    wanted |= brief_waiting()
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
