"""A multiple of the identity in the place of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hypergrad import tree
from hypergrad.solvers.base import Matvec, Solver, SolveResult
from hypergrad.solvers.neumann import check_scale
from hypergrad.tree import Params

__all__ = ["IdentitySolver"]


@dataclass(frozen=True)
class IdentitySolver(Solver):
    """Return `scale` times b: no product at all (T1-T2) [LBGR16].

    Args:
        scale: the multiple; exact where H is 1/scale times the identity.

    Raises:
        ValueError: `scale` is not positive.

    Example:
        >>> import torch
        >>> b = {"w": torch.tensor([2.0])}
        >>> IdentitySolver(0.5).solve(lambda v: v, b).x["w"]
        tensor([1.])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(float(self.scale))

    def solve(
        self, matvec: Matvec, b: Params, state: Mapping[str, Tensor] | None = None
    ) -> SolveResult:
        """Return the scaled right-hand side."""
        del matvec, state
        return SolveResult(tree.scale(b, self.scale))
