"""What the search tells between two lines of the Trainer's log."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from hypergrad.optimizer import BilevelOptimizer, StepReport

__all__ = ["StepLog"]


@dataclass
class StepLog:
    """Collect reports of steps; give their means.

    Attributes:
        reports: those since the last line.
        last: the last one.
    """

    reports: list[StepReport] = field(default_factory=list)
    last: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Take a report.

        Args:
            report: of one step.
        """
        self.reports.append(report)
        self.last = report

    def take(self, optimizer: BilevelOptimizer) -> dict[str, float]:
        """Return the means since the last call, and the counters.

        Args:
            optimizer: whose steps they are.

        Returns:
            `grad_norm` and `outer_learning_rate`; `outer_loss`, `hypergrad_norm` and
            `indirect_share`, the indirect term's norm over the sum of both terms' norms,
            where outer steps were taken; `outer_steps` and `skipped_outer_steps` so far.
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
        rates = [g["lr"] for g in optimizer.param_groups if g["level"] == "outer"]
        logs["outer_learning_rate"] = float(rates[0])
        logs["outer_steps"] = optimizer.n_outer_steps
        logs["skipped_outer_steps"] = optimizer.n_skipped
        return logs


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None
