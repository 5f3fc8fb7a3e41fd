"""Solvers by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import make_estimator
from hypergrad.estimators import Implicit
from hypergrad.solvers import (
    CGSolver,
    IdentitySolver,
    Solver,
    make_solver,
    register_solver,
    registry,
    solver_names,
)
from hypergrad.testing import ridge
from tests.hypergrad.solvers.systems import rhs, spread
from tests.tolerances import error


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.mark.parametrize("name", ["cg", "dense", "neumann", "nystrom"])
def test_a_solver_by_name_solves(name: str) -> None:
    settings: dict[str, Any] = {
        "cg": {"rtol": 1e-12},
        "neumann": {"num_terms": 200},
        "nystrom": {"rank": 6, "damping": 0.0},
    }.get(name, {})
    h = spread(6, 5.0)
    result = make_solver(name, **settings).solve(h.matvec, rhs(6))
    assert error(result.x["w"], h.solution(rhs(6)["w"])) <= 1e-9


def test_every_name_makes_a_solver() -> None:
    assert solver_names() == ["cg", "dense", "identity", "neumann", "nystrom"]
    for name in solver_names():
        assert isinstance(make_solver(name), Solver)


@pytest.mark.parametrize("product", ["exact", "forward-over-reverse"])
@pytest.mark.parametrize("name", ["cg", "dense", "nystrom", "neumann", "identity"])
def test_the_implicit_estimator_takes_every_registered_solver(
    name: str, product: str
) -> None:
    known = ridge(5)
    result = make_estimator("implicit", solver=name, product=product).estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    h = known.hessian
    v = -known.outer_grads["penalty"] / known.problem.inner_params["w"].detach() @ h
    stand_in = {
        "identity": torch.eye(5, dtype=torch.float64),
        "nystrom": torch.linalg.inv(h + 0.01 * torch.eye(5).double()),
    }.get(name, torch.linalg.inv(h))
    truth = -known.problem.inner_params["w"].detach() * (stand_in @ v)
    # Five terms of Neumann are cut off; the others are exact, CG to its rtol times κ.
    bar = {"neumann": 0.5, "cg": 1e-4}.get(name, 1e-11)
    assert error(result.indirect["penalty"], truth) <= bar


def test_registering() -> None:
    register_solver("half", lambda: IdentitySolver(0.5))
    assert make_solver("half") == IdentitySolver(0.5)
    assert Implicit("half").make_solver() == IdentitySolver(0.5)
    with pytest.raises(ValueError, match="'half' is registered already"):
        register_solver("half", CGSolver)
    with pytest.raises(ValueError, match="lower-case letters"):
        register_solver("Half", CGSolver)
    with pytest.raises(TypeError, match="must be callable"):
        register_solver("third", 3)  # pyright: ignore[reportArgumentType]


def test_wrong_names_and_settings() -> None:
    with pytest.raises(ValueError, match="solver='lu' is unknown; choose one of 'cg'"):
        make_solver("lu")
    with pytest.raises(ValueError, match="solver='lu' is unknown"):
        make_estimator("implicit", solver="lu")
    with pytest.raises(TypeError, match=r"'cg' refused its settings \['rank'\]"):
        make_solver("cg", rank=3)
    with pytest.raises(TypeError, match="or a name, got 3"):
        make_estimator("implicit", solver=3)
