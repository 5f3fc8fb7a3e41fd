"""Implicit differentiation by a truncated Neumann series."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from hypergrad.estimators.implicit import ImplicitEstimator
from hypergrad.solvers import NeumannSolver, OnFailure, Solver

__all__ = ["Neumann"]


@dataclass(frozen=True)
class Neumann(ImplicitEstimator):
    r"""Replace the inverse Hessian by the first terms of its series [LVD20, Alg. 3].

    $$\frac{\partial f}{\partial\lambda} -
      \frac{\partial^2 g}{\partial\lambda\,\partial w}\;
      \alpha\sum_{j=0}^{k}\Big(I - \alpha\Big(\frac{\partial^2 g}{\partial w^2} +
      \delta I\Big)\Big)^{j}\frac{\partial f}{\partial w}$$

    Exact as k → ∞ for 0 < α < 2/(λ_max + δ), where w is a minimum of g. With few terms
    it is the hypergradient of about k steps of gradient descent at rate α, which damps
    flat directions: a mild default where the inner problem is far from its minimum.
    Cost: a gradient of f, the graph of one of g, and one product for each term.

    Args:
        num_terms: k.
        scale: α; `"auto"` learns it from the same products.
        damping: δ; raised where curvature is negative, and `info` says so.
        product: how products with second derivatives are taken; see `Implicit`.
        curvature: `"hessian"` or `"gauss-newton"`; see `Implicit`.
        on_failure: `"warn"`, `"raise"` or `"return"` where the series would diverge.

    Raises:
        TypeError: `num_terms` is not a whole number.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2: H = 1, ∂²g/∂λ∂w = -1; α = 1/2 and one term:
        1/2 (1 + 1/2) = 3/4 of v = 4.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(4.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> Neumann(1, scale=0.5).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        3.0
    """

    name: ClassVar[str] = "neumann"
    num_terms: int = 5
    _: KW_ONLY
    scale: float | Literal["auto"] = "auto"
    damping: float = 0.0
    on_failure: OnFailure = "warn"

    def make_solver(self) -> Solver:
        """Return the solver with these settings."""
        return NeumannSolver(
            self.num_terms,
            scale=self.scale,
            damping=self.damping,
            on_failure=self.on_failure,
        )
