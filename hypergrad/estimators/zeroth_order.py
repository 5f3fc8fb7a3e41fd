"""Differences of values of the outer loss, which may be anything that is a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_count, check_number
from hypergrad.answer import EstimatorState
from hypergrad.errors import HypergradError
from hypergrad.estimator import HypergradEstimator, Needs, Point, Terms
from hypergrad.estimators._directions import (
    ONE_DIRECTION,
    Directions,
    NumDirections,
    check_directions,
    draws_of,
)
from hypergrad.estimators._window import counted, moved_within, start_of
from hypergrad.precision import autocast_dtypes, coarsest, settings_unit, unit
from hypergrad.products import gradients
from hypergrad.products.evaluation import seen_unit
from hypergrad.reporting import report
from hypergrad.rules import Rule, State
from hypergrad.rules.base import check_rule
from hypergrad.steps import InnerStep, SnapshotLimit, check_snapshots
from hypergrad.tree import Params

__all__ = ["ZerothOrder"]


@dataclass(frozen=True)
class ZerothOrder(HypergradEstimator):
    r"""Move λ to both sides, take the inner steps again, and see what f becomes [S92].

    With $w(\lambda)$ what the last K inner steps lead to when each is taken at its λ
    moved by the same, and $F(\lambda) = f(w(\lambda), \lambda)$, the slope along u is

    $$\frac{F(\lambda + \mu u) - F(\lambda - \mu u)}{2\mu}$$

    Where λ has at most `num_directions` entries, u is each of them; it is exact up to
    $O(\mu^2)$, and for F of second degree. Else u are random signs, and the result is
    the mean of slope times u: for such an F, an unbiased estimate whose squared error is
    (n - 1)/m of the squared norm, on average, for n entries and m directions.

    f is a value and nothing else: a metric that counts, a quantised or compiled model, or
    a plain number will do. It is made small: of accuracy or F1, return the negative. The
    inner steps are retaken by their own gradients; with `num_steps=0` w stays where it is,
    and not even those are needed. Both sides see the same data and the same random
    numbers, and start where the window does: what was done to w by hand between its steps
    is not done again. Cost: 4 values of f for each direction, and 2 K inner gradients.

    The two terms share each difference evenly: f is evaluated at every pair of a w and a
    λ from either side, so that a term is exactly 0 where f or w does not depend on λ.

    Args:
        num_steps: K.
        num_directions: m, or `"all"` for every entry of λ.
        radius: μ, how far an entry of λ is moved; None for the cube root of the spacing
            of the numbers that take part, 6e-6 in float64 and 5e-3 in float32, times the
            root mean square of the entry's tensor where that is above 1. A random
            direction moves all entries alike, so that its noise is that of the formula:
            by the smallest of these lengths, or by the largest times that cube root where
            it is more. A metric that counts needs more.
        rule: rule of the virtual steps where no steps are given.
        snapshots: how many copies of w and the optimizer's state the record of the steps
            may hold, as for `Unrolled`. One is used.
        seed: of the random directions.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2, f = w²/2, w = 4, λ = 0, one step of SGD at rate 1/2:
        w = 2 + λ/2, F = (2 + λ/2)²/2, and its slope at 0 is 1.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.rules import SGD
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> ZerothOrder(1, radius=0.5, rule=SGD(0.5)).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        1.0
    """

    name: ClassVar[str] = "zeroth-order"
    num_steps: int = 5
    _: KW_ONLY
    num_directions: NumDirections = 8
    radius: float | None = None
    rule: Rule | None = None
    snapshots: SnapshotLimit = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, least=0)
        check_directions(self.num_directions, self.seed)
        check_snapshots(self.snapshots)
        if self.rule is not None:
            check_rule("rule", self.rule)
        if self.radius is None:
            return
        check_number("radius", self.radius)
        if not 0 < self.radius < math.inf:
            msg = (
                f"radius={self.radius} must be positive and finite: it is how far each "
                "entry of the outer parameters is moved. Pass None for the default of the "
                "dtype."
            )
            raise ValueError(msg)

    @property
    def without_laws(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values do not tell what a loss is computed from; and see `Forward`."""
        laws = {
            "unused levels": "values of constants differ by 0, and a warning says so"
        }
        if self.num_steps == 0:
            return laws | {"direction": "without steps it has no indirect term"}
        return laws | (ONE_DIRECTION if self.num_directions == 1 else {})

    @property
    def needs(self) -> Needs:
        """Values of the outer loss alone."""
        return Needs(
            lookback=self.num_steps,
            order=0,
            v=False,
            gradients=False,
            snapshots=self.snapshots,
        )

    @property
    def answers(self) -> str:
        """What the steps do; without steps, neither question."""
        return "steps" if self.num_steps else "neither"

    def virtual_rule(self) -> Rule | None:
        """Return the rule that was set."""
        return self.rule

    def new_run(self, state: Mapping[str, Any]) -> EstimatorState:
        """Return the count of draws: directions of another run are others too.

        Args:
            state: at the end of the run before.
        """
        return draws_of(state)

    def terms(self, point: Point) -> Terms:
        """Return both terms, from the same differences.

        Args:
            point: the place.

        Raises:
            HypergradError: an entry of λ is too large to be moved by the radius.
        """
        outer = point.problem.outer_params
        directions = Directions.of(outer, self.num_directions, self.seed, point.state)
        value = point.value("outer")
        lengths = self._lengths(point, value, alike=directions.random)
        taken = point.steps[-self.num_steps :] if point.steps else ()
        start = start_of(point, len(taken)) if taken else ({}, {})
        sums = (tree.zeros_like(_wide(outer)), tree.zeros_like(_wide(outer)))
        seen: list[Tensor] = []
        tell = counted(point, 2 * len(directions) * len(taken))
        for number in range(len(directions)):
            u = directions[number]
            step = {n: t * lengths[n] for n, t in u.items()}
            ends = _moved(outer, step, 1.0), _moved(outer, step, -1.0)
            # Divided by what they were moved in truth: rounding differs by the entry.
            width = tree.sub(*(_wide({n: end[n] for n in u}) for end in ends))
            changes = _changes(point, taken, start, step, ends, tell)
            seen += changes
            for total, change in zip(sums, changes, strict=True):
                for n, t in width.items():
                    total[n] += torch.where(t == 0, 0.0, change.to(t) / t)
        if directions.random:
            sums = tuple(tree.scale(total, 1 / len(directions)) for total in sums)
        direct, indirect = (
            {n: t.to(outer[n].dtype) for n, t in total.items()} for total in sums
        )
        largest = max(lengths.values())
        reasons = [moved_within(point, taken) if taken else ""]
        if seen and not any(point.tally.read(*seen)):
            reasons.append(
                _CONSTANT.format((4 if taken else 2) * len(directions), largest)
            )
            report(reasons[-1])
        info = {"fd_radius": largest, "reason": " ".join(filter(None, reasons))}
        return Terms(direct, indirect, directions.state, info)

    def _lengths(self, point: Point, value: Tensor, *, alike: bool) -> dict[str, float]:
        """Return how far to move the entries of each tensor of λ.

        Args:
            point: the place.
            value: of the outer loss, whose dtype counts.
            alike: whether all are moved by the same.

        Raises:
            HypergradError: some entry would stay where it is.
        """
        outer = point.problem.outer_params
        sizes = point.tally.read(*tree.sizes(list(outer.values())))
        if self.radius is not None:
            lengths = dict.fromkeys(outer, float(self.radius))
        else:
            base = self._unit(point, value) ** (1 / 3)
            lengths = {
                n: base * max(1.0, size / math.sqrt(max(1, t.numel())))
                for (n, t), size in zip(outer.items(), sizes, strict=True)
            }
            if alike:
                # Shorter, and the largest would move by few of their spacings.
                least, most = min(lengths.values()), max(lengths.values())
                shared: float = max(least, base * most)
                lengths = dict.fromkeys(outer, shared)
        ones = {n: torch.full_like(t, lengths[n]) for n, t in outer.items()}
        ahead, behind = _moved(outer, ones, 1.0), _moved(outer, ones, -1.0)
        still = [((ahead[n] == t) | (behind[n] == t)).sum() for n, t in outer.items()]
        counts = point.tally.read(*still)
        for (name, t), count in zip(outer.items(), counts, strict=True):
            if count:
                msg = (
                    f"{int(count)} of the {t.numel()} entries of {name!r} stay where they "
                    f"are when they are moved by {lengths[name]:.3g}: {t.dtype} has no "
                    "number so near to them. Raise `radius`, or keep the outer parameters "
                    "in a finer dtype."
                )
                raise HypergradError(msg)
        return lengths

    def _unit(self, point: Point, value: Tensor) -> float:
        """Return the spacing at 1 of the coarsest numbers that are known to take part."""
        problem = point.problem
        key = f"values, all ranks{autocast_dtypes(problem)}, {self.num_steps > 0}"
        if key in problem.units:
            return problem.units[key]
        seen = seen_unit(problem)

        def own() -> list[float]:
            units = [settings_unit(problem), coarsest(problem.outer_params.values())]
            unseen = self.num_steps > 0 and seen is None and bool(problem.inner_params)
            return [max(*units, unit(value.dtype), seen or 0.0), float(unseen)]

        agreed, unseen = problem.reducer.largest(2, own, problem.outer_params)
        if not unseen:
            problem.units[key] = agreed
        return agreed


def _changes(
    point: Point,
    steps: Sequence[InnerStep],
    start: tuple[Params, State],
    step: Params,
    ends: tuple[Params, Params],
    tell: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Return by how much f changes from one end to the other, by λ itself and by w.

    Args:
        point: the place.
        steps: the inner steps to take again.
        start: w and the optimizer's state before them.
        step: how far λ is moved.
        ends: λ at either end.
        tell: called after each inner step.
    """
    ahead, behind = ends
    if not steps:
        change = _value(point, ahead) - _value(point, behind)
        return change, torch.zeros_like(change)
    w = _retaken(point, steps, start, step, 1.0, tell)
    high, across = _value(point, {**w, **ahead}), _value(point, {**w, **behind})
    w = _retaken(point, steps, start, step, -1.0, tell)
    back, low = _value(point, {**w, **ahead}), _value(point, {**w, **behind})
    by_outer = (high - across) + (back - low)
    by_inner = (high - back) + (across - low)
    return by_outer / 2, by_inner / 2


def _value(point: Point, at: Params) -> Tensor:
    return tree.wide(point.value("outer", at=at))


def _retaken(
    point: Point,
    steps: Sequence[InnerStep],
    start: tuple[Params, State],
    step: Params,
    sign: float,
    tell: Callable[[], None],
) -> Params:
    """Return w after the steps, each taken at its λ moved by the same."""
    problem = point.problem
    w, state = start
    for one in steps:
        lam = {**one.outer_params, **_moved(one.outer_params, step, sign)}
        with problem.at(w, lam):
            g = gradients(problem, "inner", one.micro_batches, point.tally, outer=False)
            # Not from the copy: an embedding with max_norm moved w in the forward pass.
            w, state = one.rule.apply(problem.inner_params, state, g.inner or {})
        tell()
    return w


def _moved(outer: Params, step: Params, sign: float) -> Params:
    return tree.add({n: outer[n] for n in step}, step, alpha=sign)


def _wide(tensors: Params) -> Params:
    return {n: tree.wide(t) for n, t in tensors.items()}


_CONSTANT = (
    "the outer loss has the same value at all {0} places that it was evaluated at, up to "
    "{1:.2g} from the outer parameters: the result is zeros. A metric that counts is "
    "constant between its jumps: raise `radius`, or evaluate it on more data. A loss that "
    "does not depend on the parameters is constant everywhere."
)
