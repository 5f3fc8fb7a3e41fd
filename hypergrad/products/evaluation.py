"""One evaluation of a loss and its gradient, with everything that can silently fail."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from hypergrad import _foreach as foreach
from hypergrad._checks import some
from hypergrad._graph import (
    REENTRANT,
    leaf_ids,
    once_only,
    refuse_reentrant,
    underived_backwards,
)
from hypergrad.attention import REMEDY, attention
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError, SecondOrderError
from hypergrad.precision import autocast_dtypes, graph_unit
from hypergrad.problem import BilevelProblem, Level
from hypergrad.products.autograd import differentiate, recording
from hypergrad.products.tally import Tally
from hypergrad.tree import Params

__all__ = [
    "accumulate",
    "check_reads_its_arguments",
    "derive",
    "inner_unit",
    "replay",
    "seen_unit",
]


@contextmanager
def replay(
    problem: BilevelProblem, micro: MicroBatch, *, keep: bool = False
) -> Iterator[None]:
    """Evaluate in the block from the micro-batch's random state and modes; leave no trace.

    Args:
        problem: the problem.
        micro: the data.
        keep: whether the graph that the block builds is used after it.
    """
    state, training = micro.rng_state, micro.training
    with problem.untouched(state, training, keep=keep), attention(micro.attention):
        yield


def derive(
    problem: BilevelProblem,
    level: Level,
    w: Params,
    wanted: Params,
    micro: MicroBatch,
    tally: Tally,
    *,
    create_graph: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Evaluate a loss and its gradient at given tensors.

    Args:
        problem: the problem.
        level: which loss.
        w: the inner tensors to call it with.
        wanted: the leaves to differentiate in, of `w` and of the outer parameters.
        micro: the data; its random state and attention backend are the caller's to set.
        tally: counts the evaluation.
        create_graph: whether the gradient will be differentiated again.

    Returns:
        The loss, which nobody has looked at yet, and a gradient for each of `wanted`:
        None where it is not connected.

    Raises:
        HypergradError: the loss depends on none of w, a tensor was frozen since the
            problem was made, or the loss hides a derivative from autograd.
        SecondOrderError: `create_graph`, and part of the loss cannot be derived twice.
    """
    _check_not_frozen(wanted)
    # A graph is searched the first time, and wherever something is not connected.
    kind = _kind(problem, level, second=create_graph)
    first = kind not in problem.inspected
    tally.n_forward += 1
    with recording():
        loss = problem.loss(level, w, problem.outer_params, micro.batch)
        if first:
            refuse_reentrant(loss)
            problem.units[kind] = graph_unit(loss)
            if create_graph:
                _refuse_underived(once_only(loss))
        parts: list[Tensor | None] = [None] * len(wanted)
        if wanted and loss.requires_grad:
            tally.n_backward += 1
            watch = first and create_graph
            with underived_backwards(loss) if watch else nullcontext([]) as underived:
                parts = differentiate(
                    [loss], list(wanted.values()), create_graph=create_graph
                )
            _refuse_underived(underived)
        missing = [
            n
            for n, p in zip(wanted, parts, strict=True)
            if p is None and n not in problem.beside_losses
        ]
        if missing:
            fresh = {f"{kind}: {name}" for name in missing} - problem.inspected
            if fresh:
                refuse_reentrant(loss)
                if _may_be_cut(problem, level, missing):
                    _refuse_cut_graph(problem, level, w, micro, tally)
            _check_connected(problem, level, missing)
            problem.inspected |= fresh
        if (first or missing) and w is not problem.inner_params:
            given = [*w.values(), *problem.outer_params.values()]
            check_reads_its_arguments(problem, loss, given)
    problem.inspected.add(kind)
    return loss.detach(), parts


def _kind(problem: BilevelProblem, level: Level, *, second: bool) -> str:
    cast = autocast_dtypes(problem)
    return f"{level} loss, {'second' if second else 'first'} order{cast or ''}"


def seen_unit(problem: BilevelProblem) -> float | None:
    """Return the rounding unit of the inner loss's graph; None where none was built yet."""
    for second in (False, True):
        known = problem.units.get(_kind(problem, "inner", second=second))
        if known is not None:
            return known
    return None


def inner_unit(problem: BilevelProblem, micro: MicroBatch, tally: Tally) -> float:
    """Return the rounding unit of the inner loss's graph, running it where it must.

    Args:
        problem: the problem.
        micro: what to run it on where none was seen.
        tally: counts that.
    """
    known = seen_unit(problem)
    if known is None:
        tally.n_forward += 1
        with recording(), replay(problem, micro):
            w, lam = problem.inner_params, problem.outer_params
            known = graph_unit(problem.loss("inner", w, lam, micro.batch))
        problem.units[_kind(problem, "inner", second=False)] = known
    return known


def _check_not_frozen(wanted: Params) -> None:
    if all(t.requires_grad for t in wanted.values()):
        return
    frozen = {n: t for n, t in wanted.items() if not t.requires_grad}
    msg = (
        f"{some(frozen)} no longer requires grad: frozen since the problem was made. "
        "Call .requires_grad_() on it, or make the problem anew."
    )
    raise HypergradError(msg)


class _Checkpoints(TorchFunctionMode):
    """See whether anything is computed within reentrant checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.seen and not torch.is_grad_enabled():
            frame = sys._getframe(1)
            while frame is not None and not self.seen:
                self.seen = frame.f_code is CheckpointFunction.forward.__code__
                frame = frame.f_back
        return func(*args, **(kwargs or {}))


def _may_be_cut(problem: BilevelProblem, level: Level, missing: Sequence[str]) -> bool:
    """Return whether checkpointing, and not the loss itself, may be why."""
    if level == "inner" or not problem.outer_params.keys() >= set(missing):
        return True
    # Outer losses that λ does not act on directly are common.
    module = problem.module
    return module is not None and any(
        getattr(m, "gradient_checkpointing", False) is True for m in module.modules()
    )


def _refuse_cut_graph(
    problem: BilevelProblem, level: Level, w: Params, micro: MicroBatch, tally: Tally
) -> None:
    """Refuse reentrant checkpointing of what does not require grad: it cuts the graph.

    No node of it is left to be found, so the loss is run once more and watched.

    Raises:
        HypergradError: with the setting that helps.
    """
    tally.n_forward += 1
    watch = _Checkpoints()
    with replay(problem, micro), problem.swapped(w), watch:
        problem.loss(level, w, problem.outer_params, micro.batch)
    if watch.seen:
        raise HypergradError(REENTRANT)


def _check_connected(
    problem: BilevelProblem, level: Level, missing: Sequence[str]
) -> None:
    inner = problem.inner_params
    if level == "inner" and inner and inner.keys() <= set(missing):
        msg = (
            f"the inner loss depends on none of the {len(inner)} inner parameters "
            f"({some(inner)}): a detached or recomputed tensor, torch.no_grad in the "
            "loss, or the wrong dictionary, is the usual cause. Compute the loss from "
            "inner_params."
        )
        raise HypergradError(msg)


def check_reads_its_arguments(
    problem: BilevelProblem, loss: Tensor, given: Iterable[Tensor]
) -> None:
    """Refuse a loss that reads the problem's own tensors where others were passed.

    Args:
        problem: the problem.
        loss: the inner loss.
        given: what it was called with.

    Raises:
        HypergradError: naming the tensors.
    """
    others = leaf_ids(loss) - {id(t) for t in given}
    params = {**problem.inner_params, **problem.outer_params}
    own = {n: t for n, t in params.items() if id(t) in others}
    if own:
        msg = (
            f"the inner loss was handed other tensors for {some(own)} and read the "
            "problem's own all the same: it holds them in a closure or an attribute, "
            "and derivatives would miss that part. Compute the loss from inner_params "
            "(or through the module's own parameters), or pass reuse_graph=False and "
            "product='exact'."
        )
        raise HypergradError(msg)


def _refuse_underived(names: Sequence[str]) -> None:
    if names:
        msg = (
            f"the inner loss cannot be differentiated twice: the backward pass of "
            f"{', '.join(sorted(set(names))[:4])} gives numbers that torch cannot trace "
            f"back, and their derivative would count as 0. {REMEDY}"
        )
        raise SecondOrderError(msg)


def accumulate(
    sums: list[Tensor],
    parts: Sequence[Tensor | None],
    like: Sequence[Tensor],
    weight: float,
) -> list[Tensor]:
    """Add weighted parts to sums; None is zeros like `like`, an empty sum is new."""
    new: list[Tensor] = []
    taken: set[int] = set()
    for part, t in zip(parts, like, strict=True):
        if part is None:
            new.append(torch.zeros_like(t, requires_grad=False))
            continue
        part = part.detach() if part.requires_grad else part
        if part.is_sparse:  # an embedding with sparse=True
            part = part.to_dense()
        # torch may hand out one tensor for two leaves, or one number for all entries.
        if id(part) in taken or (part.numel() > 1 and 0 in part.stride()):
            part = part.clone(memory_format=torch.contiguous_format)
        taken.add(id(part))
        new.append(part)
    if not new:
        return new
    with torch.no_grad():
        if weight != 1.0:
            new = list(foreach.mul(new, weight))
        return list(foreach.add(sums, new)) if sums else new
