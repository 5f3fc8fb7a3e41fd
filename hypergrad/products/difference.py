"""Second-derivative products from differences of gradients: first order alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch

from hypergrad import tree
from hypergrad._checks import check_number
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.problem import BilevelProblem
from hypergrad.products.evaluation import Tally
from hypergrad.products.exact import Product
from hypergrad.products.gradients import Gradients, gradients
from hypergrad.tree import Params

__all__ = ["FiniteDifference", "Scheme", "check_scheme", "default_radius"]

Scheme = Literal["central", "forward", "richardson"]

_POWERS: dict[str, float] = {"central": 1 / 3, "forward": 1 / 2, "richardson": 1 / 5}


def check_scheme(scheme: str, radius: float | None) -> None:
    """Refuse settings of a finite difference that mean nothing.

    Raises:
        TypeError: a radius that is not a number.
        ValueError: an unknown scheme, or a radius that is not positive and finite.
    """
    if scheme not in list(_POWERS):  # a list, since not everything can be hashed
        known = ", ".join(map(repr, _POWERS))
        msg = f"scheme={scheme!r} is unknown; choose one of {known}."
        raise ValueError(msg)
    if radius is None:
        return
    check_number("radius", radius)
    if not (math.isfinite(radius) and radius > 0):
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


class FiniteDifference(Product):
    r"""Divide the change of the inner gradient by the distance moved.

    $$u^\top \frac{\partial^2 g}{\partial w\,\partial\theta} \approx
      \frac{\nabla_\theta g(w + \epsilon u) - \nabla_\theta g(w - \epsilon u)}{2\epsilon},
      \qquad \epsilon = \text{radius} / \|u\|$$

    Both sides see the same batch, random numbers and attention backend. w is moved in
    place and restored bit for bit. The divisor is the displacement that was realised
    after rounding, not the one that was asked for. [LSY19, Eq. 8]

    With v = ∂f/∂w as the direction, the central scheme at its default radius is right
    to about 1e-10 in float64 and 1e-4 in float32; in bfloat16 it is not.

    Where truncation dominates, the estimate of the error is right to a few percent.
    Rounding is noise: there the estimate is its typical size, within 10 times of the
    error of any product of several entries. That of a single number can be small by
    luck, and the estimate is then too large, one time in ten. It is never below what
    storing the two gradients in their dtype loses, and infinite where both are equal.
    It says nothing where w is moved beyond the scale on which g changes.

    Args:
        problem: the problem.
        batches: the data.
        tally: counts the evaluations.
        scheme: `"central"` (error ∝ radius²), `"forward"` (∝ radius, half the cost), or
            `"richardson"` (∝ radius⁴, twice the cost).
        radius: distance in the norm of w; None for the default of the coarsest dtype
            that takes part, an autocast around the call included.
        error_estimate: take one more difference, at twice the largest distance, and
            estimate from it the error of the product, in `error`; costs as much as a
            central difference, or one evaluation with the forward scheme.
        base: gradient in λ at the present point, where the inner step has computed it
            already; serves the forward scheme.

    Raises:
        TypeError: a setting of another kind.
        ValueError: an unknown scheme, or a radius that is not positive and finite.
    """

    order: ClassVar[int] = 1

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
        self._coarsest = _coarsest(problem.inner_params.values())
        self._asked = (
            default_radius(self._coarsest, scheme) if radius is None else radius
        )
        self.scheme: Scheme = scheme
        self.radius = self._asked
        """Largest distance that the last product asked to move a part of w by."""
        self.error_estimate = error_estimate
        self.error: float | None = None
        """Estimated relative error of the last product where one was asked for: of its
        outer part, or of its inner part where that was all."""
        self._base: tuple[Params, Params] | None = None if base is None else ({}, base)

    def vjp(
        self, direction: Params, *, inner: bool = True, outer: bool = True
    ) -> tuple[Params, Params]:
        """Return `(hvp, mixed_vjp)` by differences of gradients."""
        length = self._check_direction(direction)
        self.tally.n_hvp += 1
        wanted = self._wanted(inner, outer)
        total = off = tree.zeros_like(wanted)
        least = 0.0
        self.radius = self._asked
        if length:
            for part, epsilon in self._groups(direction, self._asked / length):
                self.radius = max(self.radius, epsilon * tree.norm(part))
                value, error, lost = self._scheme(part, epsilon, inner, outer)
                total, off = tree.add(total, value), tree.add(off, error)
                least += lost
        self.error = None
        if self.error_estimate:
            judged = self.problem.outer_params if outer else self.problem.inner_params
            size = tree.norm([total[n] for n in judged])
            error = max(tree.norm([off[n] for n in judged]), least)
            self.error = error / size if size else math.inf if error else 0.0
        return self._split(total, inner, outer)

    def _scheme(
        self, u: Params, epsilon: float, inner: bool, outer: bool
    ) -> tuple[Params, Params, float]:
        """Return a product, an estimate of its error, and the least norm of that.

        The error is zeros where no estimate was asked for.
        """

        def quotient(factor: int) -> tuple[Params, float]:
            return self._quotient(u, factor * epsilon, inner, outer)

        near, lost = quotient(1)
        if self.scheme != "richardson" and not self.error_estimate:
            return near, tree.zeros_like(near), lost
        far, _ = quotient(2)
        # A central difference errs ∝ radius²: the errors of far and near are as 4 to 1.
        # A one-sided one errs ∝ radius: as 2 to 1.
        if self.scheme == "forward":
            return near, _combine(far, near, 1.0), lost
        if self.scheme == "central":
            return near, _combine(far, near, 1 / 3), lost
        best = tree.add(near, _combine(near, far, 1 / 3))
        if not self.error_estimate:
            return best, tree.zeros_like(best), lost
        # Of the difference to the result at twice the distance, 1/15 is truncation where
        # that dominates, and most is rounding where that does: something between.
        second = tree.add(far, _combine(far, quotient(4)[0], 1 / 3))
        return best, _combine(second, best, 1 / 5), lost

    def _quotient(
        self, u: Params, epsilon: float, inner: bool, outer: bool
    ) -> tuple[Params, float]:
        """Return a difference quotient, and what storing its gradients costs it."""
        two_sided = self.scheme != "forward"
        w = {n: self.problem.inner_params[n].detach() for n in u}
        plus = _moved(w, u, epsilon)
        minus = _moved(w, u, -epsilon) if two_sided else w
        # The realised step along u; rounding makes it differ from 2ε.
        step = tree.map_params(lambda a, b: a.double() - b.double(), plus, minus)
        along = tree.dot(step, u) / tree.norm(u) / tree.norm(u)
        high = self._gradient(plus, inner, outer)
        if two_sided:
            low = self._gradient(minus, inner, outer)
        else:
            low = self._start(inner, outer)
        value = {
            n: ((high[n].double() - low[n].double()) / along).to(high[n].dtype)
            for n in high
        }
        if not self.error_estimate:
            return value, 0.0
        judged = self.problem.outer_params if outer else self.problem.inner_params
        sizes = [tree.wide(high[n]) * torch.finfo(high[n].dtype).eps for n in judged]
        return value, _STORED * tree.norm(sizes) / abs(along)

    def _gradient(self, w: Params, inner: bool, outer: bool) -> Params:
        with self.problem.at(w):
            g = self._here(inner, outer)
        if outer:
            self.unused = set(g.unused) & set(self.problem.outer_params)
        return {**(g.inner or {}), **(g.outer or {})}

    def _start(self, inner: bool, outer: bool) -> Params:
        known = self._base
        if known is None or (inner and not known[0]) or (outer and not known[1]):
            # λ in any case: the mixed product that ends a solve starts from here too.
            g = self._here(inner, True)
            known = self._base = (g.inner or {}, g.outer or {})
        return {**(known[0] if inner else {}), **(known[1] if outer else {})}

    def _here(self, inner: bool, outer: bool) -> Gradients:
        return gradients(
            self.problem, "inner", self.batches, self.tally, inner=inner, outer=outer
        )

    def _groups(self, u: Params, epsilon: float) -> list[tuple[Params, float]]:
        """Split u into parts that each survive rounding at their own step.

        A step of fixed length is below the spacing of the numbers where weights are
        large. Such tensors are moved apart from the others, by a step relative to their
        own size; those of similar size together, since each group costs a difference.

        Args:
            u: the direction.
            epsilon: the step that the radius asks for.

        Returns:
            Parts that add up to u, each with its step.

        Raises:
            HypergradError: a tensor that no step moves.
        """
        w = {n: p.detach() for n, p in self.problem.inner_params.items()}
        moving = {n: t for n, t in u.items() if bool(t.any())}
        lost = _lost(w, moving, epsilon)
        sizes = _root_mean_squares({n: w[n] for n in moving})
        together = {
            n: t
            for n, t in moving.items()
            if lost[n] <= _MOST_LOST and sizes[n] <= _LARGE
        }
        steps: dict[str, float] = {}
        for name in moving.keys() - together.keys():
            rms = sizes[name]
            steps[name] = epsilon * max(1.0, rms)
            if not _lost(w, {name: u[name]}, steps[name])[name] <= _MOST_LOST:
                relative = torch.finfo(self._coarsest).eps ** _POWERS[self.scheme]
                steps[name] = relative * rms / float(u[name].abs().max())
            if not _lost(w, {name: u[name]}, steps[name])[name] <= _MOST_LOST:
                msg = (
                    f"a finite difference cannot move {name!r}: its entries (root mean "
                    f"square {rms:.3g}, {w[name].dtype}) are too large for a step along "
                    "this direction to survive rounding. Pass product='exact', or keep "
                    "the inner parameters in a finer dtype."
                )
                raise HypergradError(msg)
        groups = [(together, epsilon)] if together else []
        pending = sorted(steps, key=steps.__getitem__)
        while pending:
            near = [n for n in pending if steps[n] <= 4 * steps[pending[0]]]
            groups.append(({n: u[n] for n in near}, steps[near[-1]]))
            pending = pending[len(near) :]
        return groups


# The largest part of a step that may be lost to rounding. What is lost is noise, which
# the curvature averages out.
_MOST_LOST = 0.5
# Root mean square above which a tensor is moved apart, further by that factor: rounding
# costs a step of fixed length eps^(2/3) times it, without a word.
_LARGE = 4.0
# Root mean square of the difference of two rounded numbers, in units of eps times their
# size: rounding errors are even between -1/2 and 1/2 of a spacing of 1/2 to 1 eps.
_STORED = 0.3


def _coarsest(params: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype of fewest digits among those of the parameters and of autocast."""
    dtypes: set[torch.dtype] = set()
    for p in params:
        kind = p.device.type
        autocast = torch.is_autocast_enabled(kind) and p.dtype == torch.float32
        dtypes.add(torch.get_autocast_dtype(kind) if autocast else p.dtype)
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _moved(w: Params, u: Params, epsilon: float) -> Params:
    def move(p: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        # One rounding, at the end: low-precision parameters are moved in float32.
        wide = torch.promote_types(p.dtype, torch.float32)
        return torch.add(p.to(wide), d.to(wide), alpha=epsilon).to(p.dtype)

    return {n: move(w[n], u[n]) for n in u}


def _lost(w: Params, u: Params, epsilon: float) -> dict[str, float]:
    """Return what part of the step `epsilon * u` rounding takes away, by tensor."""
    moved = _moved(w, u, epsilon)
    parts = []
    for name, part in u.items():
        step = epsilon * part.double()
        noise = moved[name].double() - w[name].double() - step
        parts.append((noise.norm() / step.norm()).cpu())
    return dict(zip(u, torch.stack(parts).tolist(), strict=True)) if parts else {}


def _root_mean_squares(w: Params) -> dict[str, float]:
    sizes = [tree.wide(t).square().mean().sqrt().cpu() for t in w.values()]
    return dict(zip(w, torch.stack(sizes).tolist(), strict=True)) if sizes else {}


def _combine(a: Params, b: Params, factor: float) -> Params:
    return tree.map_params(lambda x, y: (x - y) * factor, a, b)
