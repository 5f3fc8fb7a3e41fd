"""Implicit differentiation with a low-rank model of the inner Hessian."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from hypergrad.estimators.implicit import ImplicitEstimator
from hypergrad.solvers import NystromSolver, OnFailure, SketchKind, Solver

__all__ = ["Nystrom"]


@dataclass(frozen=True)
class Nystrom(ImplicitEstimator):
    r"""Invert a low-rank model of the inner Hessian plus damping [HY23, Eq. 6].

    $$\frac{\partial f}{\partial\lambda} -
      \frac{\partial^2 g}{\partial\lambda\,\partial w}\,
      (\hat H + \delta I)^{-1}\frac{\partial f}{\partial w},\qquad
      \hat H = Y(\Omega^\top Y)^{+}Y^\top,\quad
      Y = \frac{\partial^2 g}{\partial w^2}\,\Omega$$

    Exact, for the damped inverse, where the rank reaches that of the Hessian; the true
    hypergradient as δ → 0 besides, at a minimum. Products are independent of ∂f/∂w and
    of each other: they are taken a few at a time, by one vmapped backward pass, and
    `every` estimates may share them. Cost: a gradient of f, the graph of one of g, `rank`
    products for a new model, and one for the residual that `info` reports.

    Args:
        rank: number of products that the model is learned from.
        damping: δ; what the model does not know is divided by it. Raised where the model
            has negative eigenvalues, and `info` says so.
        kind: which products: `"gaussian"` mixes all of H, `"columns"` picks some of its
            columns, as the source does.
        every: number of estimates that share a model, by their `state`.
        seed: of the model; torch's own random numbers are neither read nor moved.
        product: how products with second derivatives are taken; see `Implicit`.
        curvature: `"hessian"` or `"gauss-newton"`; see `Implicit`.
        on_failure: `"warn"`, `"raise"` or `"return"` where damping had to be raised, or
            the residual is above 1.

    Raises:
        TypeError: a count that is not a whole number.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2: H = 1, ∂²g/∂λ∂w = -1; with δ = 1, v = 4 is divided by 2.

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
        >>> Nystrom(damping=1.0).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        2.0
    """

    name: ClassVar[str] = "nystrom"
    rank: int = 10
    _: KW_ONLY
    damping: float = 0.01
    kind: SketchKind = "gaussian"
    every: int = 1
    seed: int = 0
    on_failure: OnFailure = "warn"

    def make_solver(self) -> Solver:
        """Return the solver with these settings."""
        return NystromSolver(
            self.rank,
            damping=self.damping,
            kind=self.kind,
            every=self.every,
            seed=self.seed,
            on_failure=self.on_failure,
        )
