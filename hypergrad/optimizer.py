"""One optimizer for both levels of a bilevel problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hypergrad._audit import Audit, Auditor
from hypergrad._checkpoint import Checkpointer, pack_estimator
from hypergrad._estimate_checks import check_reaches
from hypergrad._hooks import follows
from hypergrad._levels import OptimizerLike, make_level
from hypergrad._report import StepReport
from hypergrad._rollback import Rollback, Workspace
from hypergrad._run import Run
from hypergrad._setup import (
    check_inner,
    check_outer,
    check_settings,
    describe,
    make_estimator_of,
    make_problem,
)
from hypergrad._stepping import Stepper
from hypergrad.errors import HypergradError
from hypergrad.estimator import HypergradEstimator
from hypergrad.problem import BilevelProblem
from hypergrad.rules import check_supported
from hypergrad.steps import InnerStep, since_snapshot

__all__ = ["Audit", "BilevelOptimizer", "StepReport"]


class BilevelOptimizer(torch.optim.Optimizer):
    """Step the inner parameters, and every so often the outer ones.

    A `torch.optim.Optimizer`: its `param_groups` are the inner optimizer's, then the
    outer one's, each marked with its `"level"`; both are views on its groups and state,
    so that schedulers, hooks and checkpoints act on what is used. A gradient that a loss
    does not provide is zeros, not None.

    A step is taken wholly or not at all. Where anything in it raises, out of memory and
    Ctrl-C included, then parameters, `.grad`, optimizer state, random state, buffers (of
    up to 16 MiB), train/eval modes and all that is recorded here are bit for bit as
    before, and the same call can be made again. Batches that a function drew stay drawn.

    Args:
        problem_or_model: a `BilevelProblem`, or a module to make one of.
        loss_fn: with a module: `(model, batch) -> scalar`.
        outer: with a module: what is outer; see `BilevelProblem.from_module`.
        outer_loss_fn: with a module: the outer loss; `loss_fn` where None.
        estimator: a name of `estimator_names()` or an estimator.
        inner_optimizer: a torch optimizer over the inner parameters, or a function that
            makes one from their list, such as `partial(AdamW, lr=1e-3)`.
        outer_optimizer: likewise for the outer parameters.
        outer_every: inner steps from one outer step to the next; None for
            `max(1, estimator.needs.lookback)`.
        outer_warmup: inner steps before the first outer step. Adam's first steps have
            degenerate derivatives.
        max_grad_norm: norm that inner gradients are clipped to; None for none.
        reuse_graph: whether an exact one-step estimator continues the inner step's own
            graph. `"auto"`: where an outer step follows at once in the same `step`.
        audit_every: outer steps from one audit to the next; None for none. An audit
            computes the hypergradient again by a reference, on the same batches and
            recorded steps, and puts the comparison in `StepReport.audit`. It changes
            nothing else of the run.
        audit_reference: what to compare with: `"auto"`, `"unrolled"`, `"dense"`, `"cg"`
            or an estimator; see `hypergrad.reference.choose_reference`. `"auto"` unrolls
            through the recorded inner steps, or solves with the inner Hessian where the
            inner optimizer has no rule.
        audit_window: inner steps that are recorded for a reference that unrolls; None
            for all since the last outer step.
        inner_settings: with a module: what is learned of it; see `BilevelProblem`.
        learn_start: with a module: whether the start of an inner run is learned; likewise.

    Raises:
        TypeError: an estimator or optimizer of a kind that does not work here.
        ValueError: a setting out of range, or an optimizer over other tensors.

    Example:
        f = g = (w - λ)²/2 with SGD of rate 1/2: w goes from 4 to 2; DARTS gives
        λ a derivative of (λ - w) + ξ (w - λ) = -2 + 1.

        >>> import torch
        >>> from functools import partial
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> lam = torch.tensor(0.0, requires_grad=True)
        >>> half = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2
        >>> opt = BilevelOptimizer(
        ...     BilevelProblem(half, half, {"w": w}, {"lam": lam}),
        ...     estimator="darts",
        ...     inner_optimizer=partial(torch.optim.SGD, lr=0.5),
        ...     outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        ...     outer_warmup=0,
        ... )
        >>> report = opt.step(None, None)
        >>> w.item(), round(lam.item(), 4), report.outer_step
        (2.0, 1.0, True)
    """

    def __init__(
        self,
        problem_or_model: BilevelProblem | nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        outer: Any = None,
        outer_loss_fn: Callable[[Any, Any], Tensor | float] | None = None,
        estimator: str | HypergradEstimator,
        inner_optimizer: OptimizerLike,
        outer_optimizer: OptimizerLike,
        outer_every: int | None = None,
        outer_warmup: int = 10,
        max_grad_norm: float | None = None,
        reuse_graph: bool | Literal["auto"] = "auto",
        audit_every: int | None = None,
        audit_reference: str | HypergradEstimator = "auto",
        audit_window: int | None = None,
        inner_settings: Mapping[str, Any] | None = None,
        learn_start: bool | str | Sequence[str] = False,
    ) -> None:
        problem = make_problem(
            problem_or_model,
            loss_fn=loss_fn,
            outer=outer,
            outer_loss_fn=outer_loss_fn,
            inner_settings=inner_settings,
            learn_start=learn_start,
        )
        chosen = make_estimator_of(estimator)
        check_settings(outer_every, outer_warmup, max_grad_norm, reuse_graph)
        inner = make_level("inner", inner_optimizer, problem.inner_params)
        auditor = Auditor(audit_every, audit_reference, audit_window)
        check_inner(problem, chosen, inner, auditor)
        outer_level = make_level("outer", outer_optimizer, problem.outer_params)
        check_outer(problem, outer_level)
        self.problem = problem
        self.inner, self.outer = inner, outer_level
        self.outer_warmup = outer_warmup
        self._asked = chosen
        self._every_is_open = outer_every is None
        self._run = Run(chosen, outer_every or max(1, chosen.needs.lookback))
        self._stepper = Stepper(
            problem, inner, outer_level, auditor, max_grad_norm, reuse_graph
        )
        self._checkpointer = Checkpointer(problem, chosen)
        self._workspace = Workspace()
        self._rollback: Rollback | None = None
        self._constructing = True
        groups = [*inner.param_groups, *outer_level.param_groups]
        super().__init__([dict(g) for g in groups], dict(inner.defaults))
        self._constructing = False
        self.param_groups = groups
        self.state.update(inner.state)
        self.state.update(outer_level.state)
        self._inner_groups = len(inner.param_groups)
        for i, group in enumerate(groups):
            group["level"] = "inner" if i < self._inner_groups else "outer"
        self._link()
        described = describe(
            chosen,
            problem,
            outer_every=outer_every,
            outer_warmup=outer_warmup,
            max_grad_norm=max_grad_norm,
            reuse_graph=reuse_graph,
            audit=auditor,
            inner_optimizer=f"{type(inner).__name__} {inner.defaults}",
            outer_optimizer=f"{type(outer_level).__name__} {outer_level.defaults}",
        )
        problem.reducer.check_same(
            "how their optimizers are set up", described, problem.outer_params
        )

    # -- where the run stands -----------------------------------------------------------

    @property
    def estimator(self) -> HypergradEstimator:
        """The estimator in use, which the one that was asked for may have chosen."""
        return self._run.estimator

    @property
    def why(self) -> str:
        """Why that estimator was chosen; empty where it was asked for."""
        return self._run.why

    @property
    def outer_every(self) -> int:
        """Inner steps from one outer step to the next."""
        return self._run.outer_every

    @property
    def n_inner_steps(self) -> int:
        """Inner steps taken."""
        return self._run.n_inner_steps

    @property
    def n_outer_steps(self) -> int:
        """Outer steps taken."""
        return self._run.n_outer_steps

    @property
    def n_skipped(self) -> int:
        """Outer steps that were due and not taken, as a number was not finite."""
        return self._run.n_skipped

    @property
    def outer_frozen(self) -> bool:
        """Whether the search has ended."""
        return self._run.outer_frozen

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that inner gradients are clipped to; None for none."""
        return self._stepper.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._stepper.max_grad_norm = value

    @property
    def reuse_graph(self) -> bool | Literal["auto"]:
        """Whether an exact one-step estimator continues the inner step's own graph."""
        return self._stepper.reuse_graph

    @reuse_graph.setter
    def reuse_graph(self, value: bool | Literal["auto"]) -> None:
        self._stepper.reuse_graph = value

    @property
    def recorded_steps(self) -> tuple[InnerStep, ...]:
        """The last inner steps, oldest first; as many as the estimator looks back at.

        Where w is not kept of each step, those before them too, back to the snapshot that
        they are reached from. What an audit needs beyond them is on record, but not shown
        here.
        """
        return self._run.recorded_steps

    # -- steps --------------------------------------------------------------------------

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inner_batch: Any,
        outer_batch: Any = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> StepReport:
        """Take an inner step, then, where one is due, an outer step at the new w.

        Args:
            inner_batch: data of the inner loss; a batch or `Accumulated` of several.
            outer_batch: data of the outer loss, or a function without arguments that
                draws it; called only where an outer step is due, or where the estimator
                needs an outer batch at each step.
            on_progress: as for `outer_step`.

        Returns:
            What was done.

        Raises:
            NonFiniteError: the inner loss or its gradient is not finite; nothing moved.
        """
        with self._whole() as rollback:
            self._resolve(inner_batch)
            self._run = replace(self._run, asked=True)
            due = self._run.is_due(self.n_inner_steps + 1, self.outer_warmup)
            if self._reads_outer and callable(outer_batch):
                outer_batch = outer_batch()
            report = self._inner(inner_batch, outer_batch, rollback, outer_follows=due)
            if not due or len(self._run.window) < self.estimator.needs.lookback:
                return report
            if callable(outer_batch):
                outer_batch = outer_batch()
            outer = self.outer_step(outer_batch, on_progress=on_progress)
        return replace(
            outer,
            inner_loss=report.inner_loss,
            grad_norm=report.grad_norm,
            own=report.own,
        )

    def inner_step(self, inner_batch: Any, outer_batch: Any = None) -> StepReport:
        """Take an inner step alone; the outer parameters do not move.

        Args:
            inner_batch: as for `step`.
            outer_batch: likewise, for an estimator that needs it at each step; otherwise
                it is not looked at.

        Returns:
            What was done.

        Raises:
            NonFiniteError: as for `step`.
        """
        with self._whole() as rollback:
            self._resolve(inner_batch)
            if self._reads_outer and callable(outer_batch):
                outer_batch = outer_batch()
            return self._inner(inner_batch, outer_batch, rollback, outer_follows=False)

    @property
    def _reads_outer(self) -> bool:
        needed = self.estimator.needs.outer_batch_each_step
        return needed and not self.outer_frozen

    def _inner(
        self,
        inner_batch: Any,
        outer_batch: Any,
        rollback: Rollback,
        *,
        outer_follows: bool,
    ) -> StepReport:
        self._run, report = self._stepper.inner_step(
            self._run, inner_batch, outer_batch, rollback, outer_follows=outer_follows
        )
        self._opt_called = True  # what torch's schedulers look for
        self._resolve(inner_batch)
        return report

    def outer_step(
        self,
        outer_batch: Any,
        inner_batch: Any = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> StepReport:
        """Take an outer step alone, due or not; the inner parameters do not move.

        Args:
            outer_batch: data of the outer loss.
            inner_batch: data of the inner loss for an implicit estimator; that of the
                last inner step where None.
            on_progress: called as `(steps done, steps in all)` after each inner step that
                the estimator goes through, for a progress bar.

        Returns:
            What was done. A loss or hypergradient that is not finite skips the step:
            parameters and moments stay as they were, and `n_skipped` counts it.

        Raises:
            HypergradError: the outer parameters are frozen, or fewer inner steps were
                taken than the estimator looks back at.
        """
        if self.outer_frozen:
            msg = "the outer parameters are frozen: there is no outer step to take."
            raise HypergradError(msg)
        if inner_batch is None:
            inner_batch = self._run.last or None
        with self._whole() as rollback:
            if inner_batch is not None:
                self._resolve(inner_batch)
            self._run, report = self._stepper.outer_step(
                self._run, outer_batch, inner_batch, rollback, on_progress
            )
            return report

    def begin_run(self) -> None:
        """Begin an inner run anew: at the learned start, with a fresh optimizer state.

        w goes where `learn_start` says, and stays where it is elsewhere; momentum and
        moments, recorded steps and solutions that the estimator carried are forgotten; a
        learned schedule starts over. Counts of steps and random directions go on, and
        buffers of a module stay as they are, such as the averages of a BatchNorm. A run
        that was too short for an outer step, by `outer_every` or what the estimator looks
        back at, is warned of: outer steps keep the time of their run.
        """
        with self._whole() as rollback:
            self._run = self._stepper.begin_run(self._run, rollback)

    def freeze_outer(self) -> None:
        """End the search: the outer parameters keep their values and take no gradient.

        Past the end of a learned schedule, its last factor stays.
        """
        self._run.tell_if_idle(self.problem.reported, self.outer_warmup)
        self._run = self._run.frozen()
        for parameter in self.problem.outer_params.values():
            parameter.requires_grad_(False)

    def _resolve(self, inner_batch: Any) -> None:
        """Before the first step and after it, let an estimator that chooses do so.

        After it, since only then a graph of the inner loss tells what it computes in.
        """
        if self._run.resolved:
            return
        was = self.estimator
        chosen = was.resolve(self.problem, inner_batch, self._stepper.rule())
        self._adopt(chosen.estimator, chosen.why or self.why)
        if self.n_inner_steps:
            self._run = self._run.chosen_after(was)

    def _adopt(self, estimator: HypergradEstimator, why: str) -> None:
        every = self._run.outer_every
        if estimator is not self._asked:
            pack_estimator(estimator)  # refuses what a checkpoint could not hold
            check_reaches(estimator, self.problem)
            if estimator.needs.lookback or follows(estimator):
                check_supported(self.inner)
        if self._every_is_open:
            every = max(1, self._asked.needs.lookback, estimator.needs.lookback)
        self._run = replace(self._run, estimator=estimator, outer_every=every, why=why)

    @contextmanager
    def _whole(self) -> Iterator[Rollback]:
        """Run the block; where it raises, make everything what it was before it."""
        if self._rollback is not None:  # the outer part of `step`
            yield self._rollback
            return
        held = self._run, self.param_groups, self.state
        self._rollback = rollback = Rollback(self.problem, self._workspace)
        try:
            yield rollback
        except BaseException:
            rollback.undo()
            run, self.param_groups, self.state = held
            # Values that were copied back void a graph that saved them.
            self._run = run.without_graphs()
            self._link()
            raise
        finally:
            self._rollback = None

    # -- the side of torch --------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: which tensors there are is the problem's to say.

        Args:
            param_group: the group.

        Raises:
            ValueError: always, once constructed.
        """
        if not self._constructing:
            msg = (
                "parameters of a BilevelOptimizer come from its problem, which is fixed."
                " Make the groups in inner_optimizer and outer_optimizer before."
            )
            raise ValueError(msg)
        super().add_param_group(param_group)

    def _link(self) -> None:
        self.inner.param_groups = self.param_groups[: self._inner_groups]
        self.outer.param_groups = self.param_groups[self._inner_groups :]
        self.inner.state = self.outer.state = self.state

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, in plain containers.

        Returns:
            torch's own layout, and under `"bilevel"` the counters, the recorded inner
            steps with their batches and random states, the estimator's state, and learned
            settings and starts; weights are the model's to save. On several ranks each
            has its own batches: save one file for each rank.
        """
        out = super().state_dict()
        out["bilevel"] = self._checkpointer.pack(self._run)
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; nothing changes where it does not fit.

        Tensors go where the parameters are, whatever device they were saved from. A file
        that another rank saved has that rank's data: then the recorded steps are left
        out, on all ranks, and the first outer steps wait until there are new ones.

        Args:
            state_dict: from an optimizer over the same problem with the same estimator.

        Raises:
            ValueError: it comes from another kind of optimizer, estimator or problem.
        """
        levels = [g["level"] for g in self.param_groups]
        found: list[Run] = []

        def load() -> list[float]:
            run, foreign = self._checkpointer.unpack(state_dict, levels)
            super(BilevelOptimizer, self).load_state_dict(dict(state_dict))
            found.append(run)
            return [float(foreign)]

        with self._whole() as rollback:
            rollback.level(self.outer, self.problem.outer_params, keep=False)
            reducer = self.problem.reducer
            foreign = reducer.largest(1, load, self.problem.outer_params)[0]
            loaded = found[0]
            if foreign:
                loaded = self._checkpointer.without_data(loaded, state_dict)
            self._link()
            self._adopt(loaded.estimator, loaded.why)
            n = self._stepper.n_recorded(replace(loaded, outer_every=self.outer_every))
            window = since_snapshot(loaded.window, n) if n else ()
            self._run = replace(loaded, outer_every=self.outer_every, window=window)
            self._checkpointer.place_learned(state_dict)
            for parameter in self.problem.outer_params.values():
                parameter.requires_grad_(not self.outer_frozen)
