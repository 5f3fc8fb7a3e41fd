"""Where an estimate is taken: the problem, its data, and all that may be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from hypergrad import tree
from hypergrad.attention import attention
from hypergrad.batches import MicroBatch
from hypergrad.errors import HypergradError
from hypergrad.problem import BilevelProblem, Level
from hypergrad.products import (
    BoundProduct,
    Curvature,
    Gradients,
    Hints,
    Product,
    ProductLike,
    Tally,
    as_product,
    bind_product,
    gradients,
    value,
)
from hypergrad.steps import InnerStep, SnapshotLimit, steps_back
from hypergrad.tree import Params

__all__ = ["Point", "Wanted", "versions_of"]

Wanted = Literal["inner", "outer", "both"]
"""What a loss is differentiated in: w, λ, or both from one backward pass."""


@dataclass
class Point:
    """Everything that an estimator may use, at the problem's present parameters.

    All evaluations are averaged over ranks, leave the problem as it was, are counted, and
    start from the same random state: two of them, at two places, see the same dropout
    masks. Whether their numbers are finite is told when `estimate` ends.

    Attributes:
        problem: the problem.
        inner_batches: data of the inner loss.
        outer_batches: data of the outer loss.
        steps: the last `lookback` inner steps, oldest first. Where the estimator needs
            fewer `snapshots` than all, read them by `steps_back`.
        state: what an earlier call returned; empty for a cold start. Not to be changed.
        tally: counts evaluations; pass it on.
        v: ∂f/∂w, same keys and shapes as the inner parameters, for `indirect`: not all
            zeros where the estimator needs it, and empty where it does not.
        on_progress: called as `(steps done, steps in all)` by an estimator that goes
            through many inner steps, after each; None for nothing.

    Example:
        g = (w - λ)²/2 and f = w²/2 at w = 3, λ = 1: g = 2, and ∂f/∂w = 3.

        >>> import torch
        >>> from hypergrad.batches import as_micro_batches
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(1.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> point = Point(problem, as_micro_batches(None), as_micro_batches(None))
        >>> point.value("inner").item()
        2.0
        >>> point.gradients("outer", "inner").inner
        {'w': tensor(3.)}
    """

    problem: BilevelProblem
    inner_batches: tuple[MicroBatch, ...]
    outer_batches: tuple[MicroBatch, ...]
    steps: tuple[InnerStep, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    v: Params = field(default_factory=dict)
    on_progress: Callable[[int, int], None] | None = None
    _asked: dict[Level, set[str]] = field(default_factory=dict, repr=False)
    _used: dict[Level, set[str]] = field(default_factory=dict, repr=False)
    _outer_loss: Tensor | float | None = field(default=None, repr=False)

    # -- the losses -----------------------------------------------------------------------

    def value(self, level: Level, at: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return a loss; a forward pass for each micro-batch, without a graph.

        Args:
            level: `"inner"` or `"outer"`.
            at: values for some or all parameters of both levels, by name, to evaluate at;
                None for the present ones.

        Returns:
            A tensor of one entry, on its device.

        Raises:
            HypergradError: there are no data of that level here.
            TypeError: the loss is no tensor, or a value of `at` is none.
            ValueError: an unknown level, or a name or shape in `at` that the problem does
                not have.
        """
        _check_word("level", level, get_args(Level))
        with self._place(at):
            found = value(self.problem, level, self._batches(level), self.tally)
        if level == "outer" and not at:
            self._outer_loss = found
        return found

    def gradients(
        self,
        level: Level,
        wrt: Wanted = "both",
        at: Mapping[str, Tensor] | None = None,
    ) -> Gradients:
        """Return a loss and its gradients; the host waits for the device once.

        Args:
            level: `"inner"` or `"outer"`.
            wrt: what to differentiate in: `"inner"` (w), `"outer"` (λ) or `"both"`.
            at: as for `value`.

        Returns:
            The loss, its gradients (None for what is not asked), and which tensors it
            does not depend on.

        Raises:
            HypergradError: there are no data of that level here, or the inner loss
                depends on no inner parameter.
            TypeError: as for `value`.
            ValueError: likewise, or an unknown `wrt`.
        """
        _check_word("level", level, get_args(Level))
        _check_word("wrt", wrt, get_args(Wanted))
        inner, outer = wrt != "outer", wrt != "inner"
        with self._place(at):
            found = gradients(
                self.problem,
                level,
                self._batches(level),
                self.tally,
                inner=inner,
                outer=outer,
            )
        problem = self.problem
        asked = [
            *(problem.inner_params if inner else ()),
            *(problem.outer_params if outer else ()),
        ]
        self._record(level, asked, found.unused)
        if level == "outer" and not at:
            self._outer_loss = found.loss
        return found

    def _batches(self, level: Level) -> tuple[MicroBatch, ...]:
        found = self.inner_batches if level == "inner" else self.outer_batches
        if not found:
            msg = (
                f"there is no {level} batch here: an estimator that evaluates the outer "
                "loss at inner steps says so. Return Needs(outer_batch_each_step=True, "
                "...) from `needs`."
            )
            raise HypergradError(msg)
        return found

    def _place(self, at: Mapping[str, Tensor] | None) -> AbstractContextManager[object]:
        if not at:
            return nullcontext()
        outer = {n: t for n, t in at.items() if n in self.problem.outer_params}
        return self.problem.at({n: t for n, t in at.items() if n not in outer}, outer)

    # -- second derivatives ---------------------------------------------------------------

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
        self._record_product(made)

    @contextmanager
    def product_at(
        self,
        step: InnerStep,
        product: ProductLike = "exact",
        *,
        single_use: bool = True,
    ) -> Iterator[BoundProduct]:
        """Yield products at the w, λ, data and random state of a past inner step.

        Serves from the graph that the step kept, where it kept one and λ has not moved
        since.

        Args:
            step: the step to go back to.
            product: which product, or its name.
            single_use: whether one product is all that will be asked for. Where False,
                what it is taken from is held until the block ends, and no kept graph is
                used.

        Yields:
            The product.
        """
        product = as_product(product)
        place: Any = self.problem.at(step.inner_params, step.outer_params)
        hints = Hints(base=step.outer_grads, single_use=single_use)
        continues = single_use and product.continues_graph and step.graph is not None
        if continues and self._unmoved(step):
            hints = replace(hints, kept=step.graph)
            # The graph holds its own w; copying λ onto itself would void it.
            place = nullcontext()
        batches = step.micro_batches
        del step  # whose w and state may be let go while the product is used
        with place, _backend(product):
            made = bind_product(product, self.problem, batches, self.tally, hints=hints)
            yield made
        self._record_product(made)

    def steps_back(self, n_steps: int, limit: SnapshotLimit) -> Iterator[InnerStep]:
        """Return the last inner steps, newest first, each with its w and state.

        Args:
            n_steps: how many.
            limit: how many copies of w and state may be held at once; to keep to it,
                drop each step before asking for the next.

        Returns:
            An iterator over whole records.

        Raises:
            ValueError: there is no snapshot before the first of them.
        """
        return steps_back(self.problem, self.steps, n_steps, limit, self.tally)

    def tell_progress(self, done: int, in_all: int) -> None:
        """Say how many of the inner steps are done, to whoever asked for it."""
        if self.on_progress is not None:
            self.on_progress(done, in_all)

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

    # -- what was seen on the way ---------------------------------------------------------

    def unused(self, level: Level) -> frozenset[str]:
        """Return the parameters that were asked for and no evaluation was connected to.

        Args:
            level: of the loss; a product with second derivatives is of the inner one.
        """
        _check_word("level", level, get_args(Level))
        return frozenset(self._asked.get(level, set()) - self._used.get(level, set()))

    def asked(self, level: Level) -> frozenset[str]:
        """Return the parameters that a loss was differentiated in."""
        _check_word("level", level, get_args(Level))
        return frozenset(self._asked.get(level, set()))

    def outer_loss(self) -> Tensor | float:
        """Return f at the present parameters, evaluated where it was not seen yet."""
        return self.value("outer") if self._outer_loss is None else self._outer_loss

    def _record(
        self, level: Level, asked: Collection[str], unused: Collection[str]
    ) -> None:
        self._asked.setdefault(level, set()).update(asked)
        # What acts in inner steps is not expected in a loss.
        missing = set(unused) - self.problem.beside_losses
        self._used.setdefault(level, set()).update(set(asked) - missing)

    def _record_product(self, made: BoundProduct) -> None:
        if made.unused is not None:
            self._record("inner", self.problem.outer_params, made.unused)


def _check_word(name: str, given: object, known: tuple[str, ...]) -> None:
    if given not in known:
        choices = ", ".join(map(repr, known))
        msg = f"{name}={given!r} must be one of {choices}."
        raise ValueError(msg)


def _backend(product: Product) -> AbstractContextManager[object]:
    """Return the attention backend that all of a product needs, set once for it."""
    return attention("math" if product.order == 2 else "default")


def versions_of(problem: BilevelProblem) -> tuple[int, ...]:
    """Return the version counters of λ, by which a move shows."""
    return tuple(t._version for t in problem.outer_params.values())
