"""A low-rank model of a symmetric map from a few of its products (Nyström)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_count
from hypergrad.solvers.base import (
    Matvec,
    OnFailure,
    Solver,
    SolveResult,
    check_damping,
    check_finite_product,
    check_finite_rhs,
    check_on_failure,
    check_symmetric,
    flatten,
    product,
    products,
    resolution,
    settle,
    unflatten,
    usable,
    working_dtype,
)
from hypergrad.solvers.damping import positive_damping
from hypergrad.tree import Params

__all__ = ["LowRank", "NystromSketch", "NystromSolver", "SketchKind"]

SketchKind = Literal["columns", "gaussian"]


@dataclass(frozen=True)
class LowRank:
    r"""A symmetric matrix of low rank, $U^\top \mathrm{diag}(\theta)\, U$.

    Attributes:
        basis: U, `(k, n)`, rows orthonormal, float64.
        eigenvalues: θ, `(k,)`, float64, ascending.
        asymmetry: how far the products were from those of a symmetric matrix, relative
            to the largest.
        uses: number of solves since the first sketch, this one left out.
        n_matvec: products that it took just now; 0 where it was kept.

    Example:
        Of rank 1, with eigenvalue 4 along the first axis.

        >>> import torch
        >>> model = LowRank(
        ...     torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        ...     torch.tensor([4.0], dtype=torch.float64),
        ... )
        >>> vector = torch.tensor([1.0, 1.0], dtype=torch.float64)
        >>> model.apply(vector, 1 / model.eigenvalues, 0.0)
        tensor([0.2500, 0.0000], dtype=torch.float64)
    """

    basis: Tensor
    eigenvalues: Tensor
    asymmetry: float = 0.0
    uses: int = 0
    n_matvec: int = 0

    def apply(self, vector: Tensor, inside: Tensor, outside: float) -> Tensor:
        """Return the map that is `inside` along each row of U and `outside` off them."""
        along = torch.mv(self.basis, vector.to(self.basis.dtype))
        factor = (inside - outside).to(along)
        step = torch.mv(self.basis.T, factor * along)
        return outside * vector + step.to(vector.dtype)

    def state(self) -> dict[str, Tensor]:
        """Return it as tensors, for a later solve."""
        return {
            "sketch_basis": self.basis,
            "sketch_eigenvalues": self.eigenvalues,
            "sketch_uses": torch.tensor(self.uses + 1),
        }


@dataclass(frozen=True)
class NystromSketch:
    r"""Learn a low-rank model of H from k products $Y = H\Omega$ [FTU21, Alg. 2.1].

    $$\hat H = Y (\Omega^\top Y)^{+} Y^\top$$

    With `"columns"`, Ω picks k columns of H at random, as [HY23]; with `"gaussian"` it
    is a random orthonormal basis, which sees all of H at once. Both are drawn from a
    generator of their own, so that a sketch neither reads nor moves torch's.

    Args:
        rank: k; at most n is used, where the model is H itself.
        kind: what Ω is.
        every: number of solves that share a sketch, by the state they hand on.
        seed: of Ω; each new sketch in a sequence of solves draws another.

    Raises:
        TypeError: a count that is not a whole number.
        ValueError: a setting out of range.

    Example:
        A matrix of rank one is known from one product.

        >>> import torch
        >>> b = {"w": torch.ones(2, dtype=torch.float64)}
        >>> ones = lambda v: {"w": v["w"].sum() * torch.ones_like(v["w"])}
        >>> model = NystromSketch(1).learn(ones, b, {})
        >>> [round(x, 9) for x in model.eigenvalues.tolist()]
        [2.0]
    """

    rank: int = 10
    _: KW_ONLY
    kind: SketchKind = "gaussian"
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("every", self.every)
        check_count("seed", self.seed, least=0)
        if self.kind not in get_args(SketchKind):
            known = ", ".join(map(repr, get_args(SketchKind)))
            msg = f"kind={self.kind!r} is unknown; choose one of {known}."
            raise ValueError(msg)

    def learn(self, matvec: Matvec, b: Params, state: Mapping[str, Tensor]) -> LowRank:
        """Return the model kept in `state`, or a new one where its time is up.

        Args:
            matvec: v -> Hv.
            b: tells names, shapes and dtypes of v.
            state: of an earlier solve; empty for a cold start.

        Returns:
            The model, and how many products it took.
        """
        n = sum(t.numel() for t in b.values())
        rank = min(self.rank, n)
        basis, theta = state.get("sketch_basis"), state.get("sketch_eigenvalues")
        uses = int(state.get("sketch_uses", torch.tensor(0)))
        if (
            basis is not None
            and theta is not None
            and uses % self.every
            and usable(basis, (len(theta), n))
            and usable(theta, theta.shape)
        ):
            return LowRank(basis, theta, uses=uses)
        omega = self._test_matrix(n, rank, uses // self.every)
        y = tree.wide(products(matvec, omega, b))
        omega = tree.wide(omega.to(y.device))
        core = omega @ y.T
        largest = float(core.abs().max()) or 1.0
        skew = float((core - core.T).abs().max()) / largest
        theta, vectors = torch.linalg.eigh((core + core.T) / 2)
        # Below this an eigenvalue of the core is rounding, and its inverse is noise.
        size = float(theta.abs().max())
        # The rounding of k products is as a random matrix: its norm grows as √k.
        noise = 4 * math.sqrt(rank) * resolution(b)
        kept = theta.abs() > noise * size
        if not bool(kept.any()):
            return LowRank(y[:0], theta[:0].cpu(), skew, uses, rank)
        # Yᵀ = QR: the model is Q (R core⁺ Rᵀ) Qᵀ, whose middle is small and symmetric.
        q, r = torch.linalg.qr(y.T)
        middle = r @ vectors[:, kept]
        small = (middle / theta[kept]) @ middle.T
        eigenvalues, turn = torch.linalg.eigh((small + small.T) / 2)
        # Rank is lost where core was singular: those directions are not known to be flat.
        known = eigenvalues.abs() > noise * eigenvalues.abs().max()
        basis = (q @ turn[:, known]).T
        return LowRank(basis, eigenvalues[known].cpu(), skew, uses, rank)

    def _test_matrix(self, n: int, rank: int, number: int) -> Tensor:
        """Return Ω, `(rank, n)`, rows orthonormal."""
        make = torch.Generator().manual_seed(self.seed + number)
        if self.kind == "columns":
            omega = torch.zeros(rank, n, dtype=torch.float64)
            chosen = torch.randperm(n, generator=make)[:rank]
            omega[torch.arange(rank), chosen] = 1.0
            return omega
        drawn = torch.randn(n, rank, generator=make, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0].T


@dataclass(frozen=True)
class NystromSolver(Solver):
    r"""Invert a low-rank model of H plus damping, in closed form [HY23, Eq. 6].

    $$x = U^\top (\Theta + \delta)^{-1} U b + \tfrac1\delta\,(I - U^\top U)\,b,\qquad
      \hat H = U^\top\Theta\, U$$

    Exact where the rank is that of H, and so at full rank for every δ. Below it,
    directions that the model does not know count as flat: their part of b is divided by
    δ alone, which is right where H is small along them compared with δ and far too
    large where it is not. The residual, which one further product tells, says which.

    Differs from the source: Woodbury's formula in the eigenvectors of the model, which
    loses no digits as δ → 0.

    Args:
        rank: k, the number of products that the model is learned from.
        damping: δ; raised where the model has negative eigenvalues, or where δ = 0 and
            the rank is below n.
        kind: which products; see `NystromSketch`.
        every: number of solves that share a model.
        seed: of the model.
        on_failure: `"warn"`, `"raise"` or `"return"` where damping was raised, H is not
            symmetric, or the residual is above 1.

    Raises:
        TypeError: a count that is not a whole number.
        ValueError: a setting out of range.

    Example:
        H = diag(1, 3) at full rank, δ = 1: b is divided by 2 and by 4.

        >>> import torch
        >>> h = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> b = {"w": torch.ones(2, dtype=torch.float64)}
        >>> result = NystromSolver(2, damping=1.0).solve(lambda v: {"w": h * v["w"]}, b)
        >>> result.x["w"].mul(8).round().tolist(), result.n_matvec
        ([4.0, 2.0], 3)
    """

    rank: int = 10
    _: KW_ONLY
    damping: float = 0.01
    kind: SketchKind = "gaussian"
    every: int = 1
    seed: int = 0
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        self._sketch()
        check_damping(self.damping)
        check_on_failure(self.on_failure)

    def _sketch(self) -> NystromSketch:
        return NystromSketch(
            self.rank, kind=self.kind, every=self.every, seed=self.seed
        )

    def solve(
        self, matvec: Matvec, b: Params, state: Mapping[str, Tensor] | None = None
    ) -> SolveResult:
        """Return the model's solution; `state` carries the model on."""
        size = tree.norm(b)
        check_finite_rhs(size)
        if size == 0.0:
            return SolveResult(
                tree.zeros_like(b), residual_norm=0.0, state=dict(state or {})
            )
        model = self._sketch().learn(matvec, b, state or {})
        n = model.basis.shape[1]
        # What the model does not know counts as flat.
        spectrum = torch.cat([model.eigenvalues, torch.zeros(1).double()])
        if len(model.basis) == n:
            spectrum = model.eigenvalues
        lowest, highest = float(spectrum.min()), float(spectrum.max())
        damping, raised = positive_damping(lowest, highest, self.damping, resolution(b))
        eps = resolution(b)
        asymmetric = check_symmetric(model.asymmetry, eps)
        scaled = flatten({name: tree.wide(t) / size for name, t in b.items()})
        if damping + highest > 0:
            outside = 1.0 / damping if len(model.basis) < n else 0.0
            x = model.apply(scaled, 1.0 / (model.eigenvalues + damping), outside)
        else:  # H = 0 and δ = 0: there is no solution
            x = torch.zeros_like(scaled)
        image = product(matvec, x.to(working_dtype(b)), b)
        residual = tree.norm([image + damping * x - scaled])
        check_finite_product(residual)
        solvable = damping + highest > 0
        far = ""
        if residual > 1.0 and solvable:
            far = (
                f"a model of rank {len(model.basis)} leaves a relative residual of "
                f"{residual:.2g}, more than zeros would: it does not know directions "
                f"along which the inner Hessian is large, and divides by the damping "
                f"{damping:.3g} there. Raise rank or damping, or take CG."
            )
        result = SolveResult(
            unflatten(tree.wide(x) * size, b),
            n_matvec=model.n_matvec + 1,
            residual_norm=residual,
            converged=solvable and not asymmetric and not far,
            reason=" ".join(filter(None, (raised, asymmetric, far))),
            damping=damping,
            curvature=(lowest, highest),
            state=model.state(),
        )
        return settle(result, self.on_failure)
