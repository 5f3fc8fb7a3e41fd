"""The estimators, and the registry that names them."""

from __future__ import annotations

from hypergrad.estimators.auto import Auto
from hypergrad.estimators.cg import ConjugateGradient
from hypergrad.estimators.darts import Darts
from hypergrad.estimators.f2sa import F2SA
from hypergrad.estimators.first_order import FirstOrder
from hypergrad.estimators.forward import Forward
from hypergrad.estimators.implicit import Implicit, ImplicitEstimator
from hypergrad.estimators.neumann import Neumann
from hypergrad.estimators.nystrom import Nystrom
from hypergrad.estimators.pbgd_free import PBGDFree
from hypergrad.estimators.penalty import Penalty
from hypergrad.estimators.registry import (
    estimator_names,
    make_estimator,
    register_estimator,
)
from hypergrad.estimators.sama import Sama
from hypergrad.estimators.unrolled import Unrolled
from hypergrad.estimators.zeroth_order import ZerothOrder

__all__ = [
    "F2SA",
    "Auto",
    "ConjugateGradient",
    "Darts",
    "FirstOrder",
    "Forward",
    "Implicit",
    "ImplicitEstimator",
    "Neumann",
    "Nystrom",
    "PBGDFree",
    "Penalty",
    "Sama",
    "Unrolled",
    "ZerothOrder",
    "estimator_names",
    "make_estimator",
    "register_estimator",
]
