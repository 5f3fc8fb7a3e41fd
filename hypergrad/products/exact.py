"""Exact second-derivative products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad.attention import attention, explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.modules import refuse_recompute
from hypergrad.problem import BilevelProblem
from hypergrad.products.autograd import recording
from hypergrad.products.base import NO_HINTS, BoundProduct, Hints, Product, total_loss
from hypergrad.products.evaluation import (
    accumulate,
    check_reads_its_arguments,
    derive,
    replay,
)
from hypergrad.products.gradients import InnerGraph, inner_graph
from hypergrad.products.tally import Tally
from hypergrad.reducer import Contribution
from hypergrad.tree import Params

__all__ = ["DoubleBackward", "ForwardOverReverse"]

_VMAPPED = 8
"""Directions of one vmapped pass: it holds that many copies of what a backward holds."""


@dataclass(frozen=True, repr=False)
class DoubleBackward(Product):
    """Differentiate the inner gradient again: exact to rounding.

    With a single micro-batch the graph is built once and serves every product; with
    several it is built again for each product and micro-batch, so that memory stays
    that of one.

    Example:
        >>> DoubleBackward().order
        2
    """

    name: ClassVar[str] = "exact"

    @property
    def continues_graph(self) -> bool:
        """Double backward goes on where the inner step's own backward ended."""
        return True

    def bind(
        self,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        hints: Hints = NO_HINTS,
    ) -> BoundProduct:
        """Return the products at the problem's present point.

        Args:
            problem: the problem.
            batches: data of the inner loss.
            tally: counts the evaluations.
            hints: a kept graph is used in place of a new one, once; where a single
                product is asked for, the graph is freed by it.

        Raises:
            ValueError: a kept graph for several micro-batches.
        """
        if hints.kept is not None and len(batches) != 1:
            msg = (
                f"a kept graph is that of one micro-batch, and there are {len(batches)}. "
                "Pass kept=None."
            )
            raise ValueError(msg)
        return _DoubleBackward(problem, batches, tally, hints)


class _NotBatched(Exception):
    """A backward pass that failed for several directions at once."""


class _DoubleBackward(BoundProduct):
    def __init__(
        self,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        hints: Hints,
    ) -> None:
        super().__init__(problem, batches, tally)
        self._plain = [replace(micro, attention="math") for micro in batches]
        self._graph = hints.kept
        self._joint: InnerGraph | None = None  # with ∂g/∂λ
        self._single_use = hints.single_use
        self._vmaps = True
        self._losses: list[Tensor] = []
        """Of graphs that were built since a product was last handed on."""

    def compute(self, direction: Params, wanted: Params) -> Contribution:
        """Return the products by double backward."""
        return self._sum(direction, wanted)

    def gradient(self) -> Params:
        """Return ∂g/∂w, for nothing where it is that of the next product's graph."""
        w = self.problem.inner_params

        def compute() -> Contribution:
            if len(self.batches) != 1:
                return self._sum_of_gradients()
            (micro,) = self._plain
            if self._joint is None:
                self._ensure_graph(micro)
            graph = self._joint or self._graph
            grads = graph.grads if graph is not None else {}
            parts = [grads.get(n) for n in w]
            sums = accumulate([], parts, list(w.values()), micro.weight)
            return self._handed_on(dict(zip(w, sums, strict=True)), set())

        return self._averaged(w, compute).values

    def _handed_on(self, values: Params, unused: set[str]) -> Contribution:
        losses, self._losses = self._losses, []
        return Contribution(values, total_loss(losses), unused)

    def _sum_of_gradients(self) -> Contribution:
        problem, w = self.problem, self.problem.inner_params
        sums: list[Tensor] = []
        for micro in self.batches:
            with replay(problem, micro):
                loss, parts = derive(
                    problem, "inner", w, w, micro, self.tally, create_graph=False
                )
            self._losses.append(loss)
            sums = accumulate(sums, parts, list(w.values()), micro.weight)
        return self._handed_on(dict(zip(w, sums, strict=True)), set())

    def hvps(self, directions: Params) -> Params:
        """Return several products from one vmapped backward pass, a few at a time."""
        self.tally.watch_direction(directions)
        count = len(next(iter(directions.values())))
        parts = []
        for first in range(0, count, _VMAPPED):
            chunk = {n: t[first : first + _VMAPPED] for n, t in directions.items()}
            parts.append(self._chunk(chunk))
        return {n: torch.cat([part[n] for part in parts]) for n in directions}

    def _chunk(self, directions: Params) -> Params:
        wanted = dict(self.problem.inner_params)
        several = len(next(iter(directions.values())))
        # A rank that cannot vmap must not send another message than the others.
        could = self._vmaps

        def compute() -> Contribution:
            nonlocal could
            if could:
                try:
                    return self._sum(directions, wanted, several)
                except _NotBatched:
                    could = False
            rows = [
                self._sum({n: t[i] for n, t in directions.items()}, wanted)
                for i in range(several)
            ]
            stacked = {n: torch.stack([row.values[n] for row in rows]) for n in wanted}
            self._losses = [row.loss for row in rows if row.loss is not None]
            return self._handed_on(stacked, set())

        like = {n: directions[n].to(t.dtype) for n, t in wanted.items()}
        result = self._averaged(like, compute)
        # Not every operator has a batched backward (nor every custom function).
        self._vmaps = could
        return result.values

    def _sum(self, direction: Params, wanted: Params, several: int = 0) -> Contribution:
        sums: list[Tensor] = []
        used: set[str] = set()
        like = [direction[n] if several else t for n, t in wanted.items()]
        for micro in self._plain:
            self._ensure_graph(micro)
            # Checkpointing runs the forward pass again, and in the same modes.
            self.problem.set_modes(micro.training)
            parts = self._one(direction, wanted, several)
            sums = accumulate(sums, parts, like, micro.weight)
            used |= {n for n, p in zip(wanted, parts, strict=True) if p is not None}
        return self._handed_on(dict(zip(wanted, sums, strict=True)), set(wanted) - used)

    def push(self, inner: Params, outer: Params) -> Contribution:
        """Return (∂²g/∂w²) u + (∂²g/∂w∂λ) μ by double backward.

        Second derivatives are symmetric, so this is the derivative in w of
        u · ∂g/∂w + μ · ∂g/∂λ.
        """
        problem, w = self.problem, self.problem.inner_params
        sums: list[Tensor] = []
        used: set[str] = set()
        for micro in self._plain:
            graph = self._joint
            if graph is None:
                with replay(problem, micro, keep=True):
                    graph = inner_graph(problem, micro, self.tally, outer=True)
                if graph.loss is not None:
                    self._losses.append(graph.loss)
            self._joint = graph if self._reusable else None
            problem.set_modes(micro.training)
            with attention("math"):
                parts = graph.product(
                    {**inner, **outer}, w, self.tally, retain=self._reusable
                )
            sums = accumulate(sums, parts, list(w.values()), micro.weight)
            used |= {n for n, g in graph.grads.items() if g is not None}
        unused = set(problem.outer_params) - used
        return self._handed_on(dict(zip(w, sums, strict=True)), unused)

    @property
    def _reusable(self) -> bool:
        return len(self.batches) == 1 and not self._single_use

    def _ensure_graph(self, micro: MicroBatch) -> None:
        """Build the graph where there is none."""
        if self._graph is not None:
            return
        with replay(self.problem, micro, keep=True):
            self._graph = inner_graph(self.problem, micro, self.tally)
        if self._graph.loss is not None:
            self._losses.append(self._graph.loss)

    def _one(
        self, direction: Params, wanted: Params, several: int
    ) -> list[Tensor | None]:
        graph, problem = self._graph, self.problem
        if graph is None:
            msg = "a product was asked for before the graph of the inner gradient is built"
            raise HypergradError(msg)
        targets = {n: graph.inner.get(n, t) for n, t in wanted.items()}
        retain = self._reusable
        try:
            with problem.swapped(graph.inner), attention("math"):
                return graph.product(
                    direction, targets, self.tally, retain=retain, several=several
                )
        except RuntimeError as error:
            if several and not isinstance(error, HypergradError):
                # Taken again one by one, and counted there.
                self.tally.n_hvp -= several
                self.tally.n_backward -= several
                raise _NotBatched from error
            raise
        finally:
            if not retain:
                self._graph = None


@dataclass(frozen=True, repr=False)
class ForwardOverReverse(Product):
    """Push a tangent through the gradient (`torch.func.jvp` of `vjp`): exact.

    Keeps no graph between products, and none of the backward pass: about the memory of
    two gradients. Never the other way round: reverse-over-forward is
    silently wrong through layer_norm in torch 2.13 (pytorch #196695).

    Example:
        >>> ForwardOverReverse().name
        'forward-over-reverse'
    """

    name: ClassVar[str] = "forward-over-reverse"

    def bind(
        self,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        hints: Hints = NO_HINTS,
    ) -> BoundProduct:
        """Return the products at the problem's present point.

        Args:
            problem: the problem.
            batches: data of the inner loss.
            tally: counts the evaluations.
            hints: not used.
        """
        del hints
        return _ForwardOverReverse(problem, batches, tally)


class _ForwardOverReverse(BoundProduct):
    _unconnected: set[str] | None = None

    def __init__(
        self, problem: BilevelProblem, batches: Sequence[MicroBatch], tally: Tally
    ) -> None:
        super().__init__(problem, batches, tally)
        self._unasked = len(batches)

    def compute(self, direction: Params, wanted: Params) -> Contribution:
        """Return the products by forward-over-reverse."""
        return self._sum(direction, {}, wanted)

    def push(self, inner: Params, outer: Params) -> Contribution:
        """Return (∂²g/∂w²) u + (∂²g/∂w∂λ) μ: the tangent of λ is pushed along."""
        return self._sum(inner, outer, self.problem.inner_params)

    def _sum(self, inner: Params, outer: Params, wanted: Params) -> Contribution:
        sums: list[Tensor] = []
        losses: list[Tensor] = []
        for micro in self.batches:
            with recording():
                loss, both = self._one(replace(micro, attention="math"), inner, outer)
            parts = [both[name] for name in wanted]
            sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
            losses.append(loss)
        unused = (self._unconnected or set()) & {*wanted, *outer}
        return Contribution(
            dict(zip(wanted, sums, strict=True)), total_loss(losses), unused
        )

    def _one(
        self, micro: MicroBatch, direction: Params, outer: Params
    ) -> tuple[Tensor, Params]:
        problem = self.problem
        w = {n: p.detach() for n, p in problem.inner_params.items()}
        lam = {n: p.detach() for n, p in problem.outer_params.items()}
        tangent = {
            n: direction[n].to(t.dtype) if n in direction else torch.zeros_like(t)
            for n, t in w.items()
        }
        self.tally.n_forward += 1
        self.tally.n_backward += 1
        self.tally.n_hvp += 1

        def gradient(at: Params, lam: Params) -> Any:
            # torch.func.grad would build the graph of its backward pass too, which
            # nothing here goes through: half of the memory. The value comes along to
            # be looked at: a loss that ignores its arguments has derivatives of zeros.
            loss, pull, *_ = torch.func.vjp(
                lambda a, b: problem.inner_loss(a, b, micro.batch), at, lam
            )
            one = torch.ones_like(loss)
            return pull(one, retain_graph=False, create_graph=False), loss

        with (
            replay(problem, micro),
            refuse_recompute(),
            explain_second_order("Take product='exact', which needs no forward mode. "),
        ):
            if outer:
                along = {
                    n: outer[n].to(t.dtype) if n in outer else torch.zeros_like(t)
                    for n, t in lam.items()
                }
                pushed: Any = torch.func.jvp(gradient, (w, lam), (tangent, along))
            else:
                pushed = torch.func.jvp(lambda at: gradient(at, lam), (w,), (tangent,))
            (_, loss), ((h, m), _) = pushed
        if loss.requires_grad:
            check_reads_its_arguments(problem, loss, ())
        parts = {name: part.detach() for name, part in {**h, **m}.items()}
        if self._unasked:  # a tensor may be used by one micro-batch alone
            gone = self._ask_about_zeros(micro)
            self._unasked -= 1
            known = self._unconnected
            self._unconnected = gone if known is None else known & gone
        return loss.detach(), parts

    def _ask_about_zeros(self, micro: MicroBatch) -> set[str]:
        # Forward mode answers with zeros for what is not connected; reverse mode tells
        # those from zeros that are derivatives.
        problem = self.problem
        wanted = {**problem.inner_params, **problem.outer_params}
        key = "all connected, by reverse mode"
        if key in problem.inspected:
            return set()
        with replay(problem, micro):
            _, grads = derive(
                problem,
                "inner",
                problem.inner_params,
                wanted,
                micro,
                Tally(),  # a look at the loss, and no part of a product
                create_graph=False,
            )
        gone = {n for n, g in zip(wanted, grads, strict=True) if g is None}
        if not gone - problem.beside_losses:
            problem.inspected.add(key)
        return gone - problem.beside_losses
