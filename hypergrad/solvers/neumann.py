"""The truncated Neumann series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.solvers.base import (
    Matvec,
    OnFailure,
    Solver,
    SolveResult,
    check_count,
    check_damping,
    check_on_failure,
    settle,
)
from hypergrad.solvers.krylov import lanczos, positive_damping
from hypergrad.tree import Params

__all__ = ["NeumannSolver", "check_scale"]


def check_scale(scale: float | str) -> None:
    """Refuse a scale that is neither `"auto"` nor positive.

    Raises:
        ValueError: with the value.
    """
    if isinstance(scale, str):
        good = scale == "auto"
    else:
        good = 0 < scale < float("inf")
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

    Args:
        num_terms: k, the number of products with H.
        scale: α; `"auto"` for 1 / (a bound of the largest eigenvalue seen + δ).
        damping: δ. With `scale="auto"` it is raised where curvature is negative.
        on_failure: `"warn"`, `"raise"` or `"return"` where the series would diverge or
            curvature is negative.

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
        """Return the truncated series; `state` carries the largest eigenvalue seen."""
        del state
        if self.num_terms == 0:
            return SolveResult(
                tree.scale(b, float(self.scale)), damping=self.damping, converged=False
            )
        krylov = lanczos(matvec, b, self.num_terms)
        if krylov is None:
            return SolveResult(tree.zeros_like(b), residual_norm=0.0)
        ritz, vectors = torch.linalg.eigh(krylov.matrix())
        lowest = float(ritz[0])
        # What the last vector still couples to bounds how far the largest may be.
        coupling = (krylov.off_diagonal[-1] * vectors[-1]).abs()
        highest = float((ritz + coupling).max())
        damping, reason = self.damping, ""
        if self.scale == "auto":
            damping, reason = positive_damping(lowest, highest, damping)
            scale = 1.0 / (highest + damping)
        else:
            scale = self.scale
        if not 0 < scale * (float(ritz[-1]) + damping) < 2:
            reason = (
                f"the Neumann series diverges: scale {scale:.3g} times the largest "
                f"eigenvalue {float(ritz[-1]):.3g} plus damping {damping:.3g} is not "
                "between 0 and 2. Pass scale='auto', or one below "
                f"{2 / max(float(ritz[-1]) + damping, 1e-300):.3g}."
            )
        elif not reason and lowest + damping < 0:
            reason = (
                f"the Neumann series diverges: curvature of the inner loss is "
                f"{lowest:.3g} along one direction and damping is {damping:.3g}. Pass "
                f"scale='auto', or damping above {-lowest:.3g}."
            )
        t = krylov.matrix(krylov.basis.shape[0])
        term = torch.zeros(t.shape[0], dtype=torch.float64)
        term[0] = 1.0
        total = term.clone()
        for _ in range(self.num_terms):
            term = term - scale * (t @ term + damping * term)
            total = total + term
        contracts = "diverges" not in reason
        result = SolveResult(
            krylov.combine(scale * total, b),
            n_matvec=krylov.steps,
            residual_norm=float(torch.linalg.vector_norm(term)),
            converged=contracts,
            reason=reason,
            damping=damping,
            curvature=(lowest, float(ritz[-1])),
            state={"lambda_max": torch.tensor(highest, dtype=torch.float64)},
        )
        return settle(result, self.on_failure)
