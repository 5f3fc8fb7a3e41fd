"""The simulated bilevel problem of benchmark_bilevel [DAVM22]: quadratic at both levels.

From that repository's description and `benchmark_utils/gen_matrices.py`, written anew: g
and f are means over samples of

    ½ wᵀ x xᵀ w + ½ λᵀ y yᵀ λ + λᵀ a bᵀ w + cᵀ w + dᵀ λ

where x, y, a, b, c, d are drawn for each sample: x and y with covariances whose
eigenvalues lie evenly between μ and 1 on a log scale (y's has a 0 besides), a and b so
that the mean of a bᵀ is a matrix whose singular values do, and standard normal c and d.
The curvature of a sample is of rank one, that of the mean positive definite, and the value
function F(λ) = f(w*(λ), λ) is quadratic in closed form.

Differs from the source: samples keep their vectors and not the matrices made of them;
problems are drawn anew until F is convex by its own Hessian, with the mixed term in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hypergrad import BilevelProblem

F64 = torch.float64
TRIES = 20


@dataclass(frozen=True)
class Quadratic:
    """½ wᵀ A w + ½ λᵀ B λ + λᵀ C w + cᵀ w + dᵀ λ."""

    inner: Tensor
    outer: Tensor
    mixed: Tensor
    inner_linear: Tensor
    outer_linear: Tensor

    def __call__(self, w: Tensor, lam: Tensor) -> Tensor:
        curved = w @ self.inner @ w + lam @ self.outer @ lam
        return (
            curved / 2
            + lam @ self.mixed @ w
            + self.inner_linear @ w
            + self.outer_linear @ lam
        )


@dataclass(frozen=True)
class Samples:
    """Vectors of each sample: x, y, a, b, c, d; one in a row."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    def loss(self, w: Tensor, lam: Tensor, batch: slice | None) -> Tensor:
        """Return the mean over a batch; None for all samples, by their mean matrices."""
        if batch is None:
            return self.mean(w, lam)
        curved = (self.x[batch] @ w).square() + (self.y[batch] @ lam).square()
        mixed = (self.a[batch] @ lam) * (self.b[batch] @ w)
        return (
            (curved / 2 + mixed).mean()
            + self.c[batch].mean(0) @ w
            + self.d[batch].mean(0) @ lam
        )

    @cached_property
    def mean(self) -> Quadratic:
        """The mean over all samples."""
        n = len(self.x)
        return Quadratic(
            self.x.T @ self.x / n,
            self.y.T @ self.y / n,
            self.a.T @ self.b / n,
            self.c.mean(0),
            self.d.mean(0),
        )


@dataclass(frozen=True)
class Simulated:
    """The problem, its samples, and its value function F(λ) = ½ λᵀ Q λ + qᵀ λ + F(0).

    Attributes:
        inner: samples of g.
        outer: samples of f.
        start: λ and w that a run starts from.
    """

    inner: Samples
    outer: Samples
    start: tuple[Tensor, Tensor]

    def problem(self) -> BilevelProblem:
        """Return it with leaves of its own, at the start; a batch is a slice or None."""
        lam, w = (t.clone().requires_grad_() for t in self.start)
        return BilevelProblem(
            lambda i, o, batch: self.inner.loss(i["w"], o["lam"], batch),
            lambda i, o, batch: self.outer.loss(i["w"], o["lam"], batch),
            {"w": w},
            {"lam": lam},
        )

    # -- closed forms --------------------------------------------------------------------

    def minimum(self, lam: Tensor) -> Tensor:
        """Return w*(λ)."""
        g = self.inner.mean
        return torch.linalg.solve(g.inner, -g.inner_linear - g.mixed.T @ lam)

    @cached_property
    def response(self) -> Tensor:
        """∂w*/∂λ, which does not depend on λ."""
        g = self.inner.mean
        return -torch.linalg.solve(g.inner, g.mixed.T)

    @cached_property
    def curvature(self) -> Tensor:
        """Q, the Hessian of F."""
        f, by = self.outer.mean, self.response
        mixed = f.mixed @ by
        return by.T @ f.inner @ by + f.outer + mixed + mixed.T

    def gradient(self, lam: Tensor) -> Tensor:
        """Return ∇F: ∂f/∂λ, and ∂f/∂w through the response."""
        f, w = self.outer.mean, self.minimum(lam)
        direct = f.outer @ lam + f.mixed @ w + f.outer_linear
        v = f.inner @ w + f.mixed.T @ lam + f.inner_linear
        return direct + self.response.T @ v

    def gap(self, lam: Tensor) -> float:
        """Return F(λ) - min F, which is ½ ∇Fᵀ Q⁻¹ ∇F."""
        grad = self.gradient(lam)
        return float(grad @ torch.linalg.solve(self.curvature, grad)) / 2


# -- drawing -----------------------------------------------------------------------------


def simulated(
    n_inner: int = 32768,
    n_outer: int = 1024,
    dim_inner: int = 100,
    dim_outer: int = 10,
    mu: float = 0.1,
    cross: float = 0.1,
    seed: int = 0,
) -> Simulated:
    """Draw a problem whose value function is strictly convex.

    The defaults are those of the source's `config/quadratics_021424.yml`.
    """
    make = torch.Generator().manual_seed(seed)
    for _ in range(TRIES):
        inner, outer = (
            draw_samples(n, dim_inner, dim_outer, mu, cross, make)
            for n in (n_inner, n_outer)
        )
        start = normal(make, dim_outer), normal(make, dim_inner)
        found = Simulated(inner, outer, start)
        if float(torch.linalg.eigvalsh(found.curvature)[0]) > 1e-12:
            return found
    msg = f"none of {TRIES} problems has a convex value function: draw more samples."
    raise RuntimeError(msg)


def draw_samples(
    n: int,
    dim_inner: int,
    dim_outer: int,
    mu: float,
    cross: float,
    make: torch.Generator,
) -> Samples:
    """Draw the samples of one level."""
    both = min(dim_inner, dim_outer)
    left, right = basis(make, dim_outer)[:, :both], basis(make, dim_inner)
    # The mean of s sᵀ is the identity, so that of a bᵀ is left · diag(sizes) · rightᵀ.
    s = normal(make, n, dim_inner)
    bare = spread(mu, 1.0, dim_outer - 1)
    return Samples(
        x=normal(make, n, dim_inner) @ root(spread(mu, 1.0, dim_inner), make),
        y=normal(make, n, dim_outer) @ root(torch.cat([bare.new_zeros(1), bare]), make),
        a=(s[:, :both] * spread(mu, cross, both)) @ left.T,
        b=s @ right.T,
        c=normal(make, n, dim_inner),
        d=normal(make, n, dim_outer),
    )


def normal(make: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=make, dtype=F64)


def spread(low: float, high: float, n: int) -> Tensor:
    """Return n numbers that lie evenly on a log scale."""
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=F64)


def basis(make: torch.Generator, n: int) -> Tensor:
    return torch.linalg.qr(normal(make, n, n)).Q


def root(spectrum: Tensor, make: torch.Generator) -> Tensor:
    """Return the square root of a matrix of this spectrum in a random basis."""
    vectors = basis(make, len(spectrum))
    return (vectors * spectrum.sqrt()) @ vectors.T


def batches(n: int, size: int, seed: int) -> Iterator[slice]:
    """Yield batches of neighbours without end, each once an epoch, in a new order."""
    make = torch.Generator().manual_seed(seed)
    while True:
        for first in torch.randperm(n // size, generator=make).tolist():
            yield slice(first * size, (first + 1) * size)
