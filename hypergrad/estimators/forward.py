"""Forward mode through the inner steps that were taken, along directions of λ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_count
from hypergrad.answer import EstimatorState
from hypergrad.estimator import Indirect, Needs, Point
from hypergrad.estimators._directions import (
    ONE_DIRECTION,
    Directions,
    NumDirections,
    check_directions,
    draws_of,
)
from hypergrad.estimators._growth import TangentNorms
from hypergrad.estimators._window import check_first, counted, moved_within, start_of
from hypergrad.estimators._with_product import WithProduct
from hypergrad.learned import tangents_of_settings
from hypergrad.problem import BilevelProblem
from hypergrad.products import ProductLike, Tally, as_product
from hypergrad.rules import Rule, State
from hypergrad.rules.base import check_rule, watch_finite
from hypergrad.steps import InnerStep, SnapshotLimit, check_snapshots
from hypergrad.tree import Params

__all__ = ["Forward"]

_TOGETHER = 8
"""Directions that are pushed through the steps at once, each with its tangents."""


@dataclass(frozen=True)
class Forward(WithProduct):
    r"""Push directions of λ through the last K inner steps, oldest first [FDF17, Alg. 2].

    With $(w_{k+1}, s_{k+1}) = U(w_k, s_k, \nabla_w g(w_k, \lambda_k))$ and tangents
    $(\dot w_0, \dot s_0) = 0$ along u, each step is

    $$\dot g = \frac{\partial^2 g}{\partial w^2}\dot w_k
      + \frac{\partial^2 g}{\partial w\,\partial\lambda}u,\quad
      (\dot w_{k+1}, \dot s_{k+1}) = DU\,(\dot w_k, \dot s_k, \dot g)$$

    and the slope of f along u is $\frac{\partial f}{\partial\lambda}\cdot u +
    \frac{\partial f}{\partial w}\cdot\dot w_K$. Where λ has at most `num_directions`
    entries, u is each of them, and the result that of `Unrolled` to rounding. Else u are
    random signs, and the indirect term is an unbiased estimate [SWY24]: of n entries
    and m directions, its squared error is (n - 1)/m of the square of the term's norm, on
    average. The direct term is exact in any case.

    The derivative of w along a direction may explode on a long way: growth by more than
    1/ε of the dtype of w for each step is warned of, and an overflow names the step.

    Nothing is kept for a way back: w goes along with the tangents, so that memory is that
    of one step whatever K is. Cost: an inner gradient and `num_directions` products a
    step.

    The directions of an estimate follow on those of the one before, by the state that it
    returns. Where λ moved within the window, the result is the derivative for a common
    shift of all its values; `info.reason` says so.

    Args:
        num_steps: K.
        num_directions: m, or `"all"` for every entry of λ.
        rule: rule of the virtual steps where no steps are given.
        product: how products with second derivatives are taken: a name of
            `hypergrad.products.product_names()`, or a product. It must have the forward
            direction, as all of those have.
        snapshots: how many copies of w and the optimizer's state the record of the steps
            may hold, as for `Unrolled`. One is used, so that 3, the fewest, costs no more
            where each window is used once.
        seed: of the random directions.

    Raises:
        TypeError: a count that is not a whole number, or `rule` not a rule.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2, f = w²/2, w = 4, λ = 0, two steps of SGD at rate 1/2: w₂ = 1, and
        its tangent goes 0, 1/2, 3/4, so that the hypergradient is 3/4.

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
        >>> Forward(2, rule=SGD(0.5)).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        0.75
    """

    name: ClassVar[str] = "forward"
    reaches: ClassVar[frozenset[str]] = frozenset({"settings", "start"})
    num_steps: int = 5
    _: KW_ONLY
    num_directions: NumDirections = 8
    rule: Rule | None = None
    product: ProductLike = "exact"
    snapshots: SnapshotLimit = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        as_product(self.product)
        check_count("num_steps", self.num_steps)
        check_directions(self.num_directions, self.seed)
        check_snapshots(self.snapshots)
        if self.rule is not None:
            check_rule("rule", self.rule)

    @property
    def without_laws(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With one random direction, the term points along that."""
        return ONE_DIRECTION if self.num_directions == 1 else {}

    @property
    def needs(self) -> Needs:
        """K steps, without their gradients: the graph of the products has them."""
        return Needs(
            lookback=self.num_steps,
            order=as_product(self.product).order,
            gradients=False,
            snapshots=self.snapshots,
        )

    def virtual_rule(self) -> Rule | None:
        """Return the rule that was set."""
        return self.rule

    def new_run(self, state: Mapping[str, Any]) -> EstimatorState:
        """Return the count of draws: directions of another run are others too.

        Args:
            state: at the end of the run before.
        """
        return draws_of(state)

    def indirect(self, point: Point) -> Indirect:
        """Return the slopes of f through w, put together along the directions.

        Raises:
            HypergradError: the start of the inner run is learned, and the oldest of the
                steps is not its first.
        """
        directions = Directions.of(
            point.problem.outer_params, self.num_directions, self.seed, point.state
        )
        slopes: list[Tensor] = []
        info: dict[str, Any] = {}
        exploded: list[TangentNorms] = []
        starts = range(0, len(directions), _TOGETHER)
        tell = counted(point, len(starts) * self.num_steps)
        for first in starts:
            numbers = range(first, min(first + _TOGETHER, len(directions)))
            tangents = [_Tangent(directions[number]) for number in numbers]
            norms = TangentNorms(point, self.num_steps, len(tangents))
            info |= self._push(point, tangents, norms, tell)
            slopes += [_dot(point.v, tangent.params) for tangent in tangents]
            exploded.append(norms)
        found = point.tally.read(*slopes)
        if not any(found) and not point.asked("inner"):
            # Differences do not tell whether λ acts on the inner gradient at all.
            point.gradients("inner", "outer")
        total = directions.sum(found)
        acting = point.problem.beside_losses
        for name in point.unused("inner"):  # exactly 0, and not so by random directions
            if name in total and name not in acting:
                total[name].zero_()
        reasons = [moved_within(point, point.steps[-self.num_steps :])]
        # Of many directions through the same steps, the first that is said speaks for all.
        reasons.append(next(filter(None, (norms.warn() for norms in exploded)), ""))
        info["reason"] = " ".join(filter(None, reasons))
        return Indirect(total, directions.state, info)

    def _push(
        self,
        point: Point,
        tangents: Sequence[_Tangent],
        norms: TangentNorms,
        tell: Callable[[], None],
    ) -> dict[str, Any]:
        """Take tangents through all steps; return what the product knows of itself."""
        info: dict[str, Any] = {}
        problem = point.problem
        w, state = start_of(point, self.num_steps)
        steps = point.steps[-self.num_steps :]
        if problem.inner_start:
            check_first(self, self.num_steps, steps[0].number)
        for tangent in tangents:
            tangent.begin(problem, w)
        for left, recorded in zip(reversed(range(len(steps))), steps, strict=True):
            step = recorded
            if self.num_steps > 1:
                point.tally.where = norms.says_where(len(steps) - 1 - left)
            if not step.is_snapshot:
                step = replace(step, inner_params=w, state=state)
            with point.product_at(step, self.product, single_use=False) as product:
                changes = [product.jvp(t.params, t.in_losses) for t in tangents]
                grads = step.grads or product.gradient()
                info |= product.info
            for tangent, change in zip(tangents, changes, strict=True):
                tangent.step(problem, step, grads, change, point.tally)
            norms.watch([tangent.params for tangent in tangents])
            if left:
                w, state = step.rule.apply(step.inner_params, step.state, grads)
            tell()
        point.tally.where = None
        return info


@dataclass
class _Tangent:
    """How w and the optimizer's state change along a direction of λ.

    Attributes:
        outer: the direction.
        in_losses: the part of it that acts in the losses.
        params: tangent of w.
        state: tangents of the state.
    """

    outer: Params
    in_losses: Params = field(default_factory=dict)
    params: Params = field(default_factory=dict)
    state: State = field(default_factory=dict)

    def begin(self, problem: BilevelProblem, w: Params) -> None:
        """Start where the window does, where w moves only if its start is learned."""
        beside = problem.beside_losses
        self.in_losses = {n: t for n, t in self.outer.items() if n not in beside}
        starts = problem.inner_start
        self.params = {
            n: self.outer[starts[n]].to(t)
            if starts.get(n) in self.outer
            else torch.zeros_like(t)
            for n, t in w.items()
        }

    def step(
        self,
        problem: BilevelProblem,
        step: InnerStep,
        grads: Params,
        change: Params,
        tally: Tally,
    ) -> None:
        """Go through a step whose gradient changes by `change`."""
        pushed = step.rule.pushforward(
            step.inner_params,
            step.state,
            grads,
            self.params,
            self.state,
            change,
            tangents_of_settings(problem, step.rule, step.number, self.outer),
        )
        watch_finite(tally, pushed.params)
        self.params, self.state = pushed.params, pushed.state


@torch.no_grad()
def _dot(a: Params, b: Params) -> Tensor:
    """Return the inner product in the finest dtype, on the device."""
    parts = [(tree.wide(t) * tree.wide(b[name])).sum() for name, t in a.items()]
    return torch.stack([p.to(parts[0].device) for p in parts]).sum()
