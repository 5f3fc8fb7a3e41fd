"""Linear solvers: they know a matvec and a right-hand side, not a bilevel problem."""

from __future__ import annotations

from hypergrad.solvers.base import Matvec, OnFailure, Solver, SolveResult
from hypergrad.solvers.cg import CGSolver
from hypergrad.solvers.dense import DenseSolver
from hypergrad.solvers.identity import IdentitySolver
from hypergrad.solvers.krylov import Krylov, lanczos
from hypergrad.solvers.neumann import NeumannSolver

__all__ = [
    "CGSolver",
    "DenseSolver",
    "IdentitySolver",
    "Krylov",
    "Matvec",
    "NeumannSolver",
    "OnFailure",
    "SolveResult",
    "Solver",
    "lanczos",
]
