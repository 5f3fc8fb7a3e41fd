"""The Hessian as a matrix: the reference for small problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_count
from hypergrad.errors import SolveError
from hypergrad.solvers.base import (
    Matvec,
    Solver,
    SolveResult,
    check_damping,
    check_finite_rhs,
    check_symmetric,
    flatten,
    products,
    resolution,
    settle,
    unflatten,
)
from hypergrad.solvers.damping import is_zero
from hypergrad.tree import Params

__all__ = ["DenseSolver"]


@dataclass(frozen=True)
class DenseSolver(Solver):
    """Build H from n products and solve by LU factorisation: exact to rounding times κ.

    The factorisation is in float64 whatever the dtype of the products.

    Args:
        max_size: largest n that is accepted; H takes n² numbers.
        damping: δ.

    Raises:
        TypeError: `max_size` is not a whole number.
        ValueError: a setting out of range.

    Example:
        >>> import torch
        >>> b = {"w": torch.tensor([2.0, 4.0])}
        >>> DenseSolver().solve(lambda v: {"w": 2 * v["w"]}, b).x["w"]
        tensor([1., 2.])
    """

    max_size: int = 3000
    _: KW_ONLY
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_count("max_size", self.max_size)
        check_damping(self.damping)

    def solve(
        self, matvec: Matvec, b: Params, state: Mapping[str, Tensor] | None = None
    ) -> SolveResult:
        """Return the solution.

        Raises:
            ValueError: n is above `max_size`.
            SolveError: H + δI is singular to rounding, or H is not symmetric.
        """
        del state
        size = tree.norm(b)
        check_finite_rhs(size)
        if size == 0.0:
            return SolveResult(tree.zeros_like(b), residual_norm=0.0)
        rhs = flatten(b)
        n = rhs.numel()
        if n > self.max_size:
            msg = (
                f"a dense Hessian of {n} parameters takes {n} products and {n}² numbers;"
                f" max_size is {self.max_size}. Use CG, or raise max_size."
            )
            raise ValueError(msg)
        hessian = tree.wide(products(matvec, torch.eye(n).to(rhs), b))
        largest = float(hessian.abs().max())
        skew = float((hessian - hessian.T).abs().max())
        asymmetric = check_symmetric(skew / (largest or 1.0), resolution(b))
        if asymmetric:
            raise SolveError(asymmetric)
        hessian = (hessian + hessian.T) / 2
        eigenvalues = torch.linalg.eigvalsh(hessian)
        lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
        nearest = float((eigenvalues + self.damping).abs().min())
        if is_zero(nearest, max(-lowest, highest) + self.damping, resolution(b)):
            msg = (
                f"the inner Hessian with damping {self.damping:.3g} is singular to working "
                f"precision (eigenvalues from {lowest:.3g} to {highest:.3g}): the inner "
                "problem has flat directions. Pass damping above 0, or float64 tensors."
            )
            raise SolveError(msg)
        matrix = hessian + self.damping * torch.eye(n).to(hessian)
        x = torch.linalg.solve(matrix, tree.wide(rhs))
        residual = torch.linalg.vector_norm(matrix @ x - tree.wide(rhs)) / size
        indefinite = ""
        if lowest + self.damping < 0:
            indefinite = (
                f"curvature of the inner loss is {lowest:.3g} along one direction "
                f"(largest {highest:.3g}), so the inner problem is not at a minimum: the "
                "system was solved as it is, and its solution is not the derivative of "
                f"one. Train the inner problem longer, or set damping above {-lowest:.3g}."
            )
        result = SolveResult(
            unflatten(x, b),
            n_matvec=n,
            residual_norm=float(residual),
            damping=self.damping,
            curvature=(lowest, highest),
            reason=indefinite,
        )
        return settle(result, "return")
