"""Second-derivative products from differences of gradients: first order alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hypergrad import tree
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.problem import BilevelProblem
from hypergrad.products.exact import Product
from hypergrad.products.gradients import Tally, gradients
from hypergrad.tree import Params

__all__ = ["FiniteDifference", "Scheme", "check_scheme", "default_radius"]

Scheme = Literal["central", "forward", "richardson"]

_POWERS: dict[str, float] = {"central": 1 / 3, "forward": 1 / 2, "richardson": 1 / 5}


def check_scheme(scheme: str, radius: float | None) -> None:
    """Refuse settings of a finite difference that mean nothing.

    Raises:
        ValueError: an unknown scheme, or a radius that is not positive and finite.
    """
    if scheme not in _POWERS:
        msg = f"scheme={scheme!r} is unknown; choose one of {', '.join(map(repr, _POWERS))}."
        raise ValueError(msg)
    if radius is not None and not (math.isfinite(radius) and radius > 0):
        msg = (
            f"radius={radius} must be positive and finite: it is the distance that the "
            "inner parameters are moved. Pass None for the default of the dtype."
        )
        raise ValueError(msg)


def default_radius(dtype: torch.dtype, scheme: Scheme = "central") -> float:
    r"""Return the distance to move: $\epsilon^{1/3}$ central, $\epsilon^{1/2}$ forward.

    It balances truncation (radius² for a central difference) against rounding
    (ε / radius), ε being the spacing of the dtype's numbers at 1.

    Example:
        >>> import torch
        >>> f"{default_radius(torch.float32):.2e}"
        '4.92e-03'
    """
    return torch.finfo(dtype).eps ** _POWERS[scheme]


@dataclass(frozen=True)
class _Difference:
    inner: Params
    outer: Params


class FiniteDifference(Product):
    r"""Divide the change of the inner gradient by the distance moved.

    $$u^\top \frac{\partial^2 g}{\partial w\,\partial\theta} \approx
      \frac{\nabla_\theta g(w + \epsilon u) - \nabla_\theta g(w - \epsilon u)}{2\epsilon},
      \qquad \epsilon = \text{radius} / \|u\|$$

    Both sides see the same batch, random numbers and attention backend, on copies that
    are moved in place and restored bit for bit. The divisor is the displacement that
    was realised after rounding, not the one that was asked for. [LSY19, Eq. 8]

    Args:
        problem: the problem.
        batches: the data.
        tally: counts the evaluations.
        scheme: `"central"` (error ∝ radius²), `"forward"` (∝ radius, half the cost), or
            `"richardson"` (∝ radius⁴, twice the cost).
        radius: distance in the norm of w; None for the dtype's default.
        error_estimate: for the central scheme, take a second difference at twice the
            radius and report how far the two are apart; doubles the cost.
        base: gradient in λ at the present point, where the inner step has computed it
            already; serves the forward scheme.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        batches: Sequence[MicroBatch],
        tally: Tally,
        scheme: Scheme = "central",
        radius: float | None = None,
        error_estimate: bool = False,
        base: Params | None = None,
    ) -> None:
        super().__init__(problem, batches, tally)
        check_scheme(scheme, radius)
        dtypes = [p.dtype for p in problem.inner_params.values()]
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)
        self.scheme: Scheme = scheme
        self.radius = default_radius(coarsest, scheme) if radius is None else radius
        self.error_estimate = error_estimate
        self.error: float | None = None
        """Estimated relative error of the last product's outer part, where known."""
        self._eps = torch.finfo(coarsest).eps
        self._base = None if base is None else _Difference({}, base)

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by differences of gradients."""
        length = tree.norm(direction)
        if not math.isfinite(length):
            msg = (
                f"the direction of a finite difference has norm {length}. The outer "
                "gradient overflowed, perhaps: scale the outer loss down."
            )
            raise NonFiniteError(msg)
        self.tally.n_hvp += 1
        wanted = self._wanted(inner, outer)
        totals = tree.zeros_like(wanted)
        for part, epsilon in self._groups(
            direction, self.radius / length if length else 0
        ):
            totals = tree.add(totals, self._scheme(part, epsilon, inner, outer))
        return self._split(totals, inner, outer)

    def _scheme(self, u: Params, epsilon: float, inner: bool, outer: bool) -> Params:
        if self.scheme == "forward":
            return self._quotient(u, epsilon, inner, outer, two_sided=False)
        near = self._quotient(u, epsilon, inner, outer)
        if self.scheme == "central" and not self.error_estimate:
            return near
        far = self._quotient(u, 2 * epsilon, inner, outer)
        # Truncation falls by 4 as the radius is halved: (far - near) / 3 is near's.
        third = {n: (near[n] - far[n]) / 3 for n in near}
        size = tree.norm(near)
        self.error = tree.norm(third) / size if size else 0.0
        return near if self.scheme == "central" else tree.add(near, third)

    def _quotient(
        self,
        u: Params,
        epsilon: float,
        inner: bool,
        outer: bool,
        *,
        two_sided: bool = True,
    ) -> Params:
        w = {n: self.problem.inner_params[n].detach() for n in u}
        plus = _moved(w, u, epsilon)
        minus = _moved(w, u, -epsilon) if two_sided else w
        # The realised step along u; rounding makes it differ from 2ε.
        along = (
            tree.dot(_exact_difference(plus, minus), u) / tree.norm(u) / tree.norm(u)
        )
        high = self._gradient(plus, inner, outer)
        low = (
            self._gradient(minus, inner, outer)
            if two_sided
            else self._start(inner, outer)
        )
        return {
            n: ((high[n].double() - low[n].double()) / along).to(high[n].dtype)
            for n in high
        }

    def _gradient(self, w: Params, inner: bool, outer: bool) -> Params:
        with self.problem.at(w):
            g = gradients(
                self.problem,
                "inner",
                self.batches,
                self.tally,
                inner=inner,
                outer=outer,
            )
        if outer:
            self.unused = set(g.unused) & set(self.problem.outer_params)
        return {**(g.inner or {}), **(g.outer or {})}

    def _start(self, inner: bool, outer: bool) -> Params:
        known = self._base
        if known is None or (inner and not known.inner) or (outer and not known.outer):
            g = gradients(
                self.problem,
                "inner",
                self.batches,
                self.tally,
                inner=inner,
                outer=outer,
            )
            known = self._base = _Difference(g.inner or {}, g.outer or {})
        return {**(known.inner if inner else {}), **(known.outer if outer else {})}

    def _groups(self, u: Params, epsilon: float) -> Iterator[tuple[Params, float]]:
        """Split u into parts that each survive rounding at their own step.

        A step of fixed length is below the spacing of the numbers where weights are
        large. Such a tensor is moved alone, by a step relative to its own size.
        """
        moving = {n: t for n, t in u.items() if tree.norm([t]) > 0}
        together: Params = {}
        for name, part in moving.items():
            w = self.problem.inner_params[name].detach()
            if _survives(w, part, epsilon):
                together[name] = part
                continue
            rms = tree.norm([w]) / math.sqrt(w.numel())
            step = self._eps ** _POWERS[self.scheme] * rms / float(part.abs().max())
            if not _survives(w, part, step):
                msg = (
                    f"a finite difference cannot move {name!r}: its entries (root mean "
                    f"square {rms:.3g}, {w.dtype}) are too large for a step along the "
                    "outer gradient to survive rounding. Pass product='exact', or keep "
                    "the inner parameters in a finer dtype."
                )
                raise HypergradError(msg)
            yield {name: part}, step
        if together:
            yield together, epsilon


def _moved(w: Params, u: Params, epsilon: float) -> Params:
    def move(p: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        # One rounding, at the end: low-precision parameters are moved in float32.
        wide = torch.promote_types(p.dtype, torch.float32)
        return torch.add(p.to(wide), d.to(wide), alpha=epsilon).to(p.dtype)

    return tree.map_params(move, w, u)


def _exact_difference(a: Params, b: Params) -> Params:
    return tree.map_params(lambda x, y: x.double() - y.double(), a, b)


def _survives(w: torch.Tensor, u: torch.Tensor, epsilon: float) -> bool:
    one = {"w": w}
    moved = _exact_difference(_moved(one, {"w": u}, epsilon), one)
    return tree.norm(moved) >= 0.5 * epsilon * tree.norm([u])
