"""Run functions on several gloo processes, under a time limit, and look at their messages.

One spawn runs the cases of all modules, since starting the processes costs seconds. After
each case the ranks look whether a message was left over, and after one that failed they
meet anew, so that what one leaves behind does not reach the next.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

__all__ = [
    "Message",
    "Outcome",
    "Outcomes",
    "on_ranks",
    "outcomes_of",
    "recorded",
    "run_on_ranks",
]

Case = Callable[[], Any]
"""A function of a module, or a partial of one: it travels to other processes."""

WAIT = 15.0
"""Seconds after which a rank that waits for the others in vain gets an error."""
_POLL = 0.002
_ATTEMPTS = 5
"""Spawns at most; more than one only where a case kills its process."""


@dataclass(frozen=True)
class Outcome:
    """What one rank made of one case.

    Attributes:
        value: what it returned.
        kind: class of the exception that it raised; empty for none.
        text: message of the exception.
        trace: where it was raised.
        warned: messages of the warnings that were given.
    """

    value: Any = None
    kind: str = ""
    text: str = ""
    trace: str = ""
    warned: list[str] = field(default_factory=list)

    @property
    def lost(self) -> bool:
        """Whether the process was killed, or died, before the case had ended."""
        return self.kind == "NoResult"

    @property
    def result(self) -> Any:
        """What the case returned; fails where it raised."""
        assert not self.kind, f"{self.kind}: {self.text}\n{self.trace}"
        return self.value


@dataclass(frozen=True)
class Outcomes:
    """What each of several ranks made of each case."""

    ranks: int
    of: dict[str, list[Outcome]]

    def __repr__(self) -> str:
        return f"Outcomes({self.ranks} ranks, {len(self.of)} cases)"

    def results(self, case: str) -> list[Any]:
        """Return what each rank returned; fails where one raised."""
        return [outcome.result for outcome in self.of[case]]


def on_ranks(two: Iterable[str], four: Iterable[str] = ()) -> pytest.MarkDecorator:
    """Parametrize a test of `outcomes` and `case`.

    Args:
        two: cases to run on two ranks.
        four: cases to run on four, with `-m distributed`.
    """
    marks = pytest.mark.distributed
    return pytest.mark.parametrize(
        ("outcomes", "case"),
        [(2, case) for case in two]
        + [pytest.param(4, case, marks=marks) for case in four],
        indirect=["outcomes"],
    )


_KNOWN = pytest.StashKey[dict[int, dict[str, list[Outcome]]]]()


def outcomes_of(
    request: pytest.FixtureRequest, folders: pytest.TempPathFactory
) -> Outcomes:
    """Return what came of a module's cases.

    One spawn runs the cases of all modules that the selected tests ask for. A module has
    them in `CASES`, by name.

    Args:
        request: of the fixture `outcomes`, whose parameter is a number of ranks.
        folders: makes an empty folder.
    """
    ranks, session = request.param, request.session
    known = session.stash.setdefault(_KNOWN, {})
    if ranks not in known:
        chosen: dict[str, Case] = {}
        for item in session.items:
            test: Any = item
            given = test.callspec.params if hasattr(test, "callspec") else {}
            if given.get("outcomes") == ranks:
                name = given["case"]
                chosen[_full(test.module, name)] = test.module.CASES[name]
        folder = folders.mktemp(f"on-{ranks}-ranks")
        known[ranks] = run_on_ranks(ranks, chosen, folder, 60.0 * ranks)
    cases = request.module.CASES
    found = {n: known[ranks].get(_full(request.module, n), []) for n in cases}
    return Outcomes(ranks, found)


def _full(module: Any, case: str) -> str:
    return f"{module.__name__}: {case}"


def run_on_ranks(
    ranks: int, cases: Mapping[str, Case], folder: Path, limit: float = 120.0
) -> dict[str, list[Outcome]]:
    """Run each case on every rank, one case after the other.

    Args:
        ranks: number of processes.
        cases: by name; called without arguments, torch.distributed being initialised.
        folder: an empty one.
        limit: seconds for all of it; what has not ended by then is killed.

    Returns:
        For each case what each rank made of it. A case that did not end, and those after
        it, have an outcome of kind `NoResult`.
    """
    deadline = time.monotonic() + limit
    names = list(cases)
    outcomes: dict[str, list[Outcome]] = {}
    attempt = 0
    while names:
        here = folder / str(attempt)
        here.mkdir()
        why = _spawned(ranks, {n: cases[n] for n in names}, here, deadline)
        found = [_loaded(here, number, ranks, why) for number in range(len(names))]
        # A case that killed its process is left out, and those after it run again.
        died = [i for i, each in enumerate(found) if any(o.lost for o in each)]
        done = died[0] + 1 if died else len(names)
        if attempt == _ATTEMPTS - 1 or time.monotonic() > deadline:
            done = len(names)
        outcomes |= dict(zip(names[:done], found, strict=False))
        names = names[done:]
        attempt += 1
    return outcomes


def _spawned(ranks: int, cases: dict[str, Case], folder: Path, deadline: float) -> str:
    """Run the cases, and return why they ended."""
    limit = max(1.0, deadline - time.monotonic())
    context: Any = mp.spawn(  # pyright: ignore[reportPrivateImportUsage]
        _child, (ranks, cases, str(folder), limit), nprocs=ranks, join=False
    )
    try:
        while time.monotonic() < deadline:
            if context.join(timeout=1.0):
                return "ended"
    except Exception as error:  # a process died
        return str(error)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return f"still running after {limit:.0f} s"


def _loaded(folder: Path, number: int, ranks: int, why: str) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for rank in range(ranks):
        path = _path(folder, number, rank)
        if path.exists():
            outcomes.append(torch.load(path, weights_only=False))
            continue
        stuck = folder / f"stuck-{rank}"
        where = stuck.read_text() if stuck.exists() else ""
        outcomes.append(Outcome(None, "NoResult", f"rank {rank}: {why}", where))
    return outcomes


def _path(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number}-{rank}.pt"


def _child(
    rank: int, ranks: int, cases: dict[str, Case], place: str, limit: float
) -> None:
    torch.set_num_threads(1)
    folder, deadline = Path(place), time.monotonic() + limit
    with (folder / f"stuck-{rank}").open("w") as stuck:
        faulthandler.dump_traceback_later(max(1.0, limit - 10.0), file=stuck)
        # All have started before the first of them begins to wait for the others.
        (folder / f"started-{rank}").touch()
        _await([folder / f"started-{r}" for r in range(ranks)], deadline)
        for number, case in enumerate(cases.values()):
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/meet-{number}",
                    rank=rank,
                    world_size=ranks,
                    timeout=timedelta(seconds=WAIT),
                )
            torch.manual_seed(0)
            outcome = _outcome(case)
            spoilt = [folder / f"spoilt-{number}-{r}" for r in range(ranks)]
            if outcome.kind or not _in_step(number):
                spoilt[rank].touch()
                _destroy()
            path = _path(folder, number, rank)
            torch.save(outcome, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            _await([_path(folder, number, r) for r in range(ranks)], deadline)
            if any(mark.exists() for mark in spoilt):
                _destroy()
        _destroy()
        faulthandler.cancel_dump_traceback_later()


def _in_step(number: int) -> bool:
    """Return whether no message of a case is left over."""
    if not dist.is_initialized():
        return False
    told = torch.tensor([float(number)])
    try:
        dist.all_reduce(told)
    except RuntimeError:  # another rank failed
        return False
    return told.item() == number * dist.get_world_size()


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _await(paths: Sequence[Path], deadline: float) -> None:
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            msg = f"waited in vain for {[path.name for path in paths]}"
            raise TimeoutError(msg)
        time.sleep(_POLL)


def _outcome(case: Case) -> Outcome:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            value, error = case(), None
        except Exception as caught:
            value, error = None, caught
    warned = [str(w.message) for w in heard]
    if error is None:
        return Outcome(value, warned=warned)
    trace = "".join(traceback.format_exception(error))
    return Outcome(None, type(error).__name__, str(error), trace, warned)


# -- messages ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """One call of torch.distributed that sends something.

    Attributes:
        call: name of the function.
        numel: number of entries of all its tensors.
        dtypes: their dtypes.
        devices: their devices.
    """

    call: str
    numel: int
    dtypes: frozenset[torch.dtype]
    devices: frozenset[torch.device]


_CALLS = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
)


@contextmanager
def recorded() -> Iterator[list[Message]]:
    """Yield a list of all that the block sends, in order."""
    sent: list[Message] = []
    real = {name: getattr(dist, name) for name in _CALLS if hasattr(dist, name)}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = list(_tensors([args, kwargs]))
            sent.append(
                Message(
                    name,
                    sum(t.numel() for t in tensors),
                    frozenset(t.dtype for t in tensors),
                    frozenset(t.device for t in tensors),
                )
            )
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(dist, name, watched(name))
    try:
        yield sent
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
