"""The direct term alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hypergrad import tree
from hypergrad.estimator import HypergradEstimator, Indirect, Needs, Point

__all__ = ["FirstOrder"]


@dataclass(frozen=True)
class FirstOrder(HypergradEstimator):
    r"""Take ∂f/∂λ at fixed w for the whole derivative [LSY19, §2.3, ξ = 0].

    Exact where λ acts on f directly only. Cost: one gradient of the outer loss.

    Example:
        f = w λ at w = 2, λ = 3: ∂f/∂λ = 2.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2,
        ...     lambda i, o, b: i["w"] * o["lam"],
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> FirstOrder().estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        2.0
    """

    name: ClassVar[str] = "first-order"

    without_laws: ClassVar[Mapping[str, str]] = {"direction": "it has no indirect term"}

    @property
    def needs(self) -> Needs:
        """First derivatives suffice, and ∂f/∂w would be computed for nothing."""
        return Needs(order=1, v=False)

    @property
    def answers(self) -> str:
        """Neither question: w stays where it is."""
        return "neither"

    def indirect(self, point: Point) -> Indirect:
        """Return zeros."""
        return Indirect(tree.zeros_like(point.problem.outer_params))
