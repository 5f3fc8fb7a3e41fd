"""The contract of all estimators, as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import HypergradError
from hypergrad.estimator import HypergradEstimator
from hypergrad.reporting import silenced
from hypergrad.testing.closed_forms import quadratic, ridge
from hypergrad.testing.known import KnownProblem
from hypergrad.testing.laws import (
    EDGES,
    BrokenLaw,
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

__all__ = ["LAWS", "PROBLEMS", "Checked", "check_estimator"]

LAWS: Mapping[str, str] = {
    "scale": "c times the outer loss gives c times the hypergradient",
    "direction": "where H is the identity, the indirect term points where the truth does",
    "no outer gradient": "∂f/∂w = 0 gives an indirect term of exact zeros",
    "unused lambda": "a λ that the inner loss does not use gives the direct term",
    "unused levels": "an outer loss of constants, or two losses without λ, is an error",
    "unused w": "an inner loss that does not depend on w is an error",
}
"""Laws that a kind of estimator may declare not to have, in `without_laws`. Form, function,
no trace and errors of the losses are for all."""

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
) -> Checked:
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
      inverse is one too, so the indirect term points where the truth does.
    - *Truth*, with `exact_to`: both terms, and again from a warm start.

    Not every law is true of every kind: a penalty method is not linear in the outer loss.
    Such a kind says so in `without_laws`, by the names of `LAWS`. A law that was declared
    away and holds all the same is an error too.

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

    Returns:
        Which laws held, and which the estimator declares not to have.

    Raises:
        AssertionError: naming the law that does not hold, and problem, dtype and
            structure.

    Example:
        >>> from hypergrad import make_estimator
        >>> print(check_estimator(make_estimator("first-order")))
        held: scale, no outer gradient, unused lambda, unused levels, unused w
        declared not to hold: direction (it has no indirect term)
    """
    laws = _Laws.of(estimator)
    # A warning is the estimator's to give; here it would be ours about our problem.
    with silenced():
        every = {**problems, **_LOW_PRECISION} if problems is PROBLEMS else problems
        place = {} if device is None else {"device": device}
        on_resolving(Trial(estimator, "the quadratic problem, float64"))
        isotropic = Trial(estimator, f"an isotropic problem, {dtypes[0]}")
        laws.check("direction", lambda: on_direction(isotropic, dtypes[0]))
        for nth, dtype in enumerate(dtypes):
            for number, (name, make) in enumerate(every.items()):
                known = make(dtype=dtype, **place)
                goal = _Goal.of(known, estimator, exact_to, inverse, dtype)
                chosen = _two(structures, number) if nth else structures
                for structure in chosen:
                    trial = Trial(estimator, f"{name}, {dtype}, {structure}")
                    _check(trial, goal, structure, thoroughly=structure == chosen[0])
                if number == 0:
                    trial = Trial(estimator, f"{name}, {dtype}")
                    laws.check("scale", partial(on_scale, trial, goal.known))
        for about, law in EDGES.items():
            trial = Trial(estimator, f"a problem for {about}, float64")
            laws.check(about, partial(law, trial))
    return laws.found()


@dataclass(frozen=True)
class Checked:
    """What `check_estimator` found, where nothing was broken.

    Attributes:
        held: names of laws that hold, of those that need not.
        declared: laws that the estimator declares not to have, each with the reason; none
            of them held.
    """

    held: tuple[str, ...]
    declared: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"held: {', '.join(self.held)}"]
        if self.declared:
            away = (f"{law} ({why})" for law, why in self.declared.items())
            lines.append(f"declared not to hold: {', '.join(away)}")
        return "\n".join(lines)


@dataclass
class _Laws:
    """Check laws, but for those declared away, which must be broken somewhere."""

    who: str
    declared: Mapping[str, str]
    broken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, estimator: HypergradEstimator) -> _Laws:
        who, declared = type(estimator).__name__, dict(estimator.without_laws)
        for law, why in declared.items():
            if law not in LAWS or not why:
                msg = (
                    f"{who} declares to be without the law {law!r} (reason: {why!r}). "
                    f"Name one of {', '.join(LAWS)}, and the reason."
                )
                raise AssertionError(msg)
        return cls(who, declared)

    def check(self, law: str, run: Callable[[], None]) -> None:
        if law not in self.declared:
            run()
            return
        try:
            run()
        except (BrokenLaw, HypergradError):
            self.broken.add(law)

    def found(self) -> Checked:
        for law in self.declared:
            if law not in self.broken:
                msg = (
                    f"{self.who} declares to be without the law {law!r}, and it held "
                    "wherever it was tried. Take it out of `without_laws`."
                )
                raise AssertionError(msg)
        held = tuple(law for law in LAWS if law not in self.declared)
        return Checked(held, self.declared)


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
        chosen = estimator.resolve(known.problem, None, estimator.virtual_rule())
        order = chosen.estimator.needs.order
        unit = max(torch.finfo(dtype).eps, known.unit)
        unit **= 2 / 3 if order < 2 else 1
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
