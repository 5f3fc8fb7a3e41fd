"""First derivatives of both losses, and the graph that second ones start from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import rng, tree
from hypergrad.attention import attention
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.problem import BilevelProblem, Level
from hypergrad.products.autograd import differentiate, recording
from hypergrad.products.evaluation import accumulate, derive, replay
from hypergrad.products.tally import Tally
from hypergrad.reducer import Contribution
from hypergrad.tree import Params

__all__ = [
    "Gradients",
    "InnerGraph",
    "gradients",
    "inner_graph",
    "jvp_of",
    "local",
    "value",
    "vjp_of",
]


@dataclass(frozen=True)
class Gradients:
    """The value and gradients of one loss at one point.

    Attributes:
        loss: the value, averaged over ranks.
        inner: gradient in w, None where it was not asked for.
        outer: gradient in λ, likewise.
        unused: names of the asked-for tensors that the loss does not depend on; their
            gradient is exactly 0.
        inner_norm: norm of `inner`; 0 where it was not asked for.
        graph: the graph of the gradient in w, where it was kept.
        batches: the data as it was evaluated, each with the random state it started
            from.
    """

    loss: float
    inner: Params | None
    outer: Params | None
    unused: frozenset[str]
    inner_norm: float = 0.0
    graph: InnerGraph | None = None
    batches: tuple[MicroBatch, ...] = ()


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

    The host waits for the device once.

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
        HypergradError: the loss depends on none of w, a tensor was frozen since the
            problem was made, or the loss runs through reentrant checkpointing.
        NonFiniteError: the loss or a gradient is NaN or infinite.
        SecondOrderError: `keep`, and the loss has no second derivative in torch.
        ValueError: `keep` with several micro-batches.

    Example:
        g = (w - λ)²/2 at w = 4, λ = 1: the value is 4.5, and its gradients ±3.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(1.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> problem = BilevelProblem(half, half, {"w": w}, {"lam": lam})
        >>> from hypergrad.batches import as_micro_batches
        >>> found = gradients(problem, "inner", as_micro_batches(None), Tally())
        >>> found.loss, found.inner, found.outer
        (4.5, {'w': tensor(3.)}, {'lam': tensor(-3.)})
    """
    if keep and len(batches) != 1:
        msg = (
            f"a graph is kept of one micro-batch, not of {len(batches)}. Pass "
            "keep=False: products then build it again for each."
        )
        raise ValueError(msg)
    like = {
        **(problem.inner_params if inner else {}),
        **(problem.outer_params if outer else {}),
    }
    got = problem.reducer.together(
        like,
        lambda: local(
            problem,
            level,
            batches,
            tally,
            inner=inner,
            outer=outer,
            live=live,
            keep=keep,
        ),
        {"": problem.tensors[0]},
    )
    loss = got.loss if got.loss is not None else torch.zeros(())
    tally.watch_loss(level, loss)
    values = got.values
    w = {n: values[n] for n in problem.inner_params} if inner else None
    sizes = tally.watch_finite(
        list(values),
        list(values.values()),
        lambda bad: (
            f"the gradient of the {level} loss is not finite in {bad}, although the loss "
            f"is {tree.read([loss])[0]:.6g}. A square root or norm at 0, or an overflow, "
            "is the usual cause. Look at the named parameters; lower the learning rate."
        ),
    )
    # Those in w come first, and their norm is known from the same numbers.
    found, *lengths = tally.read(loss, *sizes[: len(w or {})])
    graph, evaluated = got.extra
    return Gradients(
        found,
        w,
        {n: values[n] for n in problem.outer_params} if outer else None,
        frozenset(got.unused),
        tree.settled_norm(math.hypot(*lengths), w or {}),
        graph,
        evaluated,
    )


def value(
    problem: BilevelProblem, level: Level, batches: Sequence[MicroBatch], tally: Tally
) -> Tensor:
    """Return one loss at the problem's present point, without a graph.

    Args:
        problem: the problem.
        level: which loss.
        batches: the data; weighted losses are added up.
        tally: counts the evaluations, and looks whether the loss is finite.

    Returns:
        A tensor of one entry, averaged over ranks.

    Example:
        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(1.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> problem = BilevelProblem(half, half, {"w": w}, {"lam": lam})
        >>> from hypergrad.batches import as_micro_batches
        >>> value(problem, "inner", as_micro_batches(None), Tally()).item()
        4.5
    """
    kind = functools.reduce(torch.promote_types, (t.dtype for t in problem.tensors))
    first = problem.tensors[0]
    # As a value and not as a message's loss, which float32 would do for.
    like = {"loss": torch.zeros((), dtype=kind, device=first.device)}

    def evaluate() -> Contribution:
        total: Tensor | None = None
        for micro in batches:
            tally.n_forward += 1
            with recording(), torch.no_grad(), replay(problem, micro):
                loss = problem.loss(
                    level,
                    problem.inner_params,
                    problem.outer_params,
                    micro.batch,
                    number=level == "outer",
                ).clone()  # a loss that is an entry of w would change with it
            loss = loss if micro.weight == 1.0 else micro.weight * loss
            total = loss if total is None else total + loss
        return Contribution({} if total is None else {"loss": total})

    with problem.guarded():
        found = problem.reducer.together(like, evaluate).values["loss"]
    tally.watch_loss(level, found)
    return found


def local(
    problem: BilevelProblem,
    level: Level,
    batches: Sequence[MicroBatch],
    tally: Tally,
    *,
    inner: bool = True,
    outer: bool = True,
    live: bool = False,
    keep: bool = False,
) -> Contribution:
    """Return this rank's loss and gradients, which nobody has looked at yet.

    Args:
        problem: as for `gradients`.
        level: likewise.
        batches: likewise.
        tally: likewise.
        inner: likewise.
        outer: likewise.
        live: likewise.
        keep: likewise.

    Returns:
        The gradients by name; `extra` holds the graph that was kept, and the data as it
        was evaluated.
    """
    total: Tensor | None = None
    sums: list[Tensor] = []
    used: set[str] = set()
    graph: InnerGraph | None = None
    names: list[str] = []
    evaluated: list[MicroBatch] = []
    with recording():
        for given in batches:
            micro = given
            if live:
                micro = replace(given, rng_state=rng.capture(problem.tensors))
            evaluated.append(micro)
            w = problem.inner_params
            if keep:
                w = _leaves_like(w)
            wanted = {**(w if inner else {}), **(problem.outer_params if outer else {})}
            names = list(wanted)
            scope: AbstractContextManager[object] = (
                attention(micro.attention) if live else replay(problem, micro)
            )
            with scope, problem.swapped(w):
                loss, parts = derive(
                    problem, level, w, wanted, micro, tally, create_graph=keep
                )
            if keep:
                graph = _graph_of(problem, w, names, parts, micro)
                _follow_renormalised(problem, w)
            used |= {n for n, p in zip(names, parts, strict=True) if p is not None}
            loss = loss if micro.weight == 1.0 else micro.weight * loss
            total = loss if total is None else total + loss
            sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
    return Contribution(
        dict(zip(names, sums, strict=True)),
        total,
        set(names) - used,
        (graph, tuple(evaluated)),
    )


@dataclass(frozen=True)
class InnerGraph:
    """The graph of ∂g/∂w on one micro-batch, ready for products.

    Attributes:
        inner: the leaves in w that it was built on.
        grads: ∂g/∂w (and more) by name, None where the loss does not depend on it.
        micro: the data it was built on.
        versions: w and λ, each with its version counter when the graph was built.
        loss: g, which nobody may have looked at yet.
    """

    inner: Params
    grads: dict[str, Tensor | None]
    micro: MicroBatch
    versions: tuple[tuple[str, Tensor, int], ...] = ()
    loss: Tensor | None = None

    def product(
        self,
        direction: Mapping[str, Tensor],
        wanted: Params,
        tally: Tally,
        *,
        retain: bool,
        several: int = 0,
    ) -> list[Tensor | None]:
        """Return the product of `direction` with ∂²g/∂w∂(wanted), None for zeros.

        Args:
            direction: u, by the names of `inner`, and by those of λ where the graph has
                its gradient.
            wanted: the leaves to differentiate in.
            tally: counts the evaluations.
            retain: whether the graph will be used again; it is freed otherwise.
            several: number of directions stacked along a leading axis of `direction`,
                for which one backward pass is vmapped; 0 for a single one without it.

        Returns:
            One part for each of `wanted`.

        Raises:
            HypergradError: w or λ was moved since, or the graph was freed.
            SecondOrderError: the loss has no second derivative in torch.
        """
        # torch checks this for what the graph saved, not for what checkpointing or a
        # product of its own reads again.
        moved = [
            n for n, tensor, version in self.versions if tensor._version != version
        ]
        if moved:
            msg = (
                f"{moved[:4]} moved after the graph of the inner gradient was built: its "
                "product would mix two points. Take the product first, or build the "
                "graph again (reuse_graph=False)."
            )
            raise HypergradError(msg)
        tally.n_hvp += several or 1
        # A graph that a product in both directions is taken from has ∂g/∂λ too.
        names = [n for n in self.grads if n in direction]
        starts = [self.grads[n] for n in names]
        if wanted and any(g is not None and g.requires_grad for g in starts):
            tally.n_backward += several or 1
        with recording():
            return differentiate(
                starts,
                list(wanted.values()),
                [direction[n] for n in names],
                retain_graph=retain,
                batched=several > 0,
            )


def inner_graph(
    problem: BilevelProblem, micro: MicroBatch, tally: Tally, *, outer: bool = False
) -> InnerGraph:
    """Build the graph of ∂g/∂w on the problem's own tensors at the present point.

    Args:
        problem: the problem.
        micro: the data.
        tally: counts the evaluations.
        outer: whether to have ∂g/∂λ in it too.

    Returns:
        The graph, whose loss nobody has looked at yet.
    """
    w = problem.inner_params
    wanted = {**w, **(problem.outer_params if outer else {})}
    loss, parts = derive(problem, "inner", w, wanted, micro, tally, create_graph=True)
    return replace(_graph_of(problem, w, list(wanted), parts, micro), loss=loss)


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
        parts = differentiate(fn(*leaves), leaves, cotangents)
    return [
        torch.zeros_like(t) if part is None else part.detach()
        for t, part in zip(inputs, parts, strict=True)
    ]


def jvp_of(
    fn: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return the Jacobian-vector product of a function of tensors, by forward mode.

    Example:
        >>> import torch
        >>> jvp_of(lambda x: [x**2], [torch.tensor(3.0)], [torch.tensor(1.0)])
        [tensor(6.)]
    """
    with recording():
        leaves = tuple(t.detach() for t in inputs)
        pushed: Any = torch.func.jvp(fn, leaves, tuple(tangents))
    return [t.detach() for t in pushed[1]]


def _graph_of(
    problem: BilevelProblem,
    w: Params,
    names: Sequence[str],
    parts: Sequence[Tensor | None],
    micro: MicroBatch,
) -> InnerGraph:
    versions = [
        (n, t, t._version) for n, t in [*w.items(), *problem.outer_params.items()]
    ]
    return InnerGraph(w, dict(zip(names, parts, strict=True)), micro, tuple(versions))


def _leaves_like(params: Params) -> Params:
    copies = tree.clone(params)
    return {
        n: torch.nn.Parameter(copies[n])
        if isinstance(p, torch.nn.Parameter)
        else copies[n].requires_grad_()
        for n, p in params.items()
    }


def _follow_renormalised(problem: BilevelProblem, w: Params) -> None:
    """Give a training step's parameters what the forward pass did to its clones.

    An embedding with `max_norm` renormalises rows of the weight that it is given, which
    stands in for the parameter here.
    """
    changed = [n for n, t in w.items() if t._version]
    tree.copy([problem.inner_params[n] for n in changed], [w[n] for n in changed])
