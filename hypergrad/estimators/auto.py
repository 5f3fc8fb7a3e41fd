"""The estimator that fits a problem, chosen by trying it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hypergrad.batches import as_micro_batches
from hypergrad.errors import HypergradError
from hypergrad.estimator import Choice, HypergradEstimator, Needs, Point, Terms
from hypergrad.problem import BilevelProblem
from hypergrad.products.choice import second_order_failure
from hypergrad.rules import SGD, Grouped, Rule

__all__ = ["Auto"]

SMALL = 3000
"""Inner parameters up to which a linear system is solved and not approximated."""


@dataclass(frozen=True)
class Auto(HypergradEstimator):
    """Choose an estimator for a problem, and say why in `info.reason`.

    A second-derivative product is tried once, on the first inner batch. Then:

    | inner steps to look back at | second derivatives | chosen |
    |---|---|---|
    | yes | work | `unrolled`, one step: exact for the step taken |
    | yes, of plain SGD | fail | `darts` by finite differences |
    | yes, of another optimizer | fail | `sama` by finite differences |
    | no, at most 3,000 inner parameters | work | `cg` |
    | no, more of them | work | `neumann` |
    | no | fail | the same by finite differences |

    Inner steps can be looked back at where a `BilevelOptimizer` steps by an optimizer
    that has a rule, or where `steps` are passed. Second derivatives fail where a fused
    kernel, a quantised or a compiled layer cannot be derived twice, and count as failing
    where attention in math mode, which they need, would not fit into half of the free
    memory. Without inner parameters the choice is `first-order`.

    It estimates nothing itself: `resolve` returns the estimator, which then stands in its
    place, and the reason.

    Example:
        No steps to look back at, and one inner parameter: g = (w - λ)²/2, f = w²/2.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> Auto().resolve(problem, None, None).estimator.name
        'cg'
        >>> result = Auto().estimate(problem, inner_batch=None, outer_batch=None)
        >>> result.outer_grads["lam"].item(), result.info.reason[:12]
        (3.0, 'auto took cg')
    """

    name: ClassVar[str] = "auto"
    # One step back does not reach the start of a longer run.
    reaches: ClassVar[frozenset[str]] = frozenset({"settings"})

    @property
    def needs(self) -> Needs:
        """Nothing yet: what it chooses has needs."""
        return Needs(order=1)

    def resolve(
        self, problem: BilevelProblem, inner_batch: Any, rule: Rule | None
    ) -> Choice:
        """Return the estimator that fits, and why; the problem is left as it was.

        Args:
            problem: the problem.
            inner_batch: data to try a second-derivative product on.
            rule: of the inner optimizer's steps; None where nothing can look back at
                them.
        """
        n = sum(t.numel() for t in problem.inner_params.values())
        if problem.beside_losses and rule is not None:
            why = "what is learned acts in inner steps, which can be looked back at"
            return _chosen(why, "unrolled", num_steps=1)
        if not n:
            return _chosen("there are no inner parameters", "first-order")
        failure = second_order_failure(problem, as_micro_batches(inner_batch))
        product = "finite-difference" if failure else "exact"
        able = failure or "second derivatives work"
        if rule is not None:
            seen = "the inner optimizer's step can be looked back at"
            if not failure:
                return _chosen(f"{able} and {seen}", "unrolled", num_steps=1)
            name = "darts" if _is_plain_sgd(rule) else "sama"
            return _chosen(f"{able}; {seen}", name, product=product)
        unseen = "there is no inner step to look back at"
        if n <= SMALL:
            why = f"{able}, {unseen}, and {n} parameters are few"
            return _chosen(why, "cg", max_iter=min(n, 100), product=product)
        why = f"{able}, {unseen}, and {n} parameters are many"
        return _chosen(why, "neumann", product=product)

    def terms(self, point: Point) -> Terms:
        """Refuse: it estimates nothing itself.

        Args:
            point: not used.

        Raises:
            HypergradError: always.
        """
        del point
        msg = (
            "auto has not chosen yet: `terms` was called before `resolve`. Call "
            "`estimate`, which resolves first."
        )
        raise HypergradError(msg)


def _chosen(why: str, name: str, **settings: Any) -> Choice:
    from hypergrad.estimators.registry import make_estimator  # which knows auto

    shown = ", ".join(f"{k}={v!r}" for k, v in settings.items())
    said = f"auto took {name}({shown}): {why}."
    return Choice(make_estimator(name, **settings), said)


def _is_plain_sgd(rule: Rule) -> bool:
    if isinstance(rule, Grouped):
        return all(_is_plain_sgd(part) for _, part in rule.groups)
    return isinstance(rule, SGD) and not rule.momentum and not rule.weight_decay
