"""SAMA: one step of the real optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad import _foreach as foreach
from hypergrad.estimator import Indirect, Point
from hypergrad.estimators._one_step import OneStepEstimator
from hypergrad.rules import Rule
from hypergrad.rules.base import check_rule, watch_finite
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["Sama"]


@dataclass(frozen=True)
class Sama(OneStepEstimator):
    r"""Differentiate through one step of the optimizer that took it [CMA23, Eq. 5].

    $$\frac{\partial f}{\partial\lambda} -
      \frac{\partial^2 g}{\partial\lambda\,\partial w}\,D v,\qquad
      D = \frac{\partial u(g)}{\partial g},\quad w_+ = w - u(g)$$

    D comes from the real rule, bias correction, weight decay and clipping included; it
    and the mixed product are taken at the w, batch, random numbers and optimizer state
    from before the step. With an exact product this *is* unrolling one step.

    Differs from the source: its D lacks the bias correction, and its difference moves w
    by a distance of 1 (18 to 32 % off); ours by ε^(1/3).

    In Adam's first steps D is degenerate where gradient and second moment are exactly 0
    (every LoRA A while B is 0): 1/ε there, times a mixed product that is 0 but for
    rounding. Finite differences leave such coordinates out and count them in
    `info.dropped`. Start outer steps some inner steps later. Cost: as `Darts`.

    Args:
        rule: rule of the virtual step where no steps are given.
        product: how the mixed product is taken: a name of
            `hypergrad.products.product_names()`, or a product such as
            `FiniteDifference(scheme="forward")`. `"auto"` takes differences where the
            loss computes in float32 or finer, and the exact product where it does not.
        product_fraction: part of the inner batch that the mixed product is taken on, its
            first examples; below 1 its cost shrinks alike, and neither a kept graph nor a
            by-product can serve.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2, f = w²/2, w = 4, λ = 0, SGD at rate 1/2: as DARTS, 1.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.rules import SGD
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> Sama(SGD(0.5), product="exact").estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        1.0
    """

    name: ClassVar[str] = "sama"
    rule: Rule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None:
            check_rule("rule", self.rule)

    def virtual_rule(self) -> Rule | None:
        """Return the rule that was set."""
        return self.rule

    def indirect(self, point: Point) -> Indirect:
        """Return the mixed product of the adjoint of the step's gradient."""
        step = point.steps[-1]
        pulled = step.rule.pullback(
            step.inner_params, step.state, step.grads, point.v, {}
        )
        direction = pulled.grads
        info: dict[str, Tensor] = {}
        if self.needs.order == 1:
            direction, info["dropped"] = _without_dead(direction, step)
        watch_finite(point.tally, direction)
        return self._mixed(point, step, direction, **info)


def _without_dead(direction: Params, step: InnerStep) -> tuple[Params, Tensor]:
    """Return the direction without degenerate coordinates, and how many there were.

    One is dead where gradient and second moment are exactly 0.
    """
    adaptive = step.rule.adaptive(step.inner_params)
    names = [n for n in direction if n in adaptive]
    if not names:
        return direction, torch.zeros(())
    given = [direction[n] for n in names]
    with torch.no_grad():
        size = foreach.absolute([step.grads[n] for n in names])
        second = [
            step.state.get(n, {}).get("exp_avg_sq", s)
            for n, s in zip(names, size, strict=True)
        ]
        live = foreach.sign(foreach.add(size, second))
        # With eps=0 a dead coordinate is infinite, and 0 times that is not 0.
        largest = min(torch.finfo(t.dtype).max for t in given)
        bounded = foreach.clamp_max(given, largest)
        bounded = foreach.clamp_min(bounded, -largest)
        kept = foreach.mul(bounded, live)
        count = torch.stack(list(foreach.norm(live, 1))).sum()
    total = sum(t.numel() for t in given)
    return {**direction, **dict(zip(names, kept, strict=True))}, total - count
