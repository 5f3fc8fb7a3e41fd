"""Products by name, and at a point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

from hypergrad import rng
from hypergrad._checks import check_new_name
from hypergrad.batches import MicroBatch, fixed
from hypergrad.problem import BilevelProblem
from hypergrad.products.base import NO_HINTS, BoundProduct, Hints, Product
from hypergrad.products.choice import AutoProduct
from hypergrad.products.difference import FiniteDifference
from hypergrad.products.exact import DoubleBackward, ForwardOverReverse
from hypergrad.products.gauss_newton import GaussNewton
from hypergrad.products.tally import Tally

__all__ = [
    "Curvature",
    "ProductLike",
    "as_product",
    "bind_product",
    "check_curvature",
    "make_product",
    "product_names",
    "register_product",
    "second_order",
]

ProductLike = Product | str
"""A product, or a name of `product_names()` for one at its defaults."""
Curvature = Literal["hessian", "gauss-newton"]
"""What the implicit estimators solve with; each may be damped."""

_KINDS: dict[str, Callable[..., Product]] = {
    **{
        kind.name: kind
        for kind in (AutoProduct, DoubleBackward, ForwardOverReverse, FiniteDifference)
    },
    "forward-difference": partial(FiniteDifference, "forward"),
    "richardson-difference": partial(FiniteDifference, "richardson"),
}


def register_product(name: str, kind: type[Product]) -> None:
    """Make a way of taking second-derivative products known by name.

    Args:
        name: lower-case letters, digits and hyphens.
        kind: a `Product` that can be made without arguments.

    Raises:
        TypeError: `kind` is not a subclass of `Product`.
        ValueError: the name is taken or not of that form.

    Example:
        >>> class Mine(DoubleBackward):
        ...     pass
        >>> register_product("mine", Mine)
        >>> as_product("mine").order
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
        ['auto', 'exact', 'finite-difference', 'forward-difference', ...]
    """
    return sorted(_KINDS)


def make_product(name: str, **settings: Any) -> Product:
    """Make a product by name.

    Args:
        name: one of `product_names()`.
        **settings: settings of its class.

    Returns:
        The product.

    Raises:
        TypeError: a setting that the product does not have.
        ValueError: an unknown name, or a setting out of range.

    Example:
        >>> make_product("finite-difference", scheme="forward").scheme
        'forward'
    """
    if name not in list(_KINDS):
        known = ", ".join(map(repr, product_names()))
        msg = f"product={name!r} is unknown; choose one of {known}."
        raise ValueError(msg)
    try:
        return _KINDS[name](**settings)
    except TypeError as error:
        msg = f"product {name!r} refused its settings {sorted(settings)}: {error}"
        raise TypeError(msg) from error


def as_product(given: ProductLike) -> Product:
    """Return a product as it is, or make one of its name.

    Args:
        given: what `product=` was set to.

    Raises:
        TypeError: neither a product nor a name.
        ValueError: an unknown name.

    Example:
        >>> as_product("exact").order
        2
    """
    if isinstance(given, Product):
        return given
    if not isinstance(given, str):
        msg = (
            f"product must be a hypergrad.products.Product or a name, got {given!r}. "
            "Pass e.g. 'exact' or FiniteDifference(scheme='forward')."
        )
        raise TypeError(msg)
    return make_product(given)


def check_curvature(name: str) -> None:
    """Refuse an unknown curvature.

    Raises:
        ValueError: with the known names.
    """
    if name not in get_args(Curvature):
        known = ", ".join(map(repr, get_args(Curvature)))
        msg = f"curvature={name!r} is unknown; choose one of {known}."
        raise ValueError(msg)


def bind_product(
    product: ProductLike,
    problem: BilevelProblem,
    batches: Sequence[MicroBatch],
    tally: Tally,
    curvature: Curvature = "hessian",
    hints: Hints = NO_HINTS,
) -> BoundProduct:
    """Return a product at the problem's present point.

    Args:
        product: a product or its name.
        problem: the problem.
        batches: data of the inner loss.
        tally: counts the evaluations; whether they are finite is told where it is read.
        curvature: what the inner part of a product is of; the mixed part is that of the
            inner loss in any case.
        hints: what is known already.

    Raises:
        ValueError: an unknown name.

    Example:
        g = (w - λ)²/2: H = 1, and the mixed derivative is -1.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(1.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> problem = BilevelProblem(half, half, {"w": w}, {"lam": lam})
        >>> from hypergrad.batches import as_micro_batches
        >>> product = bind_product("exact", problem, as_micro_batches(None), Tally())
        >>> (
        ...     product.hvp({"w": torch.tensor(2.0)}),
        ...     product.mixed_vjp({"w": torch.tensor(2.0)}),
        ... )
        ({'w': tensor(2.)}, {'lam': tensor(-2.)})
    """
    # The present random state serves every evaluation that has none of its own.
    if any(m.rng_state is None for m in batches):
        state = rng.capture(problem.tensors)
        batches = fixed(tuple(batches), state, problem.training)
    bound = as_product(product).bind(problem, batches, tally, hints)
    return GaussNewton(bound) if curvature == "gauss-newton" else bound


@contextmanager
def second_order(
    product: ProductLike,
    problem: BilevelProblem,
    batches: Sequence[MicroBatch],
    tally: Tally,
    curvature: Curvature = "hessian",
    hints: Hints = NO_HINTS,
) -> Iterator[BoundProduct]:
    """Yield a product at the problem's present point, and look at its numbers at the end.

    Args:
        product: as for `bind_product`.
        problem: likewise.
        batches: likewise.
        tally: likewise.
        curvature: likewise.
        hints: likewise.

    Yields:
        The product; where a number is not finite is told at the end of the block.

    Raises:
        NonFiniteError: the loss or a product is NaN or infinite.
        ValueError: an unknown name.
    """
    yield bind_product(product, problem, batches, tally, curvature, hints)
    tally.read()
