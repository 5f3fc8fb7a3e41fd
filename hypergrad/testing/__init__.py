"""Problems whose hypergradient is known, and the laws that every estimator obeys."""

from __future__ import annotations

from hypergrad.testing.closed_forms import quadratic, ridge
from hypergrad.testing.contract import LAWS, PROBLEMS, Checked, check_estimator
from hypergrad.testing.known import (
    DataLoss,
    KnownProblem,
    at_minimum,
    relative_error,
)
from hypergrad.testing.learned import (
    dora_block,
    reweighting,
    softmax_regression,
    two_layer_network,
)
from hypergrad.testing.structures import STRUCTURES, Structure, restructured

__all__ = [
    "LAWS",
    "PROBLEMS",
    "STRUCTURES",
    "Checked",
    "DataLoss",
    "KnownProblem",
    "Structure",
    "at_minimum",
    "check_estimator",
    "dora_block",
    "quadratic",
    "relative_error",
    "restructured",
    "reweighting",
    "ridge",
    "softmax_regression",
    "two_layer_network",
]
