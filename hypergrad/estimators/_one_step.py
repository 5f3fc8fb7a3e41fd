"""What estimators that look back at one inner step have in common."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from hypergrad.batches import as_micro_batches, check_fraction, part_of
from hypergrad.estimator import Choice, HypergradEstimator, Indirect, Needs, Point
from hypergrad.problem import BilevelProblem
from hypergrad.products import Product, ProductLike, as_product
from hypergrad.rules import Rule
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["OneStepEstimator"]


@dataclass(frozen=True)
class OneStepEstimator(HypergradEstimator):
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

    def resolve(
        self, problem: BilevelProblem, inner_batch: Any, rule: Rule | None
    ) -> Choice:
        """Return itself with the product that `auto` takes on this problem.

        Args:
            problem: the problem; it is left as it was.
            inner_batch: data of the inner loss.
            rule: not used.
        """
        del rule
        return with_chosen_product(self, self.product, problem, inner_batch)

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


def with_chosen_product(
    estimator: Any, product: ProductLike, problem: BilevelProblem, inner_batch: Any
) -> Choice:
    """Return an estimator with the product that its own stands for on a problem.

    Args:
        estimator: a dataclass with a field `product`.
        product: its product.
        problem: the problem; it is left as it was.
        inner_batch: data of the inner loss.
    """
    given = as_product(product)
    chosen, _ = given.chosen(problem, as_micro_batches(inner_batch))
    if chosen is given:
        return Choice(estimator)
    return Choice(replace(estimator, product=_plain(chosen)))


def _plain(product: Product) -> ProductLike:
    """Return the name of a product at its defaults, so that it shows as such."""
    return product.name if as_product(product.name) == product else product


def _part_of(step: InnerStep, fraction: float) -> InnerStep:
    """Return the step on part of its data; what it kept was of all of it."""
    if fraction == 1.0:
        return step
    micro = [replace(m, batch=part_of(m.batch, fraction)) for m in step.micro_batches]
    return replace(step, micro_batches=tuple(micro), outer_grads=None, graph=None)
