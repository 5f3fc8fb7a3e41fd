"""The estimator that fits a problem, chosen by trying it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from hypergrad.batches import as_micro_batches
from hypergrad.errors import HypergradError
from hypergrad.estimator import HypergradEstimator, Hypergradient, Indirect, Point
from hypergrad.problem import BilevelProblem
from hypergrad.products.choice import second_order_failure
from hypergrad.rules import SGD, Grouped, Rule
from hypergrad.steps import InnerStep, SnapshotLimit

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

    Args:
        choice: name of an estimator that was chosen; set by `resolve`, so that a resumed
            run keeps it.
        settings: its settings, likewise.
        why: the reason, likewise.

    Raises:
        ValueError: `choice` is not the name of an estimator.

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
        >>> result = Auto().estimate(problem, inner_batch=None, outer_batch=None)
        >>> result.outer_grads["lam"].item(), result.info.reason[:12]
        (3.0, 'auto took cg')
    """

    name: ClassVar[str] = "auto"
    choice: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        if self.choice:
            _make(self.choice, self.settings)

    @property
    def chosen(self) -> HypergradEstimator | None:
        """The estimator that was chosen; None before `resolve`."""
        return _make(self.choice, self.settings) if self.choice else None

    @property
    def lookback(self) -> int:
        """That of the choice; 0 before it is made."""
        return self.chosen.lookback if self.chosen else 0

    @property
    def order(self) -> int:
        """That of the choice; 1 before it is made."""
        return self.chosen.order if self.chosen else 1

    @property
    def has_indirect(self) -> bool:
        """That of the choice; True before it is made."""
        return self.chosen is None or self.chosen.has_indirect

    @property
    def needs_grads(self) -> bool:
        """That of the choice; True before it is made."""
        return self.chosen is None or self.chosen.needs_grads

    @property
    def snapshot_limit(self) -> SnapshotLimit:
        """That of the choice."""
        return self.chosen.snapshot_limit if self.chosen else "all"

    @property
    def needs_byproduct(self) -> bool:
        """That of the choice."""
        return self.chosen is not None and self.chosen.needs_byproduct

    @property
    def reuses_graph(self) -> bool:
        """That of the choice."""
        return self.chosen is not None and self.chosen.reuses_graph

    def resolve(
        self, problem: BilevelProblem, inner_batch: Any, rule: Rule | None
    ) -> HypergradEstimator:
        """Return `auto` with its choice made; the problem is left as it was.

        Args:
            problem: the problem.
            inner_batch: data to try a second-derivative product on.
            rule: of the inner optimizer's steps; None where nothing can look back at
                them.

        Returns:
            An `Auto` that answers as the estimator it chose.
        """
        if self.choice:
            return self
        n = sum(t.numel() for t in problem.inner_params.values())
        if not n:
            return Auto("first-order", {}, "there are no inner parameters")
        failure = second_order_failure(problem, as_micro_batches(inner_batch))
        product = "finite-difference" if failure else "exact"
        able = failure or "second derivatives work"
        if rule is not None:
            seen = "the inner optimizer's step can be looked back at"
            if not failure:
                return Auto("unrolled", {"num_steps": 1}, f"{able} and {seen}")
            name = "darts" if _is_plain_sgd(rule) else "sama"
            return Auto(name, {"product": product}, f"{able}; {seen}")
        unseen = "there is no inner step to look back at"
        if n <= SMALL:
            settings = {"max_iter": min(n, 100), "product": product}
            return Auto("cg", settings, f"{able}, {unseen}, and {n} parameters are few")
        why = f"{able}, {unseen}, and {n} parameters are many"
        return Auto("neumann", {"product": product}, why)

    def estimate(
        self,
        problem: BilevelProblem,
        *,
        inner_batch: Any,
        outer_batch: Any,
        steps: Sequence[InnerStep] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Hypergradient:
        """Choose where no choice was made yet, and estimate.

        Args:
            problem: as for every estimator.
            inner_batch: likewise.
            outer_batch: likewise.
            steps: likewise.
            state: likewise.

        Returns:
            The estimate of the choice; `info.reason` starts with what it is and why.
        """
        chosen = self.chosen
        if chosen is None:
            rule = steps[-1].rule if steps else None
            return self.resolve(problem, inner_batch, rule).estimate(
                problem,
                inner_batch=inner_batch,
                outer_batch=outer_batch,
                steps=steps,
                state=state,
            )
        result = chosen.estimate(
            problem,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
            steps=steps,
            state=state,
        )
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        said = f"auto took {self.choice}({settings}): {self.why}."
        reason = " ".join(filter(None, (said, result.info.reason)))
        return replace(result, info=replace(result.info, reason=reason))

    def indirect(self, point: Point) -> Indirect:
        """Return the indirect term of the choice."""
        if self.chosen is None:
            msg = (
                "auto has not chosen yet: `indirect` was called before `resolve`. Call "
                "`estimate`, which resolves first."
            )
            raise HypergradError(msg)
        return self.chosen.indirect(point)


def _make(name: str, settings: Mapping[str, Any]) -> HypergradEstimator:
    from hypergrad.estimators.registry import make_estimator  # which knows auto

    return make_estimator(name, **settings)


def _is_plain_sgd(rule: Rule) -> bool:
    if isinstance(rule, Grouped):
        return all(_is_plain_sgd(part) for _, part in rule.groups)
    return isinstance(rule, SGD) and not rule.momentum and not rule.weight_decay
