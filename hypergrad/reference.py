"""What an estimate is measured against: the best estimator that a problem can pay for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from hypergrad.estimator import HypergradEstimator
from hypergrad.estimators import ConjugateGradient, Implicit, Unrolled
from hypergrad.problem import BilevelProblem
from hypergrad.solvers import DenseSolver
from hypergrad.steps import InnerStep

__all__ = ["LARGEST_DENSE", "ReferenceName", "check_reference", "choose_reference"]

LARGEST_DENSE = 3000
"""Inner parameters up to which the Hessian is built as a matrix."""

ReferenceName = Literal["auto", "dense", "cg", "unrolled"]


def choose_reference(
    problem: BilevelProblem,
    steps: Sequence[InnerStep] | None = None,
    reference: str | HypergradEstimator = "auto",
) -> tuple[HypergradEstimator, str]:
    """Return the estimator that others are measured against, and why it is that one.

    With records of inner steps, `"auto"` unrolls through all of them: the derivative of
    what training did, exact to rounding. Without, it solves with the inner Hessian,
    which is exact where w is a minimum of the inner loss: as a matrix for at most 3,000
    inner parameters, else by long conjugate gradients.

    Args:
        problem: the problem.
        steps: records of the inner steps just taken; None or empty for none.
        reference: `"auto"`, one of its three choices by name (`"dense"`, `"cg"`,
            `"unrolled"`), or an estimator, which is returned as it is.

    Returns:
        The estimator, and one sentence.

    Raises:
        TypeError: `reference` is neither a name nor an estimator.
        ValueError: an unknown name, a matrix that would be too large, or nothing to
            unroll through where that is asked for, or where λ acts in inner steps alone.

    Example:
        >>> import torch
        >>> w = torch.zeros(2, requires_grad=True)
        >>> lam = torch.zeros(1, requires_grad=True)
        >>> loss = lambda i, o, b: (i["w"] - o["lam"]).square().sum()
        >>> problem = BilevelProblem(loss, loss, {"w": w}, {"lam": lam})
        >>> choose_reference(problem)[1]
        'the inner Hessian as a matrix, of 2 parameters: exact at a minimum of g'
    """
    check_reference(reference)
    if isinstance(reference, HypergradEstimator):
        return reference, "the estimator that was asked for"
    n = sum(t.numel() for t in problem.inner_params.values())
    # Steps along a direction of an estimator's own cannot be looked through.
    count = 0 if any(step.directed for step in steps or ()) else len(steps or ())
    name = reference
    if problem.beside_losses and not count:
        msg = (
            f"reference={reference!r} cannot answer for "
            f"{', '.join(sorted(problem.beside_losses)[:4])}: these act in inner steps "
            "alone, and there are none to look back at. Pass `steps`, such as "
            "`recorded_steps` of a BilevelOptimizer, or a reference of your own, such as "
            "Unrolled(num_steps=K, rule=...)."
        )
        raise ValueError(msg)
    if name == "auto":
        name = "unrolled" if count else "dense" if n <= LARGEST_DENSE else "cg"
    if name == "unrolled":
        if not count:
            msg = (
                "reference='unrolled' has no inner steps to look back at: none were "
                "recorded, or the inner optimizer has no rule. Pass `steps`, or "
                "reference='auto'."
            )
            raise ValueError(msg)
        why = f"the last {count} inner steps unrolled: exact for what training did"
        return Unrolled(count), why
    if name == "cg":
        why = f"long conjugate gradients, for {n} parameters: exact at a minimum of g"
        return ConjugateGradient(200, rtol=1e-10), why
    if n > LARGEST_DENSE:
        msg = (
            f"reference='dense' needs the {n} x {n} Hessian, from {n} products; at most "
            f"{LARGEST_DENSE} parameters are accepted. Pass reference='cg' or 'auto'."
        )
        raise ValueError(msg)
    why = f"the inner Hessian as a matrix, of {n} parameters: exact at a minimum of g"
    return Implicit(DenseSolver(LARGEST_DENSE)), why


def check_reference(reference: str | HypergradEstimator) -> None:
    """Refuse what is no reference.

    Raises:
        TypeError: neither a name nor an estimator.
        ValueError: an unknown name.
    """
    if isinstance(reference, HypergradEstimator):
        return
    if not isinstance(reference, str):
        msg = (
            f"reference={reference!r} must be a name or a HypergradEstimator. Pass e.g. "
            "'auto'."
        )
        raise TypeError(msg)
    if reference not in get_args(ReferenceName):
        known = ", ".join(map(repr, get_args(ReferenceName)))
        msg = (
            f"reference={reference!r} is unknown; choose one of {known}, or pass an "
            "estimator made by make_estimator."
        )
        raise ValueError(msg)
