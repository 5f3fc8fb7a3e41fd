r"""A symmetric map on the Krylov space of one vector (Lanczos) [L50; GV13, §10.1].

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
from hypergrad.solvers.base import (
    Matvec,
    check_finite_rhs,
    flatten,
    product,
    resolution,
    unflatten,
    working_dtype,
)
from hypergrad.tree import Params

__all__ = ["Krylov", "is_zero", "lanczos", "positive_damping"]

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
        eps: rounding unit of the products.
        asymmetry: largest part of QᵀHQ that a symmetric H does not have, relative to
            the largest eigenvalue; rounding where H is symmetric.
    """

    basis: Tensor
    diagonal: Tensor
    off_diagonal: Tensor
    norm: float
    eps: float
    asymmetry: float

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
        y = coefficients * self.norm
        # |b| may be out of float32's range where the basis is not: scale at the end.
        size = float(y.abs().max()) or 1.0
        x = torch.mv(rows.T, (y / size).to(rows.dtype).to(rows.device))
        return unflatten(tree.wide(x) * size, like)


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

    Example:
        b is an eigenvector: one product tells all.

        >>> import torch
        >>> b = {"w": torch.tensor([0.0, 2.0])}
        >>> krylov = lanczos(lambda v: {"w": torch.tensor([1.0, 3.0]) * v["w"]}, b, 5)
        >>> krylov.matrix(), krylov.norm
        (tensor([[3.]], dtype=torch.float64), 2.0)
    """
    size = tree.norm(b)
    check_finite_rhs(size)
    if size == 0.0:
        return None
    dtype = working_dtype(b)
    first = flatten({n: tree.wide(t) / size for n, t in b.items()}).to(dtype)
    n = first.numel()
    max_iter = min(max_iter, n)
    most = min(max_iter + 1, n)
    basis = first.new_empty(min(most, 16), n)
    basis[0] = first
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    spread = asymmetry = 0.0
    for k in range(max_iter):
        z = product(matvec, basis[k], b)
        alpha = float(torch.dot(tree.wide(basis[k]), tree.wide(z)))
        known = basis[: k + 1]
        overlap = torch.mv(known, z)
        z = z - torch.mv(known.T, overlap)
        z = z - torch.mv(known.T, torch.mv(known, z))
        beta = float(torch.linalg.vector_norm(tree.wide(z)))
        spread = max(spread, abs(alpha) + beta)
        if k:
            # Symmetry: Hq_k reaches back to q_{k-1} alone, by the same coupling.
            overlap[k - 1] -= off_diagonal[-1]
            astray = float(torch.linalg.vector_norm(tree.wide(overlap[:k])))
            asymmetry = max(asymmetry, astray)
        # Below this the remainder is rounding: the space is invariant under H.
        exhausted = k + 1 == n or beta <= 10 * torch.finfo(dtype).eps * spread
        diagonal.append(alpha)
        off_diagonal.append(0.0 if exhausted else beta)
        if exhausted:
            break
        if k + 1 == len(basis):  # grow as needed: few solves come near max_iter
            room = first.new_empty(min(most, 2 * len(basis)) - len(basis), n)
            basis = torch.cat([basis, room])
        basis[k + 1] = z / beta
        if stop is not None and stop(alpha, beta):
            break
    k = len(diagonal)
    return Krylov(
        basis[: k if off_diagonal[-1] == 0.0 else k + 1],
        torch.tensor(diagonal, dtype=torch.float64),
        torch.tensor(off_diagonal, dtype=torch.float64),
        size,
        resolution(b),
        asymmetry / spread if spread else 0.0,
    )


def is_zero(eigenvalue: float, size: float, eps: float) -> bool:
    """Return whether an eigenvalue is 0 as far as rounding lets one tell.

    Args:
        eigenvalue: of a symmetric matrix.
        size: its largest eigenvalue, in absolute value.
        eps: rounding unit of the products it was found by; they change the eigenvalues
            by about that times `size`.
    """
    return abs(eigenvalue) <= 2 * eps * size


def positive_damping(
    lowest: float, highest: float, damping: float, eps: float = 2.0**-52
) -> tuple[float, str]:
    """Return the damping that makes H positive definite, and why it was raised.

    Args:
        lowest: smallest Ritz value of H.
        highest: largest Ritz value of H.
        damping: the setting.
        eps: rounding unit of the products with H.

    Returns:
        `damping` and an empty text where `lowest + damping > 0` beyond rounding. Else a
        damping that turns the lowest eigenvalue's sign around, but leaves it at no less
        than 1e-3 of the largest, and a message. Where H = 0 there is no scale to choose
        a damping by: it stays 0.

    Example:
        Curvature -1 is turned around to +1.

        >>> damping, reason = positive_damping(-1.0, 3.0, 0.0)
        >>> damping, bool(reason), positive_damping(0.5, 3.0, 0.0)
        (2.0, True, (0.0, ''))
    """
    size = max(abs(lowest), abs(highest))
    singular = is_zero(lowest + damping, size + damping, eps)
    if lowest + damping > 0 and not singular:
        return damping, ""
    if size == 0.0:
        return 0.0, (
            "the inner Hessian is 0 along the right-hand side and damping is 0, so there "
            "is no solution: the inner loss is linear there, or does not depend on these "
            "parameters. Pass damping above 0, or look at the inner loss."
        )
    # Never below what rounding resolves, so that raising is what it is.
    floor = max(_FLOOR, 4 * eps) * (size + damping)
    raised = max(-(lowest + damping), floor) - lowest
    if singular:
        return raised, (
            f"the inner Hessian with damping {damping:.3g} is singular to working "
            f"precision (eigenvalues from {lowest:.2g} to {highest:.3g} were seen): the "
            f"inner problem has flat directions. Damping was raised to {raised:.3g}; set "
            "`damping` above 0, or add a penalty on the parameters to the inner loss."
        )
    return raised, (
        f"curvature of the inner loss is {lowest:.3g} along one direction (largest "
        f"{highest:.3g}), so the inner Hessian with damping {damping:.3g} is not "
        f"positive definite: the inner problem is not at a minimum. Damping was raised "
        f"to {raised:.3g}; set `damping` above {-lowest:.3g}, or train the inner "
        "problem longer."
    )
