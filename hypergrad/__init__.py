"""Hypergradient estimation in PyTorch."""

from __future__ import annotations

from hypergrad._shadow import warn_of_namesakes
from hypergrad.batches import Accumulated, MicroBatch
from hypergrad.compare import compare_estimators
from hypergrad.errors import (
    BatchError,
    HypergradError,
    NonFiniteError,
    NumericalWarning,
    RankError,
    SecondOrderError,
    SolveError,
)
from hypergrad.estimator import (
    HypergradEstimator,
    Hypergradient,
    Indirect,
    Info,
    Point,
)
from hypergrad.estimators import (
    estimator_names,
    make_estimator,
    register_estimator,
)
from hypergrad.modules import swapped
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.problem import BilevelProblem
from hypergrad.steps import InnerStep, take_steps

__all__ = [
    "Accumulated",
    "BatchError",
    "BilevelOptimizer",
    "BilevelProblem",
    "HypergradError",
    "HypergradEstimator",
    "Hypergradient",
    "Indirect",
    "Info",
    "InnerStep",
    "MicroBatch",
    "NonFiniteError",
    "NumericalWarning",
    "Point",
    "RankError",
    "SecondOrderError",
    "SolveError",
    "compare_estimators",
    "estimator_names",
    "make_estimator",
    "register_estimator",
    "swapped",
    "take_steps",
]

warn_of_namesakes()
