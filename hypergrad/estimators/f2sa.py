"""F²SA: sequences that follow g + ν f beside the inner parameters, which follow g."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hypergrad import tree
from hypergrad._checks import check_count, check_number, check_positive
from hypergrad.estimator import (
    EstimatorState,
    HypergradEstimator,
    Needs,
    Point,
    Terms,
)
from hypergrad.estimators._penalised import (
    descend,
    difference,
    stencil,
    virtual_ends,
)
from hypergrad.rules import Rule
from hypergrad.rules.base import check_rule
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["F2SA"]


@dataclass(frozen=True)
class F2SA(HypergradEstimator):
    r"""Take differences between weights that follow g + jν f [KKW23], [CLC25].

    $$\sum_j c_j\Big(j\,\frac{\partial f}{\partial\lambda}(y_j) +
      \frac1\nu\,\frac{\partial g}{\partial\lambda}(y_j)\Big),\qquad
      y_j \approx \arg\min\,(g + j\nu f),\quad \nu = \frac1\sigma$$

    $y_0$ is w itself. The p others take each inner step with it: the same batch, random
    numbers and rule, on their own loss. $c_j$ are the coefficients of a first derivative
    from values at jν, so that the error is O(ν^p) where all are at their minima; p = 1 is
    F²SA, with $c_1 = -c_0 = 1$. The multiplier grows over the k inner steps taken,
    $\sigma_k = \sigma\,(1 + k)^a$.

    First derivatives are all it takes. Rounding of ∂g/∂λ counts σ times. Where there are
    no sequences yet (a call by hand, a comparison), they take virtual steps from w.

    Differs from the source: w is the sequence that minimises g, and one of the
    estimator's own gives way to f, where the source keeps both; so that the outer data
    has no part in training w.

    Cost: 2 gradients of each own sequence at each inner step, and an outer batch; 2 p + 1
    or 2 p + 2 (odd p) in an estimate. A copy of w and of the optimizer's state each.

    Args:
        sigma: σ, the multiplier of g at the first inner step.
        growth: a. The rates that [KKW23] prove belong to 1/7 where both losses are noisy,
            1/5 where only f is, 1/3 where none is.
        num_points: p, how many sequences of its own.
        num_steps: virtual steps that sequences begin with where there are none.
        rule: of virtual steps where no steps are given.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2, f = w²/2 at w = λ = 3, σ = 2. A virtual step of rate 1 stays at
        y₀ = 3, and leads from there to 3 - 3/2. σ (∂g/∂λ(y₁) - ∂g/∂λ(y₀)) = 2 (3/2 - 0).

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.rules import SGD
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> F2SA(2.0, num_steps=1, rule=SGD(1.0)).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        3.0
    """

    name: ClassVar[str] = "f2sa"
    without_laws: ClassVar[Mapping[str, str]] = {
        "scale": "σ weighs g against f: c times f is σ over c"
    }
    sigma: float = 10.0
    growth: float = 1 / 7
    num_points: int = 1
    num_steps: int = 10
    rule: Rule | None = None

    def __post_init__(self) -> None:
        check_positive(
            "sigma",
            self.sigma,
            "it is the multiplier of g against f. Pass e.g. 10; the error falls with its "
            "inverse, until rounding, which is multiplied by it, takes over.",
        )
        check_number("growth", self.growth)
        if not 0 <= self.growth <= 1:
            msg = (
                f"growth={self.growth} must be in [0, 1]: the multiplier grows as that "
                "power of the steps taken. Pass 0 for one that stays, or e.g. 1/7."
            )
            raise ValueError(msg)
        check_count("num_points", self.num_points)
        if self.num_points > _MOST:
            msg = (
                f"num_points={self.num_points} must be at most {_MOST}: coefficients of "
                "higher order magnify rounding, and each point is a sequence of weights. "
                "Pass 1 or 2."
            )
            raise ValueError(msg)
        check_count("num_steps", self.num_steps)
        if self.rule is not None:
            check_rule("rule", self.rule)

    @property
    def needs(self) -> Needs:
        """An outer batch at each step, first derivatives, and the last step's rule."""
        return Needs(lookback=1, order=1, outer_batch_each_step=True)

    @property
    def answers(self) -> str:
        """Where the minimum of g goes."""
        return "minimum"

    def virtual_rule(self) -> Rule | None:
        """Return the rule that was set."""
        return self.rule

    def after_inner_step(self, point: Point, step: InnerStep) -> EstimatorState:
        """Return the own sequences after a step like that of w, each on its own loss."""
        nu = self._nu(step)
        held, points, slots = self._points(point), dict[str, Any](), dict[str, Any]()
        for j in self._own:
            if held:
                at, kept = held[j], point.state["slots"][str(j)]
            else:  # They begin where w was, with the state of its optimizer.
                at = tree.clone(step.inner_params)
                kept = {n: tree.clone(slot) for n, slot in step.state.items()}
            points[str(j)], slots[str(j)] = descend(point, step.rule, at, kept, j * nu)
        return {"points": points, "slots": slots}

    def terms(self, point: Point) -> Terms:
        """Return ∂f/∂λ at w, and the rest of the difference over the sequences."""
        state = dict(point.state)
        f = point.gradients("outer", "both")
        direct, v = f.outer or {}, f.inner or {}
        if not point.problem.inner_params:
            return Terms(direct, tree.zeros_like(direct), state)
        coefficients = stencil(self.num_points)
        nu = self._nu(point.steps[-1])
        ends: dict[int, Params | None] = {0: None, **self._points(point)}
        if len(ends) == 1:
            if f.inner_norm == 0.0:
                # All sequences would be the same.
                return Terms(direct, tree.zeros_like(direct))
            nus = {j: j * nu for j in coefficients}
            ends = {**virtual_ends(point, None, self.num_steps, nus, v)}
        indirect = difference(point, direct, ends, coefficients, nu)
        return Terms(direct, indirect, state)

    @property
    def _own(self) -> list[int]:
        return [j for j in stencil(self.num_points) if j]

    def _points(self, point: Point) -> dict[int, Params]:
        """Return the own sequences by their multiple of ν; none where one is missing."""
        held = point.state.get("points", {})
        found = {j: held[str(j)] for j in self._own if str(j) in held}
        return found if len(found) == self.num_points else {}

    def _nu(self, step: InnerStep) -> float:
        return 1 / (self.sigma * (1 + (step.number or 0)) ** self.growth)


_MOST = 8
