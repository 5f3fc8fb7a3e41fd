"""One optimizer for both levels of a bilevel problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from hypergrad import tree
from hypergrad._audit import Audit, Auditor
from hypergrad._optimizer_parts import (
    OptimizerLike,
    apply_gradients,
    check_settings,
    make_estimator_of,
    make_level,
    make_problem,
    numerical_warnings,
    without_graphs,
)
from hypergrad._report import StepReport
from hypergrad._rollback import LevelCopy, Rollback
from hypergrad._run import BilevelRun
from hypergrad.batches import as_micro_batches
from hypergrad.errors import HypergradError, NonFiniteError, NumericalWarning
from hypergrad.estimator import HypergradEstimator, Hypergradient
from hypergrad.problem import BilevelProblem
from hypergrad.products import Gradients, Tally, gradients
from hypergrad.reference import choose_reference
from hypergrad.rules import SUPPORTED, check_supported, rule_of
from hypergrad.steps import InnerStep, keeps_grads
from hypergrad.tree import Params

__all__ = ["Audit", "BilevelOptimizer", "StepReport"]


class BilevelOptimizer(BilevelRun):
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
        outer: with a module: which parameters are outer; see
            `BilevelProblem.from_module`.
        outer_loss_fn: with a module: the outer loss; `loss_fn` where None.
        estimator: a name of `estimator_names()` or an estimator.
        inner_optimizer: a torch optimizer over the inner parameters, or a function that
            makes one from their list, such as `partial(AdamW, lr=1e-3)`.
        outer_optimizer: likewise for the outer parameters.
        outer_every: inner steps from one outer step to the next; None for
            `max(1, estimator.lookback)`.
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
        outer_loss_fn: Callable[[Any, Any], Tensor] | None = None,
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
    ) -> None:
        problem = make_problem(problem_or_model, loss_fn, outer, outer_loss_fn)
        chosen = make_estimator_of(estimator)
        check_settings(outer_every, outer_warmup, max_grad_norm, reuse_graph)
        inner = make_level("inner", inner_optimizer, problem.inner_params)
        auditor = Auditor(audit_every, audit_reference, audit_window)
        if chosen.lookback or auditor.needs_steps:
            check_supported(inner)
        if audit_every and audit_reference in ("dense", "cg"):
            choose_reference(problem, None, audit_reference)
        outer_level = make_level("outer", outer_optimizer, problem.outer_params)
        super().__init__(problem, chosen, inner, outer_level, auditor, outer_every)
        self.outer_warmup = outer_warmup
        self.max_grad_norm = max_grad_norm
        self.reuse_graph: bool | Literal["auto"] = reuse_graph

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inner_batch: Any, outer_batch: Any = None
    ) -> StepReport:
        """Take an inner step, then, where one is due, an outer step at the new w.

        Args:
            inner_batch: data of the inner loss; a batch or `Accumulated` of several.
            outer_batch: data of the outer loss, or a function without arguments that
                draws it; called only where an outer step is due.

        Returns:
            What was done.

        Raises:
            NonFiniteError: the inner loss or its gradient is not finite; nothing moved.
        """
        with self._whole() as rollback:
            self._resolve(inner_batch)
            due = self._due(self.n_inner_steps + 1)
            report = self._inner_step(inner_batch, rollback, outer_follows=due)
            if not due:
                return report
            if callable(outer_batch):
                outer_batch = outer_batch()
            outer = self.outer_step(outer_batch)
        return replace(outer, inner_loss=report.inner_loss, grad_norm=report.grad_norm)

    def inner_step(self, inner_batch: Any) -> StepReport:
        """Take an inner step alone; the outer parameters do not move.

        Args:
            inner_batch: as for `step`.

        Returns:
            What was done.
        """
        with self._whole() as rollback:
            self._resolve(inner_batch)
            return self._inner_step(inner_batch, rollback, outer_follows=False)

    def outer_step(self, outer_batch: Any, inner_batch: Any = None) -> StepReport:
        """Take an outer step alone, due or not; the inner parameters do not move.

        Args:
            outer_batch: data of the outer loss.
            inner_batch: data of the inner loss for an implicit estimator; that of the
                last inner step where None.

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
            inner_batch = self._last or None
        with self._whole() as rollback:
            if inner_batch is not None:
                self._resolve(inner_batch)
            return self._outer_step(outer_batch, inner_batch, rollback)

    @property
    def recorded_steps(self) -> tuple[InnerStep, ...]:
        """The last inner steps, oldest first; as many as the estimator looks back at.

        What an audit needs beyond them is on record too, but not shown here.
        """
        lookback = self.estimator.lookback
        return self._window[-lookback:] if lookback else ()

    def freeze_outer(self) -> None:
        """End the search: the outer parameters keep their values and take no gradient."""
        self.outer_frozen = True
        self._window = ()
        self._estimator_state = {}
        for parameter in self.problem.outer_params.values():
            parameter.requires_grad_(False)

    def _due(self, n_inner_steps: int) -> bool:
        first = max(self.outer_warmup, self.estimator.lookback, 1)
        filled = min(len(self._window) + 1, n_inner_steps) >= self.estimator.lookback
        due = n_inner_steps >= first and n_inner_steps % self.outer_every == 0
        return due and filled and not self.outer_frozen

    def _resolve(self, inner_batch: Any) -> None:
        """Before the first step, let an estimator that chooses another do so."""
        if self._resolved:
            return
        has_rule = type(self.inner) in SUPPORTED
        params = self.problem.inner_params
        rule = rule_of(self.inner, params, self.max_grad_norm) if has_rule else None
        self._adopt(self.estimator.resolve(self.problem, inner_batch, rule))
        self._resolved = True

    def _inner_step(
        self, inner_batch: Any, rollback: Rollback, *, outer_follows: bool
    ) -> StepReport:
        problem, estimator = self.problem, self.estimator
        looks_back = bool(estimator.lookback) and not self.outer_frozen
        # Fused attention draws other dropout masks than the plain one that second-order
        # estimators revisit the step under: then the step itself runs under that.
        math = looks_back and estimator.order == 2
        batches = as_micro_batches(inner_batch)
        if math:
            batches = tuple(replace(m, attention="math") for m in batches)
        keep = (
            looks_back
            and estimator.reuses_graph
            and len(batches) == 1
            and (
                self.reuse_graph is True
                or (self.reuse_graph == "auto" and outer_follows)
            )
        )
        rollback.module()
        g = gradients(
            problem,
            "inner",
            batches,
            Tally(),
            outer=looks_back and estimator.needs_byproduct,
            live=True,
            keep=keep,
        )
        grads = g.inner or {}
        norm = tree.norm(grads)
        factor = 1.0
        if self.max_grad_norm is not None:
            factor = min(1.0, self.max_grad_norm / (norm + 1e-6))
        clipped = tree.scale(grads, factor) if factor < 1.0 else grads
        before = rollback.level(self.inner, problem.inner_params)
        n = self._n_recorded
        if n:
            keeps = keeps_grads(estimator.needs_grads, g.batches)
            record = self._record(g, grads if keeps else {}, before)
            self._window = (*self._window, record)[-n:]
        apply_gradients(self.inner, problem.inner_params, clipped)
        self._last = g.batches
        self.n_inner_steps += 1
        self._opt_called = True  # what torch's schedulers look for
        return StepReport(inner_loss=g.loss, grad_norm=norm)

    def _record(self, g: Gradients, grads: Params, before: LevelCopy) -> InnerStep:
        problem = self.problem
        versions = tuple(t._version for t in problem.outer_params.values())
        last = self._window[-1] if self._window else None
        unmoved = last is not None and last.outer_versions == versions
        return InnerStep(
            before.params,
            # Copies of λ are shared between steps that it did not move between.
            last.outer_params if last and unmoved else tree.clone(problem.outer_params),
            before.state,
            g.batches,
            grads,
            rule_of(self.inner, problem.inner_params, self.max_grad_norm),
            outer_grads=g.outer,
            graph=g.graph,
            outer_versions=versions,
        )

    def _outer_step(
        self, outer_batch: Any, inner_batch: Any, rollback: Rollback
    ) -> StepReport:
        lookback = self.estimator.lookback
        if len(self._window) < lookback:
            msg = (
                f"{type(self.estimator).__name__} looks back at {lookback} inner steps "
                f"but {len(self._window)} were taken. Call inner_step first."
            )
            raise HypergradError(msg)
        if inner_batch is None and not lookback:
            msg = (
                "there is no inner batch to estimate with: no inner step was taken yet. "
                "Pass inner_batch."
            )
            raise HypergradError(msg)
        steps = self.recorded_steps
        # A graph serves one product, also where the step fails or is skipped after it.
        self._window = without_graphs(self._window)
        try:
            # Once for a run; `report.info.reason` tells each time.
            with numerical_warnings(silent=self._warned) as texts:
                result = self.estimator.estimate(
                    self.problem,
                    inner_batch=inner_batch,
                    outer_batch=outer_batch,
                    steps=steps if lookback else None,
                    state=self._estimator_state,
                )
        except NonFiniteError as error:
            self.n_skipped += 1
            return StepReport(skipped=str(error))
        self._warned = self._warned or bool(texts)
        audit = self._audit(result, inner_batch, outer_batch)
        rollback.level(self.outer, self.problem.outer_params)
        apply_gradients(self.outer, self.problem.outer_params, result.outer_grads)
        self._estimator_state = result.state
        self.n_outer_steps += 1
        return StepReport(
            outer_step=True,
            outer_loss=result.outer_loss,
            hypergrad_norm=tree.norm(result.outer_grads),
            direct_norm=tree.norm(result.direct),
            indirect_norm=tree.norm(result.indirect),
            info=result.info,
            audit=audit,
        )

    def _audit(
        self, result: Hypergradient, inner_batch: Any, outer_batch: Any
    ) -> Audit | None:
        if not self._auditor.is_due(self.n_outer_steps + 1):
            return None
        audit = self._auditor.audit(
            self.problem,
            result,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
            steps=self._window,
        )
        if audit.info is None and not self._warned_of_audit:
            self._warned_of_audit = True
            msg = (
                f"the audit of outer step {self.n_outer_steps + 1} says: {audit.reason}"
            )
            warnings.warn(msg, NumericalWarning, stacklevel=5)
        return audit
