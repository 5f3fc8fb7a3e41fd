"""What estimators that look back at one inner step have in common."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from hypergrad import tree
from hypergrad.batches import check_fraction, part_of
from hypergrad.estimator import HypergradEstimator, Indirect, Point, difference_info
from hypergrad.products import (
    ProductName,
    Scheme,
    check_product,
    check_scheme,
    product_order,
)
from hypergrad.solvers.base import check_flag
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["OneStepEstimator"]


@dataclass(frozen=True)
class OneStepEstimator(HypergradEstimator):
    """Apply the mixed product of the last inner step to some direction."""

    _: KW_ONLY
    product: ProductName = "finite-difference"
    scheme: Scheme = "central"
    radius: float | None = None
    error_estimate: bool = False
    product_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_product(self.product)
        check_fraction("product_fraction", self.product_fraction)
        check_scheme(self.scheme, self.radius)
        check_flag("error_estimate", self.error_estimate)

    @property
    def lookback(self) -> int:
        """The last inner step."""
        return 1

    @property
    def order(self) -> int:
        """First order where products are finite differences."""
        return product_order(self.product)

    @property
    def needs_byproduct(self) -> bool:
        """The forward scheme starts from the inner step's own ∂g/∂λ."""
        whole = self.product_fraction == 1.0
        forward = self.product == "finite-difference" and self.scheme == "forward"
        return whole and forward

    @property
    def reuses_graph(self) -> bool:
        """Double backward continues the inner step's own backward."""
        return self.product_fraction == 1.0 and self.product == "exact"

    def _mixed(
        self, point: Point, step: InnerStep, direction: Params, **info: Any
    ) -> Indirect:
        if tree.norm(direction) == 0.0:
            return Indirect(tree.zeros_like(point.problem.outer_params), info=info)
        step = _part_of(step, self.product_fraction)
        settings: dict[str, Any] = {}
        if self.product == "finite-difference":
            settings = {
                "scheme": self.scheme,
                "radius": self.radius,
                "error_estimate": self.error_estimate,
                "base": step.outer_grads,
            }
        with point.product_at(step, self.product, **settings) as product:
            grads = product.mixed_vjp(direction)
            return Indirect(grads, info={**difference_info(product), **info})


def _part_of(step: InnerStep, fraction: float) -> InnerStep:
    """Return the step on part of its data; what it kept was of all of it."""
    if fraction == 1.0:
        return step
    micro = [replace(m, batch=part_of(m.batch, fraction)) for m in step.micro_batches]
    return replace(step, micro_batches=tuple(micro), outer_grads=None, graph=None)
