"""What the search tells between two lines of the Trainer's log."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bidora.trainer.upstream import NOTES
from hypergrad.optimizer import BilevelOptimizer, StepReport

__all__ = ["StepLog", "noted_by_the_loss", "tells_steps_back"]

LONG = 20
"""Steps from which on a walk back over them is worth a word."""


def noted_by_the_loss(trainer: Any) -> dict[str, Any]:
    """Return copies of those notes, by attribute.

    An outer step evaluates the loss again, on examples that were counted before or are
    not trained on: with these copies, its notes can be taken back.
    """
    held = vars(trainer)
    return {name: copy.deepcopy(held[name]) for name in NOTES if name in held}


def tells_steps_back(trainer: Any) -> Callable[[int, int], None]:
    """Return what tells the Trainer's callbacks how far an outer step is.

    A callback hears of it by a method `on_steps_back(state, done, of)`, and the bar of
    transformers shows it.
    """

    def tell(done: int, of: int) -> None:
        if of < LONG:
            return
        for callback in trainer.callback_handler.callbacks:
            hear = getattr(callback, "on_steps_back", None)
            bar = getattr(callback, "training_bar", None)
            if hear is not None:
                hear(trainer.state, done, of)
            elif bar is not None:
                bar.set_postfix_str(f"back over {done} of {of}" if done < of else "")

    return tell


@dataclass
class StepLog:
    """Collect reports of steps; give their means.

    Attributes:
        reports: those since the last line.
        last: the last one.
        outer_rate: rate of the magnitudes at that step.
    """

    reports: list[StepReport] = field(default_factory=list)
    last: StepReport | None = None
    outer_rate: float = 0.0

    def add(self, report: StepReport, optimizer: BilevelOptimizer) -> None:
        """Take a report, before the schedule moves on.

        Args:
            report: of one step.
            optimizer: that took it.
        """
        self.reports.append(report)
        self.last = report
        rates = [g["lr"] for g in optimizer.param_groups if g["level"] == "outer"]
        self.outer_rate = float(rates[0])

    def take(self, optimizer: BilevelOptimizer) -> dict[str, float]:
        """Return the means since the last call, and the counters.

        Args:
            optimizer: whose steps they are.

        Returns:
            `grad_norm`, of the inner gradient before it was clipped, and
            `outer_learning_rate`; where outer steps were taken, `outer_loss`,
            `hypergrad_norm`, `direct_norm`, `indirect_norm` and `indirect_share`, the
            indirect term's norm over the sum of both terms' norms; `outer_steps` and
            `skipped_outer_steps` so far.
        """
        reports, self.reports = self.reports, []
        outer = [r for r in reports if r.outer_step]
        logs = {
            "grad_norm": _mean([r.grad_norm for r in reports]),
            "outer_loss": _mean([r.outer_loss for r in outer]),
            "hypergrad_norm": _mean([r.hypergrad_norm for r in outer]),
            "direct_norm": _mean([r.direct_norm for r in outer]),
            "indirect_norm": _mean([r.indirect_norm for r in outer]),
        }
        logs = {name: value for name, value in logs.items() if value is not None}
        both = logs.get("direct_norm", 0.0) + logs.get("indirect_norm", 0.0)
        if both > 0:
            logs["indirect_share"] = logs["indirect_norm"] / both
        logs["outer_learning_rate"] = self.outer_rate
        logs["outer_steps"] = optimizer.n_outer_steps
        logs["skipped_outer_steps"] = optimizer.n_skipped
        return logs


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None
