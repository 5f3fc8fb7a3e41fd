"""Exact second-derivative products, and the contract that all products share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.attention import explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.distributed import average
from hypergrad.errors import NonFiniteError
from hypergrad.modules import refuse_recompute
from hypergrad.problem import BilevelProblem
from hypergrad.products.gradients import (
    InnerGraph,
    Tally,
    accumulate,
    inner_graph,
    recording,
    replay,
)
from hypergrad.tree import Params

__all__ = ["DoubleBackward", "ForwardOverReverse", "Product"]


class Product(ABC):
    """Second-derivative products of the inner loss at the problem's present point."""

    def __init__(
        self, problem: BilevelProblem, batches: Sequence[MicroBatch], tally: Tally
    ) -> None:
        self.problem = problem
        self.batches = batches
        self.tally = tally
        self.unused: set[str] = set()
        """Outer parameters that no product so far was connected to."""

    @abstractmethod
    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` of `direction`; an empty dict for what is not asked.

        Args:
            direction: u, same keys and shapes as `inner_params`.
            inner: whether to compute $u^T ∂²g/∂w²$.
            outer: whether to compute $u^T ∂²g/∂w∂λ$.

        Returns:
            Both products, averaged over ranks.
        """

    def hvp(self, direction: Params) -> Params:
        """Return (∂²g/∂w²) `direction`."""
        return self.vjp(direction, outer=False)[0]

    def mixed_vjp(self, direction: Params) -> Params:
        """Return `direction`ᵀ ∂²g/∂w∂λ, same keys and shapes as `outer_params`."""
        return self.vjp(direction, inner=False)[1]

    def _wanted(self, inner: bool, outer: bool) -> Params:
        p = self.problem
        return {
            **(p.inner_params if inner else {}),
            **(p.outer_params if outer else {}),
        }

    def _split(self, parts: Params, inner: bool, outer: bool) -> tuple[Params, Params]:
        parts = average(parts)
        if not tree.all_finite(parts):
            msg = (
                "a second-derivative product of the inner loss is not finite. A norm "
                "or square root at 0, or an overflow in low precision, is the usual "
                "cause. Run the inner loss in float32, or raise its epsilons."
            )
            raise NonFiniteError(msg)
        return (
            {n: parts[n] for n in self.problem.inner_params} if inner else {},
            {n: parts[n] for n in self.problem.outer_params} if outer else {},
        )


class DoubleBackward(Product):
    """Differentiate the inner gradient again: exact to rounding; the default.

    With a single micro-batch the graph is built once and serves every product; with
    several it is built again for each product and micro-batch, so that memory stays
    that of one.

    Args:
        problem: the problem.
        batches: the data.
        tally: counts the evaluations.
        kept: a graph kept from the inner step, used in place of a new one, once.
        single_use: whether one product is all that will be asked for; the graph is
            then freed by it.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        kept: InnerGraph | None = None,
        single_use: bool = False,
    ) -> None:
        super().__init__(problem, batches, tally)
        self._graph = kept
        self._kept = kept is not None
        self._single_use = single_use

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by double backward."""
        wanted = self._wanted(inner, outer)
        sums: list[Tensor] = []
        used: set[str] = set()
        for micro in self.batches:
            parts = self._one(replace(micro, attention="math"), direction, wanted)
            used |= {n for n, p in zip(wanted, parts, strict=True) if p is not None}
            sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
        if outer:
            self.unused = set(self.problem.outer_params) - used
        return self._split(dict(zip(wanted, sums, strict=True)), inner, outer)

    def _one(
        self, micro: MicroBatch, direction: Params, wanted: Params
    ) -> list[Tensor | None]:
        problem, tally = self.problem, self.tally
        reusable = len(self.batches) == 1 and not self._single_use
        with replay(problem, micro):
            graph = self._graph
            if graph is None:
                graph = inner_graph(problem, micro, tally)
                if reusable:
                    self._graph = graph
            targets = {n: graph.inner.get(n, t) for n, t in wanted.items()}
            with problem.swapped(graph.inner):
                result = graph.product(direction, targets, tally, retain=reusable)
            if not reusable:
                self._graph = None
            return result


class ForwardOverReverse(Product):
    """Push a tangent through the gradient (`torch.func.jvp` of `grad`): exact.

    Keeps no graph between products. Never the other way round: reverse-over-forward is
    silently wrong through layer_norm in torch 2.13 (pytorch #196695).
    """

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by forward-over-reverse."""
        problem = self.problem
        wanted = self._wanted(inner, outer)
        sums: list[Tensor] = []
        w = {n: p.detach() for n, p in problem.inner_params.items()}
        lam = {n: p.detach() for n, p in problem.outer_params.items()}
        tangent = {n: direction[n].to(w[n].dtype) for n in w}
        for micro in self.batches:
            self.tally.n_forward += 1
            self.tally.n_backward += 1
            self.tally.n_hvp += 1

            def gradient(w: Params, batch: Any = micro.batch) -> Any:
                return torch.func.grad(
                    lambda a, b: problem.inner_loss(a, b, batch), argnums=(0, 1)
                )(w, lam)

            math = replace(micro, attention="math")
            with (
                recording(),
                replay(problem, math),
                refuse_recompute(problem.module),
                explain_second_order(),
            ):
                _, (h, m) = torch.func.jvp(gradient, (w,), (tangent,))
            both = {**h, **m}
            parts = [both[n].detach() for n in wanted]
            sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
        return self._split(dict(zip(wanted, sums, strict=True)), inner, outer)
