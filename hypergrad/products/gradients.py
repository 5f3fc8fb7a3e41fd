"""First derivatives of both losses, and the graph that second ones start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypergrad import rng, tree
from hypergrad._checks import some
from hypergrad.attention import attention, explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.distributed import average
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.problem import BilevelProblem, Level
from hypergrad.products.evaluation import (
    Tally,
    accumulate,
    backward_pass,
    derive,
    recording,
    replay,
)
from hypergrad.tree import Params

__all__ = ["Gradients", "InnerGraph", "Tally", "gradients", "inner_graph", "vjp_of"]


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
        HypergradError: the loss depends on none of w, a tensor was frozen since the
            problem was made, or the loss runs through reentrant checkpointing.
        NonFiniteError: the loss or a gradient is NaN or infinite.
        SecondOrderError: `keep`, and the loss has no second derivative in torch.
        ValueError: `keep` with several micro-batches.
    """
    if keep and len(batches) != 1:
        msg = (
            f"a graph is kept of one micro-batch, not of {len(batches)}. Pass "
            "keep=False: products then build it again for each."
        )
        raise ValueError(msg)
    total = 0.0
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
                w = {n: _leaf_like(p) for n, p in w.items()}
            wanted = {**(w if inner else {}), **(problem.outer_params if outer else {})}
            names = list(wanted)
            scope = attention(micro.attention) if live else replay(problem, micro)
            with scope, problem.swapped(w):
                loss, parts = derive(
                    problem, level, w, wanted, micro, tally, create_graph=keep
                )
            if keep:
                graph = _graph_of(problem, w, names, parts, micro)
            used |= {n for n, p in zip(names, parts, strict=True) if p is not None}
            total += micro.weight * loss
            sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
        grads = average(dict(zip(names, sums, strict=True)))
        mean_loss = average({"loss": torch.tensor(total, dtype=torch.float64)})["loss"]
    if not tree.all_finite(grads):
        bad = {n: g for n, g in grads.items() if not bool(torch.isfinite(g).all())}
        msg = (
            f"the gradient of the {level} loss is not finite in {some(bad)}, although "
            f"the loss is {total:.6g}. A square root or norm at 0, or an overflow, is "
            "the usual cause. Look at the named parameters; lower the learning rate."
        )
        raise NonFiniteError(msg)
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
        versions: w and λ, each with its version counter when the graph was built.
    """

    inner: Params
    grads: dict[str, Tensor | None]
    micro: MicroBatch
    versions: tuple[tuple[str, Tensor, int], ...] = ()

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
            direction: u, by the names of `inner`.
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
        pairs = [
            (g, direction[n].to(g.dtype))
            for n, g in self.grads.items()
            if n in self.inner and g is not None and g.requires_grad
        ]
        tally.n_hvp += several or 1
        if not pairs or not wanted:
            return [None] * len(wanted)
        tally.n_backward += several or 1
        leaves = list(wanted.values())
        with (
            recording(),
            backward_pass(leaves),
            explain_second_order(),
            _explain_freed(),
        ):
            return list(
                torch.autograd.grad(
                    [g for g, _ in pairs],
                    leaves,
                    [u for _, u in pairs],
                    retain_graph=retain,
                    allow_unused=True,
                    is_grads_batched=several > 0,
                )
            )


def inner_graph(problem: BilevelProblem, micro: MicroBatch, tally: Tally) -> InnerGraph:
    """Build the graph of ∂g/∂w on the problem's own tensors at the present point."""
    w = problem.inner_params
    _, parts = derive(problem, "inner", w, w, micro, tally, create_graph=True)
    return _graph_of(problem, w, list(w), parts, micro)


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


@contextmanager
def _explain_freed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        msg = (
            "the graph of the inner gradient was used already and its memory freed. A "
            "kept graph serves one product; build it again for another."
        )
        raise HypergradError(msg) from error


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


def _leaf_like(parameter: Tensor) -> Tensor:
    copy = parameter.detach().clone()
    if isinstance(parameter, torch.nn.Parameter):
        return torch.nn.Parameter(copy)
    return copy.requires_grad_()
