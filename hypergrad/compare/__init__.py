"""Compare estimators on a problem of your own: accuracy, cost, and their trade-off."""

from __future__ import annotations

from hypergrad.compare._result import Comparison, Cost, Reference, Row
from hypergrad.compare._run import compare_estimators

__all__ = ["Comparison", "Cost", "Reference", "Row", "compare_estimators"]
