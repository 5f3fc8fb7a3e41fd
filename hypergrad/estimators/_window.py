"""The window of inner steps that an estimator goes through, oldest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from hypergrad.errors import HypergradError
from hypergrad.point import Point, versions_of
from hypergrad.rules import State
from hypergrad.steps import InnerStep, take_again
from hypergrad.tree import Params

__all__ = ["check_first", "counted", "moved_within", "start_of"]

_MOVED = (
    "the outer parameters moved within the last {0} inner steps: this is the derivative "
    "for a common shift of all their values. For that of the last alone, take outer steps "
    "every {0} inner ones."
)


def moved_within(point: Point, steps: Sequence[InnerStep]) -> str:
    """Return what to say where λ is not what it was at every step; else nothing."""
    now = versions_of(point.problem)
    if all(step.outer_versions == now for step in steps):
        return ""
    # Counted moves may lead back to the same values, and copies have no count.
    moved = any(point.tally.read(*point.moved(steps)))
    return _MOVED.format(len(steps)) if moved else ""


def start_of(point: Point, num_steps: int) -> tuple[Params, State]:
    """Return w and the optimizer's state before the oldest of the last steps.

    Where they are not on record, the steps since a snapshot are taken again.

    Args:
        point: the place, whose records reach back to a snapshot.
        num_steps: how many steps.
    """
    steps = point.steps
    w, state = steps[0].inner_params, steps[0].state
    for step, following in pairwise(steps[: len(steps) - num_steps + 1]):
        if following.is_snapshot:
            w, state = following.inner_params, following.state
            continue
        step = replace(step, inner_params=w, state=state)
        w, state = take_again(point.problem, step, point.tally)
    return w, state


def counted(point: Point, in_all: int) -> Callable[[], None]:
    """Return what tells of one more inner step each time that it is called.

    Args:
        point: the place, which knows who asked.
        in_all: inner steps that the estimate goes through.
    """
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        point.tell_progress(done, in_all)

    return tell


def check_first(who: object, num_steps: int, number: int | None) -> None:
    """Refuse a window that does not begin where the inner run does.

    Args:
        who: the estimator.
        num_steps: the steps of its window.
        number: of the oldest of them in its inner run.

    Raises:
        HypergradError: naming what to do.
    """
    if number != 0:
        at = "an unknown one" if number is None else f"number {number + 1}"
        msg = (
            f"the start of the inner run is learned, and the oldest of the {num_steps} "
            f"steps that {type(who).__name__} looks back at is {at} of the run, not its "
            "first. Take outer steps after as many inner steps as num_steps "
            "(`outer_every`, and an `outer_warmup` of no more), and call `begin_run` after "
            "each."
        )
        raise HypergradError(msg)
