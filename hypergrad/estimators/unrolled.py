"""Unrolling: reverse mode through the inner steps that were taken."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from hypergrad import tree
from hypergrad._checks import check_count
from hypergrad.estimator import Indirect, Needs, Point
from hypergrad.estimators._growth import AdjointNorms
from hypergrad.estimators._window import check_first, moved_within
from hypergrad.estimators._with_product import WithProduct
from hypergrad.learned import adjoint_of_settings, wanted_settings
from hypergrad.products import ProductLike, as_product
from hypergrad.rules import Rule, State
from hypergrad.rules.base import check_rule, watch_finite
from hypergrad.steps import SnapshotLimit, check_snapshots
from hypergrad.tree import Params

__all__ = ["Unrolled"]


@dataclass(frozen=True)
class Unrolled(WithProduct):
    r"""Pull ∂f/∂w back through the last K inner steps, one at a time [FDF17, Alg. 1].

    With $(w_{k+1}, s_{k+1}) = U(w_k, s_k, \nabla_w g(w_k, \lambda_k))$ and adjoints
    $(\bar w_K, \bar s_K) = (\partial f/\partial w, 0)$, each step back is

    $$(\bar w, \bar s, \bar g) = U^\top(\bar w_{k+1}, \bar s_{k+1}),\quad
      \bar w_k = \bar w + \frac{\partial^2 g}{\partial w^2}\bar g,\quad
      \bar\lambda \mathrel{+}= \frac{\partial^2 g}{\partial\lambda\,\partial w}\bar g$$

    Exact for K steps of the real optimizer: momentum, Adam's moments, decay, clipping
    and changing learning rates included. The graph in memory is that of one step
    whatever K is: it is built again from a copy of w, used once and freed. Cost: 2 to 2.5
    inner gradients for each step.

    Copies of w and of the optimizer's moments are kept of each step, or of some. Steps
    between those are taken again on the way back [GW08, Ch. 12], an inner gradient each:
    of K = 20 with `snapshots=5`, 30 in all. Where a step is accumulated from several
    micro-batches, or averaged over ranks, its gradient stays on record, and to take it
    again costs no evaluation.

    Where λ moved within the window, each step is revisited at its own λ and the result
    is the derivative for a common shift of all of them; `info.reason` says so.

    Through a whole run, K is its number of steps. The adjoint may explode on so long a
    way: `info.adjoint_norms` has its norm after each step, and growth by more than 1/ε
    of the dtype of w is warned of.

    Args:
        num_steps: K.
        rule: rule of the virtual steps where no steps are given.
        product: how products with second derivatives are taken: a name of
            `hypergrad.products.product_names()`, or a product.
        snapshots: how many copies of w and the optimizer's state are held at once, at
            least 3; `"all"` for one of each step; `"auto"` for as many as take little
            (64 MiB, or a quarter of the memory of the weights, frozen ones included),
            and at least as many as retake each step 1.5 times at most, on average.

    Raises:
        TypeError: `num_steps` or `snapshots` is not a whole number, or `rule` not a rule.
        ValueError: `num_steps` is below 1, or `snapshots` below 3 or an unknown word.

    Example:
        g = (w - λ)²/2, f = w²/2, w = 4, λ = 0, two steps of SGD at rate 1/2:
        w₂ = 1 and dw₂/dλ = 1 - 1/4, so the hypergradient is 3/4.

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
        >>> Unrolled(2, rule=SGD(0.5)).estimate(
        ...     problem, inner_batch=None, outer_batch=None
        ... ).outer_grads["lam"].item()
        0.75
    """

    name: ClassVar[str] = "unrolled"
    reaches: ClassVar[frozenset[str]] = frozenset({"settings", "start"})
    num_steps: int = 5
    _: KW_ONLY
    rule: Rule | None = None
    product: ProductLike = "exact"
    snapshots: SnapshotLimit = "auto"

    def __post_init__(self) -> None:
        as_product(self.product)
        check_count("num_steps", self.num_steps)
        check_snapshots(self.snapshots)
        if self.rule is not None:
            check_rule("rule", self.rule)

    @property
    def needs(self) -> Needs:
        """K steps, without their gradients: the graph of each product has them.

        One step back is the inner step's own graph.
        """
        product = as_product(self.product)
        return Needs(
            lookback=self.num_steps,
            order=product.order,
            gradients=False,
            graph=self.num_steps == 1 and product.continues_graph,
            snapshots=self.snapshots,
        )

    def virtual_rule(self) -> Rule | None:
        """Return the rule that was set."""
        return self.rule

    def indirect(self, point: Point) -> Indirect:
        """Return the sum of the steps' contributions.

        Raises:
            HypergradError: the start of the inner run is learned, and the oldest of the
                steps is not its first.
        """
        problem = point.problem
        adjoint: tuple[Params, State] = point.v, {}
        total: Params = {}
        info: dict[str, Any] = {}
        settings = wanted_settings(problem)
        norms = AdjointNorms(point, self.num_steps)
        walk = point.steps_back(self.num_steps, self.snapshots)
        for left in reversed(range(self.num_steps)):
            if self.num_steps > 1:
                point.tally.where = norms.says_where(left)
            step, oldest = next(walk), not left
            with point.product_at(step, self.product) as product:
                grads = step.grads or product.gradient()
                given = step.inner_params, step.state, grads, *adjoint
                if settings:
                    pulled = step.rule.pullback(*given, settings)
                    learned = adjoint_of_settings(
                        problem, step.rule, step.number, pulled.settings
                    )
                else:
                    pulled, learned = step.rule.pullback(*given), {}
                watch_finite(point.tally, pulled.grads)
                # The product takes most memory: what it does not need is let go.
                adjoint = pulled.params, pulled.state
                starts = bool(problem.inner_start) and oldest
                if starts:
                    check_first(self, self.num_steps, step.number)
                del given, grads, step
                inner = starts or not oldest
                curved, mixed = product.vjp(pulled.grads, inner=inner)
            info = dict(product.info)
            mixed |= {n: mixed[n] + t for n, t in learned.items()}
            total = tree.add(total, mixed) if total else mixed
            if inner:
                adjoint = tree.add(pulled.params, curved), pulled.state
            if starts:
                norms.watch_start(adjoint[0])
            elif not oldest:
                norms.watch(adjoint[0])
            del pulled, curved  # before others are reached
            point.tell_progress(self.num_steps - left, self.num_steps)
        point.tally.where = None
        total |= {lam: adjoint[0][w] for w, lam in problem.inner_start.items()}
        moved = moved_within(point, point.steps[-self.num_steps :])
        info["adjoint_norms"] = norms.oldest_first
        info["reason"] = lambda: f"{moved} {norms.warn()}".strip()
        return Indirect(total, info=info)
