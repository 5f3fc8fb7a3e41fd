"""Implicit differentiation: a linear solver, a product, a curvature."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from hypergrad import tree
from hypergrad.estimator import Indirect, Needs, Point
from hypergrad.estimators._with_product import WithProduct
from hypergrad.products import (
    BoundProduct,
    Curvature,
    ProductLike,
    as_product,
    check_curvature,
)
from hypergrad.solvers import Solver, make_solver
from hypergrad.tree import Params

__all__ = ["Implicit", "ImplicitEstimator"]


@dataclass(frozen=True)
class ImplicitEstimator(WithProduct):
    """Solve with the inner Hessian, then take the mixed product; see `Implicit`."""

    _: KW_ONLY
    product: ProductLike = "exact"
    curvature: Curvature = "hessian"

    def __post_init__(self) -> None:
        as_product(self.product)
        check_curvature(self.curvature)
        self.make_solver()

    @abstractmethod
    def make_solver(self) -> Solver:
        """Return the linear solver."""

    @property
    def needs(self) -> Needs:
        """The order of the product; 1 before `auto` is resolved."""
        return Needs(order=as_product(self.product).order)

    def indirect(self, point: Point) -> Indirect:
        """Return -∂²g/∂λ∂w (∂²g/∂w² + δI)⁻¹ v."""
        with point.product(self.product, self.curvature) as product:
            solved = self.make_solver().solve(_Curved(product), point.v, point.state)
            grads = tree.scale(product.mixed_vjp(solved.x), -1.0)
        info = {
            **product.info,
            "residual_norm": solved.residual_norm,
            "converged": solved.converged,
            "damping": solved.damping,
            "curvature": solved.curvature,
            "reason": solved.reason,
        }
        return Indirect(grads, state=solved.state, info=info)


class _Curved:
    """Products with the inner curvature, as solvers call them."""

    def __init__(self, product: BoundProduct) -> None:
        self._product = product

    def __call__(self, vector: Params) -> Params:
        return self._product.hvp(vector)

    def many(self, vectors: Params) -> Params:
        return self._product.hvps(vectors)


@dataclass(frozen=True)
class Implicit(ImplicitEstimator):
    r"""Differentiate the inner optimality condition, with any linear solver [LVD20].

    $$\frac{\mathrm d f}{\mathrm d\lambda} = \frac{\partial f}{\partial\lambda} -
      \frac{\partial^2 g}{\partial\lambda\,\partial w}
      \Big(\frac{\partial^2 g}{\partial w^2} + \delta I\Big)^{-1}
      \frac{\partial f}{\partial w}$$

    Exact where w is a minimum of g, δ = 0, and the solver is. Three choices make it: how
    the system is solved, how products are taken, and what curvature they are of.
    `ConjugateGradient`, `Neumann` and `Nystrom` are presets.

    Args:
        solver: a `Solver`, or a name of `hypergrad.solvers.solver_names()` for one at
            its defaults.
        product: how products with second derivatives are taken: a name of
            `hypergrad.products.product_names()`, or a product such as
            `FiniteDifference(radius=0.1)`.
        curvature: `"hessian"`, or `"gauss-newton"` for a problem that has
            `inner_outputs`: never negative where the criterion is convex.

    Raises:
        TypeError: `solver` is neither a `Solver` nor a name.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2: w*(λ) = λ; f = w²/2 at w = λ = 3.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> Implicit("dense").estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        3.0
    """

    name: ClassVar[str] = "implicit"
    solver: Solver | str = "cg"

    def make_solver(self) -> Solver:
        """Return the solver that was set."""
        solver = self.solver
        if isinstance(solver, str):
            solver = make_solver(solver)
        if not isinstance(solver, Solver):
            msg = (
                f"solver must be a hypergrad.solvers.Solver or a name, got {solver!r}. "
                "Pass e.g. 'dense' or CGSolver(max_iter=50)."
            )
            raise TypeError(msg)
        return solver
