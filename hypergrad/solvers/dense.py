"""The Hessian as a matrix: the reference for small problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import SolveError
from hypergrad.solvers.base import (
    Matvec,
    Solver,
    SolveResult,
    check_count,
    check_damping,
    check_finite_rhs,
    flatten,
    unflatten,
)
from hypergrad.tree import Params

__all__ = ["DenseSolver"]


@dataclass(frozen=True)
class DenseSolver(Solver):
    """Build H from n products and solve by LU factorisation: exact to rounding times κ.

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
            SolveError: H + δI is singular.
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
        identity = torch.eye(n, dtype=rhs.dtype, device=rhs.device)
        hessian = torch.stack([flatten(matvec(unflatten(e, b))) for e in identity])
        hessian = ((hessian + hessian.T) / 2).double()
        eigenvalues = torch.linalg.eigvalsh(hessian)
        matrix = hessian + self.damping * identity.double()
        try:
            x = torch.linalg.solve(matrix, rhs.double())
        except torch.linalg.LinAlgError as error:
            msg = (
                f"the inner Hessian with damping {self.damping} is singular (eigenvalues "
                f"{float(eigenvalues[0]):.3g} to {float(eigenvalues[-1]):.3g}): the "
                "inner problem has flat directions. Pass damping above 0."
            )
            raise SolveError(msg) from error
        residual = torch.linalg.vector_norm(matrix @ x - rhs.double()) / size
        return SolveResult(
            unflatten(x.to(rhs.dtype), b),
            n_matvec=n,
            residual_norm=float(residual),
            damping=self.damping,
            curvature=(float(eigenvalues[0]), float(eigenvalues[-1])),
        )
