"""What a linear solver is: a function of a matvec and a right-hand side."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad._checks import check_number
from hypergrad.errors import NonFiniteError, SolveError
from hypergrad.reporting import report
from hypergrad.tree import Params

__all__ = ["BlockMatvec", "Matvec", "OnFailure", "SolveResult", "Solver"]

Matvec = Callable[[Params], Params]
"""A symmetric linear map on dictionaries of tensors."""
OnFailure = Literal["warn", "raise", "return"]


@runtime_checkable
class BlockMatvec(Protocol):
    """A matvec that can take several vectors at once, for less than one by one."""

    def __call__(self, vector: Params, /) -> Params:
        """Return Hv."""
        ...

    def many(self, vectors: Params, /) -> Params:
        """Return Hv for several v, stacked along a leading axis of each tensor."""
        ...


_MOST_ASYMMETRY = 0.02
"""Largest relative asymmetry of H that passes for an error of its products."""


@dataclass(frozen=True)
class SolveResult:
    r"""An approximate solution x of (H + δI) x = b.

    Attributes:
        x: same keys, shapes and dtypes as b.
        n_matvec: products with H that it took.
        residual_norm: $\|(H + \delta I)x - b\| / \|b\|$; for Neumann the norm of the
            last term, which bounds it where the series converges; None where it is not
            known.
        converged: whether the solver reached its own goal.
        reason: empty where all is well, else what happened, why, and what to try.
        damping: δ that was used; above the setting where curvature was negative.
        curvature: smallest and largest eigenvalue of H seen on the way (Ritz values),
            None where none was looked for.
        state: tensors to pass to the next solve.
    """

    x: Params
    n_matvec: int = 0
    residual_norm: float | None = None
    converged: bool = True
    reason: str = ""
    damping: float = 0.0
    curvature: tuple[float, float] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class Solver(ABC):
    """Solve (H + δI) x = b for a symmetric H that is known by its products alone.

    Laws: b = 0 gives exact zeros without a product; b and the state are unchanged;
    scaling b scales x; a right-hand side, product or solution that is not finite raises
    `NonFiniteError`.

    Example:
        H = 2 by its diagonal, which one product with ones tells.

        >>> import torch
        >>> class Diagonal(Solver):
        ...     def solve(self, matvec, b, *, state=None):
        ...         ones = {name: torch.ones_like(t) for name, t in b.items()}
        ...         h = matvec(ones)
        ...         return SolveResult({n: t / h[n] for n, t in b.items()}, n_matvec=1)
        >>> double = lambda v: {n: 2 * t for n, t in v.items()}
        >>> Diagonal().solve(double, {"w": torch.tensor([4.0, 6.0])}).x
        {'w': tensor([2., 3.])}
    """

    @abstractmethod
    def solve(
        self, matvec: Matvec, b: Params, state: Mapping[str, Tensor] | None = None
    ) -> SolveResult:
        """Return an approximate solution.

        Args:
            matvec: v -> Hv.
            b: right-hand side.
            state: `state` of an earlier result on a similar system; None for a cold
                start.

        Returns:
            The solution and how it was reached.
        """


def check_damping(damping: float) -> None:
    """Refuse a damping that is negative or not finite.

    Raises:
        TypeError: not a number.
        ValueError: with the value.
    """
    check_number("damping", damping)
    if not (damping >= 0 and damping < float("inf")):
        msg = (
            f"damping={damping} must be finite and at least 0: it is added to the "
            "eigenvalues of the inner Hessian to make it positive definite."
        )
        raise ValueError(msg)


def check_on_failure(value: str) -> None:
    """Refuse an unknown policy.

    Raises:
        ValueError: with the known ones.
    """
    if value not in ("warn", "raise", "return"):
        msg = f"on_failure={value!r} must be 'warn', 'raise' or 'return'."
        raise ValueError(msg)


def settle(
    result: SolveResult, on_failure: OnFailure, size: float | None = None
) -> SolveResult:
    """Return the result, after a warning or instead of an error where it has a reason.

    Args:
        result: what was found.
        on_failure: what to do where it has a reason.
        size: norm of the solution, where the host knows it already.

    Returns:
        The result.

    Raises:
        NonFiniteError: the solution overflowed.
        SolveError: the result has a reason and `on_failure` is `"raise"`.
    """
    largest = min((torch.finfo(t.dtype).max for t in result.x.values()), default=1.0)
    if size is None or not size < largest:
        size = tree.norm(result.x)
    if not math.isfinite(size):
        why = result.reason or (
            "the smallest eigenvalues of the inner Hessian are too small for the dtype. "
            "Raise damping, or scale the losses."
        )
        msg = (
            f"the solution of the linear solve with damping {result.damping:.3g} is not "
            f"finite: {why}"
        )
        raise NonFiniteError(msg)
    if result.reason and on_failure == "raise":
        raise SolveError(result.reason)
    if result.reason and on_failure == "warn":
        report(result.reason)
    return result


def usable(kept: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor of a state is of this solve's shape, and finite."""
    return kept.shape == tuple(shape) and bool(torch.isfinite(kept).all())


def working_dtype(vector: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that a solve works in: float32 or finer."""
    dtype = torch.float32
    for t in vector.values():
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def resolution(vector: Mapping[str, Tensor]) -> float:
    """Return the rounding unit of products with vectors like this: the coarsest."""
    return max((torch.finfo(t.dtype).eps for t in vector.values()), default=0.0)


def flatten(vector: Mapping[str, Tensor]) -> Tensor:
    """Return a new vector of all entries, in float32 or finer, on the first device."""
    tensors = [t.detach() if t.requires_grad else t for t in vector.values()]
    device, dtype = tensors[0].device, working_dtype(vector)
    return torch.cat([t.reshape(-1).to(device, dtype) for t in tensors])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Return the entries of `vector` in the names, shapes and dtypes of `like`."""
    parts = vector.split([t.numel() for t in like.values()])
    return {
        name: part.view(t.shape).to(t.device, t.dtype)
        for (name, t), part in zip(like.items(), parts, strict=True)
    }


def product(matvec: Matvec, vector: Tensor, like: Params) -> Tensor:
    """Return H times a flat vector, as a flat vector of the same dtype and device.

    Args:
        matvec: v -> Hv.
        vector: v, flat.
        like: names, shapes and dtypes that `matvec` expects, in the order of `vector`.

    Returns:
        Hv, its entries in the order of `like` whatever that of the answer. Whether it is
        finite is the caller's to look at, with what it reads of it anyway.

    Raises:
        ValueError: Hv lacks a name or has another shape.
    """
    answer = matvec(unflatten(vector, like))
    for name, t in like.items():
        if name not in answer or answer[name].shape != t.shape:
            got = tuple(answer[name].shape) if name in answer else "nothing"
            msg = (
                f"the matvec returned {got} for {name!r}, whose shape is "
                f"{tuple(t.shape)}: it must map vectors to vectors of the same names "
                "and shapes. Look at the function passed as matvec."
            )
            raise ValueError(msg)
    return flatten({name: answer[name] for name in like}).to(vector)


def check_finite_product(*numbers: float) -> None:
    """Refuse a product that is NaN or infinite, by numbers that come of its entries.

    Raises:
        NonFiniteError: one of the numbers is NaN or infinite.
    """
    if not all(math.isfinite(number) for number in numbers):
        msg = (
            "a product with the inner Hessian is not finite: a norm or square root at 0 "
            "in the inner loss, or an overflow in low precision, is the usual cause. "
            "Run the inner loss in float32, or raise its epsilons."
        )
        raise NonFiniteError(msg)


def products(matvec: Matvec, vectors: Tensor, like: Params) -> Tensor:
    """Return H times several flat vectors, at once where `matvec` is a `BlockMatvec`.

    Args:
        matvec: v -> Hv.
        vectors: `(k, n)`.
        like: as for `product`.

    Returns:
        `(k, n)`, of the dtype and device that flat vectors have.

    Raises:
        NonFiniteError: a product is NaN or infinite.
    """
    if not isinstance(matvec, BlockMatvec):
        flat = torch.stack([product(matvec, v, like) for v in vectors])
        check_finite_product(*tree.read([flat.abs().max()]))
        return flat
    stacked: Params = {}
    start = 0
    for name, t in like.items():
        part = vectors[:, start : start + t.numel()]
        stacked[name] = part.reshape(len(vectors), *t.shape).to(t.device, t.dtype)
        start += t.numel()
    answer = matvec.many(stacked)
    rows = [{n: answer[n][i] for n in like} for i in range(len(vectors))]
    flat = torch.stack([flatten(row) for row in rows])
    check_finite_product(*tree.read([flat.abs().max()]))
    return flat


def check_symmetric(asymmetry: float, eps: float) -> str:
    """Return a message where products are not those of a symmetric matrix.

    Args:
        asymmetry: how far H and its transpose differ, relative to the largest of H.
        eps: rounding unit of the products.

    Returns:
        The message; empty up to 0.02, or 20 `eps` where that is more: finite differences
        come to a thousandth in float32, to a tenth in bfloat16.
    """
    if asymmetry <= max(_MOST_ASYMMETRY, 20 * eps):
        return ""
    return (
        f"the products are not those of a symmetric matrix: H and its transpose differ "
        f"by {asymmetry:.2g} of the largest eigenvalue, so they are not second "
        "derivatives of one loss and the solution means little. Random numbers drawn "
        "anew for each product, or finite differences of a loss that has a detached part "
        "(a normalisation, say) or kinks, are the usual causes. Replay the random "
        "numbers, compute the loss in full, or pass product='exact'."
    )


def check_finite_rhs(norm: float) -> None:
    """Refuse a right-hand side that is NaN or infinite.

    Raises:
        NonFiniteError: blaming the right-hand side, not the solver.
    """
    if not norm < float("inf"):
        msg = (
            f"the right-hand side of the linear solve has norm {norm}: the outer "
            "gradient is not finite. Look at the outer loss and its batch."
        )
        raise NonFiniteError(msg)
