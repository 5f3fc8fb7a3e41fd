"""What estimators that look back at one inner step have in common."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from hypergrad.batches import check_fraction, part_of
from hypergrad.estimator import Indirect, Needs, Point
from hypergrad.estimators._with_product import WithProduct
from hypergrad.products import ProductLike, as_product
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["OneStepEstimator"]


@dataclass(frozen=True)
class OneStepEstimator(WithProduct):
    """Apply the mixed product of the last inner step to some direction."""

    _: KW_ONLY
    product: ProductLike = "auto"
    product_fraction: float = 1.0

    def __post_init__(self) -> None:
        as_product(self.product)
        check_fraction("product_fraction", self.product_fraction)

    @property
    def needs(self) -> Needs:
        """The last inner step; the order of the product, 1 before `auto` is resolved."""
        product = as_product(self.product)
        return Needs(
            lookback=1,
            order=product.order,
            byproduct=self._whole and product.starts_from_gradient,
            graph=self._whole and product.continues_graph,
        )

    @property
    def _whole(self) -> bool:
        return self.product_fraction == 1.0

    def _mixed(
        self, point: Point, step: InnerStep, direction: Params, **info: Any
    ) -> Indirect:
        parts: list[InnerStep] = []

        def divide() -> list[float]:
            parts.append(_part_of(step, self.product_fraction))
            return []

        if self._whole:
            divide()
        else:
            problem = point.problem
            problem.reducer.largest(0, divide, problem.inner_params)
        (step,) = parts
        with point.product_at(step, self.product) as product:
            grads = product.mixed_vjp(direction)
        return Indirect(grads, info={**product.info, **info})


def _part_of(step: InnerStep, fraction: float) -> InnerStep:
    """Return the step on part of its data; what it kept was of all of it."""
    if fraction == 1.0:
        return step
    micro = [replace(m, batch=part_of(m.batch, fraction)) for m in step.micro_batches]
    return replace(step, micro_batches=tuple(micro), outer_grads=None, graph=None)
