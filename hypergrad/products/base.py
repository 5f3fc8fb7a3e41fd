"""What a second-derivative product is: settings, and those settings at a point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.problem import BilevelProblem
from hypergrad.products.gradients import InnerGraph, gradients
from hypergrad.products.tally import Tally
from hypergrad.reducer import Contribution
from hypergrad.tree import Params

__all__ = ["NO_HINTS", "BoundProduct", "Hints", "Product", "total_loss"]


@dataclass(frozen=True)
class Hints:
    """What is known already where a product is bound; a product may leave it unused.

    Attributes:
        kept: the graph of ∂g/∂w that the inner step kept, for one product.
        base: ∂g/∂λ at this point.
        single_use: whether one product is all that will be asked for.
    """

    kept: InnerGraph | None = None
    base: Params | None = None
    single_use: bool = False


NO_HINTS = Hints()


class Product(ABC):
    """How second-derivative products of the inner loss are taken.

    A subclass is a frozen dataclass of settings, as solvers are; `bind` gives the
    products at a problem's present point.
    """

    name: ClassVar[str] = ""
    """Under which it is registered."""
    order: ClassVar[int] = 2
    """1 where first derivatives suffice, so that fused attention works."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # pyright: ignore[reportArgumentType]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def continues_graph(self) -> bool:
        """Whether it can go on from a graph that the inner step kept."""
        return False

    @property
    def starts_from_gradient(self) -> bool:
        """Whether it saves an evaluation where ∂g/∂λ is known already."""
        return False

    @abstractmethod
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
            hints: what is known already.
        """

    def chosen(
        self, problem: BilevelProblem, batches: Sequence[MicroBatch]
    ) -> tuple[Product, str]:
        """Return what to use on this problem, and why: itself, but for `auto`.

        Args:
            problem: the problem; it is left as it was.
            batches: data of the inner loss, to try it with.
        """
        del problem, batches
        return self, ""


class BoundProduct(ABC):
    r"""Products $u^\top \partial^2 g/\partial w\,\partial(w, \lambda)$ at one point.

    Laws: linear in the direction, exact zeros for a direction of zeros; the problem is
    left as it was. Numbers stay on the device: whether a product is finite is told where
    the tally is read next.

    A subclass implements `compute`.

    Args:
        problem: the problem.
        batches: data of the inner loss.
        tally: counts the evaluations.
    """

    order: ClassVar[int] = 2

    def __init__(
        self, problem: BilevelProblem, batches: Sequence[MicroBatch], tally: Tally
    ) -> None:
        self.problem = problem
        self.batches = batches
        self.tally = tally
        self.unused: set[str] | None = None
        """Outer parameters that the last product in λ was not connected to; None where it
        cannot tell, and before there was one."""
        self.info: dict[str, Any] = {}
        """Fields of `Info` that the last product knows; numbers may be tensors."""

    @abstractmethod
    def compute(self, direction: Params, wanted: Params) -> Contribution:
        """Return this rank's product, before it is averaged and looked at.

        Args:
            direction: u, same keys and shapes as `inner_params`.
            wanted: tensors of the problem to take the second derivative in.

        Returns:
            A value for each of `wanted`, the loss where one was evaluated (the sum of
            several), and which of `wanted` nothing was connected to.
        """

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
        problem = self.problem
        wanted = {
            **(problem.inner_params if inner else {}),
            **(problem.outer_params if outer else {}),
        }
        self.tally.watch_direction(direction)
        parts = self._averaged(wanted, lambda: self.compute(direction, wanted))
        if outer:
            self.unused = set(parts.unused) & set(problem.outer_params)
        return (
            {n: parts.values[n] for n in problem.inner_params} if inner else {},
            {n: parts.values[n] for n in problem.outer_params} if outer else {},
        )

    def gradient(self) -> Params:
        """Return ∂g/∂w, averaged over ranks; same keys and shapes as `inner_params`."""
        g = gradients(self.problem, "inner", self.batches, self.tally, outer=False)
        return g.inner or {}

    def hvp(self, direction: Params) -> Params:
        """Return (∂²g/∂w²) `direction`, whose direction a solver knows to be finite."""
        w = self.problem.inner_params
        parts = self._together(w, lambda: self.compute(direction, w))
        self.tally.watch_latest(*_named(parts), _not_finite)
        return parts.values

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

    def jvp(self, inner: Params, outer: Params) -> Params:
        """Return (∂²g/∂w²) u + (∂²g/∂w∂λ) μ: how ∂g/∂w changes as w and λ move.

        The transpose of `vjp`: for every u, v and μ, v · jvp(u, μ) is u · hvp(v) +
        μ · mixed_vjp(v).

        Args:
            inner: u, same keys and shapes as `inner_params`.
            outer: μ, likewise as `outer_params`; one that is left out stays where it is.

        Returns:
            Same keys and shapes as `inner_params`, averaged over ranks.
        """
        w = self.problem.inner_params
        self.tally.watch_direction({**inner, **outer})
        parts = self._averaged(w, lambda: self.push(inner, outer))
        self.unused = set(parts.unused) & set(self.problem.outer_params)
        return parts.values

    def push(self, inner: Params, outer: Params) -> Contribution:
        """Return this rank's `jvp`, before it is averaged and looked at.

        With it, the loss, and the outer parameters that nothing was connected to.

        Args:
            inner: u.
            outer: μ; some of the outer parameters.

        Raises:
            HypergradError: this product has no forward direction.
        """
        del inner, outer
        msg = (
            f"{type(self).__name__} has no forward direction: it implements `compute` "
            "and not `push`. Take product='exact' or 'finite-difference', or write it."
        )
        raise HypergradError(msg)

    def outputs_jvp(
        self, direction: Params, evaluate: Callable[[], Params]
    ) -> Params | None:
        """Return the derivative of a function of w along a direction, at first order.

        Args:
            direction: u.
            evaluate: the function at the problem's present w, without a graph.

        Returns:
            Ju; None where this product takes second derivatives, which need none.
        """
        del direction, evaluate
        return None

    def _averaged(
        self,
        like: Params,
        compute: Callable[[], Contribution],
    ) -> Contribution:
        parts = self._together(like, compute)
        self.tally.watch_finite(*_named(parts), _not_finite)
        return parts

    def _together(
        self, like: Params, compute: Callable[[], Contribution]
    ) -> Contribution:
        with self.problem.guarded():
            parts = self.problem.reducer.together(like, compute)
        if parts.loss is not None:
            self.tally.watch_loss("inner", parts.loss)
        return parts


def _named(parts: Contribution) -> tuple[list[str], list[Tensor]]:
    return list(parts.values), list(parts.values.values())


def _not_finite(bad: str) -> str:
    return (
        f"a second-derivative product of the inner loss is not finite in {bad}. A norm "
        "or square root at 0, or an overflow in low precision, is the usual cause. Run "
        "the inner loss in float32, or raise its epsilons."
    )


def total_loss(losses: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of losses, by which one that is not finite shows; None for none."""
    if not losses:
        return None
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
