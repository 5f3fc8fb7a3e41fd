"""The value function: how much worse for g are weights that give way to f."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hypergrad import tree
from hypergrad._checks import check_count, check_positive
from hypergrad.estimator import HypergradEstimator, Needs, Point, Terms
from hypergrad.estimators._penalised import difference, stencil, virtual_ends
from hypergrad.rules import Rule
from hypergrad.rules.base import check_rule

__all__ = ["Penalty"]


@dataclass(frozen=True)
class Penalty(HypergradEstimator):
    r"""Weigh the inner loss at weights that minimise g + γ f against its minimum [YLW22].

    $$\frac{\partial f}{\partial\lambda}(z) + \frac1\gamma\Big(
      \frac{\partial g}{\partial\lambda}(z) - \frac{\partial g}{\partial\lambda}(y)\Big)$$

    Both start at w and take K inner steps on copies: y on g, z on g + γ f. Where they end
    at the minima, this is the derivative in λ of $\min_z\,(f + (g - \min g)/\gamma)$, and
    its distance from the hypergradient is O(γ) [KKW23]. First derivatives are
    all it takes. Rounding of ∂g/∂λ counts 1/γ times.

    Differs from the source: γ is a setting and not chosen anew at each step, and w is not
    drawn towards f, so that the outer data has no part in training it.

    Cost: 3 K + 2 gradients, and two copies of w and of the optimizer's state.

    Args:
        gamma: γ, how much f weighs beside g.
        num_steps: K.
        rule: what the steps do, from a fresh optimizer state; None to go on as the last
            inner step, with the state after it.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2, f = w²/2 at w = λ = 3, γ = 1/2. One step of rate 1 stays at y = 3;
        on g + γ f it leads from 3 to z = 3 - 3/2. ∂g/∂λ is λ - w: 3/2 and 0.

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
        >>> Penalty(0.5, num_steps=1, rule=SGD(1.0)).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        3.0
    """

    name: ClassVar[str] = "penalty"
    without_laws: ClassVar[Mapping[str, str]] = {
        "scale": "γ weighs f against g: c times f is c times γ"
    }
    gamma: float = 0.1
    num_steps: int = 10
    rule: Rule | None = None

    def __post_init__(self) -> None:
        check_positive(
            "gamma",
            self.gamma,
            "it is how much f weighs beside g. Pass e.g. 0.1; the error falls with it, "
            "until rounding, which is divided by it, takes over.",
        )
        check_count("num_steps", self.num_steps)
        if self.rule is not None:
            check_rule("rule", self.rule)

    @property
    def needs(self) -> Needs:
        """The last inner step, where its rule is gone on with; first derivatives."""
        return Needs(lookback=0 if self.rule is not None else 1, order=1)

    @property
    def answers(self) -> str:
        """Where the minimum of g goes."""
        return "minimum"

    def terms(self, point: Point) -> Terms:
        """Return ∂f/∂λ at w, and the rest of the penalty's derivative."""
        f = point.gradients("outer", "both")
        direct, v = f.outer or {}, f.inner or {}
        if f.inner_norm == 0.0:
            # Both sequences would be the same.
            return Terms(direct, tree.zeros_like(direct))
        nus = {0: 0.0, 1: self.gamma}
        ends = virtual_ends(point, self.rule, self.num_steps, nus, v)
        indirect = difference(point, direct, ends, stencil(1), self.gamma)
        return Terms(direct, indirect)
