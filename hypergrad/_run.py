"""What a bilevel run has reached: kept, saved, loaded and rolled back as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hypergrad._audit import Auditor
from hypergrad._checkpoint import (
    check_saved,
    pack_batches,
    pack_estimator,
    pack_step,
    unpack_batches,
    unpack_estimator,
    unpack_steps,
)
from hypergrad._optimizer_parts import without_graphs
from hypergrad._rollback import Rollback
from hypergrad.batches import MicroBatch
from hypergrad.estimator import HypergradEstimator
from hypergrad.problem import BilevelProblem
from hypergrad.rules import SUPPORTED, check_supported
from hypergrad.steps import InnerStep

__all__ = ["BilevelRun"]


class BilevelRun(torch.optim.Optimizer):
    """The torch side of `BilevelOptimizer`, which takes the steps.

    Its parameter groups are the inner optimizer's, then the outer one's; both are views
    on its groups and state.

    Args:
        problem: the problem.
        estimator: what was asked for.
        inner: optimizer of the inner parameters.
        outer: optimizer of the outer parameters.
        auditor: says how many inner steps an audit looks back at.
        outer_every: as for `BilevelOptimizer`.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        estimator: HypergradEstimator,
        inner: torch.optim.Optimizer,
        outer: torch.optim.Optimizer,
        auditor: Auditor,
        outer_every: int | None,
    ) -> None:
        self.problem = problem
        self.inner, self.outer = inner, outer
        self._asked = self.estimator = estimator
        self._auditor = auditor
        self._every_is_open = outer_every is None
        self.outer_every = outer_every or max(1, estimator.lookback)
        self._constructing = True
        groups = [*inner.param_groups, *outer.param_groups]
        super().__init__([dict(g) for g in groups], dict(inner.defaults))
        self._constructing = False
        self.param_groups = groups
        self.state.update(inner.state)
        self.state.update(outer.state)
        self._inner_groups = len(inner.param_groups)
        for i, group in enumerate(groups):
            group["level"] = "inner" if i < self._inner_groups else "outer"
        self._link()
        self.n_inner_steps = 0
        self.n_outer_steps = 0
        self.n_skipped = 0
        self.outer_frozen = False
        self._window: tuple[InnerStep, ...] = ()
        self._estimator_state: dict[str, Tensor] = {}
        self._last: tuple[MicroBatch, ...] = ()
        self._resolved = False
        self._warned = False
        self._warned_of_audit = False
        self._rollback: Rollback | None = None

    @property
    def _n_recorded(self) -> int:
        """Number of inner steps to keep on record, for the estimator and for audits."""
        if self.outer_frozen or type(self.inner) not in SUPPORTED:
            return 0
        lookback = self.estimator.lookback
        audited = self._auditor.lookback(max(self.outer_every, lookback))
        return max(lookback, audited)

    def _adopt(self, estimator: HypergradEstimator) -> None:
        if estimator is not self._asked:
            pack_estimator(estimator)  # refuses what a checkpoint could not hold
            if estimator.lookback:
                check_supported(self.inner)
        self.estimator = estimator
        if self._every_is_open:
            self.outer_every = max(1, self._asked.lookback, estimator.lookback)

    @contextmanager
    def _whole(self) -> Iterator[Rollback]:
        """Run the block; where it raises, make everything what it was before it."""
        if self._rollback is not None:  # the outer part of `step`
            yield self._rollback
            return
        held = {name: getattr(self, name) for name in _PROGRESS}
        self._rollback = rollback = Rollback(self.problem)
        try:
            yield rollback
        except BaseException:
            rollback.undo()
            vars(self).update(held)
            # Values that were copied back void a graph that saved them.
            self._window = without_graphs(self._window)
            self._link()
            raise
        finally:
            self._rollback = None

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
        chosen = self.estimator is not self._asked
        out["bilevel"] = {
            "estimator": type(self._asked).__name__,
            "chosen": pack_estimator(self.estimator) if chosen else None,
            "resolved": self._resolved,
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
        levels = [g["level"] for g in self.param_groups]
        saved = check_saved(state_dict, self._asked, levels)
        window = unpack_steps(saved["window"], self.problem.inner_params)
        with self._whole():
            super().load_state_dict(dict(state_dict))
            self._link()
            chosen = saved.get("chosen")
            self._adopt(self._asked if chosen is None else unpack_estimator(chosen))
            self._resolved = saved.get("resolved", True)
            self.n_inner_steps = saved["n_inner_steps"]
            self.n_outer_steps = saved["n_outer_steps"]
            self.n_skipped = saved["n_skipped"]
            self.outer_frozen = saved["outer_frozen"]
            n = self._n_recorded
            self._window = window[-n:] if n else ()
            self._last = unpack_batches(saved["last"])
            self._estimator_state = dict(saved["estimator_state"])
            for parameter in self.problem.outer_params.values():
                parameter.requires_grad_(not self.outer_frozen)


_PROGRESS = (
    "estimator",
    "outer_every",
    "n_inner_steps",
    "n_outer_steps",
    "n_skipped",
    "outer_frozen",
    "param_groups",
    "state",
    "_window",
    "_estimator_state",
    "_last",
    "_resolved",
    "_warned",
    "_warned_of_audit",
)
"""Attributes that a step or a checkpoint replaces, never changing the old value."""
