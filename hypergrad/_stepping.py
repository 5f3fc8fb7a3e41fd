"""The steps of a `BilevelOptimizer`: from one state of a run to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from hypergrad import rng, tree
from hypergrad._answer_checks import check_state
from hypergrad._audit import Audit, Auditor
from hypergrad._hooks import Hooks, directs, follows
from hypergrad._learned_groups import check_written, learned_groups, own_settings
from hypergrad._levels import LevelCopy, apply_gradients, moments
from hypergrad._report import StepReport
from hypergrad._rollback import Rollback
from hypergrad._run import Run
from hypergrad._snapshots import LEAST, spacing
from hypergrad.batches import MicroBatch, as_micro_batches, fixed, versions_in
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.estimator import Hypergradient, Needs
from hypergrad.learned import start_of
from hypergrad.point import versions_of
from hypergrad.problem import BilevelProblem
from hypergrad.products import Gradients, Tally, gradients
from hypergrad.reporting import once_for, report
from hypergrad.rules import SUPPORTED, Rule, rule_of
from hypergrad.steps import (
    InnerStep,
    bytes_of,
    keeps_grads,
    n_snapshots,
    since_snapshot,
    without_snapshot,
)
from hypergrad.tree import Params

__all__ = ["Stepper"]


class Stepper:
    """Take inner and outer steps.

    Args:
        problem: the problem.
        inner: optimizer of the inner parameters.
        outer: optimizer of the outer parameters.
        auditor: compares hypergradients with a reference's.
        max_grad_norm: norm that inner gradients are clipped to; None for none.
        reuse_graph: whether an exact one-step estimator continues the inner step's graph.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        inner: torch.optim.Optimizer,
        outer: torch.optim.Optimizer,
        auditor: Auditor,
        max_grad_norm: float | None,
        reuse_graph: bool | Literal["auto"],
    ) -> None:
        self.problem = problem
        self.inner, self.outer = inner, outer
        self.auditor = auditor
        self.max_grad_norm = max_grad_norm
        self.reuse_graph: bool | Literal["auto"] = reuse_graph
        self._own = own_settings(inner, problem)
        self._spacings: dict[Any, int] = {}
        self._settled: tuple[int, ...] = ()

    @property
    def has_rule(self) -> bool:
        """Whether the inner optimizer's steps can be looked back at."""
        return type(self.inner) in SUPPORTED

    def rule(self) -> Rule | None:
        """Return the rule of the inner optimizer's next step; None where it has none."""
        if not self.has_rule:
            return None
        return rule_of(self.inner, self.problem.inner_params, self.max_grad_norm)

    def n_recorded(self, run: Run) -> int:
        """Return how many inner steps to keep, for the estimator and for audits."""
        if run.outer_frozen or not self.has_rule:
            return 0
        lookback = run.estimator.needs.lookback
        return max(lookback, self.auditor.lookback(max(run.outer_every, lookback)))

    # -- inner steps ----------------------------------------------------------------------

    def inner_step(
        self,
        run: Run,
        inner_batch: Any,
        outer_batch: Any,
        rollback: Rollback,
        *,
        outer_follows: bool,
    ) -> tuple[Run, StepReport]:
        """Take an inner step.

        Args:
            run: where the run stands.
            inner_batch: data of the inner loss.
            outer_batch: data of the outer loss, where the estimator needs it at each step.
            rollback: copies what the step may change.
            outer_follows: whether an outer step follows in the same call.

        Returns:
            Where it then stands, and what was done.

        Raises:
            HypergradError: the parameters are on another device than the records.
            NonFiniteError: the loss or its gradient is not finite; nothing moved.
            ValueError: a hook of the inner optimizer set what is learned.
        """
        problem, needs = self.problem, run.estimator.needs
        self._check_devices(run)
        searches = not run.outer_frozen
        looks_back = bool(needs.lookback) and searches
        batches = as_micro_batches(inner_batch)
        if looks_back and needs.order == 2:
            # Fused attention draws other dropout masks than the plain one that
            # second-order estimators revisit the step under.
            batches = tuple(replace(m, attention="math") for m in batches)
        reuses = self.reuse_graph is True or (
            self.reuse_graph == "auto" and outer_follows
        )
        keep = looks_back and reuses and needs.graph and len(batches) == 1
        n = self.n_recorded(run)
        training = rollback.module()
        batches = tuple(replace(m, training=training) for m in batches)
        # Before the forward pass: an embedding with max_norm moves its weight in it.
        before = rollback.level(self.inner, problem.inner_params, keep=n > 0)
        tally, gaps = Tally(), list[float]()
        if run.left is not None:
            now = tree.size(moments(self.inner, problem.inner_params))
            tally.watch([now - run.left], gaps.extend)
        versions = [t._version for t in problem.inner_params.values()]
        g = gradients(
            problem,
            "inner",
            batches,
            tally,
            outer=looks_back and needs.byproduct,
            live=True,
            keep=keep,
        )
        grads, norm = g.inner or {}, g.inner_norm
        directed = searches and directs(run.estimator)
        followed = searches and follows(run.estimator)
        hooks = None
        if directed or followed:
            hooks = Hooks(problem, run, g.batches, self._outer(needs, outer_batch))
        if hooks is not None and directed:
            grads, norm = hooks.direction(grads)
        factor = 1.0
        if self.max_grad_norm is not None:
            factor = min(1.0, self.max_grad_norm / (norm + 1e-6))
        clipped = tree.scale(grads, factor) if factor < 1.0 else grads
        record, recorded = None, bool(n or followed)
        with learned_groups(
            self.inner,
            problem,
            run.n_inner_steps - run.began,
            own=self._own if searches else (),
            held=not searches,
        ) as written:
            # An embedding with max_norm moves w in the forward pass.
            still = versions == [t._version for t in problem.inner_params.values()]
            with self._rule_taken(written) if recorded else nullcontext([]) as rules:
                apply_gradients(self.inner, problem.inner_params, clipped)
        if recorded:
            asked = needs.gradients or directed or not n
            kept = grads if keeps_grads(problem, asked, batches) else {}
            record = self._record(
                run, g, kept, before, rules[-1], follows=gaps == [0.0]
            )
            record = replace(record, directed=directed)
        if n and record is not None:
            run = replace(run, window=(*run.window, record))
        if n:
            run = self._trimmed(run, n, still=still)
        own = None
        if hooks is not None:
            if record is not None and followed:
                run = replace(run, estimator_state=hooks.state_after(record))
            own = hooks.cost
        run = replace(run, last=g.batches, n_inner_steps=run.n_inner_steps + 1)
        return run, StepReport(inner_loss=g.loss, grad_norm=g.inner_norm, own=own)

    @contextmanager
    def _rule_taken(self, written: Sequence[dict[str, Any]]) -> Iterator[list[Rule]]:
        """Yield a list that gets the rule of the step that is taken in the block.

        Hooks of the optimizer may change its settings at the last moment, as schedulers do
        between steps; what is registered last runs after them.

        Args:
            written: learned settings that the optimizer's groups have in the block.

        Raises:
            ValueError: they have others where the step is taken.
        """
        rules: list[Rule] = []

        def look(*_: Any) -> None:
            check_written(self.inner, written)
            rules.append(rule_of(self.inner, w, self.max_grad_norm))

        w = self.problem.inner_params
        hook = self.inner.register_step_pre_hook(look)
        try:
            yield rules
        finally:
            hook.remove()
        if not rules:  # a `step` that somebody replaced runs no hooks
            look()

    def _outer(self, needs: Needs, outer_batch: Any) -> tuple[MicroBatch, ...]:
        """Return the outer data of an inner step; none where it is not needed.

        Raises:
            HypergradError: it is needed, and there is none.
        """
        if not needs.outer_batch_each_step:
            return ()
        # A functional problem may have losses without data.
        if outer_batch is None and self.problem.module is not None:
            msg = (
                "the estimator evaluates the outer loss at each inner step, and there is "
                "no outer batch. Pass outer_batch to `inner_step` or `step`, e.g. a "
                "function that draws one."
            )
            raise HypergradError(msg)
        return fixed(outer_batch, rng.capture(self.problem.tensors))

    def _record(
        self,
        run: Run,
        g: Gradients,
        grads: Params,
        before: LevelCopy,
        rule: Rule,
        *,
        follows: bool,
    ) -> InnerStep:
        problem = self.problem
        versions = versions_of(problem)
        last = run.window[-1] if run.window else None
        unmoved = last is not None and last.outer_versions == versions
        return InnerStep(
            before.params,
            # Copies of λ are shared between steps that it did not move between.
            last.outer_params if last and unmoved else tree.clone(problem.outer_params),
            before.state,
            g.batches,
            grads,
            rule,
            outer_grads=g.outer,
            graph=g.graph,
            outer_versions=versions,
            batch_versions=versions_in(g.batches),
            grad_norm=g.inner_norm,
            follows=follows and last is not None,
            number=run.n_inner_steps - run.began,
        )

    def _trimmed(self, run: Run, n: int, *, still: bool) -> Run:
        """Return the run with what the last steps are reached from, and no more.

        Args:
            run: the run, whose newest record is that of the step just taken.
            n: how many steps are looked back at.
            still: whether w moved in the optimizer's step alone.
        """
        every = self._spacing(run, n)
        if every == 1:
            return replace(run, window=since_snapshot(run.window, n), left=None)
        newest = run.n_inner_steps  # counted from 0
        # An estimator that looks at whole records finds those of its own.
        needs = run.estimator.needs
        own = newest - (needs.lookback if needs.snapshots == "all" else 0)
        # The window of an outer step that is due starts with a snapshot.
        period, shift = (
            (run.outer_every, n) if run.outer_every >= n else (newest + 1, 0)
        )
        begun = run.began - shift
        window, first = list(run.window), newest + 1 - len(run.window)
        # The step before this one left the older records as they are to be, so that a
        # step of a long run does not go through all of them.
        by = every, n, run.outer_every, newest - own, run.began
        settled = self._settled == (*by, newest - 1)
        self._settled = (*by, newest)
        for i in range(max(first, own) if settled else first, own + 1):
            step, chosen = window[i - first], (i - begun) % period % every == 0
            if step.is_snapshot and step.follows and not chosen:
                window[i - first] = without_snapshot(self.problem, step)
        w = self.problem.inner_params
        left = tree.size(moments(self.inner, w)) if still else None
        return replace(run, window=since_snapshot(window, n), left=left)

    def _spacing(self, run: Run, n: int) -> int:
        """Return from how many steps to the next w and the state are kept."""
        needs = run.estimator.needs
        limit = needs.snapshots
        if n > needs.lookback and limit == "all":
            limit = self.auditor.snapshots
        if limit == "all" or n <= LEAST or not self.problem.inner_params:
            return 1
        # There is no state before the first step.
        tensors = moments(self.inner, self.problem.inner_params)
        tensors += run.window[-1].grads.values()
        key = limit, n, len(tensors)
        if key not in self._spacings:
            held = n_snapshots(self.problem, n, limit, bytes_of(tensors))
            self._spacings[key] = spacing(n, held)
        return self._spacings[key]

    def _check_devices(self, run: Run) -> None:
        # Of the newest that has any.
        params = (s.inner_params for s in reversed(run.window) if s.is_snapshot)
        now = self.problem.inner_params
        for name, then in next(params, {}).items():
            if then.device != now[name].device:
                msg = (
                    f"{name!r} is on {now[name].device}, and the recorded inner steps "
                    f"have it on {then.device}: the module was moved between two steps. "
                    "Move it back, or save state_dict(), make the optimizer anew on the "
                    "new device and load it there."
                )
                raise HypergradError(msg)
            if then.dtype != now[name].dtype:
                msg = (
                    f"{name!r} is {now[name].dtype}, and the recorded inner steps have it "
                    f"in {then.dtype}: the module was converted between two steps. "
                    "Convert it back, or make the problem and the optimizer anew."
                )
                raise HypergradError(msg)
        self._check_starts()

    def _check_starts(self) -> None:
        now = self.problem.inner_params
        for name, start in self.problem.inner_start.items():
            held = self.problem.outer_params[start]
            if held.dtype != now[name].dtype:
                msg = (
                    f"{name!r} is {now[name].dtype}, and {start!r} is learned in "
                    f"{held.dtype}: the module was converted after the problem was made. "
                    "Convert it before, or make the problem anew."
                )
                raise HypergradError(msg)

    def begin_run(self, run: Run, rollback: Rollback) -> Run:
        """Return the run where another inner run begins, with w at its start.

        Args:
            run: where the run stands.
            rollback: copies what changes.
        """
        problem = self.problem
        run.tell_if_idle(problem.reported)
        self._check_starts()
        rollback.level(self.inner, problem.inner_params, keep=False)
        start = start_of(problem)
        own = [problem.inner_params[name] for name in start]
        with torch.inference_mode(mode=False):
            tree.copy(own, list(start.values()))
        for parameter in own:
            self.inner.state.pop(parameter, None)
        state = run.estimator.new_run(dict(run.estimator_state))
        check_state(state, f"{type(run.estimator).__name__}.new_run")
        return replace(run.begun(), estimator_state=state)

    # -- outer steps ----------------------------------------------------------------------

    def outer_step(
        self,
        run: Run,
        outer_batch: Any,
        inner_batch: Any,
        rollback: Rollback,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Run, StepReport]:
        """Take an outer step.

        Args:
            run: where the run stands.
            outer_batch: data of the outer loss.
            inner_batch: data of the inner loss; None for none.
            rollback: copies what the step may change.
            on_progress: hears of the inner steps that the estimator goes through.

        Returns:
            Where it then stands, and what was done; where a loss or the hypergradient is
            not finite, why nothing was.

        Raises:
            HypergradError: fewer inner steps were taken than the estimator looks back at.
        """
        estimator = run.estimator
        lookback = estimator.needs.lookback
        if len(run.window) < lookback:
            msg = (
                f"{type(estimator).__name__} looks back at {lookback} inner steps "
                f"but {len(run.window)} were taken. Call inner_step first."
            )
            raise HypergradError(msg)
        if inner_batch is None and not lookback:
            msg = (
                "there is no inner batch to estimate with: no inner step was taken yet. "
                "Pass inner_batch."
            )
            raise HypergradError(msg)
        self._check_devices(run)
        steps = run.recorded_steps
        self._check_batches(steps)
        # A graph serves one product, also where the step fails or is skipped after it.
        run = run.without_graphs()
        try:
            result = estimator.estimate(
                self.problem,
                inner_batch=inner_batch,
                outer_batch=outer_batch,
                steps=steps if lookback else None,
                state=run.estimator_state,
                on_progress=on_progress,
            )
        except NonFiniteError as error:
            run = replace(run, n_skipped=run.n_skipped + 1)
            return run, StepReport(skipped=str(error))
        result = result.because(run.why)
        audit = self._audit(run, result, inner_batch, outer_batch)
        rollback.level(self.outer, self.problem.outer_params, keep=False)
        apply_gradients(self.outer, self.problem.outer_params, result.outer_grads)
        run = replace(
            run,
            estimator_state=result.state,
            n_outer_steps=run.n_outer_steps + 1,
        )
        info = result.info
        return run, StepReport(
            outer_step=True,
            outer_loss=result.outer_loss,
            hypergrad_norm=info.norm,
            direct_norm=info.direct_norm,
            indirect_norm=info.indirect_norm,
            info=info,
            audit=audit,
        )

    def _check_batches(self, steps: Sequence[InnerStep]) -> None:
        known = (s for s in steps if s.batch_versions)
        written = sum(versions_in(s.micro_batches) != s.batch_versions for s in known)
        if written and "batches" not in self.problem.reported:
            self.problem.reported.add("batches")
            with once_for(set()):
                report(
                    f"batches of {written} of the {len(steps)} recorded inner steps were "
                    "written into since: steps are looked back at on the data that the "
                    "batches hold now, and the hypergradient is that of other steps. Hand "
                    "each step tensors of its own, such as batch.clone()."
                )

    def _audit(
        self, run: Run, result: Hypergradient, inner_batch: Any, outer_batch: Any
    ) -> Audit | None:
        if not self.auditor.is_due(run.n_outer_steps + 1):
            return None
        audit = self.auditor.audit(
            self.problem,
            result,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
            steps=run.window,
            n_steps=self.n_recorded(run),
        )
        if audit.info is None and "audit" not in self.problem.reported:
            self.problem.reported.add("audit")
            with once_for(set()):
                report(
                    f"the audit of outer step {run.n_outer_steps + 1} says: "
                    f"{audit.reason}"
                )
        return audit
