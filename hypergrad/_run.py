"""What a bilevel run has reached, as values that are replaced and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from hypergrad.batches import MicroBatch
from hypergrad.estimator import EstimatorState, HypergradEstimator
from hypergrad.reporting import once_for, report
from hypergrad.steps import InnerStep, since_snapshot

__all__ = ["Run", "without_graphs"]


@dataclass(frozen=True)
class Run:
    """The state of a run between two steps.

    Attributes:
        estimator: the one in use, which the one that was asked for may have chosen.
        outer_every: inner steps from one outer step to the next.
        n_inner_steps: inner steps taken.
        n_outer_steps: outer steps taken.
        n_skipped: outer steps that were due and not taken.
        outer_frozen: whether the search has ended.
        window: records of the last inner steps, oldest first.
        estimator_state: what the estimator hands to its next call.
        last: data of the last inner step.
        resolved: whether the estimator had the occasion to choose.
        left: size of w and the inner optimizer's state after the last inner step, where
            not every step is kept whole: by it a change by hand shows.
        why: why this estimator, where it was chosen.
        began: inner steps taken before the present inner run began.
        outer_began: outer steps taken or skipped before it began.
        asked: whether an outer step could have followed an inner one of it by itself.
    """

    estimator: HypergradEstimator
    outer_every: int
    n_inner_steps: int = 0
    n_outer_steps: int = 0
    n_skipped: int = 0
    outer_frozen: bool = False
    window: tuple[InnerStep, ...] = ()
    estimator_state: EstimatorState = field(default_factory=dict)
    last: tuple[MicroBatch, ...] = ()
    resolved: bool = False
    left: Tensor | None = None
    why: str = ""
    began: int = 0
    outer_began: int = 0
    asked: bool = False

    @property
    def recorded_steps(self) -> tuple[InnerStep, ...]:
        """As many of the last inner steps as the estimator looks back at.

        And those before them, back to the snapshot that they are reached from.
        """
        lookback = self.estimator.needs.lookback
        return since_snapshot(self.window, lookback) if lookback else ()

    def is_due(self, n_inner_steps: int, warmup: int) -> bool:
        """Return whether an outer step follows the inner step of that number.

        The cadence is that of the present inner run, the warmup that of all.
        """
        lookback = self.estimator.needs.lookback
        first = max(warmup, lookback, 1)
        filled = min(len(self.window) + 1, n_inner_steps) >= lookback
        in_run = n_inner_steps - self.began
        due = n_inner_steps >= first and in_run % self.outer_every == 0
        return due and filled and not self.outer_frozen

    def begun(self) -> Run:
        """Return the run where another inner run begins."""
        return replace(
            self,
            began=self.n_inner_steps,
            outer_began=self.n_outer_steps + self.n_skipped,
            asked=False,
            window=(),
            left=None,
        )

    def frozen(self) -> Run:
        """Return the run where the search has ended."""
        return replace(
            self, outer_frozen=True, window=(), estimator_state={}, left=None
        )

    def chosen_after(self, was: HypergradEstimator) -> Run:
        """Return the run where the estimator has had the occasion to choose.

        Args:
            was: the one in use before.
        """
        window = self.window
        if self.estimator.needs.order > was.needs.order:
            # What was recorded may have run under fused attention, which draws dropout
            # masks of its own; then the first outer step waits for another record.
            window = tuple(s for s in window if s.is_plain)
        return replace(self, window=window, resolved=True)

    def tell_if_idle(self, reported: set[str], warmup: int | None = None) -> None:
        """Warn where the inner run ends before its first outer step was due.

        Args:
            reported: kinds of warnings that were given.
            warmup: inner steps before the first outer step of all, where none may follow;
                None where other inner runs do, which the warmup passes with.
        """
        taken = self.n_outer_steps + self.n_skipped
        idle = taken == self.outer_began if warmup is None else not taken
        if not self.asked or self.outer_frozen or not idle:
            return
        n, every = self.n_inner_steps - self.began, self.outer_every
        lookback = self.estimator.needs.lookback
        least = max(1, lookback, (warmup or 0) - self.began)
        first = -(-least // every) * every
        if n >= first:
            return
        by = f"outer_every={every}"
        if lookback:
            name = type(self.estimator).__name__
            by += f" and the {lookback} steps that {name} looks back at"
        if least > max(1, lookback):
            by += f" and outer_warmup={warmup}"
        own = "Call outer_step() at the end of each run, lower outer_every"
        if n < lookback:
            own = f"Look back at {n} steps at most, with outer_every no larger"
        with once_for(reported):
            report(
                f"an inner run ended at step {n} without an outer step, so that the "
                "outer parameters did not move: the first one follows step "
                f"{first} of a run (by {by}), and each run counts from its own beginning. "
                f"{own}, or take runs of at least {first} steps."
            )

    def without_graphs(self) -> Run:
        """Return the run without the graphs that its records kept."""
        return replace(self, window=without_graphs(self.window))


def without_graphs(steps: Sequence[InnerStep]) -> tuple[InnerStep, ...]:
    """Return the steps without the graphs that they kept."""
    return tuple(s if s.graph is None else replace(s, graph=None) for s in steps)
