"""The contract of all estimators: what goes in, what comes out, what stays untouched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad import rng, tree
from hypergrad.batches import MicroBatch, as_micro_batches
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.problem import BilevelProblem
from hypergrad.products import (
    FiniteDifference,
    Product,
    ProductName,
    Tally,
    gradients,
    second_order,
)
from hypergrad.rules import Rule
from hypergrad.steps import InnerStep, take_steps, with_grads
from hypergrad.tree import Params

__all__ = [
    "HypergradEstimator",
    "Hypergradient",
    "Indirect",
    "Info",
    "Point",
]


@dataclass(frozen=True)
class Info:
    """How a hypergradient was reached, and how far to trust it.

    Attributes:
        n_forward: forward passes on one (micro-)batch.
        n_backward: backward passes, first and second order alike.
        n_hvp: second-derivative products.
        residual_norm: relative residual of the linear solve, where there was one.
        converged: whether the linear solve reached its goal.
        fd_radius: distance that a finite difference moved w, where there was one.
        fd_error: its estimated relative error, where two radii were taken.
        damping: δ that the linear solve used in the end.
        curvature: smallest and largest eigenvalue of the inner Hessian seen.
        dropped: number of coordinates left out as degenerate (SAMA).
        unused: `"outer_loss: name"` or `"inner_loss: name"` for each tensor that a loss
            does not depend on, and which contributes exact zeros there.
        reason: empty where all is well, else what happened, why and what to try.
    """

    n_forward: int = 0
    n_backward: int = 0
    n_hvp: int = 0
    residual_norm: float | None = None
    converged: bool | None = None
    fd_radius: float | None = None
    fd_error: float | None = None
    damping: float | None = None
    curvature: tuple[float, float] | None = None
    dropped: int = 0
    unused: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Hypergradient:
    """The derivative of the outer loss in λ, through w*(λ) too.

    Law: `direct + indirect == outer_grads`, all with the names, shapes and dtypes of the
    outer parameters.

    Attributes:
        outer_grads: the total derivative.
        direct: ∂f/∂λ at fixed w.
        indirect: the term through w.
        outer_loss: f, averaged over ranks.
        state: tensors to pass to the next `estimate` for a warm start.
        info: cost and trustworthiness.
    """

    outer_grads: Params
    direct: Params
    indirect: Params
    outer_loss: float
    state: dict[str, Tensor] = field(default_factory=dict)
    info: Info = field(default_factory=Info)


@dataclass(frozen=True)
class Indirect:
    """What an estimator's own part returns.

    Attributes:
        grads: the indirect term; same keys and shapes as the outer parameters.
        state: tensors for a warm start of the next call.
        info: fields of `Info` that the estimator knows.
    """

    grads: Params
    state: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Point:
    """Everything that an estimator's own part may use.

    Attributes:
        problem: the problem, at the w where v was taken.
        inner_batches: data of the inner loss.
        steps: the last `lookback` inner steps, oldest first.
        v: ∂f/∂w, same keys and shapes as the inner parameters; not all zeros.
        state: state of an earlier call; empty for a cold start.
        tally: counts evaluations; pass it on.
        unused: outer parameters that no product was connected to.
    """

    problem: BilevelProblem
    inner_batches: tuple[MicroBatch, ...]
    steps: tuple[InnerStep, ...]
    v: Params
    state: Mapping[str, Tensor]
    tally: Tally
    unused: set[str] = field(default_factory=set)

    @contextmanager
    def product(
        self, name: ProductName = "exact", **settings: Any
    ) -> Iterator[Product]:
        """Yield second-derivative products of the inner loss at the present w.

        Args:
            name: which product.
            **settings: e.g. `scheme` and `radius` of the finite difference.
        """
        with second_order(
            name, self.problem, self.inner_batches, self.tally, **settings
        ) as made:
            yield made
        self.unused = set(made.unused)

    @contextmanager
    def product_at(
        self, step: InnerStep, name: ProductName = "exact", **settings: Any
    ) -> Iterator[Product]:
        """Yield products at the w, λ, data and random state of a past inner step.

        Serves from the graph that the step kept, where it kept one and λ has not moved
        since.

        Args:
            step: the step to go back to.
            name: which product.
            **settings: as for `product`.
        """
        place: Any = self.problem.at(step.inner_params, step.outer_params)
        if name == "exact":
            settings.setdefault("single_use", True)
            if step.graph is not None and self._unmoved(step):
                settings["kept"] = step.graph
                # The graph holds its own w; copying λ onto itself would void it.
                place = nullcontext()
        with (
            place,
            second_order(
                name, self.problem, step.micro_batches, self.tally, **settings
            ) as made,
        ):
            yield made
        self.unused = set(made.unused)

    def _unmoved(self, step: InnerStep) -> bool:
        now = self.problem.outer_params
        versions = tuple(t._version for t in now.values())
        # A move through `.data` does not raise the version.
        return versions == step.outer_versions and all(
            torch.equal(t, step.outer_params[name]) for name, t in now.items()
        )


class HypergradEstimator(ABC):
    """Estimate the derivative of the outer loss in the outer parameters.

    A subclass implements `indirect`; all else is here. Laws, checked by
    `hypergrad.testing.check_estimator`: direct + indirect = total; same inputs, same
    output; parameters, `.grad`, buffers, random state and train/eval mode come back bit
    for bit, also when a loss raises; no state is kept on `self`.
    """

    name: ClassVar[str] = ""

    @property
    def lookback(self) -> int:
        """Number of past inner steps that it must see; 0 for implicit estimators."""
        return 0

    @property
    def order(self) -> int:
        """1 where first derivatives suffice (fused attention works), else 2."""
        return 2

    @property
    def has_indirect(self) -> bool:
        """Whether there is an indirect term; where not, ∂f/∂w is not computed."""
        return True

    @property
    def needs_grads(self) -> bool:
        """Whether `indirect` reads `step.grads`.

        Where False, the records of an optimizer may leave them out. Where True,
        `point.steps` have them in any case.
        """
        return True

    @property
    def needs_byproduct(self) -> bool:
        """Whether the inner step should record ∂g/∂λ, which its backward can give."""
        return False

    @property
    def reuses_graph(self) -> bool:
        """Whether it can take its product from a graph that the inner step kept."""
        return False

    @abstractmethod
    def indirect(self, point: Point) -> Indirect:
        """Return the term through w*(λ); called only where v is not zero."""

    def virtual_rule(self) -> Rule | None:
        """Return the rule of the steps taken where none are given; None for none."""
        return None

    def resolve(
        self, problem: BilevelProblem, inner_batch: Any, rule: Rule | None
    ) -> HypergradEstimator:
        """Return the estimator to use on this problem: itself, but for `auto`.

        Args:
            problem: the problem; it is left as it was.
            inner_batch: data of the inner loss, to try it with.
            rule: what the inner optimizer's steps are; None where there is no rule for
                it, so that nothing can look back at them.

        Returns:
            An estimator that resolves to itself.
        """
        del problem, inner_batch, rule
        return self

    def estimate(
        self,
        problem: BilevelProblem,
        *,
        inner_batch: Any,
        outer_batch: Any,
        steps: Sequence[InnerStep] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Hypergradient:
        """Estimate the hypergradient at the problem's present parameters.

        Args:
            problem: the problem; it is left as it was.
            inner_batch: data of the inner loss; a batch or `Accumulated` of several.
            outer_batch: data of the outer loss, likewise.
            steps: the inner steps just taken, oldest first, for an estimator that looks
                back. Without them it takes virtual steps by its own rule, and the outer
                loss is that at their end.
            state: `state` of an earlier result, for a warm start.

        Returns:
            The hypergradient, its two terms, and how it was reached.

        Raises:
            HypergradError: a loss depends on nothing that it should depend on.
            NonFiniteError: a loss, gradient or product is NaN or infinite.
            ValueError: too few `steps`, or none and no rule to take virtual ones by; a
                loss that is not a scalar.
        """
        tally = Tally()
        with problem.untouched():
            inner_batches = _fixed(inner_batch, problem)
            outer_batches = _fixed(outer_batch, problem)
            recorded, end = self._steps(problem, inner_batches, steps, tally)
            with problem.at(end) if end is not None else nullcontext():
                inner = self.has_indirect
                f = gradients(problem, "outer", outer_batches, tally, inner=inner)
                if not inner and problem.outer_params.keys() <= f.unused:
                    # Whether it depends on w tells zeros from a mistake.
                    f = gradients(problem, "outer", outer_batches, tally)
                v, direct = f.inner or {}, f.outer or {}
                point = Point(
                    problem,
                    inner_batches,
                    recorded,
                    v,
                    dict(state or {}),
                    tally,
                )
                if len(f.unused) == len(problem.tensors):
                    msg = (
                        "the outer loss depends on no parameter of the problem: a "
                        "detached tensor or torch.no_grad in it is the usual cause. "
                        "Compute it from inner_params and outer_params."
                    )
                    raise HypergradError(msg)
                if tree.norm(v) == 0.0:
                    part = Indirect(tree.zeros_like(problem.outer_params))
                else:
                    part = self.indirect(point)
                    _check_acts(problem, f.unused, point.unused)
        total = tree.add(direct, part.grads)
        if not tree.all_finite(total):
            msg = (
                f"the hypergradient of {type(self).__name__} is not finite although "
                "loss and gradients are: its linear solve or finite difference "
                "overflowed. Raise damping, or scale the outer loss down."
            )
            raise NonFiniteError(msg)
        unused = [f"outer_loss: {n}" for n in _in_order(problem, f.unused)]
        unused += [f"inner_loss: {n}" for n in _in_order(problem, point.unused)]
        info = Info(
            n_forward=tally.n_forward,
            n_backward=tally.n_backward,
            n_hvp=tally.n_hvp,
            unused=tuple(unused),
        )
        return Hypergradient(
            total, direct, part.grads, f.loss, part.state, replace(info, **part.info)
        )

    def _steps(
        self,
        problem: BilevelProblem,
        batches: tuple[MicroBatch, ...],
        steps: Sequence[InnerStep] | None,
        tally: Tally,
    ) -> tuple[tuple[InnerStep, ...], Params | None]:
        if not self.lookback or not problem.inner_params:
            return (), None
        if steps is not None:
            if len(steps) < self.lookback:
                msg = (
                    f"{type(self).__name__} looks back at {self.lookback} inner steps "
                    f"but `steps` holds {len(steps)}. Take more inner steps first, or "
                    "pass steps=None for virtual ones."
                )
                raise ValueError(msg)
            taken = tuple(steps)[-self.lookback :]
            if self.needs_grads:
                taken = tuple(with_grads(problem, step, tally) for step in taken)
            return taken, None
        rule = self.virtual_rule()
        if rule is None:
            setting = "inner_lr" if self.name == "darts" else "rule"
            msg = (
                f"{type(self).__name__} looks back at inner steps: pass `steps`, the "
                f"records of those just taken, or set {setting}=... so that it can "
                "take virtual ones."
            )
            raise ValueError(msg)
        if self.order == 2:
            batches = tuple(replace(m, attention="math") for m in batches)
        virtual, end = take_steps(
            problem,
            [batches] * self.lookback,
            rule,
            tally=tally,
            grads=self.needs_grads,
            byproduct=self.needs_byproduct,
        )
        return tuple(virtual), end


def difference_info(product: Product) -> dict[str, Any]:
    """Return the fields of `Info` that a finite difference knows."""
    if isinstance(product, FiniteDifference):
        return {"fd_radius": product.radius, "fd_error": product.error}
    return {}


def _fixed(batch: Any, problem: BilevelProblem) -> tuple[MicroBatch, ...]:
    """Give each micro-batch the present random state, so that all see the same."""
    state = rng.capture(problem.tensors)
    return tuple(
        m if m.rng_state is not None else replace(m, rng_state=state)
        for m in as_micro_batches(batch)
    )


def _check_acts(
    problem: BilevelProblem, direct: frozenset[str], indirect: set[str]
) -> None:
    outer = set(problem.outer_params)
    if outer <= direct and outer <= indirect:
        msg = (
            f"no outer parameter ({', '.join(list(outer)[:4])}) acts on the outer loss, "
            "neither directly nor through the inner gradient: the hypergradient would "
            "be zeros. Compute a loss from outer_params."
        )
        raise HypergradError(msg)


def _in_order(problem: BilevelProblem, names: frozenset[str] | set[str]) -> list[str]:
    every = [*problem.inner_params, *problem.outer_params]
    return [name for name in every if name in names]
