"""One evaluation of a loss and its gradient, with everything that can silently fail."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad._checks import some
from hypergrad._graph import (
    REENTRANT,
    leaf_ids,
    once_only,
    refuse_reentrant,
    underived_backwards,
)
from hypergrad.attention import REMEDY, attention, explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError, NonFiniteError, SecondOrderError
from hypergrad.problem import BilevelProblem, Level
from hypergrad.tree import Params

__all__ = [
    "Tally",
    "accumulate",
    "backward_pass",
    "check_finite_loss",
    "check_reads_its_arguments",
    "derive",
    "recording",
    "replay",
]


@dataclass
class Tally:
    """Count evaluations of the model.

    Attributes:
        n_forward: forward passes on one (micro-)batch.
        n_backward: backward passes, first and second order alike.
        n_hvp: second-derivative products.
    """

    n_forward: int = 0
    n_backward: int = 0
    n_hvp: int = 0


@contextmanager
def recording() -> Iterator[None]:
    """Record for autograd in the block, whatever mode the caller is in."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        # Autocast keeps its casts by tensor and does not see that a tensor was moved:
        # under a caller's autocast, the second evaluation would run on the first's.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.clear_autocast_cache()


@contextmanager
def backward_pass(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Run a backward pass in the block, out of the caller's autocast.

    Autocast belongs around the forward pass alone: a backward pass within it rounds its
    own products to the low precision (2e-3 of a DoRA norm's derivative).
    """
    with ExitStack() as stack:
        for kind in {t.device.type for t in tensors}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def replay(problem: BilevelProblem, micro: MicroBatch) -> Iterator[None]:
    """Evaluate in the block from the micro-batch's random state, and leave no trace."""
    with problem.untouched(micro.rng_state), attention(micro.attention):
        yield


def check_finite_loss(level: Level, loss: float) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        NonFiniteError: with its value.
    """
    if not math.isfinite(loss):
        msg = (
            f"the {level} loss is {loss}: a NaN or infinity in the batch or the "
            "parameters, or an overflow, is the usual cause. Check the batch; lower the "
            "learning rate of the level that diverged."
        )
        raise NonFiniteError(msg)


def derive(
    problem: BilevelProblem,
    level: Level,
    w: Params,
    wanted: Params,
    micro: MicroBatch,
    tally: Tally,
    *,
    create_graph: bool,
) -> tuple[float, list[Tensor | None]]:
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
        The loss, and a gradient for each of `wanted`: None where it is not connected.

    Raises:
        HypergradError: the loss depends on none of w, a tensor was frozen since the
            problem was made, or the loss hides a derivative from autograd.
        NonFiniteError: the loss is NaN or infinite.
        SecondOrderError: `create_graph`, and part of the loss cannot be derived twice.
    """
    _check_not_frozen(wanted)
    # A graph is searched the first time, and wherever something is not connected.
    kind = f"{level} loss, {'second' if create_graph else 'first'} order"
    first = kind not in problem.inspected
    tally.n_forward += 1
    with recording():
        with _heeding_warnings() if first else nullcontext([]) as warned:
            loss = problem.loss(level, w, problem.outer_params, micro.batch)
        value = float(loss.detach())
        check_finite_loss(level, value)
        if first:
            refuse_reentrant(loss)
            if create_graph:
                _refuse_underived(once_only(loss))
        parts: list[Tensor | None] = [None] * len(wanted)
        if wanted and loss.requires_grad:
            tally.n_backward += 1
            watch = first and create_graph
            with underived_backwards(loss) if watch else nullcontext([]) as underived:
                parts = _grad(loss, list(wanted.values()), create_graph)
            _refuse_underived(underived)
        missing = [n for n, p in zip(wanted, parts, strict=True) if p is None]
        if missing:
            refuse_reentrant(loss)
            fresh = {f"{kind}: {name}" for name in missing} - problem.inspected
            if fresh and not first:  # connected once, and not now
                tally.n_forward += 1
                with problem.untouched(micro.rng_state), _heeding_warnings() as warned:
                    problem.loss(level, w, problem.outer_params, micro.batch)
            _check_connected(problem, level, missing, warned)
            problem.inspected |= fresh
        if (first or missing) and w is not problem.inner_params:
            given = [*w.values(), *problem.outer_params.values()]
            check_reads_its_arguments(problem, loss, given)
    problem.inspected.add(kind)
    return value, parts


def _grad(
    loss: Tensor, wanted: list[Tensor], create_graph: bool
) -> list[Tensor | None]:
    explained = explain_second_order() if create_graph else nullcontext()
    try:
        with backward_pass(wanted), explained:
            parts = torch.autograd.grad(
                loss, wanted, create_graph=create_graph, allow_unused=True
            )
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise HypergradError(REENTRANT) from error
        raise
    return list(parts)


@contextmanager
def _heeding_warnings() -> Iterator[list[str]]:
    """Yield a list of the block's warnings; they are passed on when it ends."""
    texts: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield texts
    finally:
        texts += [str(w.message) for w in caught]
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _check_not_frozen(wanted: Params) -> None:
    frozen = {n: t for n, t in wanted.items() if not t.requires_grad}
    if frozen:
        msg = (
            f"{some(frozen)} no longer requires grad: frozen since the problem was made. "
            "Call .requires_grad_() on it, or make the problem anew."
        )
        raise HypergradError(msg)


def _check_connected(
    problem: BilevelProblem,
    level: Level,
    missing: Sequence[str],
    warned: Sequence[str],
) -> None:
    # Where no input requires grad, reentrant checkpointing cuts the graph and warns.
    if any("None of the inputs have requires_grad" in text for text in warned):
        raise HypergradError(REENTRANT)
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

    def weighted(part: Tensor | None, t: Tensor) -> Tensor:
        if part is None:
            return torch.zeros_like(t.detach())
        part = part.detach()
        # An embedding with sparse=True gives sparse gradients.
        return (part.to_dense() if part.is_sparse else part) * weight

    new = [weighted(p, t) for p, t in zip(parts, like, strict=True)]
    return [a + b for a, b in zip(sums, new, strict=True)] if sums else new
