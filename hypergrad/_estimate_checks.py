"""Checks of whether an estimator can answer for a problem, and a problem for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypergrad.errors import HypergradError
from hypergrad.point import Point
from hypergrad.problem import BilevelProblem
from hypergrad.products import Tally, gradients

if TYPE_CHECKING:
    from hypergrad.estimator import HypergradEstimator

__all__ = ["check_acts", "check_depends", "check_reaches"]


def check_reaches(estimator: HypergradEstimator, problem: BilevelProblem) -> None:
    """Refuse an estimator that does not see where λ acts.

    Raises:
        HypergradError: naming the outer parameters, and estimators that do.
    """
    acts = {"settings": list(problem.inner_settings)}
    acts["start"] = list(problem.inner_start.values())
    for where, names in acts.items():
        if names and where not in estimator.reaches:
            what = (
                "settings of the inner optimizer" if where == "settings" else "starts"
            )
            msg = (
                f"{type(estimator).__name__} cannot answer for {', '.join(names[:4])}: "
                f"these are {what}, which act in inner steps and not in the losses, and "
                "it does not go through the steps to them. Take "
                "Unrolled(num_steps=K), K the steps of an inner run, or Forward for a "
                "handful of numbers."
            )
            raise HypergradError(msg)


def check_depends(point: Point) -> None:
    """Refuse an outer loss that was asked about λ and depends neither on it nor on w.

    Raises:
        HypergradError: with the usual cause.
    """
    problem, unused = point.problem, point.unused("outer")
    key = "the outer loss depends on w"
    lam = problem.outer_params.keys() - problem.beside_losses
    if not lam <= unused or key in problem.inspected or not point.asked("outer"):
        return
    if not problem.inner_params.keys() <= point.asked("outer"):
        # Whether it depends on w tells zeros from a mistake: a look, once for a problem,
        # and no part of the estimate.
        batches = point.outer_batches
        unused |= gradients(problem, "outer", batches, Tally(), outer=False).unused
    if not problem.inner_params.keys() <= unused:
        problem.inspected.add(key)
        return
    msg = (
        "the outer loss depends on no parameter of the problem: a detached "
        "tensor or torch.no_grad in it is the usual cause. Compute it from "
        "inner_params and outer_params."
    )
    raise HypergradError(msg)


def check_acts(point: Point) -> None:
    """Refuse a problem in which no outer parameter acts on anything.

    Raises:
        HypergradError: naming the parameters.
    """
    outer = set(point.problem.outer_params)  # what acts in steps counts as used
    if outer <= point.unused("outer") and outer <= point.unused("inner"):
        msg = (
            f"no outer parameter ({', '.join(list(outer)[:4])}) acts on the outer loss, "
            "neither directly nor through the inner gradient: the hypergradient would "
            "be zeros. Compute a loss from outer_params."
        )
        raise HypergradError(msg)
