"""Exact second-derivative products, and the contract that all products share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import some
from hypergrad.attention import explain_second_order
from hypergrad.batches import MicroBatch
from hypergrad.distributed import average
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.modules import refuse_recompute
from hypergrad.problem import BilevelProblem
from hypergrad.products.evaluation import (
    Tally,
    accumulate,
    check_finite_loss,
    check_reads_its_arguments,
    derive,
    recording,
    replay,
)
from hypergrad.products.gradients import InnerGraph, gradients, inner_graph
from hypergrad.tree import Params

__all__ = ["DoubleBackward", "ForwardOverReverse", "Product"]

_VMAPPED = 8
"""Directions of one vmapped pass: it holds that many copies of what a backward holds."""


class Product(ABC):
    """Second-derivative products of the inner loss at the problem's present point.

    Laws: linear in the direction, exact zeros for a direction of zeros; the problem is
    left as it was.

    Args:
        problem: the problem.
        batches: data of the inner loss.
        tally: counts the evaluations.
    """

    order: ClassVar[int] = 2
    """1 where first derivatives suffice, so that fused attention works."""

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

        Raises:
            NonFiniteError: the direction, the loss or a product is NaN or infinite.
        """

    def gradient(self) -> Params:
        """Return ∂g/∂w, averaged over ranks; same keys and shapes as `inner_params`."""
        g = gradients(self.problem, "inner", self.batches, self.tally, outer=False)
        return g.inner or {}

    def hvp(self, direction: Params) -> Params:
        """Return (∂²g/∂w²) `direction`."""
        return self.vjp(direction, outer=False)[0]

    def hvps(self, directions: Params) -> Params:
        """Return (∂²g/∂w²) u for several u, stacked along a leading axis of each tensor.

        Args:
            directions: by the names of `inner_params`, shapes `(k, *shape)`.
        """
        count = len(next(iter(directions.values())))
        rows = [
            self.hvp({n: t[i] for n, t in directions.items()}) for i in range(count)
        ]
        return {n: torch.stack([row[n] for row in rows]) for n in directions}

    def mixed_vjp(self, direction: Params) -> Params:
        """Return `direction`ᵀ ∂²g/∂w∂λ, same keys and shapes as `outer_params`."""
        return self.vjp(direction, inner=False)[1]

    def _check_direction(self, direction: Params) -> float:
        """Return the norm of the direction.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        length = tree.norm(direction)
        if not math.isfinite(length):
            msg = (
                f"the direction of a second-derivative product has norm {length}. The "
                "outer gradient or a solver's iterate overflowed, perhaps: scale the "
                "outer loss down, or raise damping."
            )
            raise NonFiniteError(msg)
        return length

    def _wanted(self, inner: bool, outer: bool) -> Params:
        p = self.problem
        return {
            **(p.inner_params if inner else {}),
            **(p.outer_params if outer else {}),
        }

    def _split(self, parts: Params, inner: bool, outer: bool) -> tuple[Params, Params]:
        parts = average(parts)
        if not tree.all_finite(parts):
            bad = {n: t for n, t in parts.items() if not bool(torch.isfinite(t).all())}
            msg = (
                "a second-derivative product of the inner loss is not finite in "
                f"{some(bad)}. A norm or square root at 0, or an overflow in low "
                "precision, is the usual cause. Run the inner loss in float32, or raise "
                "its epsilons."
            )
            raise NonFiniteError(msg)
        return (
            {n: parts[n] for n in self.problem.inner_params} if inner else {},
            {n: parts[n] for n in self.problem.outer_params} if outer else {},
        )


class _NotBatched(Exception):
    """A backward pass that failed for several directions at once."""


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

    Raises:
        ValueError: a kept graph for several micro-batches.
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
        if kept is not None and len(batches) != 1:
            msg = (
                f"a kept graph is that of one micro-batch, and there are {len(batches)}. "
                "Pass kept=None."
            )
            raise ValueError(msg)
        self._graph = kept
        self._single_use = single_use
        self._vmaps = True

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by double backward."""
        self._check_direction(direction)
        wanted = self._wanted(inner, outer)
        sums: list[Tensor] = []
        used: set[str] = set()
        for micro in self.batches:
            with recording():
                parts = self._one(replace(micro, attention="math"), direction, wanted)
                sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
            used |= {n for n, p in zip(wanted, parts, strict=True) if p is not None}
        if outer:
            self.unused = set(self.problem.outer_params) - used
        return self._split(dict(zip(wanted, sums, strict=True)), inner, outer)

    def gradient(self) -> Params:
        """Return ∂g/∂w, for nothing where it is that of the next product's graph."""
        if len(self.batches) != 1:
            return super().gradient()
        micro = replace(self.batches[0], attention="math")
        w = self.problem.inner_params
        with recording(), replay(self.problem, micro):
            if self._graph is None:
                self._graph = inner_graph(self.problem, micro, self.tally)
            parts = [self._graph.grads[name] for name in w]
            sums = accumulate([], parts, list(w.values()), micro.weight)
        return average(dict(zip(w, sums, strict=True)))

    def hvps(self, directions: Params) -> Params:
        """Return several products from one vmapped backward pass, a few at a time."""
        self._check_direction(directions)
        count = len(next(iter(directions.values())))
        parts = []
        for first in range(0, count, _VMAPPED):
            chunk = {n: t[first : first + _VMAPPED] for n, t in directions.items()}
            parts.append(self._chunk(chunk))
        return {n: torch.cat([part[n] for part in parts]) for n in directions}

    def _chunk(self, directions: Params) -> Params:
        if not self._vmaps:
            return super().hvps(directions)
        several = len(next(iter(directions.values())))
        wanted = self._wanted(inner=True, outer=False)
        sums: list[Tensor] = []
        before = replace(self.tally)
        try:
            for micro in self.batches:
                with recording():
                    parts = self._one(
                        replace(micro, attention="math"), directions, wanted, several
                    )
                    like = [directions[n] for n in wanted]
                    sums = accumulate(sums, parts, like, micro.weight)
        except _NotBatched:
            # Not every operator has a batched backward (nor every custom function);
            # what else went wrong shows in the single products.
            self._vmaps = False
            vars(self.tally).update(vars(before))
            return super().hvps(directions)
        return self._split(dict(zip(wanted, sums, strict=True)), True, False)[0]

    def _one(
        self,
        micro: MicroBatch,
        direction: Params,
        wanted: Params,
        several: int = 0,
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
                try:
                    result = graph.product(
                        direction, targets, tally, retain=reusable, several=several
                    )
                except RuntimeError as error:
                    if several and not isinstance(error, HypergradError):
                        raise _NotBatched from error
                    raise
            if not reusable:
                self._graph = None
            return result


class ForwardOverReverse(Product):
    """Push a tangent through the gradient (`torch.func.jvp` of `grad`): exact.

    Keeps no graph between products. Never the other way round: reverse-over-forward is
    silently wrong through layer_norm in torch 2.13 (pytorch #196695).

    Args:
        problem: the problem.
        batches: the data.
        tally: counts the evaluations.
    """

    _asked = False

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by forward-over-reverse."""
        self._check_direction(direction)
        wanted = self._wanted(inner, outer)
        sums: list[Tensor] = []
        for micro in self.batches:
            with recording():
                both = self._one(replace(micro, attention="math"), direction)
                parts = [both[name] for name in wanted]
                sums = accumulate(sums, parts, list(wanted.values()), micro.weight)
        return self._split(dict(zip(wanted, sums, strict=True)), inner, outer)

    def _one(self, micro: MicroBatch, direction: Params) -> Params:
        problem = self.problem
        w = {n: p.detach() for n, p in problem.inner_params.items()}
        lam = {n: p.detach() for n, p in problem.outer_params.items()}
        tangent = {n: direction[n].to(w[n].dtype) for n in w}
        self.tally.n_forward += 1
        self.tally.n_backward += 1
        self.tally.n_hvp += 1
        # The value comes along to be looked at: a loss that ignores its arguments has
        # derivatives of zeros here.
        gradient = torch.func.grad_and_value(
            lambda a, b: problem.inner_loss(a, b, micro.batch), argnums=(0, 1)
        )
        with (
            replay(problem, micro),
            refuse_recompute(),
            explain_second_order("Take product='exact', which needs no forward mode. "),
        ):
            pushed: Any = torch.func.jvp(lambda a: gradient(a, lam), (w,), (tangent,))
            (_, loss), ((h, m), _) = pushed
        check_finite_loss("inner", float(loss.detach()))
        if loss.requires_grad:
            check_reads_its_arguments(problem, loss, ())
        parts = {name: part.detach() for name, part in {**h, **m}.items()}
        if not self._asked:
            self._ask_about_zeros(micro, parts)
        return parts

    def _ask_about_zeros(self, micro: MicroBatch, parts: Params) -> None:
        # Forward mode answers with zeros for what is not connected; reverse mode tells
        # those from zeros that are derivatives.
        self._asked = True
        if all(bool(part.any()) for part in parts.values()):
            return
        problem, wanted = self.problem, self._wanted(True, True)
        with replay(problem, micro):
            _, grads = derive(
                problem,
                "inner",
                problem.inner_params,
                wanted,
                micro,
                self.tally,
                create_graph=False,
            )
        used = {n for n, g in zip(wanted, grads, strict=True) if g is not None}
        self.unused = set(problem.outer_params) - used
