"""The window of inner steps that an estimator goes through, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from hypergrad.point import Point, versions_of
from hypergrad.rules import State
from hypergrad.steps import InnerStep, take_again
from hypergrad.tree import Params

__all__ = ["MOVED", "moved_within", "start_of"]

MOVED = (
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
    return MOVED.format(len(steps)) if moved else ""


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
