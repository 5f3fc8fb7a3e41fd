"""The truncated Neumann series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_count, check_number
from hypergrad.solvers.base import (
    Matvec,
    OnFailure,
    Solver,
    SolveResult,
    check_damping,
    check_finite_rhs,
    check_on_failure,
    check_symmetric,
    settle,
)
from hypergrad.solvers.damping import is_zero, positive_damping
from hypergrad.solvers.krylov import lanczos
from hypergrad.tree import Params

__all__ = ["NeumannSolver", "check_scale"]


def check_scale(scale: float | str) -> None:
    """Refuse a scale that is neither `"auto"` nor positive.

    Raises:
        TypeError: another kind than a number or a name.
        ValueError: with the value.
    """
    if not isinstance(scale, str):
        check_number("scale", scale)
    good = scale == "auto" if isinstance(scale, str) else 0 < scale < float("inf")
    if not good:
        msg = (
            f"scale={scale!r} must be 'auto' or positive: the series converges for "
            "0 < scale < 2 / (largest eigenvalue of the inner Hessian + damping)."
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class NeumannSolver(Solver):
    r"""Sum the first terms of the series of an inverse [LVD20, Alg. 3].

    $$x = \alpha \sum_{j=0}^{k} \big(I - \alpha (H + \delta I)\big)^j\, b$$

    Error at most $\|I - \alpha(H + \delta I)\|^{k+1}$ of the solution; exact as k → ∞
    for $0 < \alpha < 2 / (\lambda_{max} + \delta)$.

    Differs from the source: the terms are taken on an orthonormal basis of the same
    Krylov space, where they are the same, so that the largest eigenvalue (and with it α)
    and negative curvature are known without power iterations.

    `scale="auto"` is 1 / (Λ + δ). Each Ritz value θ has a coupling c to what lies
    outside the Krylov space, and H an eigenvalue between θ - c and θ + c; Λ is the
    largest θ + c. H may have larger eigenvalues that b hardly contains. They do no harm
    within k terms: the norm of each term is at most that of b, of the last one at most
    √(k+1) times it.

    Args:
        num_terms: k, the largest number of products with H.
        scale: α, or `"auto"`.
        damping: δ. With `scale="auto"` it is raised where curvature is negative.
        on_failure: `"warn"`, `"raise"` or `"return"` where the series would diverge,
            curvature is negative or H is not symmetric. Where H = 0 and δ = 0 there is
            nothing to learn α from, and zeros are returned with the reason.

    Raises:
        TypeError: `num_terms` is not a whole number.
        ValueError: a setting out of range.

    Example:
        H = 1, α = 1/2: 1/2 (1 + 1/2 + 1/4) = 7/8 of the solution.

        >>> import torch
        >>> b = {"w": torch.tensor([8.0])}
        >>> NeumannSolver(2, scale=0.5).solve(lambda v: v, b).x["w"]
        tensor([7.])
    """

    num_terms: int = 10
    _: KW_ONLY
    scale: float | Literal["auto"] = "auto"
    damping: float = 0.0
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        check_count("num_terms", self.num_terms, least=0)
        check_scale(self.scale)
        check_damping(self.damping)
        check_on_failure(self.on_failure)
        if self.scale == "auto" and self.num_terms == 0:
            msg = "num_terms=0 takes no product to learn a scale from; pass scale."
            raise ValueError(msg)

    def solve(
        self, matvec: Matvec, b: Params, state: Mapping[str, Tensor] | None = None
    ) -> SolveResult:
        """Return the truncated series; `state` tells the Λ that was used."""
        del state  # each solve learns its own
        if self.num_terms == 0:
            check_finite_rhs(tree.norm(b))
            return settle(
                SolveResult(tree.scale(b, float(self.scale)), damping=self.damping),
                self.on_failure,
            )
        krylov = lanczos(matvec, b, self.num_terms)
        if krylov is None:
            return SolveResult(tree.zeros_like(b), residual_norm=0.0)
        ritz, vectors = np.linalg.eigh(krylov.matrix())
        lowest, highest = float(ritz[0]), float(ritz[-1])
        coupling = np.abs(krylov.off_diagonal[-1] * vectors[-1])
        bound = float((ritz + coupling).max())
        damping, raised = self.damping, ""
        if self.scale == "auto":
            # Flat directions are harmless: there, each term adds α times b.
            flat = is_zero(lowest + damping, bound + damping, krylov.eps)
            if not flat or bound + damping == 0.0:
                damping, raised = positive_damping(lowest, bound, damping, krylov.eps)
            scale = 1.0 / (bound + damping) if bound + damping > 0 else 0.0
        else:
            scale = self.scale
        diverges = self._diverges(lowest, highest, damping, scale, krylov.eps)
        t = krylov.matrix(krylov.basis.shape[0])
        identity = np.eye(len(t))
        step = identity - scale * (t + damping * identity)
        term = total = identity[0]
        for _ in range(self.num_terms):
            term = step @ term
            total = total + term
        asymmetric = check_symmetric(krylov.asymmetry, krylov.eps)
        result = SolveResult(
            krylov.combine(scale * total, b),
            n_matvec=krylov.steps,
            residual_norm=float(np.linalg.norm(term)),
            converged=scale > 0 and not diverges and not asymmetric,
            reason=" ".join(filter(None, (raised, diverges, asymmetric))),
            damping=damping,
            curvature=(lowest, highest),
            state={"lambda_max": torch.tensor(bound, dtype=torch.float64)},
        )
        size = scale * float(np.linalg.norm(total)) * krylov.norm
        return settle(result, self.on_failure, size)

    def _diverges(
        self, lowest: float, highest: float, damping: float, scale: float, eps: float
    ) -> str:
        """Return why the series diverges; empty where it does not."""
        if self.scale == "auto":
            return ""
        top = highest + damping
        if scale * top >= 2:
            return (
                f"the Neumann series diverges: scale {scale:.3g} times the largest "
                f"eigenvalue {highest:.3g} plus damping {damping:.3g} is "
                f"{scale * top:.3g}, and must be below 2. Pass scale='auto', or one below "
                f"{2 / top:.3g}."
            )
        flat = is_zero(lowest + damping, top, eps)
        if lowest + damping < 0 and not flat:
            return (
                f"the Neumann series diverges: curvature of the inner loss is "
                f"{lowest:.3g} along one direction and damping is {damping:.3g}. Pass "
                f"scale='auto', or damping above {-lowest:.3g}."
            )
        if lowest == highest == damping == 0.0:
            return (
                "the Neumann series diverges: the inner Hessian is 0 along the right-hand "
                "side and damping is 0, so that each term is as large as the last. Pass "
                "damping above 0, or look at the inner loss."
            )
        return ""
