"""What one step of a `BilevelOptimizer` tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from hypergrad._audit import Audit
from hypergrad.estimator import Info

__all__ = ["StepReport"]


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        inner_loss: g on the inner batch before the inner step; None without one.
        grad_norm: norm of its gradient, before clipping.
        outer_step: whether the outer parameters moved.
        outer_loss: f on the outer batch, where an outer step was due.
        hypergrad_norm: norm of the hypergradient.
        direct_norm: norm of its direct term.
        indirect_norm: norm of its indirect term.
        skipped: why a due outer step was not taken; None where it was.
        info: cost and trustworthiness of the hypergradient.
        own: what the estimator's own part of the inner step evaluated; None where it has
            none.
        audit: its comparison with a reference, where this step was audited.
    """

    inner_loss: float | None = None
    grad_norm: float | None = None
    outer_step: bool = False
    outer_loss: float | None = None
    hypergrad_norm: float | None = None
    direct_norm: float | None = None
    indirect_norm: float | None = None
    skipped: str | None = None
    info: Info | None = None
    own: Info | None = None
    audit: Audit | None = None
