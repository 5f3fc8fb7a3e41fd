"""What an estimator asks of those who take the inner steps and hand it its data."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hypergrad._checks import check_count, check_flag
from hypergrad.steps import SnapshotLimit

__all__ = ["Needs"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an estimator must be given, and what may be left out for it.

    Attributes:
        lookback: number of past inner steps that it must see; 0 for none.
        order: order of the derivatives that it takes. 0: values alone, and it gives the
            direct term too. 1: fused attention works. 2: inner steps that it looks back
            at run under attention that can be derived twice.
        v: whether `indirect` reads ∂f/∂w. Where False, it is not computed, and
            `indirect` is called in any case.
        gradients: whether it reads `step.grads`. Where False, records may leave them out.
        byproduct: whether an inner step should record ∂g/∂λ, which its backward can give.
        graph: whether it can take its product from a graph that an inner step kept.
        outer_batch_each_step: whether its part of an inner step reads an outer batch.
        snapshots: how many copies of w and the optimizer's state may be held at once;
            `"all"` for one of each step. Otherwise `point.steps` may lack them, and it
            reads them by `point.steps_back`.

    Raises:
        TypeError: a value of another kind.
        ValueError: an order that there is not, or a negative lookback.

    Example:
        >>> Needs(lookback=1, order=1)
        Needs(lookback=1, order=1)
    """

    lookback: int = 0
    order: int = 2
    v: bool = True
    gradients: bool = True
    byproduct: bool = False
    graph: bool = False
    outer_batch_each_step: bool = False
    snapshots: SnapshotLimit = "all"

    def __post_init__(self) -> None:
        check_count("lookback", self.lookback, least=0)
        if self.order not in (0, 1, 2):
            msg = (
                f"order={self.order!r} must be 0, 1 or 2: the highest derivative that "
                "the estimator takes. Pass that of its product."
            )
            raise ValueError(msg)
        for f in fields(self):
            if isinstance(f.default, bool):
                check_flag(f.name, getattr(self, f.name))

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"Needs({', '.join(shown)})"
