"""Implicit differentiation by conjugate gradients."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from hypergrad._checks import check_count
from hypergrad.estimators.implicit import ImplicitEstimator
from hypergrad.solvers import CGSolver, NystromSketch, OnFailure, Solver

__all__ = ["ConjugateGradient"]


@dataclass(frozen=True)
class ConjugateGradient(ImplicitEstimator):
    r"""Solve with the inner Hessian by conjugate gradients [RFKL19, Alg. 2].

    $$\frac{\partial f}{\partial\lambda} -
      \frac{\partial^2 g}{\partial\lambda\,\partial w}
      \Big(\frac{\partial^2 g}{\partial w^2} + \delta I\Big)^{-1}
      \frac{\partial f}{\partial w}$$

    Exact where w is a minimum of g, δ = 0 and CG has converged: within as many
    iterations as the Hessian has distinct eigenvalues. At equal products it is never
    further from the solution, in the energy norm, than `Neumann`. Cost: a gradient of
    f, the graph of one of g, and one product for each iteration.

    Args:
        max_iter: largest number of products with H.
        rtol: residual, relative to ∂f/∂w, to stop at.
        damping: δ; raised where curvature is negative, and `info` says so.
        preconditioner_rank: rank of a low-rank model of H that preconditions; 0 for
            none. It takes as many products, once for `preconditioner_every` estimates.
        preconditioner_every: number of estimates that share a model, by their `state`.
        warm_start: whether to start from the solution of the last estimate, by its
            `state`, at one more product: pays where batches stay the same.
        product: how products with second derivatives are taken; see `Implicit`.
        curvature: `"hessian"` or `"gauss-newton"`; see `Implicit`.
        on_failure: `"warn"`, `"raise"` or `"return"` where it did not converge.

    Raises:
        TypeError: `max_iter` is not a whole number.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²: H = 2, ∂²g/∂λ∂w = -2; f = w² at w = λ = 3: df/dλ = 2·3.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2,
        ...     lambda i, o, b: i["w"] ** 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> ConjugateGradient().estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        6.0
    """

    name: ClassVar[str] = "cg"
    max_iter: int = 20
    _: KW_ONLY
    rtol: float = 1e-6
    damping: float = 0.0
    preconditioner_rank: int = 0
    preconditioner_every: int = 10
    warm_start: bool = False
    on_failure: OnFailure = "warn"

    def make_solver(self) -> Solver:
        """Return the solver with these settings."""
        check_count("preconditioner_rank", self.preconditioner_rank, least=0)
        check_count("preconditioner_every", self.preconditioner_every)
        sketch = None
        if self.preconditioner_rank:
            sketch = NystromSketch(
                self.preconditioner_rank, every=self.preconditioner_every
            )
        return CGSolver(
            self.max_iter,
            rtol=self.rtol,
            damping=self.damping,
            preconditioner=sketch,
            warm_start=self.warm_start,
            on_failure=self.on_failure,
        )
