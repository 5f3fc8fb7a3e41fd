"""Records of inner steps that were taken, for estimators that look back at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypergrad import rng, tree
from hypergrad.batches import MicroBatch, as_micro_batches
from hypergrad.problem import BilevelProblem
from hypergrad.products import InnerGraph, Tally, gradients
from hypergrad.rules import Rule, State
from hypergrad.tree import Params

__all__ = ["InnerStep", "keeps_grads", "take_steps", "with_grads"]


@dataclass(frozen=True)
class InnerStep:
    """Everything that one inner step was made of.

    A step that was not taken (a skipped one) makes no record.

    Attributes:
        inner_params: w before the step; copies.
        outer_params: λ at the step; copies.
        state: optimizer state before the step; copies.
        micro_batches: the data, each with its weight, random state and attention
            backend.
        grads: ∂g/∂w as it entered the rule: weighted sums, unscaled, before clipping.
            Empty where it was not kept; `with_grads` computes it again.
        rule: what the optimizer did with it.
        outer_grads: the by-product ∂g/∂λ, where it was asked for.
        graph: the graph of `grads`, where it was kept; used once.
        outer_versions: version counters of λ when the graph was built.
    """

    inner_params: Params
    outer_params: Params
    state: State
    micro_batches: tuple[MicroBatch, ...]
    grads: Params
    rule: Rule
    outer_grads: Params | None = None
    graph: InnerGraph | None = field(default=None, repr=False, compare=False)
    outer_versions: tuple[int, ...] = field(default=(), repr=False, compare=False)


def take_steps(
    problem: BilevelProblem,
    batches: Sequence[Any],
    rule: Rule,
    *,
    state: State | None = None,
    tally: Tally | None = None,
    grads: bool = True,
    byproduct: bool = False,
) -> tuple[list[InnerStep], Params]:
    """Take virtual inner steps from the present w, and leave the problem as it was.

    Args:
        problem: the problem.
        batches: one batch (or `Accumulated`) for each step.
        rule: what a step does.
        state: optimizer state to start from; None for a fresh optimizer.
        tally: counts the evaluations.
        grads: whether ∂g/∂w is needed on record; see `keeps_grads`.
        byproduct: whether to record ∂g/∂λ too.

    Returns:
        The records, oldest first, and w after the last step (to be used with
        `problem.at`).

    Example:
        Two steps on (w - 0)²/2 at rate 1/2: 4 → 2 → 1.

        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> problem = BilevelProblem(half, half, {"w": w}, {"lam": lam})
        >>> steps, end = take_steps(problem, [None, None], SGD(0.5))
        >>> end["w"].item(), steps[1].inner_params["w"].item(), w.item()
        (1.0, 2.0, 4.0)
    """
    tally = tally or Tally()
    w = tree.clone(problem.inner_params)
    lam = tree.clone(problem.outer_params)
    state = dict(state or {})
    records: list[InnerStep] = []
    with problem.untouched():
        for batch in batches:
            micro = as_micro_batches(batch)
            now = rng.capture(problem.tensors)
            micro = tuple(
                m if m.rng_state else replace(m, rng_state=now) for m in micro
            )
            with problem.at(w):
                g = gradients(problem, "inner", micro, tally, outer=byproduct)
            found = g.inner or {}
            kept = found if keeps_grads(problem, grads, micro) else {}
            records.append(
                InnerStep(w, lam, state, micro, kept, rule, outer_grads=g.outer)
            )
            w, state = rule.apply(w, state, found)
    return records, w


def keeps_grads(
    problem: BilevelProblem, needed: bool, batches: Sequence[MicroBatch]
) -> bool:
    """Return whether a step's gradient is worth keeping on record.

    Args:
        problem: the problem.
        needed: whether the estimator reads it from there.
        batches: what the step was taken on.

    Returns:
        True also where it would cost to have it again: a forward and a backward pass for
        each of several micro-batches, or a message to the other ranks.
    """
    return needed or len(batches) > 1 or problem.reducer.ranks > 1


def with_grads(problem: BilevelProblem, step: InnerStep, tally: Tally) -> InnerStep:
    """Return the step with its gradient, computed again where it was not kept.

    Args:
        problem: the problem; it is left as it was.
        step: the record.
        tally: counts the evaluations.
    """
    if step.grads:
        return step
    with problem.at(step.inner_params, step.outer_params):
        g = gradients(problem, "inner", step.micro_batches, tally, outer=False)
    return replace(step, grads=g.inner or {})
