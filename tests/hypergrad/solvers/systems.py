"""Linear systems with prescribed eigenvalues, and their solution in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

F64 = torch.float64
Named = dict[str, Tensor]


@dataclass
class System:
    """A symmetric H with known eigenvalues, applied in the dtype of what it is given.

    Attributes:
        eigenvalues: of H.
        vectors: its eigenvectors, as columns.
        calls: number of products so far.
    """

    eigenvalues: Tensor
    vectors: Tensor
    calls: int = 0
    cache: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.eigenvalues.numel()

    @property
    def matrix(self) -> Tensor:
        return (self.vectors * self.eigenvalues) @ self.vectors.T

    @property
    def cond(self) -> float:
        return float(self.eigenvalues.max() / self.eigenvalues.min())

    def matvec(self, v: Named) -> Named:
        self.calls += 1
        dtype = v["w"].dtype
        if dtype not in self.cache:
            self.cache[dtype] = self.matrix.to(dtype)
        return {"w": self.cache[dtype] @ v["w"]}

    def solution(self, b: Tensor, damping: float = 0.0) -> Tensor:
        """Return (H + δI)⁻¹ b by the eigenvectors, independent of any solver."""
        along = self.vectors.T @ b.double()
        return self.vectors @ (along / (self.eigenvalues + damping))

    def residual(self, x: Tensor, b: Tensor, damping: float = 0.0) -> float:
        """Return the true relative residual, in float64."""
        r = self.matrix @ x.double() + damping * x.double() - b.double()
        return float(r.norm() / b.double().norm())


def system(eigenvalues: Iterable[float] | Tensor, seed: int = 0) -> System:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(
        eigenvalues if isinstance(eigenvalues, Tensor) else list(eigenvalues), dtype=F64
    )
    n = values.numel()
    make = torch.Generator().manual_seed(seed)
    random = torch.randn(n, n, dtype=F64, generator=make)
    return System(values, torch.linalg.qr(random).Q)


def spread(n: int, cond: float, seed: int = 0) -> System:
    """Return a positive definite matrix, eigenvalues log-spaced in [1/cond, 1]."""
    return system(torch.logspace(0, 1, n, base=1 / cond, dtype=F64), seed)


def rhs(n: int, seed: int = 1, dtype: torch.dtype = F64) -> Named:
    """Return a random right-hand side."""
    make = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(n, dtype=F64, generator=make).to(dtype)}


def diagonal(values: list[float]) -> Callable[[Named], Named]:
    """Return the product with a diagonal matrix."""

    def matvec(v: Named) -> Named:
        return {"w": torch.tensor(values, dtype=v["w"].dtype) * v["w"]}

    return matvec
