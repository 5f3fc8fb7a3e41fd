"""Linear solvers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypergrad._checks import check_new_name
from hypergrad.solvers.base import Solver
from hypergrad.solvers.cg import CGSolver
from hypergrad.solvers.dense import DenseSolver
from hypergrad.solvers.identity import IdentitySolver
from hypergrad.solvers.neumann import NeumannSolver
from hypergrad.solvers.nystrom import NystromSolver

__all__ = ["make_solver", "register_solver", "solver_names"]

_registry: dict[str, Callable[..., Solver]] = {
    "cg": CGSolver,
    "dense": DenseSolver,
    "identity": IdentitySolver,
    "neumann": NeumannSolver,
    "nystrom": NystromSolver,
}


def register_solver(name: str, factory: Callable[..., Solver]) -> None:
    """Make a linear solver known by name.

    Args:
        name: lower-case letters, digits and hyphens.
        factory: a `Solver` subclass, or a function that returns an instance from
            settings.

    Raises:
        TypeError: `factory` is not callable.
        ValueError: the name is taken or not of that form.

    Example:
        >>> register_solver("half", lambda: IdentitySolver(0.5))
        >>> make_solver("half")
        IdentitySolver(scale=0.5)
        >>> del _registry["half"]
    """
    if not callable(factory):
        msg = f"factory must be callable, got {type(factory).__name__}."
        raise TypeError(msg)
    check_new_name("a solver", name, _registry)
    _registry[name] = factory


def solver_names() -> list[str]:
    """Return all names that `make_solver` knows.

    Example:
        >>> solver_names()
        ['cg', 'dense', 'identity', 'neumann', 'nystrom']
    """
    return sorted(_registry)


def make_solver(name: str, **settings: Any) -> Solver:
    """Make a linear solver by name.

    Args:
        name: one of `solver_names()`.
        **settings: settings of its constructor.

    Returns:
        The solver.

    Raises:
        TypeError: a setting that the solver does not have.
        ValueError: an unknown name, or a setting out of range.

    Example:
        >>> make_solver("cg", max_iter=3).max_iter
        3
    """
    if name not in _registry:
        known = ", ".join(map(repr, solver_names()))
        msg = f"solver={name!r} is unknown; choose one of {known}."
        raise ValueError(msg)
    try:
        return _registry[name](**settings)
    except TypeError as error:
        msg = f"solver {name!r} refused its settings {sorted(settings)}: {error}"
        raise TypeError(msg) from error
