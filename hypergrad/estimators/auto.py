"""The estimator that fits a problem, chosen by trying it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hypergrad.batches import MicroBatch, as_micro_batches
from hypergrad.errors import HypergradError, NonFiniteError, SecondOrderError
from hypergrad.estimator import HypergradEstimator, Hypergradient, Indirect, Point
from hypergrad.problem import BilevelProblem
from hypergrad.products import Tally, gradients, second_order
from hypergrad.rules import SGD, Grouped, Rule
from hypergrad.steps import InnerStep

__all__ = ["Auto"]

SMALL = 3000
"""Inner parameters up to which a linear system is solved and not approximated."""
_ATTENTION_COPIES = 6
"""Score matrices that attention in math mode keeps for two derivatives: scores, weights,
dropout mask, and their gradients."""


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
        failure = _second_order_failure(problem, as_micro_batches(inner_batch))
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


def _second_order_failure(
    problem: BilevelProblem, batches: Sequence[MicroBatch]
) -> str:
    """Return why second derivatives are out of reach; empty where they work."""
    with _watched_attention() as scores:
        # First order, under the model's own attention: it must work in any case.
        gradients(problem, "inner", batches[:1], Tally())
    needed, free = _ATTENTION_COPIES * sum(scores), _free_memory(problem)
    if free is not None and needed > free / 2:
        return (
            f"attention in math mode, which second derivatives need, would take about "
            f"{needed / 2**30:.2g} GiB of the {free / 2**30:.2g} GiB that are free"
        )
    quantised = _quantised_layer(problem.module)
    what = f"a quantised layer ({quantised})" if quantised else "a part of the model"
    try:
        with second_order("exact", problem, batches[:1], Tally()) as product:
            product.vjp({n: torch.ones_like(p) for n, p in _detached(problem)})
    except SecondOrderError as error:
        return f"{what} cannot be derived twice ({str(error).splitlines()[0][:160]})"
    except NonFiniteError:
        return "a second-derivative product is not finite where the gradient is"
    except torch.OutOfMemoryError:
        return "a second-derivative product does not fit into memory"
    return ""


def _detached(problem: BilevelProblem) -> Iterator[tuple[str, Tensor]]:
    return ((n, p.detach()) for n, p in problem.inner_params.items())


def _quantised_layer(module: nn.Module | None) -> str:
    """Return the type of the first layer whose weight is not of floating point."""
    for layer in module.modules() if module is not None else ():
        for weight in (*layer._parameters.values(), *layer._buffers.values()):
            packed = weight is not None and weight.dtype in (torch.int8, torch.uint8)
            if packed and weight is not None and weight.dim() > 1:
                return type(layer).__name__
    return ""


@contextmanager
def _watched_attention() -> Iterator[list[int]]:
    """Yield a list of the bytes of each score matrix that math attention would make."""
    found: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                names = ("query", "key", "value")
                given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                query, key = given["query"], given["key"]
                rows = query.shape[:-1].numel()
                found.append(rows * key.shape[-2] * query.element_size())
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found


def _free_memory(problem: BilevelProblem) -> int | None:
    """Return the bytes that are free on the problem's device; None where unknown."""
    device = problem.tensors[0].device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
