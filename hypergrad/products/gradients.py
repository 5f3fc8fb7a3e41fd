"""First derivatives of both losses, and the graph that second ones start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import rng, tree
from hypergrad.attention import attention, explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.distributed import average
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.problem import BilevelProblem, Level
from hypergrad.tree import Params

__all__ = ["Gradients", "InnerGraph", "Tally", "gradients", "inner_graph", "vjp_of"]


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


@dataclass(frozen=True)
class Gradients:
    """The value and gradients of one loss at one point.

    Attributes:
        loss: the value, averaged over ranks.
        inner: gradient in w, None where it was not asked for.
        outer: gradient in λ, likewise.
        unused: names of the asked-for tensors that the loss does not depend on; their
            gradient is exactly 0.
        graph: the graph of the gradient in w, where it was kept.
        batches: the data as it was evaluated, each with the random state it started
            from.
    """

    loss: float
    inner: Params | None
    outer: Params | None
    unused: frozenset[str]
    graph: InnerGraph | None = None
    batches: tuple[MicroBatch, ...] = ()


@contextmanager
def recording() -> Iterator[None]:
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def gradients(
    problem: BilevelProblem,
    level: Level,
    batches: Sequence[MicroBatch],
    tally: Tally,
    *,
    inner: bool = True,
    outer: bool = True,
    live: bool = False,
    keep: bool = False,
) -> Gradients:
    """Compute first derivatives of one loss at the problem's present point.

    Args:
        problem: the problem.
        level: which loss.
        batches: the data; weighted losses are added up.
        tally: counts the evaluations.
        inner: whether to differentiate in w.
        outer: whether to differentiate in λ.
        live: whether this is a training step's own evaluation, which draws from the
            present random state and may change buffers. All others leave both alone.
        keep: keep the graph of the gradient in w, on clones of w that no optimizer
            moves. Needs a single micro-batch.

    Returns:
        Loss and gradients, averaged over ranks.

    Raises:
        HypergradError: the loss depends on none of w, or runs through reentrant
            activation checkpointing.
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    total = 0.0
    sums: list[Tensor] = []
    used: set[str] = set()
    graph: InnerGraph | None = None
    names: list[str] = []
    evaluated: list[MicroBatch] = []
    for given in batches:
        micro = given
        if live:
            micro = replace(given, rng_state=rng.capture(problem.tensors))
        evaluated.append(micro)
        w = problem.inner_params
        if keep:
            w = {n: _leaf_like(p) for n, p in w.items()}
        wanted = {**(w if inner else {}), **(problem.outer_params if outer else {})}
        names = list(wanted)
        scope = _live if live else replay
        with scope(problem, micro), problem.swapped(w):
            loss = scalar_loss(problem, level, w, micro, tally)
            parts = _grad(loss, wanted, tally, create_graph=keep)
            if keep:
                graph = InnerGraph(w, dict(zip(names, parts, strict=True)), micro)
        _check_connected(problem, level, loss, wanted, parts)
        used |= {n for n, part in zip(names, parts, strict=True) if part is not None}
        total += micro.weight * float(loss.detach())
        sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
    grads = average(dict(zip(names, sums, strict=True)))
    if not tree.all_finite(grads):
        bad = [n for n, g in grads.items() if not bool(torch.isfinite(g).all())]
        msg = (
            f"the gradient of the {level} loss is not finite in {bad[:4]} although the "
            f"loss is ({total:.6g}). A square root or norm at 0, or an overflow, is the "
            "usual cause. Look at the named parameters; lower the learning rate."
        )
        raise NonFiniteError(msg)
    mean_loss = average({"loss": torch.tensor(total, dtype=torch.float64)})["loss"]
    return Gradients(
        float(mean_loss),
        {n: grads[n] for n in problem.inner_params} if inner else None,
        {n: grads[n] for n in problem.outer_params} if outer else None,
        frozenset(names) - used,
        graph,
        tuple(evaluated),
    )


@dataclass(frozen=True)
class InnerGraph:
    """The graph of ∂g/∂w on one micro-batch, ready for products.

    Attributes:
        inner: the leaves in w that it was built on.
        grads: ∂g/∂w (and more) by name, None where the loss does not depend on it.
        micro: the data it was built on.
    """

    inner: Params
    grads: dict[str, Tensor | None]
    micro: MicroBatch

    def product(
        self,
        direction: Mapping[str, Tensor],
        wanted: Params,
        tally: Tally,
        *,
        retain: bool,
    ) -> list[Tensor | None]:
        """Return the product of `direction` with ∂²g/∂w∂(wanted), None for zeros.

        Raises:
            SecondOrderError: the loss has no second derivative in torch.
        """
        pairs = [
            (g, direction[n].to(g.dtype))
            for n, g in self.grads.items()
            if n in self.inner and g is not None and g.requires_grad
        ]
        tally.n_hvp += 1
        if not pairs or not wanted:
            return [None] * len(wanted)
        tally.n_backward += 1
        with recording(), explain_second_order():
            return list(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    list(wanted.values()),
                    [u for _, u in pairs],
                    retain_graph=retain,
                    allow_unused=True,
                )
            )


def inner_graph(problem: BilevelProblem, micro: MicroBatch, tally: Tally) -> InnerGraph:
    """Build the graph of ∂g/∂w on the problem's own tensors at the present point."""
    w = problem.inner_params
    loss = scalar_loss(problem, "inner", w, micro, tally)
    parts = _grad(loss, w, tally, create_graph=True)
    _check_connected(problem, "inner", loss, w, parts)
    return InnerGraph(w, dict(zip(w, parts, strict=True)), micro)


def vjp_of(
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return the vector-Jacobian product of a function of tensors, zeros where unused.

    Example:
        >>> import torch
        >>> vjp_of(lambda x: [x**2], [torch.tensor(3.0)], [torch.tensor(1.0)])
        [tensor(6.)]
    """
    with recording():
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        outputs = fn(*leaves)
        pairs = [
            (o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(t) for t in inputs]
        parts = torch.autograd.grad(
            [o for o, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True
        )
    return [
        torch.zeros_like(t) if part is None else part.detach()
        for t, part in zip(inputs, parts, strict=True)
    ]


# -- evaluation -------------------------------------------------------------------


@contextmanager
def _live(problem: BilevelProblem, micro: MicroBatch) -> Iterator[None]:
    del problem
    with attention(micro.attention):
        yield


@contextmanager
def replay(problem: BilevelProblem, micro: MicroBatch) -> Iterator[None]:
    with problem.untouched(micro.rng_state), attention(micro.attention):
        yield


def scalar_loss(
    problem: BilevelProblem, level: Level, w: Params, micro: MicroBatch, tally: Tally
) -> Tensor:
    tally.n_forward += 1
    with recording():
        loss = problem.loss(level, w, problem.outer_params, micro.batch)
    if not math.isfinite(float(loss.detach())):
        msg = (
            f"the {level} loss is {float(loss.detach())}: a NaN or infinity in the "
            "batch or the parameters, or an overflow, is the usual cause. Check the "
            "batch; lower the learning rate of the level that diverged."
        )
        raise NonFiniteError(msg)
    return loss


def _grad(
    loss: Tensor, wanted: Params, tally: Tally, *, create_graph: bool
) -> list[Tensor | None]:
    if not wanted or not loss.requires_grad:
        return [None] * len(wanted)
    tally.n_backward += 1
    with recording():
        try:
            return list(
                torch.autograd.grad(
                    loss,
                    list(wanted.values()),
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise HypergradError(_REENTRANT) from error
            raise


_REENTRANT = (
    "the loss runs through reentrant activation checkpointing, which torch.autograd.grad "
    "cannot see through: gradients would be zeros without a word. Pass "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, or use_reentrant=False to "
    "torch.utils.checkpoint."
)


def _check_connected(
    problem: BilevelProblem,
    level: Level,
    loss: Tensor,
    wanted: Params,
    parts: Sequence[Tensor | None],
) -> None:
    if any(part is None for part in parts) or level not in problem.inspected:
        _refuse_reentrant(loss)
        problem.inspected.add(level)
    inner = [
        part
        for name, part in zip(wanted, parts, strict=True)
        if name in problem.inner_params
    ]
    if level == "inner" and inner and all(part is None for part in inner):
        msg = (
            f"the inner loss depends on none of the {len(inner)} inner parameters "
            f"({', '.join(list(problem.inner_params)[:4])}...): a detached or recomputed "
            "tensor, torch.no_grad in the loss, or the wrong dictionary, is the usual "
            "cause. Compute the loss from inner_params."
        )
        raise HypergradError(msg)


def _refuse_reentrant(loss: Tensor) -> None:
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise HypergradError(_REENTRANT)
        pending.extend(parent for parent, _ in node.next_functions)


def accumulate(
    sums: list[Tensor],
    parts: Sequence[Tensor | None],
    like: Sequence[Tensor],
    weight: float,
) -> list[Tensor]:
    new = [
        torch.zeros_like(t.detach()) if p is None else p.detach() * weight
        for p, t in zip(parts, like, strict=True)
    ]
    return [a + b for a, b in zip(sums, new, strict=True)] if sums else new


def _leaf_like(parameter: Tensor) -> Tensor:
    copy = parameter.detach().clone()
    if isinstance(parameter, torch.nn.Parameter):
        return torch.nn.Parameter(copy)
    return copy.requires_grad_()
