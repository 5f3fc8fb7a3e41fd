"""Linear solvers: they know a matvec and a right-hand side, not a bilevel problem."""

from __future__ import annotations

from hypergrad.solvers.base import (
    BlockMatvec,
    Matvec,
    OnFailure,
    Solver,
    SolveResult,
)
from hypergrad.solvers.cg import CGSolver
from hypergrad.solvers.dense import DenseSolver
from hypergrad.solvers.identity import IdentitySolver
from hypergrad.solvers.krylov import Krylov, lanczos
from hypergrad.solvers.neumann import NeumannSolver
from hypergrad.solvers.nystrom import LowRank, NystromSketch, NystromSolver, SketchKind
from hypergrad.solvers.registry import make_solver, register_solver, solver_names

__all__ = [
    "BlockMatvec",
    "CGSolver",
    "DenseSolver",
    "IdentitySolver",
    "Krylov",
    "LowRank",
    "Matvec",
    "NeumannSolver",
    "NystromSketch",
    "NystromSolver",
    "OnFailure",
    "SketchKind",
    "SolveResult",
    "Solver",
    "lanczos",
    "make_solver",
    "register_solver",
    "solver_names",
]
