"""A multiple of the identity in the place of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_number
from hypergrad.solvers.base import (
    Matvec,
    Solver,
    SolveResult,
    check_finite_rhs,
    settle,
)
from hypergrad.tree import Params

__all__ = ["IdentitySolver"]


@dataclass(frozen=True)
class IdentitySolver(Solver):
    """Return `scale` times b: no product at all (T1-T2) [LBGR16].

    Args:
        scale: the multiple; exact where H is 1/scale times the identity.

    Raises:
        TypeError: `scale` is not a number.
        ValueError: `scale` is not positive and finite.

    Example:
        >>> import torch
        >>> b = {"w": torch.tensor([2.0])}
        >>> IdentitySolver(0.5).solve(lambda v: v, b).x["w"]
        tensor([1.])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale)
        if not 0 < self.scale < float("inf"):
            msg = (
                f"scale={self.scale} must be positive and finite: it stands in for the "
                "inverse of the inner Hessian. Pass about 1 / (its eigenvalues)."
            )
            raise ValueError(msg)

    def solve(
        self, matvec: Matvec, b: Params, state: Mapping[str, Tensor] | None = None
    ) -> SolveResult:
        """Return the scaled right-hand side; whether it solves anything is not known."""
        del matvec, state
        check_finite_rhs(tree.norm(b))
        return settle(SolveResult(tree.scale(b, self.scale)), "return")
