r"""First derivatives of both losses and second-derivative products of the inner one.

This is the only package that calls autograd. A product is always
$u^\top \partial^2 g/\partial w\,\partial(w, \lambda)$ for a direction u shaped like w:
its inner part is the Hessian-vector product `hvp`, its outer part `mixed_vjp`.
"""

from __future__ import annotations

from hypergrad.products.base import NO_HINTS, BoundProduct, Hints, Product
from hypergrad.products.choice import AutoProduct
from hypergrad.products.difference import FiniteDifference, Scheme, default_radius
from hypergrad.products.exact import DoubleBackward, ForwardOverReverse
from hypergrad.products.gauss_newton import GaussNewton
from hypergrad.products.gradients import (
    Gradients,
    InnerGraph,
    gradients,
    jvp_of,
    value,
    vjp_of,
)
from hypergrad.products.registry import (
    Curvature,
    ProductLike,
    as_product,
    bind_product,
    check_curvature,
    make_product,
    product_names,
    register_product,
    second_order,
)
from hypergrad.products.tally import Tally

__all__ = [
    "NO_HINTS",
    "AutoProduct",
    "BoundProduct",
    "Curvature",
    "DoubleBackward",
    "FiniteDifference",
    "ForwardOverReverse",
    "GaussNewton",
    "Gradients",
    "Hints",
    "InnerGraph",
    "Product",
    "ProductLike",
    "Scheme",
    "Tally",
    "as_product",
    "bind_product",
    "check_curvature",
    "default_radius",
    "gradients",
    "jvp_of",
    "make_product",
    "product_names",
    "register_product",
    "second_order",
    "value",
    "vjp_of",
]
