"""DARTS: one virtual step of gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hypergrad import _foreach as foreach
from hypergrad._checks import check_number
from hypergrad.estimator import Indirect, Point
from hypergrad.estimators._one_step import OneStepEstimator
from hypergrad.rules import SGD, Rule

__all__ = ["Darts"]


@dataclass(frozen=True)
class Darts(OneStepEstimator):
    r"""Differentiate through one step of gradient descent [LSY19, Eq. 7].

    $$\frac{\partial f}{\partial\lambda}(\bar w) - \xi\,
      \frac{\partial^2 g}{\partial\lambda\,\partial w}(w)\,v,\qquad
      v = \frac{\partial f}{\partial w}(\bar w),\quad \bar w = w - \xi\nabla_w g(w)$$

    Exact, up to the product, where the inner step was plain SGD with rate ξ. With
    momentum or Adam it is an approximation: `Sama` and `Unrolled` are not. Cost: a
    gradient of f and two of g (differences), or a product with the graph of the inner
    step's own gradient (exact).

    Args:
        inner_lr: ξ; None for the learning rate that the inner step had, per parameter
            group. Required where no steps are given.
        product: how the mixed product is taken: a name of
            `hypergrad.products.product_names()`, or a product such as
            `FiniteDifference(scheme="forward")`. `"auto"` takes differences where the
            loss computes in float32 or finer, and the exact product where it does not.
        product_fraction: part of the inner batch that the mixed product is taken on, its
            first examples; below 1 its cost shrinks alike, and neither a kept graph nor a
            by-product can serve.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2, f = w²/2, w = 4, λ = 0, ξ = 1/2: w̄ = 2, v = 2 and
        ∂²g/∂λ∂w = -1, so the hypergradient is ξ v = 1.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> Darts(0.5, product="exact").estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        1.0
    """

    name: ClassVar[str] = "darts"
    inner_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_lr is None:
            return
        check_number("inner_lr", self.inner_lr)
        if not 0 < self.inner_lr < float("inf"):
            msg = (
                f"inner_lr={self.inner_lr} must be positive: it is the rate ξ of the "
                "virtual step. Pass None for the inner optimizer's own."
            )
            raise ValueError(msg)

    def virtual_rule(self) -> Rule | None:
        """Return gradient descent at `inner_lr`."""
        return None if self.inner_lr is None else SGD(self.inner_lr)

    def indirect(self, point: Point) -> Indirect:
        """Return -ξ times the mixed product of v at the step's own w."""
        step = point.steps[-1]
        if self.inner_lr is None:
            rates = step.rule.learning_rates(step.inner_params)
        else:
            rates = dict.fromkeys(point.v, self.inner_lr)
        if not point.v:
            return self._mixed(point, step, {})
        with torch.no_grad():
            moved = foreach.mul(list(point.v.values()), [-rates[n] for n in point.v])
        return self._mixed(point, step, dict(zip(point.v, moved, strict=True)))
