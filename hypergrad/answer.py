"""What an estimate gives: terms, their sum, and how they were reached."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hypergrad.tree import Params

__all__ = ["EstimatorState", "Hypergradient", "Indirect", "Info", "Terms"]

EstimatorState = dict[str, Any]
"""Tensors by name, or dictionaries of such, as deep as needed: what an estimator carries
from one call to the next. A sequence of its own is a dictionary like the parameters."""


@dataclass(frozen=True)
class Info:
    """How a hypergradient was reached, and how far to trust it.

    Attributes:
        n_forward: forward passes on one (micro-)batch.
        n_backward: backward passes, first and second order alike.
        n_hvp: second-derivative products.
        residual_norm: relative residual of the linear solve, where there was one.
        converged: whether the linear solve reached its goal.
        fd_radius: distance that a finite difference moved w, where there was one.
        fd_error: its estimated relative error, where two radii were taken; above 0.1 it
            is warned of.
        damping: δ that the linear solve used in the end.
        curvature: smallest and largest eigenvalue of the inner Hessian seen.
        dropped: number of coordinates left out as degenerate (SAMA).
        norm: norm of the total derivative.
        direct_norm: norm of its direct term.
        indirect_norm: norm of its indirect term.
        adjoint_norms: norm of ∂f/∂w after each step that was walked back through, oldest
            first, so that the last is that of ∂f/∂w itself (`unrolled`). Growth beyond
            1/ε of the dtype of w is warned of.
        unused: `"outer_loss: name"` or `"inner_loss: name"` for each tensor that a loss
            does not depend on, and which contributes exact zeros there.
        reason: empty where all is well, else what happened, why and what to try.
    """

    n_forward: int = 0
    n_backward: int = 0
    n_hvp: int = 0
    residual_norm: float | None = None
    converged: bool | None = None
    fd_radius: float | None = None
    fd_error: float | None = None
    damping: float | None = None
    curvature: tuple[float, float] | None = None
    dropped: int = 0
    norm: float | None = None
    direct_norm: float | None = None
    indirect_norm: float | None = None
    adjoint_norms: tuple[float, ...] = ()
    unused: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Hypergradient:
    """The derivative of the outer loss in λ, through w*(λ) too.

    Law: `direct + indirect == outer_grads`, all with the names, shapes and dtypes of the
    outer parameters.

    Attributes:
        outer_grads: the total derivative.
        direct: ∂f/∂λ at fixed w.
        indirect: the term through w.
        outer_loss: f, averaged over ranks.
        state: what to pass to the next `estimate`, for a warm start or for sequences of
            the estimator's own.
        info: cost and trustworthiness.

    Example:
        >>> import torch
        >>> one = {"lam": torch.ones(())}
        >>> result = Hypergradient(one, one, {"lam": torch.zeros(())}, 0.5)
        >>> result.because("auto took cg.").info.reason
        'auto took cg.'
    """

    outer_grads: Params
    direct: Params
    indirect: Params
    outer_loss: float
    state: EstimatorState = field(default_factory=dict)
    info: Info = field(default_factory=Info)

    def because(self, why: str) -> Hypergradient:
        """Return the same with what to say of its estimator in front of `info.reason`.

        Args:
            why: a sentence; nothing is said where it is empty.
        """
        if not why:
            return self
        reason = f"{why} {self.info.reason}".strip()
        return replace(self, info=replace(self.info, reason=reason))


@dataclass(frozen=True)
class Indirect:
    """What `HypergradEstimator.indirect` returns.

    Attributes:
        grads: the indirect term; same keys and shapes as the outer parameters.
        state: what the next call finds in `point.state`.
        info: fields of `Info` that the estimator knows; a number may still be a tensor of
            one entry, which is read with all others; what follows from numbers that the
            tally watches, a function that is called once they are read.

    Example:
        >>> import torch
        >>> Indirect({"lam": torch.tensor(2.0)}, info={"residual_norm": 1e-6}).state
        {}
    """

    grads: Params
    state: EstimatorState = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """What `HypergradEstimator.terms` returns: both terms of a hypergradient.

    Attributes:
        direct: ∂f/∂λ at fixed w, or what takes its place; same keys and shapes as the
            outer parameters.
        indirect: the term through w, likewise.
        state: as in `Indirect`.
        info: as in `Indirect`.

    Example:
        >>> import torch
        >>> Terms({"lam": torch.tensor(1.0)}, {"lam": torch.tensor(2.0)}).indirect
        {'lam': tensor(2.)}
    """

    direct: Params
    indirect: Params
    state: EstimatorState = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
