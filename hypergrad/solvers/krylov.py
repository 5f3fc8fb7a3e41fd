r"""A symmetric map on the Krylov space of one vector (Lanczos) [GV13, §10.1].

Conjugate gradients and the truncated Neumann series both return a polynomial of H
applied to b. With an orthonormal basis Q of span{b, Hb, H²b, ...} and T = QᵀHQ, which is
tridiagonal, $p(H)b = \|b\|\,Q\,p(T)\,e_1$ for every polynomial of that degree. So one
pass of products gives the eigenvalues that matter for b, and damping and step size can be
chosen *after* it, at no further product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.solvers.base import Matvec, check_finite_rhs, flatten, unflatten
from hypergrad.tree import Params

__all__ = ["Krylov", "lanczos", "positive_damping"]

_FLOOR = 1e-3
"""Smallest eigenvalue, relative to the largest, that added damping leaves."""


@dataclass(frozen=True)
class Krylov:
    """An orthonormal basis of the Krylov space of b, and H on it.

    Attributes:
        basis: `(m, n)`, rows orthonormal to rounding, first row b / |b|; m is k + 1, or
            k where the space is invariant.
        diagonal: `(k,)` diagonal of T, float64; k the number of products taken.
        off_diagonal: `(k,)`, the last one couples to the next basis vector; 0 where the
            space is invariant.
        norm: |b|.
    """

    basis: Tensor
    diagonal: Tensor
    off_diagonal: Tensor
    norm: float

    @property
    def steps(self) -> int:
        """Number k of products taken."""
        return self.diagonal.numel()

    def matrix(self, size: int | None = None) -> Tensor:
        """Return T, `(size, size)`; what lies beyond the k-th diagonal entry is 0."""
        size = self.steps if size is None else size
        t = torch.zeros(size, size, dtype=torch.float64)
        k = min(size, self.steps)
        t[range(k), range(k)] = self.diagonal[:k]
        coupled = min(size - 1, self.steps)
        rows = torch.arange(coupled)
        t[rows, rows + 1] = t[rows + 1, rows] = self.off_diagonal[:coupled]
        return t

    def combine(self, coefficients: Tensor, like: Params) -> Params:
        """Return |b| Qᵀ `coefficients` as a dictionary shaped like `like`."""
        rows = self.basis[: coefficients.numel()]
        y = (coefficients * self.norm).to(rows.device)
        # |b| may be out of float32's range where the basis is not: scale at the end.
        size = float(y.abs().max()) or 1.0
        x = torch.mv(rows.T, (y / size).to(rows.dtype))
        return unflatten((x.double() * size).to(rows.dtype), like)


def lanczos(
    matvec: Matvec,
    b: Params,
    max_iter: int,
    stop: Callable[[float, float], bool] | None = None,
) -> Krylov | None:
    """Build the Krylov basis of b with full re-orthogonalisation.

    Keeping and re-orthogonalising against all vectors (twice, which is enough) is what
    makes the method finish within n steps in floating point. It takes k·n numbers of
    memory; adapters are small, and `max_iter` bounds it.

    Args:
        matvec: v -> Hv.
        b: the first vector.
        max_iter: largest number of products.
        stop: called with each new diagonal and off-diagonal entry; ends the pass where
            it returns True.

    Returns:
        The basis, or None where b = 0.
    """
    size = tree.norm(b)
    check_finite_rhs(size)
    if size == 0.0:
        return None
    first = flatten({n: t.detach().double() / size for n, t in b.items()})
    dtype = torch.float32
    for t in b.values():
        dtype = torch.promote_types(dtype, t.dtype)
    first = first.to(dtype)
    n = first.numel()
    max_iter = min(max_iter, n)
    basis = torch.empty(min(max_iter + 1, n), n, dtype=dtype, device=first.device)
    basis[0] = first
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    spread = 0.0
    for k in range(max_iter):
        z = flatten(matvec(unflatten(basis[k], b))).to(dtype)
        alpha = float(torch.dot(basis[k].double(), z.double()))
        known = basis[: k + 1]
        for _ in range(2):
            z = z - torch.mv(known.T, torch.mv(known, z))
        beta = float(torch.linalg.vector_norm(z, dtype=torch.float64))
        spread = max(spread, abs(alpha) + beta)
        # Below this the remainder is rounding: the space is invariant under H.
        exhausted = k + 1 == n or beta <= 10 * torch.finfo(dtype).eps * spread
        diagonal.append(alpha)
        off_diagonal.append(0.0 if exhausted else beta)
        if exhausted:
            break
        basis[k + 1] = z / beta
        if stop is not None and stop(alpha, beta):
            break
    k = len(diagonal)
    return Krylov(
        basis[: k if off_diagonal[-1] == 0.0 else k + 1],
        torch.tensor(diagonal, dtype=torch.float64),
        torch.tensor(off_diagonal, dtype=torch.float64),
        size,
    )


def positive_damping(
    lowest: float, highest: float, damping: float
) -> tuple[float, str]:
    """Return the damping that makes H positive definite, and why it was raised.

    Args:
        lowest: smallest Ritz value of H.
        highest: largest Ritz value of H.
        damping: the setting.

    Returns:
        `damping` and an empty text where `lowest + damping > 0`. Else a damping that
        turns the lowest eigenvalue's sign around, but leaves it at no less than 1e-3 of
        the largest, and a message.
    """
    if lowest + damping > 0:
        return damping, ""
    size = max(abs(lowest), abs(highest))
    target = max(-(lowest + damping), _FLOOR * size)
    raised = target - lowest
    return raised, (
        f"curvature of the inner loss is {lowest:.3g} along one direction (largest "
        f"{highest:.3g}), so the inner Hessian with damping {damping:.3g} is not "
        f"positive definite: the inner problem is not at a minimum. Damping was raised "
        f"to {raised:.3g}; set `damping` above {-lowest:.3g}, or train the inner "
        "problem longer."
    )
