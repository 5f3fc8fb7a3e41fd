"""How damping is raised where a Hessian is not positive definite."""

from __future__ import annotations

__all__ = ["is_zero", "positive_damping"]

_FLOOR = 1e-3
"""Smallest eigenvalue, relative to the largest, that added damping leaves."""


def is_zero(eigenvalue: float, size: float, eps: float) -> bool:
    """Return whether an eigenvalue is 0 as far as rounding lets one tell.

    Args:
        eigenvalue: of a symmetric matrix.
        size: its largest eigenvalue, in absolute value.
        eps: rounding unit of the products it was found by; they change the eigenvalues
            by about that times `size`.
    """
    return abs(eigenvalue) <= 2 * eps * size


def positive_damping(
    lowest: float, highest: float, damping: float, eps: float = 2.0**-52
) -> tuple[float, str]:
    """Return the damping that makes H positive definite, and why it was raised.

    Args:
        lowest: smallest Ritz value of H.
        highest: largest Ritz value of H.
        damping: the setting.
        eps: rounding unit of the products with H.

    Returns:
        `damping` and an empty text where `lowest + damping > 0` beyond rounding. Else a
        damping that turns the lowest eigenvalue's sign around, but leaves it at no less
        than 1e-3 of the largest, and a message. Where H = 0 there is no scale to choose
        a damping by: it stays 0.

    Example:
        Curvature -1 is turned around to +1.

        >>> damping, reason = positive_damping(-1.0, 3.0, 0.0)
        >>> damping, bool(reason), positive_damping(0.5, 3.0, 0.0)
        (2.0, True, (0.0, ''))
    """
    size = max(abs(lowest), abs(highest))
    singular = is_zero(lowest + damping, size + damping, eps)
    if lowest + damping > 0 and not singular:
        return damping, ""
    if size == 0.0:
        return 0.0, (
            "the inner Hessian is 0 along the right-hand side and damping is 0, so there "
            "is no solution: the inner loss is linear there, or does not depend on these "
            "parameters. Pass damping above 0, or look at the inner loss."
        )
    # Never below what rounding resolves, so that raising is what it is.
    floor = max(_FLOOR, 4 * eps) * (size + damping)
    raised = max(-(lowest + damping), floor) - lowest
    if singular:
        return raised, (
            f"the inner Hessian with damping {damping:.3g} is singular to working "
            f"precision (eigenvalues from {lowest:.2g} to {highest:.3g} were seen): the "
            f"inner problem has flat directions. Damping was raised to {raised:.3g}; set "
            "`damping` above 0, or add a penalty on the parameters to the inner loss."
        )
    return raised, (
        f"curvature of the inner loss is {lowest:.3g} along one direction (largest "
        f"{highest:.3g}), so the inner Hessian with damping {damping:.3g} is not "
        f"positive definite: the inner problem is not at a minimum. Damping was raised "
        f"to {raised:.3g}; set `damping` above {-lowest:.3g}, or train the inner "
        "problem longer."
    )
