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
    Choice,
    HypergradEstimator,
    Hypergradient,
    Indirect,
    Info,
    Needs,
    Point,
    Terms,
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
    "Choice",
    "HypergradError",
    "HypergradEstimator",
    "Hypergradient",
    "Indirect",
    "Info",
    "InnerStep",
    "MicroBatch",
    "Needs",
    "NonFiniteError",
    "NumericalWarning",
    "Point",
    "RankError",
    "SecondOrderError",
    "SolveError",
    "Terms",
    "compare_estimators",
    "estimator_names",
    "make_estimator",
    "register_estimator",
    "swapped",
    "take_steps",
]

warn_of_namesakes()
