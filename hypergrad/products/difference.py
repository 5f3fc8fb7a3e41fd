"""Second-derivative products from differences of gradients: first order alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_flag, check_number
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.precision import (
    FLOAT32,
    autocast_dtypes,
    coarsest,
    settings_unit,
    unit,
)
from hypergrad.problem import BilevelProblem
from hypergrad.products.base import NO_HINTS, BoundProduct, Hints, Product, total_loss
from hypergrad.products.evaluation import seen_unit
from hypergrad.products.gradients import local
from hypergrad.products.tally import Tally, direction_not_finite
from hypergrad.reducer import Contribution
from hypergrad.tree import Params

__all__ = ["FiniteDifference", "Scheme", "default_radius"]

Scheme = Literal["central", "forward", "richardson"]

_POWERS: dict[str, float] = {"central": 1 / 3, "forward": 1 / 2, "richardson": 1 / 5}


def default_radius(dtype: torch.dtype, scheme: Scheme = "central") -> float:
    r"""Return the distance to move: $\epsilon^{1/3}$ central, $\epsilon^{1/2}$ forward.

    It balances truncation (radius² for a central difference) against rounding
    (ε / radius), ε being the spacing of the dtype's numbers at 1.

    Example:
        >>> import torch
        >>> f"{default_radius(torch.float32):.2e}"
        '4.92e-03'
    """
    return unit(dtype) ** _POWERS[scheme]


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
            estimate from it the error of a mixed product, in `info.fd_error`; costs as
            much as a central difference, or one evaluation with the forward scheme. None
            for True where the loss computes more coarsely than float32.

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
        if self.scheme not in list(_POWERS):  # a list: not everything can be hashed
            known = ", ".join(map(repr, _POWERS))
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

    def compute(self, direction: Params, wanted: Params) -> Contribution:
        """Return the products without a judgement."""
        return self._compute(direction, wanted, {})

    def _vjp(
        self, direction: Params, inner: bool, outer: bool, *, judged: bool
    ) -> tuple[Params, Params]:
        problem = self.problem
        self._agree()
        judge = judged and self._estimates
        self.tally.n_hvp += 1
        wanted = {
            **(problem.inner_params if inner else {}),
            **(problem.outer_params if outer else {}),
        }
        result = problem.outer_params if outer else problem.inner_params
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
            return self._vjp(direction, inner, outer, judged=judged)
        if outer:
            self.unused = set(parts.unused) & set(problem.outer_params)
        self.info = {"fd_radius": parts.extra}
        if judge:
            found = tree.size([parts.values[n] for n in result])
            off = tree.size([parts.values[n] for n in errors])
            error = torch.maximum(off, parts.values[_LEAST].to(off))
            self.info["fd_error"] = torch.where(error == 0, error, error / found)
        return (
            {n: parts.values[n] for n in problem.inner_params} if inner else {},
            {n: parts.values[n] for n in problem.outer_params} if outer else {},
        )

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
                # From the present point λ in any case: the mixed product that ends a
                # solve starts from there too.
                outer=outer,
            )
            losses.extend([] if g.loss is None else [g.loss])
            unused.intersection_update(g.unused)
            return g.values

        def start() -> Params:
            if any(n not in self._base for n in wanted):
                g = local(self.problem, "inner", self.batches, self.tally, inner=inner)
                losses.extend([] if g.loss is None else [g.loss])
                self._base = {**self._base, **g.values}
            return {n: self._base[n] for n in wanted}

        judged = [n.removeprefix(_ERROR) for n in errors]
        difference = _Difference(self, judged, evaluate, start)
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
        return _Difference(self, [], evaluate, evaluate).along(direction, None)[0]

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
    def scheme(self) -> Scheme:
        """Which quotient."""
        return self._settings.scheme

    @property
    def radius(self) -> float:
        """Distance that is asked for."""
        asked = self._settings.radius
        if asked is not None:
            return asked
        balanced = self.unit ** _POWERS[self.scheme]
        # Parameters that move exactly lose no part of a step, and what the gradients'
        # entries are rounded by evens out: measured, half is best over a coarse base.
        fine = coarsest(self.problem.inner_params.values()) <= FLOAT32
        return balanced / 2 if self.coarse and fine else balanced

    @property
    def coarse(self) -> bool:
        """Whether something computes more coarsely than float32."""
        return self.unit > FLOAT32

    @property
    def _estimates(self) -> bool:
        asked = self._settings.error_estimate
        return self.coarse if asked is None else asked


_ERROR = "error of "
_LEAST = "least error"


class _Difference:
    """Difference quotients of a function of w along one direction after another.

    Args:
        product: radius, scheme and precision.
        judged: names of the results that an error is estimated of; empty for none.
        evaluate: the function at the problem's present w.
        start: the same at the w of the product, which may be known already.
    """

    def __init__(
        self,
        product: _FiniteDifference,
        judged: Sequence[str],
        evaluate: Callable[[], Params],
        start: Callable[[], Params],
    ) -> None:
        self._product = product
        self._problem = product.problem
        self._judged = list(judged)
        self._evaluate = evaluate
        self._start = start
        self.least: Tensor = torch.zeros((), dtype=torch.float64)
        """Least norm of the error: what storing the gradients has lost."""

    def along(
        self, direction: Params, wanted: Params | None
    ) -> tuple[Params, Params, float]:
        """Return the derivative along a direction, its error, and the distance moved.

        Args:
            direction: u.
            wanted: names and shapes of the results, for a direction of zeros; None to
                evaluate the function for that.

        Raises:
            HypergradError: a tensor that no step moves.
            NonFiniteError: the direction is NaN or infinite.
        """
        radius = self._product.radius
        length, groups = _Groups(self._product, direction).found()
        if not groups:
            zeros = tree.zeros_like(self._evaluate() if wanted is None else wanted)
            return zeros, zeros, radius
        total: Params = {}
        off: Params = {}
        for part, step, plus in groups:
            value, error = self._scheme(part, step, plus)
            total = tree.add(total, value) if total else value
            off = tree.add(off, error) if off else error
            if plus is None:  # a part alone; `plus` is at hand for the whole
                radius = max(radius, step * tree.norm(part))
        self.least = self.least * length
        return tree.scale(total, length), tree.scale(off, length), radius

    def _scheme(
        self, u: Params, step: float, plus: Params | None
    ) -> tuple[Params, Params]:
        """Return a quotient along u, and an estimate of its error; none was no asked."""
        scheme, judges = self._product.scheme, bool(self._judged)
        near = self._quotient(u, step, plus)
        if scheme != "richardson" and not judges:
            return near, {}
        far = self._quotient(u, 2 * step)
        # A central difference errs ∝ radius²: the errors of far and near are as 4 to 1.
        # A one-sided one errs ∝ radius: as 2 to 1.
        if scheme == "forward":
            return near, self._error(far, near, 1.0)
        if scheme == "central":
            # Rounding errs ∝ 1/radius, and two of it differ by 1.12 of the nearer. Where
            # it is as large as truncation, between the two.
            share = 1 / math.sqrt(3 * 1.12) if self._product.coarse else 1 / 3
            return near, self._error(far, near, share)
        best = tree.add(near, _combine(near, far, 1 / 3))
        if not judges:
            return best, {}
        # Of the difference to the result at twice the distance, 1/15 is truncation where
        # that dominates, and most is rounding where that does: something between.
        second = tree.add(far, _combine(far, self._quotient(u, 4 * step), 1 / 3))
        share = 1 / 2 if self._product.coarse else 1 / 5
        return best, self._error(second, best, share)

    def _error(self, a: Params, b: Params, share: float) -> Params:
        def judged(p: Params) -> Params:
            return {n: p[n] for n in self._judged}

        return _combine(judged(a), judged(b), share)

    @torch.no_grad()
    def _quotient(self, u: Params, step: float, plus: Params | None = None) -> Params:
        """Return a difference quotient along u, a part of a direction of norm 1."""
        two_sided = self._product.scheme != "forward"
        w = {n: self._problem.inner_params[n].detach() for n in u}
        plus = plus or _moved(w, u, step)
        minus = _moved(w, u, -step) if two_sided else w
        # The realised step d along u; rounding makes it differ from the one asked for, s.
        # ⟨d, u⟩ = (|d|²/s + s|u|² - |d - su|²/s) / 2, which loses no digits where d ≈ su.
        asked = 2 * step if two_sided else step
        direction = _single(u)
        realised = tree.sub(_single(plus), _single(minus))
        off = tree.size(tree.add(realised, direction, alpha=-asked))
        own = tree.size(direction) ** 2
        along = (tree.size(realised) ** 2 - off**2) / asked + asked * own
        along = along / (2 * own)
        with self._problem.at(plus):
            high = self._evaluate()
        if two_sided:
            with self._problem.at(minus):
                low = self._evaluate()
        else:
            low = self._start()
        if self._judged:
            rounded = [
                s * unit(high[n].dtype)
                for n, s in zip(
                    self._judged,
                    tree.sizes([high[n] for n in self._judged]),
                    strict=True,
                )
            ]
            lost = torch.linalg.vector_norm(torch.stack(rounded)) / along.abs()
            self.least = self.least.to(lost) + _STORED * lost
        return tree.scale(tree.sub(high, low), 1 / along)


class _Groups:
    """Parts of a direction that each survive rounding at their own step.

    A step of fixed length is below the spacing of the numbers where weights are large.
    Such tensors are moved apart from the others, by a step relative to their own size;
    those of similar size together, since each group costs a difference.

    Args:
        product: radius and precision.
        direction: u, of any length.
    """

    def __init__(self, product: _FiniteDifference, direction: Params) -> None:
        self._product = product
        self._w = {n: p.detach() for n, p in product.problem.inner_params.items()}
        self._direction = direction

    def found(self) -> tuple[float, list[tuple[Params, float, Params | None]]]:
        """Return the direction's norm, and its parts.

        Returns:
            The norm, and for each part: its tensors over that norm, its step, and w moved
            by that, where it is at hand. No part for a direction of zeros.

        Raises:
            HypergradError: a tensor that no step moves.
            NonFiniteError: the direction is NaN or infinite.
        """
        radius = self._product.radius
        if not self._direction:
            return 0.0, []
        names = list(self._direction)
        length = tree.size(self._direction)
        unit_u, plus, numbers = self._tried(length, radius)
        found, *read = tree.read([length, *numbers])
        settled = tree.settled_norm(found, self._direction)
        if not math.isfinite(settled):
            raise NonFiniteError(direction_not_finite(settled))
        if settled == 0.0:
            return 0.0, []
        if settled != found:  # its squares left the range: once more, from the host
            length = torch.tensor(settled, dtype=length.dtype, device=length.device)
            unit_u, plus, numbers = self._tried(length, radius)
            read = tree.read(numbers)
        count = len(names)
        noise, steps, sizes = (read[i * count : (i + 1) * count] for i in range(3))
        lost = {
            n: a / b for n, a, b in zip(names, noise, steps, strict=True) if b > 0.0
        }
        rms = {
            n: s / math.sqrt(max(1, self._w[n].numel()))
            for n, s in zip(names, sizes, strict=True)
        }
        if all(lost[n] <= _MOST_LOST and rms[n] <= _LARGE for n in lost):
            return settled, [(unit_u, radius, plus)]
        return settled, self._apart(unit_u, radius, lost, rms)

    def _tried(
        self, length: Tensor, radius: float
    ) -> tuple[Params, Params, list[Tensor]]:
        """Return the direction over its length, w moved by it, and what rounding lost."""
        low = any(unit(t.dtype) > FLOAT32 for t in self._direction.values())
        u = _single(self._direction) if low else self._direction
        unit_u = tree.scale(u, 1 / length)
        plus = _moved(self._w, unit_u, radius)
        realised = tree.sub(_single(plus), _single(self._w))
        noise = tree.add(realised, unit_u, alpha=-radius)
        step = [s * radius for s in tree.sizes(list(unit_u.values()))]
        w = [self._w[n] for n in unit_u]
        return unit_u, plus, [*tree.sizes(list(noise.values())), *step, *tree.sizes(w)]

    def _apart(
        self, u: Params, radius: float, lost: dict[str, float], rms: dict[str, float]
    ) -> list[tuple[Params, float, Params | None]]:
        together = {n: u[n] for n in lost if lost[n] <= _MOST_LOST and rms[n] <= _LARGE}
        steps: dict[str, float] = {}
        for name in lost.keys() - together.keys():
            steps[name] = radius * max(1.0, rms[name])
            if not self._lost(u, name, steps[name]) <= _MOST_LOST:
                relative = self._product.unit ** _POWERS[self._product.scheme]
                (largest,) = tree.read([u[name].abs().max()])
                steps[name] = relative * rms[name] / largest
            if not self._lost(u, name, steps[name]) <= _MOST_LOST:
                msg = (
                    f"a finite difference cannot move {name!r}: its entries (root mean "
                    f"square {rms[name]:.3g}, {self._w[name].dtype}) are too large for a "
                    "step along this direction to survive rounding. Pass "
                    "product='exact', or keep the inner parameters in a finer dtype."
                )
                raise HypergradError(msg)
        groups: list[tuple[Params, float, Params | None]] = []
        if together:
            groups.append((together, radius, None))
        pending = sorted(steps, key=steps.__getitem__)
        while pending:
            near = [n for n in pending if steps[n] <= 4 * steps[pending[0]]]
            groups.append(({n: u[n] for n in near}, steps[near[-1]], None))
            pending = pending[len(near) :]
        return groups

    def _lost(self, u: Params, name: str, step: float) -> float:
        """Return what part of a step of one tensor rounding takes away."""
        w, part = {name: self._w[name]}, {name: u[name]}
        realised = tree.sub(_single(_moved(w, part, step)), _single(w))
        noise = tree.add(realised, part, alpha=-step)
        off, size = tree.norms(noise, part)
        return off / (step * size)


# The largest part of a step that may be lost to rounding. What is lost is noise, which
# the curvature averages out.
_MOST_LOST = 0.5
# Root mean square above which a tensor is moved apart, further by that factor: rounding
# costs a step of fixed length eps^(2/3) times it, without a word.
_LARGE = 4.0
# Root mean square of the difference of two rounded numbers, in units of eps times their
# size: rounding errors are even between -1/2 and 1/2 of a spacing of 1/2 to 1 eps.
_STORED = 0.3


def _single(params: Params) -> Params:
    """Return tensors in float32 or finer."""
    if all(unit(t.dtype) <= FLOAT32 for t in params.values()):
        return params
    return {
        n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in params.items()
    }


def _moved(w: Params, u: Params, step: float) -> Params:
    """Return w + step · u, rounded once: low-precision parameters move in float32."""
    here = {n: w[n] for n in u}
    moved = tree.add(_single(here), _single(u), alpha=step)
    return {
        n: t if t.dtype == here[n].dtype else t.to(here[n].dtype)
        for n, t in moved.items()
    }


def _combine(a: Params, b: Params, factor: float) -> Params:
    return tree.scale(tree.sub(a, b), factor)
