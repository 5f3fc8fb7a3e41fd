"""CG on a preconditioned system, from a start other than 0."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.solvers.base import Matvec, flatten, product, working_dtype
from hypergrad.solvers.krylov import Array, Krylov
from hypergrad.solvers.nystrom import LowRank
from hypergrad.tree import Params

__all__ = ["Change", "Start", "galerkin", "ritz_values"]

_LEAST = 1e-8
"""Smallest eigenvalue of P relative to the largest: a preconditioner must be definite."""


@dataclass(frozen=True)
class Change:
    r"""The change of variables $x = P^{-1/2} y$, with P low rank plus a multiple of I.

    Attributes:
        model: the low-rank model; None for P = I.
        factors: $P^{-1/2}$ along each row of the model's basis; it is 1 off them.
        shift: δ, which P knows and the products with H therefore include.
    """

    model: LowRank | None = None
    factors: Tensor | None = None
    shift: float = 0.0

    @classmethod
    def by(cls, model: LowRank, damping: float) -> Change:
        """Return the change that makes what is modelled of H + δI flat [FTU21, Eq. 5.3]."""
        if not len(model.eigenvalues):
            return cls(shift=damping)
        # |θ|: any definite P is right, and along negative curvature this one is as good.
        theta = model.eigenvalues.abs() + damping
        theta = theta.clamp(min=_LEAST * float(theta.max()))
        return cls(model, (theta.min() / theta).sqrt(), damping)

    @property
    def least(self) -> float:
        """Smallest factor: lengths shrink by no more than that."""
        return 1.0 if self.factors is None else float(self.factors.min())

    def shrink(self, vector: Tensor) -> Tensor:
        """Return $P^{-1/2}$ times a flat vector."""
        if self.model is None or self.factors is None:
            return vector
        return self.model.apply(vector, self.factors, 1.0)

    def grow(self, vector: Tensor) -> Tensor:
        """Return $P^{1/2}$ times a flat vector."""
        if self.model is None or self.factors is None:
            return vector
        return self.model.apply(vector, 1.0 / self.factors, 1.0)

    def of(self, matvec: Matvec, like: Params) -> Matvec:
        r"""Return $P^{-1/2}(H + \delta I)P^{-1/2}$ as a map of one flat vector."""

        def changed(vector: Params) -> Params:
            x = self.shrink(vector[""])
            return {"": self.shrink(product(matvec, x, like) + self.shift * x)}

        return changed


@dataclass(frozen=True)
class Start:
    """Where a solve begins, for a right-hand side of norm 1.

    Attributes:
        x: the first iterate, flat.
        left: what it leaves of the right-hand side.
        n_matvec: products that this took.
    """

    x: Tensor
    left: Tensor
    n_matvec: int = 0

    @classmethod
    def cold(cls, b: Params, size: float) -> Start:
        """Start from 0."""
        rhs = flatten({name: tree.wide(t) / size for name, t in b.items()})
        rhs = rhs.to(working_dtype(b))
        return cls(torch.zeros_like(rhs), rhs)

    def warm(self, matvec: Matvec, b: Params, damping: float, x: Tensor) -> Start:
        """Start from the multiple of x that leaves least, at one product."""
        x = x.to(self.x)
        curved = product(matvec, x, b) + damping * x
        along = tree.wide(curved)
        length, overlap = tree.read(
            [torch.dot(along, along), torch.dot(along, tree.wide(self.left))]
        )
        if not 0.0 < length < float("inf"):
            return replace(self, n_matvec=1)
        multiple = overlap / length
        return Start(multiple * x, self.left - multiple * curved, 1)


def ritz_values(krylov: Krylov, change: Change) -> tuple[Array, Tensor]:
    """Return the Ritz values of H on the space of the iterates, and its Gram matrix."""
    t = torch.from_numpy(krylov.matrix())
    rows = krylov.basis[: len(t)]
    shrunk = tree.wide(torch.stack([change.shrink(row) for row in rows])).cpu()
    gram = shrunk @ shrunk.T
    root = torch.linalg.cholesky(gram)
    half = torch.linalg.solve_triangular(root, t, upper=False)
    whole = torch.linalg.solve_triangular(root, half.T, upper=False)
    ritz = torch.linalg.eigvalsh((whole + whole.T) / 2) - change.shift
    return ritz.numpy(), gram


def galerkin(
    krylov: Krylov,
    change: Change,
    start: Start,
    gram: Tensor,
    raised: float,
    known: float,
) -> tuple[Tensor, float]:
    """Return the iterate for a damping that may have been raised, and its residual.

    Args:
        krylov: basis of the changed system, first vector along what the start leaves.
        change: the change of variables.
        start: where the solve began.
        gram: of the space of the iterates.
        raised: the damping to solve for.
        known: the damping that `start.left` was computed with.
    """
    t = torch.from_numpy(krylov.matrix())
    rows = krylov.basis[: len(t)]
    rhs = torch.zeros(len(t), dtype=torch.float64)
    rhs[0] = krylov.norm
    # A start leaves another rest under another damping.
    rest = (raised - known) * start.x
    rhs -= torch.mv(tree.wide(rows), tree.wide(change.shrink(rest))).cpu()
    y = torch.linalg.solve(t + (raised - change.shift) * gram, rhs)
    along = y.to(rows.dtype).to(rows.device)
    step = change.shrink(torch.mv(rows.T, along))
    # H times the step is known from the recurrence, without a product.
    image = torch.mv(rows.T, torch.mv(t.to(rows), along))
    if len(krylov.basis) > len(t):
        image = image + float(krylov.off_diagonal[-1] * y[-1]) * krylov.basis[len(t)]
    moved = change.grow(image) + (raised - change.shift) * step
    left = start.left - rest - moved
    return start.x + step, float(torch.linalg.vector_norm(tree.wide(left)))
