r"""First derivatives of both losses and second-derivative products of the inner one.

This is the only package that calls autograd. A product is always
$u^\top \partial^2 g/\partial w\,\partial(w, \lambda)$ for a direction u shaped like w:
its inner part is the Hessian-vector product `hvp`, its outer part `mixed_vjp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

from hypergrad import rng
from hypergrad._checks import check_new_name
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
from hypergrad.products.gauss_newton import GaussNewton
from hypergrad.products.gradients import (
    Gradients,
    InnerGraph,
    gradients,
    vjp_of,
)

__all__ = [
    "Curvature",
    "DoubleBackward",
    "FiniteDifference",
    "ForwardOverReverse",
    "GaussNewton",
    "Gradients",
    "InnerGraph",
    "Product",
    "ProductName",
    "Scheme",
    "Tally",
    "check_curvature",
    "check_product",
    "check_scheme",
    "default_radius",
    "gradients",
    "product_names",
    "product_order",
    "register_product",
    "second_order",
    "vjp_of",
]

ProductName = Literal["exact", "forward-over-reverse", "finite-difference"] | str
"""A name of `product_names()`."""
Curvature = Literal["hessian", "gauss-newton"]
"""What the implicit estimators solve with; each may be damped."""

_KINDS: dict[str, type[Product]] = {
    "exact": DoubleBackward,
    "forward-over-reverse": ForwardOverReverse,
    "finite-difference": FiniteDifference,
}


def register_product(name: str, kind: type[Product]) -> None:
    """Make a way of taking second-derivative products known by name.

    Args:
        name: lower-case letters, digits and hyphens.
        kind: a `Product`, constructed as `kind(problem, batches, tally)`.

    Raises:
        TypeError: `kind` is not a subclass of `Product`.
        ValueError: the name is taken or not of that form.

    Example:
        >>> class Mine(DoubleBackward):
        ...     pass
        >>> register_product("mine", Mine)
        >>> product_order("mine")
        2
        >>> del _KINDS["mine"]
    """
    if not (isinstance(kind, type) and issubclass(kind, Product)):
        msg = f"kind must be a subclass of hypergrad.products.Product, got {kind!r}."
        raise TypeError(msg)
    check_new_name("a product", name, _KINDS)
    _KINDS[name] = kind


def product_names() -> list[str]:
    """Return all names that `product=` takes.

    Example:
        >>> product_names()
        ['exact', 'finite-difference', 'forward-over-reverse']
    """
    return sorted(_KINDS)


def check_product(name: str) -> None:
    """Refuse an unknown product.

    Raises:
        ValueError: with the known names.
    """
    if name not in product_names():
        known = ", ".join(map(repr, product_names()))
        msg = f"product={name!r} is unknown; choose one of {known}."
        raise ValueError(msg)


def check_curvature(name: str) -> None:
    """Refuse an unknown curvature.

    Raises:
        ValueError: with the known names.
    """
    if name not in get_args(Curvature):
        known = ", ".join(map(repr, get_args(Curvature)))
        msg = f"curvature={name!r} is unknown; choose one of {known}."
        raise ValueError(msg)


def product_order(name: ProductName) -> int:
    """Return 1 where first derivatives suffice for that product, else 2."""
    check_product(name)
    return _KINDS[name].order


@contextmanager
def second_order(
    name: ProductName,
    problem: BilevelProblem,
    batches: Sequence[MicroBatch],
    tally: Tally,
    curvature: Curvature = "hessian",
    **settings: Any,
) -> Iterator[Product]:
    """Yield the product of that name at the problem's present point.

    Args:
        name: one of `product_names()`.
        problem: the problem.
        batches: data of the inner loss.
        tally: counts the evaluations.
        curvature: what the inner part of a product is of; the mixed part is that of the
            inner loss in any case.
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
    yield GaussNewton(product) if curvature == "gauss-newton" else product
