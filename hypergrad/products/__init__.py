r"""First derivatives of both losses and second-derivative products of the inner one.

This is the only package that calls autograd. A product is always
$u^\top \partial^2 g/\partial w\,\partial(w, \lambda)$ for a direction u shaped like w:
its inner part is the Hessian-vector product `hvp`, its outer part `mixed_vjp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from hypergrad import rng
from hypergrad.batches import MicroBatch
from hypergrad.problem import BilevelProblem
from hypergrad.products.difference import (
    FiniteDifference,
    Scheme,
    check_scheme,
    default_radius,
)
from hypergrad.products.evaluation import Tally
from hypergrad.products.exact import DoubleBackward, ForwardOverReverse, Product
from hypergrad.products.gradients import (
    Gradients,
    InnerGraph,
    gradients,
    vjp_of,
)

__all__ = [
    "DoubleBackward",
    "FiniteDifference",
    "ForwardOverReverse",
    "Gradients",
    "InnerGraph",
    "Product",
    "ProductName",
    "Scheme",
    "Tally",
    "check_product",
    "check_scheme",
    "default_radius",
    "gradients",
    "second_order",
    "vjp_of",
]

ProductName = Literal["exact", "forward-over-reverse", "finite-difference"]

_KINDS: dict[str, Callable[..., Product]] = {
    "exact": DoubleBackward,
    "forward-over-reverse": ForwardOverReverse,
    "finite-difference": FiniteDifference,
}


def check_product(name: str) -> None:
    """Refuse an unknown product.

    Raises:
        ValueError: with the known names.
    """
    if name not in _KINDS:
        msg = f"product={name!r} is unknown; choose one of {', '.join(map(repr, _KINDS))}."
        raise ValueError(msg)


@contextmanager
def second_order(
    name: ProductName,
    problem: BilevelProblem,
    batches: Sequence[MicroBatch],
    tally: Tally,
    **settings: Any,
) -> Iterator[Product]:
    """Yield the product of that name at the problem's present point.

    Args:
        name: `"exact"`, `"forward-over-reverse"` or `"finite-difference"`.
        problem: the problem.
        batches: data of the inner loss.
        tally: counts the evaluations.
        **settings: arguments of the product's class.

    Raises:
        ValueError: an unknown name.
    """
    check_product(name)
    product = _KINDS[name](problem, batches, tally, **settings)
    # The random state at entry serves every evaluation inside that has none of its own.
    state = rng.capture(problem.tensors)
    product.batches = [
        m if m.rng_state is not None else replace(m, rng_state=state)
        for m in product.batches
    ]
    yield product
