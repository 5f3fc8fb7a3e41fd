r"""A symmetric map on the Krylov space of one vector (Lanczos) [L50; GV13, §10.1].

Conjugate gradients and the truncated Neumann series both return a polynomial of H
applied to b. With an orthonormal basis Q of span{b, Hb, H²b, ...} and T = QᵀHQ, which is
tridiagonal, $p(H)b = \|b\|\,Q\,p(T)\,e_1$ for every polynomial of that degree. So one
pass of products gives the eigenvalues that matter for b, and damping and step size can be
chosen *after* it, at no further product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.solvers.base import (
    Matvec,
    check_finite_product,
    check_finite_rhs,
    flatten,
    product,
    resolution,
    unflatten,
    working_dtype,
)
from hypergrad.tree import Params

__all__ = ["Array", "Krylov", "lanczos"]

Array = npt.NDArray[np.floating[Any]]
"""Numbers on the host: matrices as small as the number of products."""


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
    diagonal: Array
    off_diagonal: Array
    norm: float
    eps: float
    asymmetry: float

    @property
    def steps(self) -> int:
        """Number k of products taken."""
        return len(self.diagonal)

    def matrix(self, size: int | None = None) -> Array:
        """Return T, `(size, size)`; what lies beyond the k-th diagonal entry is 0."""
        size = self.steps if size is None else size
        t = np.zeros((size, size))
        k = np.arange(min(size, self.steps))
        t[k, k] = self.diagonal[: len(k)]
        k = np.arange(min(size - 1, self.steps))
        t[k, k + 1] = t[k + 1, k] = self.off_diagonal[: len(k)]
        return t

    def combine(self, coefficients: Array, like: Params) -> Params:
        """Return |b| Qᵀ `coefficients` as a dictionary shaped like `like`."""
        rows = self.basis[: len(coefficients)]
        y = coefficients * self.norm
        # |b| may be out of float32's range where the basis is not: scale at the end.
        size = float(np.abs(y).max()) or 1.0
        x = torch.mv(rows.T, torch.from_numpy(y / size).to(rows.device, rows.dtype))
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
        (array([[3.]]), 2.0)
    """
    size = tree.norm(b)
    check_finite_rhs(size)
    if size == 0.0:
        return None
    dtype = working_dtype(b)
    first = (tree.wide(flatten(b)) / size).to(dtype)
    wide = tree.wide_dtype(first.device)
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
        known = basis[: k + 1]
        overlap = torch.mv(known, z)
        along = overlap[k]
        if dtype != wide:
            along = torch.dot(basis[k].to(wide), z.to(wide))
        # Twice is enough.
        z -= torch.mv(known.T, overlap)
        z -= torch.mv(known.T, torch.mv(known, z))
        rest = torch.linalg.vector_norm(z, dtype=wide)
        numbers = torch.cat([overlap[:k], torch.stack([along, rest])])
        *astray, alpha, beta = numbers.tolist()
        check_finite_product(alpha, beta)
        spread = max(spread, abs(alpha) + beta)
        if k:
            # Symmetry: Hq_k reaches back to q_{k-1} alone, by the same coupling.
            astray[-1] -= off_diagonal[-1]
            asymmetry = max(asymmetry, math.hypot(*astray))
        # Below this the remainder is rounding: the space is invariant under H.
        exhausted = k + 1 == n or beta <= 10 * torch.finfo(dtype).eps * spread
        diagonal.append(alpha)
        off_diagonal.append(0.0 if exhausted else beta)
        if exhausted:
            break
        if k + 1 == len(basis):  # grow as needed: few solves come near max_iter
            room = first.new_empty(min(most, 2 * len(basis)) - len(basis), n)
            basis = torch.cat([basis, room])
        torch.div(z, beta, out=basis[k + 1])
        if stop is not None and stop(alpha, beta):
            break
    k = len(diagonal)
    return Krylov(
        basis[: k if off_diagonal[-1] == 0.0 else k + 1],
        np.array(diagonal),
        np.array(off_diagonal),
        size,
        resolution(b),
        asymmetry / spread if spread else 0.0,
    )
