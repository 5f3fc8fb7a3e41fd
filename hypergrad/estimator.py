"""The contract of all estimators: what goes in, what comes out, what stays untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor

from hypergrad import tree
from hypergrad._answer_checks import check_like, check_state
from hypergrad._estimate_checks import check_acts, check_depends, check_reaches
from hypergrad.answer import EstimatorState, Hypergradient, Indirect, Info, Terms
from hypergrad.batches import MicroBatch, fixed
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.needs import Needs
from hypergrad.point import Point
from hypergrad.problem import BilevelProblem
from hypergrad.products import Tally
from hypergrad.reporting import once_for, report
from hypergrad.rules import Rule
from hypergrad.steps import (
    InnerStep,
    since_snapshot,
    steps_back,
    take_steps,
    with_grads,
)
from hypergrad.tree import Params

__all__ = [
    "Choice",
    "EstimatorState",
    "HypergradEstimator",
    "Hypergradient",
    "Indirect",
    "Info",
    "Needs",
    "Point",
    "Terms",
]


@dataclass(frozen=True)
class Choice:
    """The estimator to use on a problem, and why.

    Attributes:
        estimator: it resolves to itself.
        why: empty where nothing had to be chosen.

    Example:
        >>> from hypergrad import make_estimator
        >>> Choice(make_estimator("darts"), "differences do").estimator.name
        'darts'
    """

    estimator: HypergradEstimator
    why: str = ""


class HypergradEstimator:
    """Estimate the derivative of the outer loss in the outer parameters.

    A subclass implements `indirect`, or `terms` where the direct term is its own too; all
    else is here. Laws, checked by `hypergrad.testing.check_estimator`: direct + indirect =
    total; same inputs, same output; parameters, `.grad`, buffers, random state and
    train/eval mode come back bit for bit, also when a loss raises; no state is kept on
    `self`. A law that is not true of a kind is declared in `without_laws`.

    Example:
        For g = (w - λ)²/2, where w* = λ: the indirect term is ∂f/∂w. Of f = w²/2 at w = 3
        it is 3, and λ is not in f.

        >>> import torch
        >>> from dataclasses import dataclass
        >>> from hypergrad.answer import Indirect
        >>> @dataclass(frozen=True)
        ... class Through(HypergradEstimator):
        ...     def indirect(self, point):
        ...         v = point.gradients("outer", "inner").inner
        ...         return Indirect({"lam": v["w"]})
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": w},
        ...     {"lam": lam},
        ... )
        >>> found = Through().estimate(problem, inner_batch=None, outer_batch=None)
        >>> found.outer_grads["lam"].item(), found.direct["lam"].item()
        (3.0, 0.0)
    """

    name: ClassVar[str] = ""
    reaches: ClassVar[frozenset[str]] = frozenset()
    """Where λ may act beside the losses: `"settings"` of the inner optimizer, `"start"`."""
    without_laws: ClassVar[Mapping[str, str]] = {}
    """Laws of `hypergrad.testing.LAWS` that this kind does not have, each with why."""

    @property
    def needs(self) -> Needs:
        """What it must be given."""
        return Needs()

    @property
    def answers(self) -> str:
        """Which question it answers, as tables show it.

        `"steps"` (what the last inner steps do), `"minimum"` (where the minimum of the
        inner loss goes), `"neither"` (how the outer loss changes at fixed w), or a few
        words of its own, such as `"penalty at its multiplier"`.
        """
        return "steps" if self.needs.lookback else "minimum"

    # -- what a subclass gives ------------------------------------------------------------

    def indirect(self, point: Point) -> Indirect:
        """Return the term through w*(λ).

        Where the estimator needs v, it is called only where v is not zero.

        Args:
            point: the place, with v = ∂f/∂w.

        Raises:
            HypergradError: the estimator implements neither this nor `terms`.
        """
        del point
        msg = (
            f"{type(self).__name__} implements neither `indirect` nor `terms`: there is "
            "nothing to estimate by. Implement `indirect(point)` for the term through w, "
            "or `terms(point)` for both."
        )
        raise HypergradError(msg)

    def terms(self, point: Point) -> Terms:
        """Return both terms: here ∂f/∂λ, and what `indirect` makes of ∂f/∂w.

        Args:
            point: the place.

        Raises:
            HypergradError: the outer loss depends on no parameter.
            TypeError: `indirect` returned something else than `Indirect`.
        """
        problem, needs_v = point.problem, self.needs.v
        f = point.gradients("outer", "both" if needs_v else "outer")
        check_depends(point)
        if needs_v and f.inner_norm == 0.0:
            # What the estimator carries, such as its count of draws, goes on.
            zeros = tree.zeros_like(problem.outer_params)
            part = Indirect(zeros, dict(point.state))
        else:
            point.v = (f.inner or {}) if needs_v else {}
            part = self.indirect(point)
        if not isinstance(part, Indirect):
            msg = (
                f"{type(self).__name__}.indirect returned a {type(part).__name__}, not a "
                "hypergrad.Indirect. Return Indirect(grads), with grads a dictionary "
                "like the outer parameters."
            )
            raise TypeError(msg)
        check_like("grads", part.grads, problem.outer_params, type(self).__name__)
        return Terms(f.outer or {}, part.grads, part.state, part.info)

    def inner_direction(self, point: Point, gradient: Params) -> Params:
        """Return what the inner optimizer takes for the gradient; here, the gradient.

        Called by `BilevelOptimizer` before each inner step of a search, within what it
        undoes where anything raises.

        Args:
            point: the place before the step, with the step's own data; `point.state` is
                what the estimator carries.
            gradient: ∂g/∂w there, before clipping. Not to be changed.

        Returns:
            Same keys and shapes as `gradient`.
        """
        del point
        return gradient

    def after_inner_step(self, point: Point, step: InnerStep) -> EstimatorState:
        """Return the state to carry on with after an inner step; here, what it was.

        Called as `inner_direction`, once the inner parameters have moved.

        Args:
            point: the place after the step, with the step's own data.
            step: the record of the step; its tensors serve until this returns.

        Returns:
            State that the next call, hook or estimate, finds in `point.state`.
        """
        del step
        return dict(point.state)

    def new_run(self, state: Mapping[str, Any]) -> EstimatorState:
        """Return the state to begin another inner run with; here, none.

        Called by `BilevelOptimizer.begin_run`: w jumps there, so that a solution or a
        sequence that followed it is of no use. What counts estimates goes on.

        Args:
            state: what the estimator carried at the end of the run before. Not to be
                changed.

        Returns:
            State that the first call of the new run finds in `point.state`.
        """
        del state
        return {}

    def virtual_rule(self) -> Rule | None:
        """Return the rule of the steps taken where none are given; None for none."""
        return None

    def resolve(
        self, problem: BilevelProblem, inner_batch: Any, rule: Rule | None
    ) -> Choice:
        """Return the estimator to use on this problem, and why.

        Args:
            problem: the problem; it is left as it was.
            inner_batch: data of the inner loss, to try it with.
            rule: what the inner optimizer's steps are; None where there is no rule for
                it, so that nothing can look back at them.
        """
        del problem, inner_batch, rule
        return Choice(self)

    # -- an estimate ----------------------------------------------------------------------

    def estimate(
        self,
        problem: BilevelProblem,
        *,
        inner_batch: Any,
        outer_batch: Any,
        steps: Sequence[InnerStep] | None = None,
        state: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
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
            on_progress: called as `(steps done, steps in all)` after each inner step that
                an estimator goes through, for a progress bar.

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
            if chosen.estimator is not self:
                result = chosen.estimator.estimate(
                    problem,
                    inner_batch=inner_batch,
                    outer_batch=outer_batch,
                    steps=steps,
                    state=state,
                    on_progress=on_progress,
                )
                return result.because(chosen.why)
            inner_batches = fixed(inner_batch, session.start)
            outer_batches = fixed(outer_batch, session.start)
            point = Point(
                problem,
                inner_batches,
                outer_batches,
                state=dict(state or {}),
                on_progress=on_progress,
            )
            return self._estimate(point, steps)

    def _resolved(
        self,
        problem: BilevelProblem,
        inner_batch: Any,
        steps: Sequence[InnerStep] | None,
    ) -> Choice:
        rule = steps[-1].rule if steps else self.virtual_rule()
        chosen = self.resolve(problem, inner_batch, rule)
        taken = chosen.estimator
        if taken is self:
            return chosen
        again = taken.resolve(problem, inner_batch, rule).estimator
        if again is taken:
            return chosen
        msg = (
            f"{type(self).__name__}.resolve returned a {type(taken).__name__} that "
            "chooses again: what it returns must resolve to itself. Return an estimator "
            "whose `resolve` returns Choice(self)."
        )
        raise HypergradError(msg)

    def _estimate(
        self, point: Point, steps: Sequence[InnerStep] | None
    ) -> Hypergradient:
        problem, tally = point.problem, point.tally
        check_reaches(self, problem)
        point.steps, end = self._steps(problem, point.inner_batches, steps, tally)
        with problem.at(end) if end is not None else nullcontext():
            terms = self._terms(point)
            check_depends(point)
            check_acts(point)
            loss = point.outer_loss()
        total = tree.add(terms.direct, terms.indirect)
        info, found = self._read(point, total, terms, loss)
        unused = [
            f"{level}_loss: {name}"
            for level in ("outer", "inner")
            for name in _in_order(problem, point.unused(level))
            if level == "outer" or name in problem.outer_params
        ]
        counts = Info(
            n_forward=tally.n_forward,
            n_backward=tally.n_backward,
            n_hvp=tally.n_hvp,
            unused=tuple(unused),
        )
        return Hypergradient(
            total,
            terms.direct,
            terms.indirect,
            found,
            terms.state,
            replace(counts, **info),
        )

    def _terms(self, point: Point) -> Terms:
        who = type(self).__name__
        try:
            found = self.terms(point)
        except NonFiniteError:
            point.tally.read()  # which says what came first
            raise
        if not isinstance(found, Terms):
            msg = (
                f"{who}.terms returned a {type(found).__name__}, not a hypergrad.Terms. "
                "Return Terms(direct, indirect), both dictionaries like the outer "
                "parameters."
            )
            raise TypeError(msg)
        outer = point.problem.outer_params
        check_like("direct", found.direct, outer, who)
        check_like("indirect", found.indirect, outer, who)
        check_state(found.state, who)
        return found

    def _read(
        self, point: Point, total: Params, terms: Terms, loss: Tensor | float
    ) -> tuple[dict[str, Any], float]:
        """Look at everything at once.

        Returns:
            The fields of `Info`, and the outer loss, as numbers.

        Raises:
            NonFiniteError: something on the way, or the result, is NaN or infinite.
        """
        # What is not connected is 0, and no small number whose square vanishes.
        unused = point.unused("outer")
        direct = {n: t for n, t in terms.direct.items() if n not in unused}
        trees = (total, direct, terms.indirect)
        names = [n for n, value in terms.info.items() if isinstance(value, Tensor)]
        numbers = [terms.info[n] for n in names]
        lengths = tree.sizes([t for each in trees for t in each.values()])
        *found, outer_loss = point.tally.read(*lengths, *numbers, loss)
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
        info = {**terms.info, **dict(zip(names, found[len(lengths) :], strict=True))}
        info = {n: value() if callable(value) else value for n, value in info.items()}
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
        return {**info, **dict(zip(names, sizes, strict=True))}, outer_loss

    def _steps(
        self,
        problem: BilevelProblem,
        batches: tuple[MicroBatch, ...],
        steps: Sequence[InnerStep] | None,
        tally: Tally,
    ) -> tuple[tuple[InnerStep, ...], Params | None]:
        needs = self.needs
        if not needs.lookback or not problem.inner_params:
            return (), None
        if steps is not None:
            if len(steps) < needs.lookback:
                msg = (
                    f"{type(self).__name__} looks back at {needs.lookback} inner steps "
                    f"but `steps` holds {len(steps)}. Take more inner steps first, or "
                    "pass steps=None for virtual ones."
                )
                raise ValueError(msg)
            if any(step.directed for step in steps[-needs.lookback :]):
                raise HypergradError(_DIRECTED.format(type(self).__name__))
            if needs.snapshots != "all":
                return since_snapshot(steps, needs.lookback), None
            taken = tuple(steps)[-needs.lookback :]
            if not all(step.is_snapshot for step in taken):
                back = steps_back(problem, steps, needs.lookback, "all", tally)
                taken = tuple(back)[::-1]
            if needs.gradients:
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
        if needs.order == 2:
            batches = tuple(replace(m, attention="math") for m in batches)
        virtual, end = take_steps(
            problem,
            [batches] * needs.lookback,
            rule,
            tally=tally,
            grads=needs.gradients,
            byproduct=needs.byproduct,
            snapshots=needs.snapshots,
        )
        return tuple(virtual), end


_DIRECTED = (
    "{} looks back at inner steps, and those on record went along a direction of an "
    "estimator's own, not along the gradient of the inner loss: their derivative is not "
    "known here. Take an estimator that looks at no steps, such as 'cg' or 'neumann'."
)
_LARGEST_FD_ERROR = 0.1
"""Estimated relative error of a finite difference above which it is warned of."""


def _in_order(problem: BilevelProblem, names: frozenset[str]) -> list[str]:
    every = [*problem.inner_params, *problem.outer_params]
    return [name for name in every if name in names]
