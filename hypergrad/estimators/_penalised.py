"""Weights that minimise g + ν f, and what they tell of the hypergradient.

With y(ν) the minimiser of g + ν f, the hypergradient is the derivative in ν, at ν = 0, of
∂/∂λ of min(g + ν f) = ν ∂f/∂λ(y(ν)) + ∂g/∂λ(y(ν)) [CLC25]. All first-order penalty
methods are differences of that; this is what they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import prod

from hypergrad import tree
from hypergrad.point import Point
from hypergrad.rules import Rule
from hypergrad.rules.base import State
from hypergrad.tree import Params

__all__ = ["descend", "difference", "stencil", "virtual_ends"]


def stencil(order: int) -> dict[int, float]:
    """Return the coefficients of a first derivative at 0 from values around it.

    Args:
        order: p; the error is O(h^p) where values are h apart.

    Returns:
        Coefficients by place, those of 0 left out: p + 1 places, as central as they can
        be, or p where that at 0 has none.

    Example:
        >>> stencil(1), stencil(2)
        ({0: -1.0, 1: 1.0}, {-1: -0.5, 1: 0.5})
        >>> stencil(4) == {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
        True
    """
    places = range(-(order // 2), (order + 1) // 2 + 1)
    # The derivative at 0 of Lagrange's polynomial that is 1 at j and 0 at the others.
    found = {
        j: Fraction(1, j)
        * prod((Fraction(-m, j - m) for m in places if m not in (0, j)), start=1)
        for j in places
        if j
    }
    found[0] = -sum(found.values(), Fraction(0))
    return {j: float(found[j]) for j in places if found[j]}


def descend(
    point: Point, rule: Rule, at: Params, slots: State, nu: float
) -> tuple[Params, State]:
    """Take one step on g + ν f.

    Args:
        point: the losses.
        rule: what a step does.
        at: weights before it.
        slots: optimizer state before it.
        nu: ν.

    Returns:
        Both after it.
    """
    direction = point.gradients("inner", "inner", at=at).inner or {}
    if nu:
        f = point.gradients("outer", "inner", at=at).inner or {}
        direction = tree.add(direction, f, alpha=nu)
    return rule.apply(at, slots, direction)


def virtual_ends(
    point: Point,
    rule: Rule | None,
    n_steps: int,
    nus: Mapping[int, float],
    v: Params,
) -> dict[int, Params]:
    """Return where steps from the present w lead on g + ν f, for several ν.

    Args:
        point: the losses; the last of its steps tells rule and state where `rule` is None.
        rule: what a step does.
        n_steps: how many to take.
        nus: ν of each sequence.
        v: ∂f/∂w at the present w.

    Returns:
        The weights after the last step, by the keys of `nus`.
    """
    slots: State = {}
    if rule is None:
        step = point.steps[-1]
        rule = step.rule
        _, slots = rule.apply(step.inner_params, step.state, step.grads)
    w = tree.clone(point.problem.inner_params)
    g = point.gradients("inner", "inner").inner or {}
    ends: dict[int, Params] = {}
    for j, nu in nus.items():
        # All start at w: the first step costs no evaluation of its own.
        at, kept = rule.apply(w, slots, tree.add(g, v, alpha=nu) if nu else g)
        for _ in range(n_steps - 1):
            at, kept = descend(point, rule, at, kept, nu)
        ends[j] = at
    return ends


def difference(
    point: Point,
    direct: Params,
    ends: Mapping[int, Params | None],
    coefficients: Mapping[int, float],
    nu: float,
) -> Params:
    """Return the indirect term from weights at several multiples of ν.

    Args:
        point: the losses.
        direct: ∂f/∂λ at the present w, which the result comes beside.
        ends: the weights, by the multiple; None for the present w.
        coefficients: what each counts; see `stencil`.
        nu: ν.
    """
    total = tree.zeros_like(direct)
    for j, coefficient in coefficients.items():
        g = point.gradients("inner", "outer", at=ends[j]).outer or {}
        total = tree.add(total, g, alpha=coefficient / nu)
    for j in _but_zero(coefficients):
        # The coefficients times j add up to 1.
        f = point.gradients("outer", "outer", at=ends[j]).outer or {}
        total = tree.add(total, tree.sub(f, direct), alpha=coefficients[j] * j)
    return total


def _but_zero(places: Iterable[int]) -> list[int]:
    return [j for j in places if j]
