"""One optimizer for both levels of a bilevel problem."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hypergrad import tree
from hypergrad._checkpoint import (
    pack_batches,
    pack_step,
    unpack_batches,
    unpack_step,
)
from hypergrad._optimizer_parts import (
    OptimizerLike,
    all_or_nothing,
    check_settings,
    make_level,
    make_problem,
)
from hypergrad.batches import MicroBatch, as_micro_batches
from hypergrad.errors import HypergradError, NonFiniteError, NumericalWarning
from hypergrad.estimator import HypergradEstimator, Info
from hypergrad.estimators import make_estimator
from hypergrad.problem import BilevelProblem
from hypergrad.products import Gradients, Tally, gradients
from hypergrad.rules import check_supported, rule_of, state_of
from hypergrad.steps import InnerStep
from hypergrad.tree import Params

__all__ = ["BilevelOptimizer", "StepReport"]


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        inner_loss: g on the inner batch before the inner step; None without one.
        grad_norm: norm of its gradient, before clipping.
        outer_step: whether the outer parameters moved.
        outer_loss: f on the outer batch, where an outer step was due.
        hypergrad_norm: norm of the hypergradient.
        direct_norm: norm of its direct term.
        indirect_norm: norm of its indirect term.
        skipped: why a due outer step was not taken; None where it was.
        info: cost and trustworthiness of the hypergradient.
    """

    inner_loss: float | None = None
    grad_norm: float | None = None
    outer_step: bool = False
    outer_loss: float | None = None
    hypergrad_norm: float | None = None
    direct_norm: float | None = None
    indirect_norm: float | None = None
    skipped: str | None = None
    info: Info | None = None


class BilevelOptimizer(torch.optim.Optimizer):
    """Step the inner parameters, and every so often the outer ones.

    A `torch.optim.Optimizer`: its `param_groups` are the inner optimizer's, then the
    outer one's, each marked with its `"level"`; both are views on its groups and state,
    so that schedulers, hooks and checkpoints act on what is used. A gradient that a loss
    does not provide is zeros, not None.

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
    ) -> None:
        self.problem = make_problem(problem_or_model, loss_fn, outer, outer_loss_fn)
        if isinstance(estimator, str):
            estimator = make_estimator(estimator)
        if not isinstance(estimator, HypergradEstimator):
            msg = (
                f"estimator must be a name or a HypergradEstimator, got {estimator!r}."
                " Pass e.g. estimator='neumann'."
            )
            raise TypeError(msg)
        self.estimator = estimator
        lookback = estimator.lookback
        if outer_every is None:
            outer_every = max(1, lookback)
        check_settings(outer_every, outer_warmup, max_grad_norm, reuse_graph)
        self.outer_every = outer_every
        self.outer_warmup = outer_warmup
        self.max_grad_norm = max_grad_norm
        self.reuse_graph: bool | Literal["auto"] = reuse_graph
        self.inner = make_level("inner", inner_optimizer, self.problem.inner_params)
        self.outer = make_level("outer", outer_optimizer, self.problem.outer_params)
        if lookback:
            check_supported(self.inner)
        self._constructing = True
        groups = [*self.inner.param_groups, *self.outer.param_groups]
        super().__init__([dict(g) for g in groups], dict(self.inner.defaults))
        self._constructing = False
        self.param_groups = groups
        self.state.update(self.inner.state)
        self.state.update(self.outer.state)
        self._inner_groups = len(self.inner.param_groups)
        for i, group in enumerate(groups):
            group["level"] = "inner" if i < self._inner_groups else "outer"
        self._link()
        self.n_inner_steps = 0
        self.n_outer_steps = 0
        self.n_skipped = 0
        self.outer_frozen = False
        self._window: deque[InnerStep] = deque(maxlen=max(lookback, 1))
        self._estimator_state: dict[str, Tensor] = {}
        self._last: tuple[MicroBatch, ...] = ()
        self._warned = False

    # -- stepping -----------------------------------------------------------------

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
        due = self._due(self.n_inner_steps + 1)
        report = self._inner_step(inner_batch, outer_follows=due)
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
        return self._inner_step(inner_batch, outer_follows=False)

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
        lookback = self.estimator.lookback
        if self.outer_frozen:
            msg = "the outer parameters are frozen: there is no outer step to take."
            raise HypergradError(msg)
        if len(self._window) < lookback:
            msg = (
                f"{type(self.estimator).__name__} looks back at {lookback} inner steps "
                f"but {len(self._window)} were taken. Call inner_step first."
            )
            raise HypergradError(msg)
        if inner_batch is None and not lookback:
            if not self._last:
                msg = (
                    "there is no inner batch to estimate with: no inner step was taken "
                    "yet. Pass inner_batch."
                )
                raise HypergradError(msg)
            inner_batch = self._last
        with warnings.catch_warnings():
            if self._warned:  # once for a run; `report.info.reason` tells each time
                warnings.simplefilter("ignore", NumericalWarning)
            try:
                result = self.estimator.estimate(
                    self.problem,
                    inner_batch=inner_batch,
                    outer_batch=outer_batch,
                    steps=tuple(self._window) if lookback else None,
                    state=self._estimator_state,
                )
            except NonFiniteError as error:
                self.n_skipped += 1
                return StepReport(skipped=str(error))
        self._warned = self._warned or bool(result.info.reason)
        self._apply(self.outer, self.problem.outer_params, result.outer_grads)
        self._estimator_state = result.state
        self.n_outer_steps += 1
        return StepReport(
            outer_step=True,
            outer_loss=result.outer_loss,
            hypergrad_norm=tree.norm(result.outer_grads),
            direct_norm=tree.norm(result.direct),
            indirect_norm=tree.norm(result.indirect),
            info=result.info,
        )

    @property
    def recorded_steps(self) -> tuple[InnerStep, ...]:
        """The last inner steps, oldest first; as many as the estimator looks back at."""
        return tuple(self._window)

    def freeze_outer(self) -> None:
        """End the search: the outer parameters keep their values and take no gradient."""
        self.outer_frozen = True
        self._window.clear()
        self._estimator_state = {}
        for parameter in self.problem.outer_params.values():
            parameter.requires_grad_(False)

    def _due(self, n_inner_steps: int) -> bool:
        first = max(self.outer_warmup, self.estimator.lookback, 1)
        filled = min(len(self._window) + 1, n_inner_steps) >= self.estimator.lookback
        due = n_inner_steps >= first and n_inner_steps % self.outer_every == 0
        return due and filled and not self.outer_frozen

    def _inner_step(self, inner_batch: Any, *, outer_follows: bool) -> StepReport:
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
        record = self._record(g, grads) if looks_back else None
        factor = 1.0
        if self.max_grad_norm is not None:
            factor = min(1.0, self.max_grad_norm / (norm + 1e-6))
        clipped = tree.scale(grads, factor) if factor < 1.0 else grads
        self._apply(self.inner, problem.inner_params, clipped)
        if record is not None:
            self._window.append(record)
        self._last = g.batches
        self.n_inner_steps += 1
        self._opt_called = True  # what torch's schedulers look for
        return StepReport(inner_loss=g.loss, grad_norm=norm)

    def _record(self, g: Gradients, grads: Params) -> InnerStep:
        problem = self.problem
        versions = tuple(t._version for t in problem.outer_params.values())
        last = self._window[-1] if self._window else None
        unmoved = last is not None and last.outer_versions == versions
        return InnerStep(
            tree.clone(problem.inner_params),
            # Copies of λ are shared between steps that it did not move between.
            last.outer_params if last and unmoved else tree.clone(problem.outer_params),
            state_of(self.inner, problem.inner_params),
            g.batches,
            grads,
            rule_of(self.inner, problem.inner_params, self.max_grad_norm),
            outer_grads=g.outer,
            graph=g.graph,
            outer_versions=versions,
        )

    def _apply(
        self, optimizer: torch.optim.Optimizer, params: Params, grads: Params
    ) -> None:
        """Step one level on these gradients; all or nothing, `.grad` left alone."""
        own = [p for group in optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in params.items()}
        held = [p.grad for p in own]
        try:
            with all_or_nothing(optimizer, own):
                for p in own:
                    p.grad = grads[names[id(p)]].to(p.dtype)
                optimizer.step()
        finally:
            for p, grad in zip(own, held, strict=True):
                p.grad = grad

    # -- torch.optim.Optimizer ------------------------------------------------------

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
            steps with their batches and random states, and the estimator's state.
        """
        out = super().state_dict()
        out["bilevel"] = {
            "estimator": type(self.estimator).__name__,
            "n_inner_steps": self.n_inner_steps,
            "n_outer_steps": self.n_outer_steps,
            "n_skipped": self.n_skipped,
            "outer_frozen": self.outer_frozen,
            "window": [pack_step(s) for s in self._window],
            "last": pack_batches(self._last),
            "estimator_state": dict(self._estimator_state),
        }
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; nothing changes where it does not fit.

        Args:
            state_dict: from an optimizer over the same problem with the same estimator.

        Raises:
            ValueError: it comes from another kind of optimizer, estimator or problem.
        """
        saved = state_dict.get("bilevel")
        if saved is None:
            msg = (
                "this state_dict has no 'bilevel' entry: it comes from another "
                "optimizer. Load one that BilevelOptimizer.state_dict returned."
            )
            raise ValueError(msg)
        mine = type(self.estimator).__name__
        if saved["estimator"] != mine:
            msg = (
                f"this state_dict was saved with estimator {saved['estimator']}, and "
                f"this optimizer has {mine}: its records would not fit. Make the "
                "optimizer with the same estimator."
            )
            raise ValueError(msg)
        levels = [g.get("level") for g in state_dict["param_groups"]]
        if levels != [g["level"] for g in self.param_groups]:
            msg = (
                f"the levels of the saved groups are {levels}, those here are "
                f"{[g['level'] for g in self.param_groups]}. Make the optimizer with "
                "the same groups."
            )
            raise ValueError(msg)
        window = [unpack_step(s) for s in saved["window"]]
        for step in window:
            if set(step.inner_params) != set(self.problem.inner_params):
                msg = (
                    "the recorded inner steps have other parameter names than this "
                    "problem. Load the state of an optimizer over the same model."
                )
                raise ValueError(msg)
        last = unpack_batches(saved["last"])
        super().load_state_dict(dict(state_dict))
        self._link()
        self.n_inner_steps = saved["n_inner_steps"]
        self.n_outer_steps = saved["n_outer_steps"]
        self.n_skipped = saved["n_skipped"]
        self._window = deque(window, maxlen=self._window.maxlen)
        self._last = last
        self._estimator_state = dict(saved["estimator_state"])
        if saved["outer_frozen"]:
            self.freeze_outer()
