"""Warnings: each kind once for a problem, at the line of the caller's own code."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from hypergrad.errors import NumericalWarning

__all__ = ["once_for", "report", "silenced"]

_ROOT = Path(__file__).resolve().parent
_SKIPPED = (
    f"{_ROOT}/",
    f"{_ROOT.parent / 'bidora'}/",
    "/torch/optim/",
    "/torch/utils/_contextlib.py",
    "/contextlib.py",
)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*(e[-+]?\d+)?|inf|nan)")

# Where texts of the kinds that were given already are kept; None where nothing is kept,
# and False where nothing is to be given. By context, so that threads do not mix.
_given: ContextVar[set[str] | None] = ContextVar("_given", default=None)
_silent: ContextVar[bool] = ContextVar("_silent", default=False)


def report(text: str, category: type[Warning] = NumericalWarning) -> None:
    """Warn, but not of what was warned of already.

    Two texts that differ in their numbers alone are one kind. Within `once_for`, a kind
    is given once; elsewhere Python's own filters decide.

    Args:
        text: what happened, why, and what to try.
        category: class of the warning.
    """
    if _silent.get():
        return
    given = _given.get()
    kind = _NUMBER.sub("#", text)
    if given is not None:
        if kind in given:
            return
        given.add(kind)
    warnings.warn(text, category, stacklevel=_level_of_caller())


@contextmanager
def once_for(given: set[str]) -> Iterator[None]:
    """Give each kind of warning in the block once, as long as `given` lives.

    Args:
        given: kinds that were given; added to.
    """
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)


@contextmanager
def silenced() -> Iterator[None]:
    """Give no warning of this library in the block; those of others are not touched.

    Example:
        >>> with silenced():
        ...     report("nobody hears of this")
    """
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def _level_of_caller() -> int:
    """Return the `stacklevel`, seen from `report`, of the first frame that is not ours."""
    frame, level = sys._getframe(1), 1
    while frame is not None and _is_ours(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(filename: str) -> bool:
    path = filename.replace("\\", "/")
    return path.startswith(_SKIPPED[:2]) or any(part in path for part in _SKIPPED[2:])
