"""Implicit differentiation: a linear solver, a product, a curvature."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from hypergrad import tree
from hypergrad.estimator import HypergradEstimator, Indirect, Point, difference_info
from hypergrad.products import ProductName, Scheme, check_product, check_scheme
from hypergrad.solvers import CGSolver, Solver

__all__ = ["Implicit", "ImplicitEstimator"]


@dataclass(frozen=True)
class ImplicitEstimator(HypergradEstimator):
    """Solve with the inner Hessian, then take the mixed product; see `Implicit`."""

    _: KW_ONLY
    product: ProductName = "exact"
    scheme: Scheme = "central"
    radius: float | None = None

    def __post_init__(self) -> None:
        check_product(self.product)
        check_scheme(self.scheme, self.radius)
        self.make_solver()

    @abstractmethod
    def make_solver(self) -> Solver:
        """Return the linear solver."""

    @property
    def order(self) -> int:
        """First order where products are finite differences."""
        return 1 if self.product == "finite-difference" else 2

    def indirect(self, point: Point) -> Indirect:
        """Return -∂²g/∂λ∂w (∂²g/∂w² + δI)⁻¹ v."""
        settings: dict[str, Any] = {}
        if self.product == "finite-difference":
            settings = {"scheme": self.scheme, "radius": self.radius}
        with point.product(self.product, **settings) as product:
            solved = self.make_solver().solve(product.hvp, point.v, point.state)
            grads = tree.scale(product.mixed_vjp(solved.x), -1.0)
            info = {
                **difference_info(product),
                "residual_norm": solved.residual_norm,
                "converged": solved.converged,
                "damping": solved.damping,
                "curvature": solved.curvature,
                "reason": solved.reason,
            }
        return Indirect(grads, state=solved.state, info=info)


@dataclass(frozen=True)
class Implicit(ImplicitEstimator):
    r"""Differentiate the inner optimality condition, with any linear solver [LVD20].

    $$\frac{\mathrm d f}{\mathrm d\lambda} = \frac{\partial f}{\partial\lambda} -
      \frac{\partial^2 g}{\partial\lambda\,\partial w}
      \Big(\frac{\partial^2 g}{\partial w^2} + \delta I\Big)^{-1}
      \frac{\partial f}{\partial w}$$

    Exact where w is a minimum of g, δ = 0, and the solver is.

    Args:
        solver: any `Solver`; `ConjugateGradient` and `Neumann` are presets.
        product: how products with second derivatives are taken.
        scheme: scheme of the finite difference.
        radius: its distance in w; None for the default of the dtype.

    Raises:
        TypeError: `solver` is not a `Solver`.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2: w*(λ) = λ; f = w²/2 at w = λ = 3.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.solvers import DenseSolver
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> Implicit(DenseSolver()).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        3.0
    """

    name: ClassVar[str] = "implicit"
    solver: Solver = field(default_factory=CGSolver)
    _: KW_ONLY
    product: ProductName = "exact"
    scheme: Scheme = "central"
    radius: float | None = None

    def make_solver(self) -> Solver:
        """Return the solver that was set."""
        if not isinstance(self.solver, Solver):
            msg = (
                f"solver must be a hypergrad.solvers.Solver, got {self.solver!r}. Pass "
                "e.g. CGSolver(max_iter=50)."
            )
            raise TypeError(msg)
        return self.solver
