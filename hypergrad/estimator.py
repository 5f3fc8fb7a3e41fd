"""The contract of all estimators: what goes in, what comes out, what stays untouched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor

from hypergrad import tree
from hypergrad.attention import attention
from hypergrad.batches import MicroBatch, as_micro_batches
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.problem import BilevelProblem
from hypergrad.products import (
    BoundProduct,
    Curvature,
    Hints,
    Product,
    ProductLike,
    Tally,
    as_product,
    bind_product,
    gradients,
)
from hypergrad.reporting import once_for, report
from hypergrad.rng import RngState
from hypergrad.rules import Rule
from hypergrad.steps import (
    InnerStep,
    SnapshotLimit,
    since_snapshot,
    steps_back,
    take_steps,
    with_grads,
)
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
        fd_error: its estimated relative error, where two radii were taken; above 0.1 it
            is warned of.
        damping: δ that the linear solve used in the end.
        curvature: smallest and largest eigenvalue of the inner Hessian seen.
        dropped: number of coordinates left out as degenerate (SAMA).
        norm: norm of the total derivative.
        direct_norm: norm of its direct term.
        indirect_norm: norm of its indirect term.
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
    norm: float | None = None
    direct_norm: float | None = None
    indirect_norm: float | None = None
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
        info: fields of `Info` that the estimator knows; a number may still be a tensor of
            one entry, which is read with all others.
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
        steps: the last `lookback` inner steps, oldest first. Where the estimator has a
            `snapshot_limit`, read them by `steps_back`.
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
        self, product: ProductLike = "exact", curvature: Curvature = "hessian"
    ) -> Iterator[BoundProduct]:
        """Yield second-derivative products of the inner loss at the present w.

        Args:
            product: which product, or its name.
            curvature: what the inner part is of.

        Yields:
            The product; whether its numbers are finite is told when `estimate` ends.
        """
        product = as_product(product)
        with _backend(product):
            made = bind_product(
                product, self.problem, self.inner_batches, self.tally, curvature
            )
            yield made
        self.unused = set(made.unused)

    @contextmanager
    def product_at(
        self, step: InnerStep, product: ProductLike = "exact"
    ) -> Iterator[BoundProduct]:
        """Yield products at the w, λ, data and random state of a past inner step.

        Serves from the graph that the step kept, where it kept one and λ has not moved
        since.

        Args:
            step: the step to go back to.
            product: which product, or its name.

        Yields:
            The product; it serves once.
        """
        product = as_product(product)
        place: Any = self.problem.at(step.inner_params, step.outer_params)
        hints = Hints(base=step.outer_grads, single_use=True)
        if product.continues_graph and step.graph is not None and self._unmoved(step):
            hints = replace(hints, kept=step.graph)
            # The graph holds its own w; copying λ onto itself would void it.
            place = nullcontext()
        batches = step.micro_batches
        del step  # whose w and state may be let go while the product is used
        with place, _backend(product):
            made = bind_product(product, self.problem, batches, self.tally, hints=hints)
            yield made
        self.unused = set(made.unused)

    def steps_back(self, n_steps: int, limit: SnapshotLimit) -> Iterator[InnerStep]:
        """Return the last inner steps, newest first, each with its w and state.

        Args:
            n_steps: how many.
            limit: how many copies of w and state may be held at once; to keep to it,
                drop each step before asking for the next.

        Returns:
            An iterator over whole records.
        """
        return steps_back(self.problem, self.steps, n_steps, limit, self.tally)

    def _unmoved(self, step: InnerStep) -> bool:
        if step.outer_versions != versions_of(self.problem):
            return False
        # A move through `.data` does not raise the version.
        return not any(self.tally.read(*self.moved([step])))

    def moved(self, steps: Sequence[InnerStep]) -> list[Tensor]:
        """Return how far λ is from where it was at each step, as tensors of one entry."""
        now = self.problem.outer_params
        seen = {id(step.outer_params): step.outer_params for step in steps}
        return [tree.size(tree.sub(now, then)) for then in seen.values()]


def _backend(product: Product) -> AbstractContextManager[object]:
    """Return the attention backend that all of a product needs, set once for it."""
    return attention("math" if product.order == 2 else "default")


def versions_of(problem: BilevelProblem) -> tuple[int, ...]:
    """Return the version counters of λ, by which a move shows."""
    return tuple(t._version for t in problem.outer_params.values())


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
    def snapshot_limit(self) -> SnapshotLimit:
        """How many copies of w and the optimizer's state may be held at once.

        `"all"` for one of each step. Otherwise `point.steps` may lack them, and `indirect`
        reads the steps by `point.steps_back`.
        """
        return "all"

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
        with once_for(problem.reported), problem.untouched() as session:
            chosen = self._resolved(problem, inner_batch, steps)
            if chosen is not self:
                return chosen.estimate(
                    problem,
                    inner_batch=inner_batch,
                    outer_batch=outer_batch,
                    steps=steps,
                    state=state,
                )
            inner_batches = _fixed(inner_batch, session.start)
            outer_batches = _fixed(outer_batch, session.start)
            return self._estimate(problem, inner_batches, outer_batches, steps, state)

    def _resolved(
        self,
        problem: BilevelProblem,
        inner_batch: Any,
        steps: Sequence[InnerStep] | None,
    ) -> HypergradEstimator:
        rule = steps[-1].rule if steps else self.virtual_rule()
        chosen = self.resolve(problem, inner_batch, rule)
        if chosen is self or chosen.resolve(problem, inner_batch, rule) is chosen:
            return chosen
        msg = (
            f"{type(self).__name__}.resolve returned a {type(chosen).__name__} that "
            "chooses again: what it returns must resolve to itself. Return an estimator "
            "whose `resolve` returns self."
        )
        raise HypergradError(msg)

    def _estimate(
        self,
        problem: BilevelProblem,
        inner_batches: tuple[MicroBatch, ...],
        outer_batches: tuple[MicroBatch, ...],
        steps: Sequence[InnerStep] | None,
        state: Mapping[str, Tensor] | None,
    ) -> Hypergradient:
        tally = Tally()
        recorded, end = self._steps(problem, inner_batches, steps, tally)
        with problem.at(end) if end is not None else nullcontext():
            inner = self.has_indirect
            f = gradients(problem, "outer", outer_batches, tally, inner=inner)
            if not inner and problem.outer_params.keys() <= f.unused:
                # Whether it depends on w tells zeros from a mistake.
                f = gradients(problem, "outer", outer_batches, tally)
            v, direct = f.inner or {}, f.outer or {}
            point = Point(problem, inner_batches, recorded, v, dict(state or {}), tally)
            if len(f.unused) == len(problem.tensors):
                msg = (
                    "the outer loss depends on no parameter of the problem: a detached "
                    "tensor or torch.no_grad in it is the usual cause. Compute it from "
                    "inner_params and outer_params."
                )
                raise HypergradError(msg)
            if f.inner_norm == 0.0:
                part = Indirect(tree.zeros_like(problem.outer_params))
            else:
                part = self._indirect(point)
                _check_acts(problem, f.unused, point.unused)
        total = tree.add(direct, part.grads)
        info = self._read(tally, total, direct, part, f.unused)
        unused = [f"outer_loss: {n}" for n in _in_order(problem, f.unused)]
        unused += [f"inner_loss: {n}" for n in _in_order(problem, point.unused)]
        counts = Info(
            n_forward=tally.n_forward,
            n_backward=tally.n_backward,
            n_hvp=tally.n_hvp,
            unused=tuple(unused),
        )
        return Hypergradient(
            total, direct, part.grads, f.loss, part.state, replace(counts, **info)
        )

    def _indirect(self, point: Point) -> Indirect:
        try:
            part = self.indirect(point)
        except NonFiniteError:
            point.tally.read()  # which says what came first
            raise
        if not isinstance(part, Indirect):
            msg = (
                f"{type(self).__name__}.indirect returned a {type(part).__name__}, not a "
                "hypergrad.Indirect. Return Indirect(grads), with grads a dictionary "
                "like the outer parameters."
            )
            raise TypeError(msg)
        check_like("grads", part.grads, point.problem.outer_params, type(self).__name__)
        return part

    def _read(
        self,
        tally: Tally,
        total: Params,
        direct: Params,
        part: Indirect,
        unused: frozenset[str],
    ) -> dict[str, Any]:
        """Look at everything at once.

        Returns:
            The fields of `Info`, as numbers.

        Raises:
            NonFiniteError: something on the way, or the result, is NaN or infinite.
        """
        # What is not connected is 0, and no small number whose square vanishes.
        direct = {n: t for n, t in direct.items() if n not in unused}
        trees = (total, direct, part.grads)
        names = [n for n, value in part.info.items() if isinstance(value, Tensor)]
        numbers = [part.info[n] for n in names]
        lengths = tree.sizes([t for each in trees for t in each.values()])
        found = tally.read(*lengths, *numbers)
        each_found = iter(found)
        sizes = [
            tree.settled_norm(math.hypot(*islice(each_found, len(each))), each)
            for each in trees
        ]
        if not math.isfinite(sizes[0]):
            msg = (
                f"the hypergradient of {type(self).__name__} is not finite although "
                "loss and gradients are: its linear solve or finite difference "
                "overflowed. Raise damping, or scale the outer loss down."
            )
            raise NonFiniteError(msg)
        info = {**part.info, **dict(zip(names, found[len(lengths) :], strict=True))}
        error = info.get("fd_error")
        if error is not None and error > _LARGEST_FD_ERROR:
            report(
                f"the finite difference is off by about {error:.2g} of the mixed "
                f"product (w was moved by {info.get('fd_radius', 0.0):.2g}): gradients "
                "are rounded too coarsely for it, or w is moved beyond the scale on "
                "which the inner loss changes. Pass product='exact', or compute the "
                "loss in float32."
            )
        names = ("norm", "direct_norm", "indirect_norm")
        return {**info, **dict(zip(names, sizes, strict=True))}

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
            if self.snapshot_limit != "all":
                return since_snapshot(steps, self.lookback), None
            taken = tuple(steps)[-self.lookback :]
            if not all(step.is_snapshot for step in taken):
                back = steps_back(problem, steps, self.lookback, "all", tally)
                taken = tuple(back)[::-1]
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
            snapshots=self.snapshot_limit,
        )
        return tuple(virtual), end


_LARGEST_FD_ERROR = 0.1
"""Estimated relative error of a finite difference above which it is warned of."""


def check_like(what: str, given: Any, like: Params, who: str) -> None:
    """Refuse a result that is not a dictionary of tensors like the outer parameters.

    Raises:
        TypeError: another kind, or a value that is not a tensor.
        ValueError: other names or shapes.
    """
    if not isinstance(given, Mapping):
        msg = (
            f"{who} returned {what} of type {type(given).__name__}. Return a dictionary "
            "of tensors with the names of the outer parameters."
        )
        raise TypeError(msg)
    if given.keys() != like.keys():
        msg = (
            f"{who} returned {what} for {sorted(given)}; the outer parameters are "
            f"{sorted(like)}. Return a tensor for each of them, zeros where it has none."
        )
        raise ValueError(msg)
    for name, t in like.items():
        value = given[name]
        if not isinstance(value, Tensor):
            msg = f"{who} returned a {type(value).__name__} for {name!r}, not a tensor."
            raise TypeError(msg)
        if value.shape != t.shape:
            msg = (
                f"{who} returned shape {tuple(value.shape)} for {name!r}, whose shape "
                f"is {tuple(t.shape)}."
            )
            raise ValueError(msg)


def _fixed(batch: Any, state: RngState) -> tuple[MicroBatch, ...]:
    """Give each micro-batch the present random state, so that all see the same."""
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
