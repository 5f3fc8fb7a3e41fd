"""What estimators with a second-derivative product have in common: its choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypergrad.batches import as_micro_batches
from hypergrad.estimator import Choice, HypergradEstimator
from hypergrad.problem import BilevelProblem
from hypergrad.products import Product, ProductLike, as_product
from hypergrad.rules import Rule

__all__ = ["WithProduct"]


class WithProduct(HypergradEstimator):
    """An estimator, a dataclass, whose setting `product` may leave the choice open."""

    product: ProductLike

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
        given = as_product(self.product)
        chosen, _ = given.chosen(problem, as_micro_batches(inner_batch))
        if chosen is given:
            return Choice(self)
        own: Any = self
        return Choice(replace(own, product=_plain(chosen)))


def _plain(product: Product) -> ProductLike:
    """Return the name of a product at its defaults, so that it shows as such."""
    return product.name if as_product(product.name) == product else product
