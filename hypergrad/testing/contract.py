"""The contract of all estimators, as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.estimator import HypergradEstimator
from hypergrad.reporting import silenced
from hypergrad.testing.closed_forms import quadratic, ridge
from hypergrad.testing.known import KnownProblem
from hypergrad.testing.laws import (
    EDGES,
    Trial,
    on_direction,
    on_repeat,
    on_resolving,
    on_scale,
    on_truth,
)
from hypergrad.testing.learned import (
    dora_block,
    reweighting,
    softmax_regression,
    two_layer_network,
)
from hypergrad.testing.structures import STRUCTURES, Structure, restructured

__all__ = ["PROBLEMS", "check_estimator"]

PROBLEMS: Mapping[str, Callable[..., KnownProblem]] = {
    "quadratic": quadratic,
    "ridge": ridge,
    "softmax regression": softmax_regression,
    "reweighting": reweighting,
    "two-layer network": two_layer_network,
    "DoRA block": dora_block,
}
"""What `check_estimator` tries an estimator on; each takes `dtype`, `device`, `seed`."""

_LOW_PRECISION: Mapping[str, Callable[..., KnownProblem]] = {
    "low-precision base": lambda **settings: quadratic(
        (1.0, 1.5, 2.0), **{"compute": torch.bfloat16, **settings}
    ),
}
"""Tried beside all of `PROBLEMS`; its losses do not reach their truth."""


def check_estimator(
    estimator: HypergradEstimator,
    *,
    exact_to: float | None = None,
    inverse: Callable[[Tensor], Tensor] | None = None,
    problems: Mapping[str, Callable[..., KnownProblem]] = PROBLEMS,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16),
    structures: Sequence[Structure] = STRUCTURES,
    device: torch.device | str | None = None,
) -> None:
    r"""Check the laws of `HypergradEstimator`, and the answer where it is known.

    - *Form*: names, shapes, dtypes and devices of the outer parameters, without a graph;
      direct + indirect = total, bit for bit; nothing that is not finite.
    - *Function*: the same inputs give the same output, bit for bit, within
      `torch.no_grad` too; c times the outer loss gives c times the hypergradient, for c
      between 2⁻⁶⁶ and 2⁶⁶.
    - *No trace*: parameters, `.grad`, buffers, train/eval mode, random state, grad mode,
      the `state` that is passed and the estimator itself are as before, also where
      either loss raises, at whichever call.
    - *Edges*: ∂f/∂w = 0 gives an indirect term of exact zeros, as does no w at all; a λ
      that the inner loss does not use gives the direct term; a level that no loss uses
      raises `HypergradError`; a loss that is NaN or infinite raises `NonFiniteError`.
    - *Direction*: where H is a multiple of the identity, every approximation of its
      inverse is one too, so the indirect term points where the truth does; zeros are
      for an estimator that says so by `has_indirect`.
    - *Truth*, with `exact_to`: both terms, and again from a warm start.

    Each problem is tried in each dtype: in the first one in every structure, in the
    others in two of them. Rounding is allowed for on top of `exact_to`: ten times what
    one rounding of H, ∂²g/∂λ∂w and ∂f/∂w does to the answer. One rounding is the ε of the
    dtype, or ε^(2/3) for an estimator of order 1, whose differences lose that much. Where
    this comes to more than 1/2 (bfloat16, unless H is well conditioned), laws are all that
    is checked. One problem computes in bfloat16 under parameters in any dtype; there 1/2
    is what is allowed for.

    Args:
        estimator: the estimator; one that looks back needs settings to take virtual
            steps by.
        exact_to: relative error that both terms must reach at the minimum; None where
            nothing is promised.
        inverse: what the estimator puts in the place of H⁻¹, as a function of H (float64,
            `(n, n)`), where it is not the inverse; for one step of gradient descent at rate
            0.1, `lambda h: 0.1 * torch.eye(len(h)).to(h)`.
        problems: what to try, by name: functions that make a `KnownProblem` of a `dtype`.
            The first one is also tried at all scales of the outer loss.
        dtypes: dtypes of the problems.
        structures: forms of their tensors; see `restructured`.
        device: where the problems' tensors are; None for the host. Dtypes that it does
            not have are for the caller to leave out.

    Raises:
        AssertionError: naming the law that does not hold, and problem, dtype and
            structure.

    Example:
        >>> from hypergrad import make_estimator
        >>> check_estimator(make_estimator("cg"), exact_to=1e-5)
    """
    # A warning is the estimator's to give; here it would be ours about our problem.
    with silenced():
        every = {**problems, **_LOW_PRECISION} if problems is PROBLEMS else problems
        place = {} if device is None else {"device": device}
        on_resolving(Trial(estimator, "the quadratic problem, float64"))
        on_direction(Trial(estimator, f"an isotropic problem, {dtypes[0]}"), dtypes[0])
        for nth, dtype in enumerate(dtypes):
            for number, (name, make) in enumerate(every.items()):
                known = make(dtype=dtype, **place)
                goal = _Goal.of(known, estimator, exact_to, inverse, dtype)
                chosen = _two(structures, number) if nth else structures
                for structure in chosen:
                    trial = Trial(estimator, f"{name}, {dtype}, {structure}")
                    _check(trial, goal, structure, thoroughly=structure == chosen[0])
                if number == 0:
                    on_scale(Trial(estimator, f"{name}, {dtype}"), goal.known)
        for law in EDGES:
            about = law.__name__.removeprefix("on_").replace("_", " ")
            law(Trial(estimator, f"a problem for {about}, float64"))


@dataclass(frozen=True)
class _Goal:
    """A known problem, and how near to its truth an estimator must come.

    Attributes:
        known: the problem, with what the estimator should find as its truth.
        tolerance: relative error; None where the truth is not checked.
    """

    known: KnownProblem
    tolerance: float | None

    @classmethod
    def of(
        cls,
        known: KnownProblem,
        estimator: HypergradEstimator,
        exact_to: float | None,
        inverse: Callable[[Tensor], Tensor] | None,
        dtype: torch.dtype,
    ) -> _Goal:
        if exact_to is None:
            return cls(known, None)
        order = estimator.resolve(known.problem, None, estimator.virtual_rule()).order
        unit = max(torch.finfo(dtype).eps, known.unit)
        unit **= 2 / 3 if order == 1 else 1
        rounding = 10 * unit * _roundings(known, inverse or torch.linalg.inv)
        if known.unit > torch.finfo(dtype).eps:
            rounding = min(rounding, 0.5)
        tolerance = exact_to + rounding if rounding <= 0.5 else None
        if inverse is not None:
            indirect = known.indirect_by(inverse(known.hessian))
            known = replace(known, indirect=indirect)
        return cls(known, tolerance)


def _check(
    trial: Trial, goal: _Goal, structure: Structure, *, thoroughly: bool
) -> None:
    if structure == "empty" and tree.norm(goal.known.direct) == 0.0:
        return  # no problem is left
    known = restructured(goal.known, structure)
    result = trial.estimate(known.problem)
    results = [result]
    if result.state:
        results.append(trial.estimate(known.problem, dict(result.state)))
    if goal.tolerance is not None:
        for each in results:
            on_truth(trial, known, each, goal.tolerance)
    if thoroughly:
        on_repeat(trial, known.problem, result)


def _two(structures: Sequence[Structure], number: int) -> Sequence[Structure]:
    """Return the first structure and another, in turn."""
    others = structures[1:]
    return (
        [*structures[:1], *others[number % len(others) :][:1]] if others else structures
    )


def _roundings(known: KnownProblem, inverse: Callable[[Tensor], Tensor]) -> float:
    """Return by how many roundings the indirect term moves if H, M and v move by one."""
    make = torch.Generator().manual_seed(0)
    one = 1e-4 / known.condition  # any size within the linear range

    def moved(t: Tensor) -> Tensor:
        off = torch.randn(t.shape, generator=make, dtype=t.dtype)
        return t + one * off * t.norm() / off.norm()

    truth = known.mixed @ (inverse(known.hessian) @ known.v)
    if not truth.any():
        return 1.0
    worst = 0.0
    for _ in range(3):
        hessian = moved(known.hessian)
        h = (hessian + hessian.T) / 2
        off = moved(known.mixed) @ (inverse(h) @ moved(known.v)) - truth
        worst = max(worst, float(off.norm() / truth.norm()) / one)
    return worst
