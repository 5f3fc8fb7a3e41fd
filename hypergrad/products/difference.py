"""Second-derivative products from differences of gradients: first order alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_flag, check_number
from hypergrad.batches import MicroBatch
from hypergrad.precision import (
    autocast_dtypes,
    settings_unit,
    unit,
)
from hypergrad.problem import BilevelProblem
from hypergrad.products._quotient import POWERS, Differences, Move, Scheme
from hypergrad.products.base import NO_HINTS, BoundProduct, Hints, Product, total_loss
from hypergrad.products.evaluation import seen_unit
from hypergrad.products.gradients import local
from hypergrad.products.tally import Tally
from hypergrad.reducer import Contribution
from hypergrad.tree import Params

__all__ = ["FiniteDifference", "Scheme", "default_radius"]


def default_radius(dtype: torch.dtype, scheme: Scheme = "central") -> float:
    r"""Return the distance to move: $\epsilon^{1/3}$ central, $\epsilon^{1/2}$ forward.

    It balances truncation (radius² for a central difference) against rounding
    (ε / radius), ε being the spacing of the dtype's numbers at 1.

    Example:
        >>> import torch
        >>> f"{default_radius(torch.float32):.2e}"
        '4.92e-03'
    """
    return unit(dtype) ** POWERS[scheme]


@dataclass(frozen=True, repr=False)
class FiniteDifference(Product):
    r"""Divide the change of the inner gradient by the distance moved.

    $$u^\top \frac{\partial^2 g}{\partial w\,\partial\theta} \approx
      \frac{\nabla_\theta g(w + \epsilon u) - \nabla_\theta g(w - \epsilon u)}{2\epsilon},
      \qquad \epsilon = \text{radius} / \|u\|$$

    Both sides see the same batch, random numbers and attention backend. w is moved in
    place and restored bit for bit. The divisor is the displacement that was realised
    after rounding, not the one that was asked for. [LSY19, Eq. 8]

    With v = ∂f/∂w as the direction, the central scheme at its default radius is right
    to about 1e-10 in float64 and 1e-4 in float32. Where any part of the loss computes in
    bfloat16, a frozen base for one, it is off by some percent to some ten percent: there
    the exact product is right to 2 % and is what `product="auto"` takes.

    Where truncation dominates, the estimate of the error is right to a few percent.
    Rounding is noise: there the estimate is its typical size, within 10 times of the
    error of any product of several entries. That of a single number can be small by
    luck, and the estimate is then too large, one time in ten. It is never below what
    storing the two gradients in their dtype loses, and infinite where both are equal.
    It says nothing where w is moved beyond the scale on which g changes.

    Args:
        scheme: `"central"` (error ∝ radius²), `"forward"` (∝ radius, half the cost), or
            `"richardson"` (∝ radius⁴, twice the cost).
        radius: distance in the norm of w; None for the default of the coarsest dtype
            that takes part: of w, of frozen weights, of autocast, of matrix products in
            TensorFloat-32, and of everything in the graph of the inner loss; half of it
            where w itself is in float32 or finer and moves exactly.
        error_estimate: take one more difference, at twice the largest distance, and
            estimate from it the error of a mixed product, or of one of forward mode, in
            `info.fd_error`; costs as much as a central difference, or one evaluation
            with the forward scheme. None for True where the loss computes more coarsely
            than float32.

    Raises:
        TypeError: a setting of another kind.
        ValueError: an unknown scheme, or a radius that is not positive and finite.

    Example:
        >>> FiniteDifference("forward").starts_from_gradient
        True
    """

    name: ClassVar[str] = "finite-difference"
    order: ClassVar[int] = 1
    scheme: Scheme = "central"
    radius: float | None = None
    error_estimate: bool | None = None

    def __post_init__(self) -> None:
        if self.scheme not in list(POWERS):  # a list: not everything can be hashed
            known = ", ".join(map(repr, POWERS))
            msg = f"scheme={self.scheme!r} is unknown; choose one of {known}."
            raise ValueError(msg)
        if self.error_estimate is not None:
            check_flag("error_estimate", self.error_estimate)
        if self.radius is None:
            return
        check_number("radius", self.radius)
        if not (math.isfinite(self.radius) and self.radius > 0):
            msg = (
                f"radius={self.radius} must be positive and finite: it is the distance "
                "that the inner parameters are moved. Pass None for the default of the "
                "dtype."
            )
            raise ValueError(msg)

    @property
    def starts_from_gradient(self) -> bool:
        """The forward scheme starts from ∂g/∂λ at w itself."""
        return self.scheme == "forward"

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
            hints: ∂g/∂λ here, from which the forward scheme starts.
        """
        return _FiniteDifference(self, problem, batches, tally, hints.base)


class _FiniteDifference(BoundProduct):
    order: ClassVar[int] = 1

    def __init__(
        self,
        settings: FiniteDifference,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        base: Params | None,
    ) -> None:
        super().__init__(problem, batches, tally)
        self._settings = settings
        self._base: Params = base or {}
        self.unit = max(settings_unit(problem), seen_unit(problem) or 0.0)
        """Spacing at 1 of the coarsest numbers that take part in the inner loss."""

    # -- as a product -------------------------------------------------------------------

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by differences of gradients."""
        return self._vjp(direction, inner, outer, judged=True)

    def hvp(self, direction: Params) -> Params:
        """Return (∂²g/∂w²) `direction`; a solver's products are not judged."""
        return self._vjp(direction, inner=True, outer=False, judged=False)[0]

    def jvp(self, inner: Params, outer: Params) -> Params:
        """Return (∂²g/∂w²) u + (∂²g/∂w∂λ) μ by differences; w and λ move together."""
        w = self.problem.inner_params
        found = self._told({**inner, **outer}, w, w, judged=True)
        self.unused = None  # λ moves, and nothing is differentiated in it
        return {n: found.values[n] for n in w}

    def push(self, inner: Params, outer: Params) -> Contribution:
        """Return this rank's part of it, without a judgement."""
        self.tally.n_hvp += 1
        found = self._compute({**inner, **outer}, self.problem.inner_params, {})
        return replace(found, unused=set())

    def compute(self, direction: Params, wanted: Params) -> Contribution:
        """Return the products without a judgement."""
        return self._compute(direction, wanted, {})

    def _vjp(
        self, direction: Params, inner: bool, outer: bool, *, judged: bool
    ) -> tuple[Params, Params]:
        problem = self.problem
        wanted = {
            **(problem.inner_params if inner else {}),
            **(problem.outer_params if outer else {}),
        }
        result = problem.outer_params if outer else problem.inner_params
        parts = self._told(direction, wanted, result, judged=judged)
        if outer:
            self.unused = set(parts.unused) & set(problem.outer_params)
        return (
            {n: parts.values[n] for n in problem.inner_params} if inner else {},
            {n: parts.values[n] for n in problem.outer_params} if outer else {},
        )

    def _told(
        self, direction: Params, wanted: Params, result: Params, *, judged: bool
    ) -> Contribution:
        """Return a product averaged over ranks; tell in `info` how it was reached.

        Args:
            direction: what is moved along.
            wanted: what to take the product in.
            result: those of `wanted` that an error is estimated of.
            judged: whether to estimate it, where the settings want that.
        """
        self._agree()
        judge = judged and self._estimates
        self.tally.n_hvp += 1
        errors = {_ERROR + n: t for n, t in result.items()} if judge else {}
        least = {_LEAST: next(iter(result.values())).new_zeros(())} if judge else {}
        parts = self._averaged(
            {**wanted, **errors, **least},
            lambda: self._compute(direction, wanted, errors),
        )
        if self._agree():
            # The first graph of the loss shows that it computes more coarsely than
            # weights and settings told: once more, at the radius of that.
            self.tally.n_hvp -= 1
            return self._told(direction, wanted, result, judged=judged)
        self.info = {"fd_radius": parts.extra}
        if judge:
            found = tree.size([parts.values[n] for n in result])
            off = tree.size([parts.values[n] for n in errors])
            error = torch.maximum(off, parts.values[_LEAST].to(off))
            self.info["fd_error"] = torch.where(error == 0, error, error / found)
        return parts

    def _compute(
        self, direction: Params, wanted: Params, errors: Params
    ) -> Contribution:
        inner = all(n in wanted for n in self.problem.inner_params)
        outer = all(n in wanted for n in self.problem.outer_params)
        losses: list[Tensor] = []
        unused = set(wanted)

        def evaluate() -> Params:
            g = local(
                self.problem,
                "inner",
                self.batches,
                self.tally,
                inner=inner,
                outer=outer,
            )
            losses.extend([] if g.loss is None else [g.loss])
            unused.intersection_update(g.unused)
            return g.values

        def start() -> Params:
            if any(n not in self._base for n in wanted):
                # In λ in any case: the mixed product that ends a solve starts here too.
                g = local(self.problem, "inner", self.batches, self.tally, inner=inner)
                losses.extend([] if g.loss is None else [g.loss])
                self._base = {**self._base, **g.values}
            return {n: self._base[n] for n in wanted}

        judged = [n.removeprefix(_ERROR) for n in errors]
        difference = Differences(self._move, judged, evaluate, start)
        total, off, moved = difference.along(direction, wanted)
        if not losses:
            unused = set()
        values = {**total, **{_ERROR + n: off[n] for n in judged}}
        if errors:
            values[_LEAST] = difference.least
        return Contribution(values, total_loss(losses), unused, moved)

    def outputs_jvp(
        self, direction: Params, evaluate: Callable[[], Params]
    ) -> Params | None:
        """Return the derivative of a function of w along a direction, by differences."""
        return Differences(self._move, [], evaluate, evaluate).along(direction, None)[0]

    def _agree(self) -> bool:
        """Take the unit of the coarsest rank; return whether it was finer before."""
        problem = self.problem
        key = f"inner loss, all ranks{autocast_dtypes(problem)}"
        agreed = problem.units.get(key)
        if agreed is None:
            seen = seen_unit(problem)
            agreed, unseen = problem.reducer.largest(
                2,
                lambda: [max(self.unit, seen or 0.0), float(seen is None)],
                problem.inner_params,
            )
            if not unseen:
                problem.units[key] = agreed
        finer = agreed > self.unit
        self.unit = max(agreed, self.unit)
        return finer

    # -- precision ----------------------------------------------------------------------

    @property
    def radius(self) -> float:
        """Distance that is asked for."""
        return self._move.radius

    @property
    def _move(self) -> Move:
        settings = self._settings
        return Move(self.problem, settings.scheme, settings.radius, self.unit)

    @property
    def _estimates(self) -> bool:
        asked = self._settings.error_estimate
        return self._move.coarse if asked is None else asked


_ERROR = "error of "
_LEAST = "least error"
