"""An estimator's own part of an inner step: the hooks that `BilevelOptimizer` calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hypergrad import tree
from hypergrad._answer_checks import check_like, check_state
from hypergrad._run import Run
from hypergrad.answer import EstimatorState, Info
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.estimator import HypergradEstimator, Point
from hypergrad.problem import BilevelProblem
from hypergrad.products import Tally
from hypergrad.reporting import once_for
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["Hooks", "directs", "follows"]


def directs(estimator: HypergradEstimator) -> bool:
    """Return whether an estimator has a direction of its own for inner steps."""
    own = type(estimator).inner_direction
    return own is not HypergradEstimator.inner_direction


def follows(estimator: HypergradEstimator) -> bool:
    """Return whether an estimator's state goes on at inner steps."""
    own = type(estimator).after_inner_step
    return own is not HypergradEstimator.after_inner_step


class Hooks:
    """Call the hooks of one inner step, and check what they return.

    Args:
        problem: the problem.
        run: where the run stands before the step.
        inner_batches: the step's data, as it was evaluated.
        outer_batches: data of the outer loss; empty where the estimator needs none.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        run: Run,
        inner_batches: tuple[MicroBatch, ...],
        outer_batches: tuple[MicroBatch, ...],
    ) -> None:
        self._problem = problem
        self._estimator = run.estimator
        self._state = run.estimator_state
        self._batches = inner_batches, outer_batches
        self._tally = Tally()

    @property
    def cost(self) -> Info:
        """What the hooks evaluated."""
        tally = self._tally
        return Info(tally.n_forward, tally.n_backward, tally.n_hvp)

    def direction(self, gradient: Params) -> tuple[Params, float]:
        """Return what to step along, and its norm.

        Args:
            gradient: ∂g/∂w.

        Raises:
            NonFiniteError: the direction is NaN or infinite.
        """
        with self._point() as point:
            found = self._estimator.inner_direction(point, gradient)
            who = f"{type(self._estimator).__name__}.inner_direction"
            own = self._problem.inner_params
            check_like("a direction", found, own, who, "inner")
            (size,) = self._tally.read(tree.size(found))
        norm = tree.settled_norm(size, found)
        if not math.isfinite(norm):
            msg = (
                f"{who} returned a direction of norm {norm}: a penalty or a multiplier "
                "that grew without bound is the usual cause. Nothing moved; lower it, or "
                "the inner learning rate."
            )
            raise NonFiniteError(msg)
        return found, norm

    def state_after(self, step: InnerStep) -> EstimatorState:
        """Return the state after the step.

        Args:
            step: its record.
        """
        with self._point() as point:
            found = self._estimator.after_inner_step(point, step)
            who = f"{type(self._estimator).__name__}.after_inner_step"
            check_state(found, who)
            self._tally.read()
        # The next step writes to the parameters, and may to copies of before this one.
        held = [self._problem.inner_params, self._problem.outer_params]
        held += [step.inner_params, *step.state.values(), step.grads]
        memory = {_memory(t) for params in held for t in params.values()}
        return _apart(found, memory)

    @contextmanager
    def _point(self) -> Iterator[Point]:
        problem, before = self._problem, _versions(self._state)
        with once_for(problem.reported), problem.untouched():
            yield Point(
                problem, *self._batches, state=dict(self._state), tally=self._tally
            )
        if _versions(self._state) != before:
            msg = (
                f"{type(self._estimator).__name__} changed its state in place, which a "
                "step that fails could not undo. Return new tensors."
            )
            raise HypergradError(msg)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _apart(state: Mapping[str, Any], memory: set[int]) -> dict[str, Any]:
    """Return a state whose tensors lie in none of the memory."""

    def kept(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _apart(value, memory)
        return value.detach().clone() if _memory(value) in memory else value

    return {key: kept(value) for key, value in state.items()}


def _versions(state: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for value in state.values():
        if isinstance(value, Tensor):
            found.append(value._version)
        else:
            found += _versions(value)
    return found
