"""PBGD-Free: inner steps that give way to f, and ∂f/∂λ where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hypergrad import tree
from hypergrad._checks import check_positive
from hypergrad.estimator import HypergradEstimator, Indirect, Needs, Point
from hypergrad.tree import Params

__all__ = ["PBGDFree"]


@dataclass(frozen=True)
class PBGDFree(HypergradEstimator):
    r"""Take ∂f/∂λ at weights that follow g + f/σ [JXC25, Alg. 1].

    $$w \leftarrow w - \eta\Big(\nabla_w g + \frac1\sigma\nabla_w f\Big),\qquad
      \lambda \leftarrow \lambda - \eta'\,\frac{\partial f}{\partial\lambda}(w)$$

    A penalty method without the value function: of the derivative of
    $\min_w\,f + \sigma\,(g - \min g)$ it leaves out
    $\sigma\,(\partial g/\partial\lambda(w) - \partial g/\partial\lambda(y))$, y the minimum
    of g, so that there is one sequence alone. What is left out does not vanish with large
    σ: it is small where f is flat in w. Where λ acts through w alone it is everything, and
    λ does not move.

    The inner optimizer takes ∇g + ∇f/σ for the gradient, clipping and all: the outer data
    has a part in training w. By hand, or in a comparison, it is `first-order`.

    Cost: a gradient of f at each inner step, and an outer batch; another in an estimate.

    Args:
        sigma: σ, the multiplier of g against f (γ in the source).

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        g = (w - λ)²/2 and f = λ w at w = λ = 2, σ = 2. A step of rate 1/2 along
        0 + 2/2 leads to w = 3/2, which is ∂f/∂λ there.

        >>> import torch
        >>> from functools import partial
        >>> from hypergrad import BilevelOptimizer, BilevelProblem
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> opt = BilevelOptimizer(
        ...     BilevelProblem(
        ...         lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...         lambda i, o, b: i["w"] * o["lam"],
        ...         {"w": w},
        ...         {"lam": lam},
        ...     ),
        ...     estimator=PBGDFree(2.0),
        ...     inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        ...     outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        ...     outer_warmup=0,
        ... )
        >>> report = opt.step(None, None)
        >>> w.item(), lam.item()
        (1.5, 0.5)
    """

    name: ClassVar[str] = "pbgd-free"
    without_laws: ClassVar[Mapping[str, str]] = {
        "direction": "it leaves the indirect term out"
    }
    sigma: float = 10.0

    def __post_init__(self) -> None:
        check_positive(
            "sigma",
            self.sigma,
            "it is the multiplier of g against f. Pass e.g. 10; the larger it is, the "
            "less inner steps give way to f.",
        )

    @property
    def needs(self) -> Needs:
        """An outer batch at each step, and first derivatives."""
        return Needs(order=1, v=False, outer_batch_each_step=True)

    @property
    def answers(self) -> str:
        """Neither question: w stays where its steps led."""
        return "neither"

    def inner_direction(self, point: Point, gradient: Params) -> Params:
        """Return ∂g/∂w + ∂f/∂w / σ."""
        f = point.gradients("outer", "inner").inner or {}
        return tree.add(gradient, f, alpha=1 / self.sigma)

    def indirect(self, point: Point) -> Indirect:
        """Return zeros."""
        return Indirect(tree.zeros_like(point.problem.outer_params))
