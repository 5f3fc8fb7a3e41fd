"""Difference quotients of a function of w: how far to move it, and what that loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.precision import FLOAT32, coarsest, unit
from hypergrad.problem import BilevelProblem
from hypergrad.products.tally import direction_not_finite
from hypergrad.tree import Params

__all__ = ["POWERS", "Differences", "Move", "Scheme"]

Scheme = Literal["central", "forward", "richardson"]

POWERS: dict[str, float] = {"central": 1 / 3, "forward": 1 / 2, "richardson": 1 / 5}
"""Power of the rounding unit that balances truncation against rounding."""


@dataclass(frozen=True)
class Move:
    """How w, and λ where a direction has it, is moved, and by which quotient.

    Attributes:
        problem: whose w it is.
        scheme: which quotient.
        asked: distance that was asked for; None for the balanced one.
        unit: spacing at 1 of the coarsest numbers that take part.
    """

    problem: BilevelProblem
    scheme: Scheme
    asked: float | None
    unit: float

    @property
    def params(self) -> Params:
        """All that may be moved."""
        return {**self.problem.inner_params, **self.problem.outer_params}

    def to(self, values: Params) -> AbstractContextManager[None]:
        """Return a context in which the problem is at these values."""
        outer = {n: t for n, t in values.items() if n in self.problem.outer_params}
        inner = {n: t for n, t in values.items() if n not in outer}
        return self.problem.at(inner, outer)

    @property
    def coarse(self) -> bool:
        """Whether something computes more coarsely than float32."""
        return self.unit > FLOAT32

    @property
    def radius(self) -> float:
        """Distance to move w by."""
        if self.asked is not None:
            return self.asked
        balanced = self.unit ** POWERS[self.scheme]
        # Parameters that move exactly lose no part of a step, and what the gradients'
        # entries are rounded by evens out: measured, half is best over a coarse base.
        fine = coarsest(self.problem.inner_params.values()) <= FLOAT32
        return balanced / 2 if self.coarse and fine else balanced


class Differences:
    """Difference quotients of a function of w along one direction after another.

    Args:
        move: radius, scheme and precision.
        judged: names of the results that an error is estimated of; empty for none.
        evaluate: the function at the problem's present w.
        start: the same at the w of the product, which may be known already.
    """

    def __init__(
        self,
        move: Move,
        judged: Sequence[str],
        evaluate: Callable[[], Params],
        start: Callable[[], Params],
    ) -> None:
        self._move = move
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
        radius = self._move.radius
        length, groups = _Groups(self._move, direction).found()
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
        scheme, judges = self._move.scheme, bool(self._judged)
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
            share = 1 / math.sqrt(3 * 1.12) if self._move.coarse else 1 / 3
            return near, self._error(far, near, share)
        best = tree.add(near, _combine(near, far, 1 / 3))
        if not judges:
            return best, {}
        # Of the difference to the result at twice the distance, 1/15 is truncation where
        # that dominates, and most is rounding where that does: something between.
        second = tree.add(far, _combine(far, self._quotient(u, 4 * step), 1 / 3))
        share = 1 / 2 if self._move.coarse else 1 / 5
        return best, self._error(second, best, share)

    def _error(self, a: Params, b: Params, share: float) -> Params:
        def judged(p: Params) -> Params:
            return {n: p[n] for n in self._judged}

        return _combine(judged(a), judged(b), share)

    @torch.no_grad()
    def _quotient(self, u: Params, step: float, plus: Params | None = None) -> Params:
        """Return a difference quotient along u, a part of a direction of norm 1."""
        two_sided = self._move.scheme != "forward"
        here = self._move.params
        w = {n: here[n].detach() for n in u}
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
        with self._move.to(plus):
            high = self._evaluate()
        if two_sided:
            with self._move.to(minus):
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
        move: radius and precision.
        direction: u, of any length.
    """

    def __init__(self, move: Move, direction: Params) -> None:
        self._move = move
        self._w = {n: move.params[n].detach() for n in direction}
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
        radius = self._move.radius
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
                relative = self._move.unit ** POWERS[self._move.scheme]
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
