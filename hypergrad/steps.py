"""Records of inner steps that were taken, for estimators that look back at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from torch import Tensor

from hypergrad import _snapshots as snapshots_of
from hypergrad import rng, tree
from hypergrad._checks import check_count
from hypergrad.batches import MicroBatch, fixed
from hypergrad.learned import learned_rule, start_of
from hypergrad.problem import BilevelProblem
from hypergrad.products import InnerGraph, Tally, gradients
from hypergrad.reporting import report
from hypergrad.rules import Rule, State
from hypergrad.tree import Params

__all__ = [
    "InnerStep",
    "SnapshotLimit",
    "bytes_of",
    "check_snapshots",
    "keeps_grads",
    "n_snapshots",
    "since_snapshot",
    "steps_back",
    "take_again",
    "take_steps",
    "with_grads",
    "without_snapshot",
]

SnapshotLimit = int | Literal["auto", "all"]
"""How many copies of w and the optimizer's state may be held at once."""
_SMALL = 64 * 2**20
"""Bytes of records that are not worth a computation."""
_SHARE = 0.25
"""The same as a part of the weights."""


@dataclass(frozen=True)
class InnerStep:
    """Everything that one inner step was made of.

    A step that was not taken (a skipped one) makes no record.

    Attributes:
        inner_params: w before the step; copies. Empty where no snapshot of this step was
            kept; `steps_back` reaches it again from that of an earlier one.
        outer_params: λ at the step; copies.
        state: optimizer state before the step; copies. Empty likewise.
        micro_batches: the data, each with its weight, random state and attention
            backend.
        grads: ∂g/∂w as it entered the rule: weighted sums, unscaled, before clipping.
            Empty where it was not kept; `with_grads` computes it again.
        rule: what the optimizer did with it.
        outer_grads: the by-product ∂g/∂λ, where it was asked for.
        graph: the graph of `grads`, where it was kept; used once.
        outer_versions: version counters of λ when the graph was built.
        batch_versions: those of the batches' tensors after the step; empty where the record
            was loaded.
        grad_norm: norm of the gradient that was taken.
        follows: whether w and the state are what the step before it made of them. Not so
            where they were changed by hand in between.
        directed: whether `grads` is a direction of the estimator's own, in the place of
            ∂g/∂w; it is then kept in any case.
        number: which step of its inner run it was, from 0; None where that is not known.

    Example:
        One step on w²/2 at rate 1/2, from w = 4: the record has w before it.

        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> problem = BilevelProblem(half, half, {"w": w}, {"lam": lam})
        >>> (step,), end = take_steps(problem, [None], SGD(0.5))
        >>> step.inner_params["w"].item(), step.grads["w"].item(), step.number
        (4.0, 4.0, 0)
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
    batch_versions: tuple[int, ...] = field(default=(), repr=False, compare=False)
    grad_norm: float | None = None
    follows: bool = False
    directed: bool = False
    number: int | None = None

    @property
    def is_snapshot(self) -> bool:
        """Whether w and the state before the step are on record."""
        return bool(self.inner_params)

    @property
    def is_plain(self) -> bool:
        """Whether it ran under attention whose masks can be drawn again.

        On a CPU, torch itself takes the plain one where there is dropout.
        """
        on_host = all(t.device.type == "cpu" for t in self.inner_params.values())
        return on_host or all(m.attention == "math" for m in self.micro_batches)


def take_steps(
    problem: BilevelProblem,
    batches: Sequence[Any],
    rule: Rule,
    *,
    state: State | None = None,
    tally: Tally | None = None,
    grads: bool = True,
    byproduct: bool = False,
    snapshots: SnapshotLimit = "all",
) -> tuple[list[InnerStep], Params]:
    """Take virtual inner steps from the present w, and leave the problem as it was.

    Where the start is learned, from that; where settings are, by those in the place of
    the rule's own.

    Args:
        problem: the problem.
        batches: one batch (or `Accumulated`) for each step.
        rule: what a step does.
        state: optimizer state to start from; None for a fresh optimizer. Steps are
            counted from 0 in either case, and begin at a learned start: it does not go on
            with a run.
        tally: counts the evaluations.
        grads: whether ∂g/∂w is needed on record; see `keeps_grads`.
        byproduct: whether to record ∂g/∂λ too.
        snapshots: how many copies of w and the state may be held at once; `"auto"` as
            for `Unrolled`.

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
    w = start_of(problem)
    lam = tree.clone(problem.outer_params)
    state = dict(state or {})
    records: list[InnerStep] = []
    every = 1
    with problem.untouched():
        for i, batch in enumerate(batches):
            micro = fixed(batch, rng.capture(problem.tensors), problem.training)
            with problem.at(w):
                g = gradients(problem, "inner", micro, tally, outer=byproduct)
            found = g.inner or {}
            taken = learned_rule(rule, problem, i)
            kept = found if keeps_grads(problem, grads, micro) else {}
            records.append(
                InnerStep(
                    w,
                    lam,
                    state,
                    micro,
                    kept,
                    taken,
                    outer_grads=g.outer,
                    grad_norm=g.inner_norm,
                    follows=bool(records),
                    number=i,
                )
            )
            w, state = taken.apply(w, state, found)
            if i == 0:
                size = record_bytes([replace(records[0], state=state)])
                held = n_snapshots(problem, len(batches), snapshots, size)
                every = snapshots_of.spacing(len(batches), held)
            elif i % every:
                records[i] = without_snapshot(problem, records[i])
    return records, w


# -- records without w and state ---------------------------------------------------------


def n_snapshots(
    problem: BilevelProblem, n_steps: int, limit: SnapshotLimit, size: int
) -> int:
    """Return how many copies of w and the optimizer's state to hold at once.

    Args:
        problem: the problem.
        n_steps: number of steps that are looked back at.
        limit: a number, `"all"`, or `"auto"`: as many as take at most a quarter of the
            memory of the weights, frozen ones included, or 64 MiB; and at least as many
            as retake each step 1.5 times at most, on average.
        size: bytes that one record takes.
    """
    if limit == "all":
        return n_steps
    if limit == "auto":
        cheap = max(_SMALL, int(_SHARE * _weight_bytes(problem))) // max(1, size)
        limit = max(cheap, snapshots_of.enough(n_steps))
    return min(limit, n_steps)


def check_snapshots(given: Any) -> None:
    """Refuse a number of snapshots that is none.

    Raises:
        TypeError: neither a whole number nor a word.
        ValueError: a word that is not known, or too few to walk back with.
    """
    if given in ("auto", "all"):
        return
    if isinstance(given, str):
        msg = f"snapshots={given!r} must be 'auto', 'all' or a whole number."
        raise ValueError(msg)
    check_count("snapshots", given, snapshots_of.LEAST)


def record_bytes(steps: Sequence[InnerStep]) -> int:
    """Return how much memory the newest record with w and a state takes."""
    kept = [step for step in steps if step.is_snapshot]
    if not kept:
        return 0
    slots = [t for held in kept[-1].state.values() for t in held.values()]
    return bytes_of([*kept[-1].inner_params.values(), *slots, *kept[-1].grads.values()])


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return how much memory tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _weight_bytes(problem: BilevelProblem) -> int:
    module = problem.module
    tensors = problem.tensors
    if module is not None:
        tensors = [*module.parameters(), *module.buffers()]
    return bytes_of(tensors)


def without_snapshot(problem: BilevelProblem, step: InnerStep) -> InnerStep:
    """Return what is left of a step's record where w and the state are taken again.

    Args:
        problem: the problem.
        step: the record.
    """
    kept = keeps_grads(problem, step.directed, step.micro_batches)
    grads = step.grads if kept else {}
    return replace(
        step, inner_params={}, state={}, grads=grads, outer_grads=None, graph=None
    )


def since_snapshot(steps: Sequence[InnerStep], n_steps: int) -> tuple[InnerStep, ...]:
    """Return the last steps, and those before them back to one with a snapshot."""
    first = max(0, len(steps) - n_steps)
    while first and not steps[first].is_snapshot:
        first -= 1
    return tuple(steps[first:])


def steps_back(
    problem: BilevelProblem,
    steps: Sequence[InnerStep],
    n_steps: int,
    limit: SnapshotLimit,
    tally: Tally,
) -> Iterator[InnerStep]:
    """Yield the last steps, newest first, each with w and the state before it.

    What is not on record is reached again from a snapshot before: by the recorded rule,
    with the gradient that is on record, else computed again on the recorded data with
    its random state.

    Args:
        problem: the problem; it is left as it was.
        steps: the records, oldest first.
        n_steps: how many to yield.
        limit: how many copies of w and the state may be held at once, those of `steps`
            included; one more for as long as a step is applied. To keep to it, drop each
            record before asking for the next.
        tally: counts the evaluations.

    Yields:
        The records.

    Raises:
        ValueError: there is no snapshot before the first of them.

    Example:
        Two steps on w²/2 at rate 1/2, 4 → 2 → 1, of which the start alone is on record.

        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> problem = BilevelProblem(half, half, {"w": w}, {"lam": lam})
        >>> (first, second), _ = take_steps(problem, [None, None], SGD(0.5))
        >>> known = [first, without_snapshot(problem, second)]
        >>> back = steps_back(problem, known, 2, "all", Tally())
        >>> [step.inner_params["w"].item() for step in back]
        [2.0, 4.0]
    """
    steps = since_snapshot(steps, n_steps)
    if steps and problem.inner_params and not steps[0].is_snapshot:
        msg = (
            f"the first of the {len(steps)} recorded inner steps has no copy of w, and "
            "no step before it is given to reach that from. Pass all `recorded_steps`, "
            "or record with snapshots='all'."
        )
        raise ValueError(msg)
    held = n_snapshots(problem, len(steps), limit, record_bytes(steps))

    def advance(i: int, step: InnerStep) -> InnerStep:
        w, state = take_again(problem, step, tally)
        return replace(steps[i + 1], inner_params=w, state=state)

    kept = [step if step.is_snapshot else None for step in steps]
    yield from islice(snapshots_of.walk_back(kept, held, advance), n_steps)


def take_again(
    problem: BilevelProblem, step: InnerStep, tally: Tally
) -> tuple[Params, State]:
    """Return w and the state after a step, which is taken once more as it was.

    Args:
        problem: the problem; it is left as it was.
        step: the record, with w and the state before it.
        tally: counts the evaluations.
    """
    if step.grads:
        return step.rule.apply(step.inner_params, step.state, step.grads)
    with problem.at(step.inner_params, step.outer_params):
        g = gradients(problem, "inner", step.micro_batches, tally, outer=False)
        # Not from the copy: an embedding with max_norm moved w in the forward pass.
        moved = step.rule.apply(problem.inner_params, step.state, g.inner or {})
    then, now = step.grad_norm, g.inner_norm
    if then is not None and abs(now - then) > _LARGEST_GAP * then:
        report(
            f"an inner step that was taken again has a gradient of norm {now:.4g}, and "
            f"had one of {then:.4g}: the inner loss depends on more than parameters, "
            "batch, random state and train/eval mode, and the hypergradient is that of "
            "other steps. Pass snapshots='all', which keeps w of each step."
        )
    return moved


_LARGEST_GAP = 0.05
"""Relative difference of gradient norms above which it is warned of."""


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

    Raises:
        ValueError: w of that step is not on record.
    """
    if step.grads:
        return step
    if problem.inner_params and not step.is_snapshot:
        msg = (
            "the step's w is not on record, so that its gradient cannot be computed. "
            "Take the records that `steps_back` yields."
        )
        raise ValueError(msg)
    with problem.at(step.inner_params, step.outer_params):
        g = gradients(problem, "inner", step.micro_batches, tally, outer=False)
    return replace(step, grads=g.inner or {})
