"""Compare a hypergradient with that of a reference while training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypergrad import tree
from hypergrad._run import without_graphs
from hypergrad.errors import HypergradError
from hypergrad.estimator import HypergradEstimator, Hypergradient, Info
from hypergrad.problem import BilevelProblem
from hypergrad.reference import check_reference, choose_reference
from hypergrad.reporting import silenced
from hypergrad.steps import InnerStep, SnapshotLimit
from hypergrad.tree import Params

__all__ = ["Audit", "Auditor"]


@dataclass(frozen=True)
class Audit:
    """How far a hypergradient is from that of a reference, at the same point and data.

    A relative error is that to the norm of the reference. What has no meaning is None: a
    cosine with zeros, an error relative to zeros, and all of them where the reference
    failed.

    Attributes:
        reference: name of the estimator that it was compared with.
        why: why with that one.
        cosine: of the total derivatives.
        error: relative error of the total derivative.
        indirect_cosine: of the indirect terms.
        indirect_error: relative error of the indirect term.
        info: cost and trustworthiness of the reference; None where it failed.
        reason: empty where all is well, else why the reference failed, or what is to be
            said of its result.
    """

    reference: str
    why: str = ""
    cosine: float | None = None
    error: float | None = None
    indirect_cosine: float | None = None
    indirect_error: float | None = None
    info: Info | None = None
    reason: str = ""


@dataclass(frozen=True)
class Auditor:
    """Audit every so many outer steps.

    Args:
        every: outer steps from one audit to the next; None for none.
        reference: as for `choose_reference`.
        window: inner steps to unroll through; None for those since the last outer step.
    """

    every: int | None
    reference: str | HypergradEstimator
    window: int | None

    def __post_init__(self) -> None:
        for name, value in (("audit_every", self.every), ("audit_window", self.window)):
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                msg = f"{name}={value!r} must be a whole number of steps, or None."
                raise TypeError(msg)
            if value < 1:
                msg = f"{name}={value} must be at least 1 step, or None."
                raise ValueError(msg)
        check_reference(self.reference)

    @property
    def needs_steps(self) -> bool:
        """Whether the reference cannot do without recorded inner steps."""
        if self.every is None:
            return False
        if isinstance(self.reference, HypergradEstimator):
            return self.reference.needs.lookback > 0
        return self.reference == "unrolled"

    def lookback(self, since_outer: int) -> int:
        """Return how many inner steps the reference looks back at.

        Args:
            since_outer: inner steps from one outer step to the next.
        """
        if self.every is None:
            return 0
        if isinstance(self.reference, HypergradEstimator):
            return self.reference.needs.lookback
        unrolls = self.reference in ("auto", "unrolled")
        return (self.window or since_outer) if unrolls else 0

    @property
    def snapshots(self) -> SnapshotLimit:
        """How many copies of w and the optimizer's state its reference may hold."""
        if isinstance(self.reference, HypergradEstimator):
            return self.reference.needs.snapshots
        return "auto"  # that of `Unrolled`

    def is_due(self, outer_step: int) -> bool:
        """Return whether the outer step of that number, from 1, is audited."""
        return self.every is not None and outer_step % self.every == 0

    def audit(
        self,
        problem: BilevelProblem,
        estimated: Hypergradient,
        *,
        inner_batch: Any,
        outer_batch: Any,
        steps: Sequence[InnerStep],
        n_steps: int,
    ) -> Audit:
        """Compute the hypergradient again by the reference, and compare.

        Args:
            problem: the problem; it is left as it was.
            estimated: what to compare.
            inner_batch: data of the inner loss.
            outer_batch: data of the outer loss.
            steps: the inner steps on record, oldest first.
            n_steps: how many of the last of them to look back at; those before are what
                they may have to be reached from.

        Returns:
            The comparison; where the reference raises a `HypergradError`, its message.
        """
        try:
            chosen, why = choose_reference(
                problem, steps[-n_steps:] if n_steps else (), self.reference
            )
        except ValueError as error:  # nothing to unroll through yet
            return Audit(str(self.reference), reason=str(error))
        name = chosen.name or type(chosen).__name__
        lookback = chosen.needs.lookback
        if len(steps) < lookback:
            reason = (
                f"the reference looks back at {lookback} inner steps, and only "
                f"{len(steps)} are on record yet."
            )
            return Audit(name, why, reason=reason)
        try:
            with silenced():  # `reason` tells
                truth = chosen.estimate(
                    problem,
                    inner_batch=inner_batch,
                    outer_batch=outer_batch,
                    # A kept graph is the estimator's, and serves once.
                    steps=without_graphs(steps) or None,
                )
        except HypergradError as error:
            return Audit(name, why, reason=f"the reference failed: {error}")
        cosine, off = _compared(estimated.outer_grads, truth.outer_grads)
        indirect_cosine, indirect_off = _compared(estimated.indirect, truth.indirect)
        return Audit(
            name,
            why,
            cosine,
            off,
            indirect_cosine,
            indirect_off,
            truth.info,
            truth.info.reason,
        )


def _compared(value: Params, truth: Params) -> tuple[float | None, float | None]:
    """Return cosine and relative error; None for what has no meaning."""
    error = tree.relative_error(value, truth)
    return tree.cosine(value, truth), error if math.isfinite(error) else None
