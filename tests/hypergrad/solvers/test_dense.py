"""The dense solver against solutions by eigenvectors and torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hypergrad.errors import NonFiniteError, SolveError
from hypergrad.solvers import CGSolver, DenseSolver
from tests.hypergrad.solvers.systems import Named, rhs, spread, system
from tests.tolerances import error, tol

F64 = torch.float64
F32 = torch.float32


@pytest.mark.parametrize("cond", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_equals_torch_and_eigenvectors(damping: float, cond: float) -> None:
    h = spread(25, cond)
    b = rhs(25)
    result = DenseSolver(damping=damping).solve(h.matvec, b)
    assert result.n_matvec == h.calls == 25
    damped = h.matrix + damping * torch.eye(25, dtype=F64)
    assert error(result.x["w"], torch.linalg.solve(damped, b["w"])) <= tol(F64, cond)
    assert error(result.x["w"], h.solution(b["w"], damping)) <= tol(F64, cond)
    assert result.residual_norm is not None
    assert result.residual_norm <= tol(F64, cond)
    assert result.damping == damping


def test_indefinite_is_no_difficulty() -> None:
    h = system([-3.0, -0.5, 1.0, 2.0])
    b = rhs(4)
    result = DenseSolver().solve(h.matvec, b)
    assert error(result.x["w"], h.solution(b["w"])) <= tol(F64, 6.0)
    assert result.curvature == (pytest.approx(-3.0), pytest.approx(2.0))


def test_float32_is_factorised_in_float64() -> None:
    # All that is lost is the rounding of H itself.
    h = spread(25, 1e4)
    b = rhs(25, dtype=F32)
    result = DenseSolver().solve(h.matvec, b)
    assert result.x["w"].dtype == F32
    rounded = h.matrix.to(F32).double()
    rounded = (rounded + rounded.T) / 2
    truth = torch.linalg.solve(rounded, b["w"].double())
    assert error(result.x["w"], truth) <= tol(F32)


def test_products_that_are_symmetric_but_for_an_error() -> None:
    # As finite differences are: the symmetric part is taken, for H has no other.
    h = spread(6, 10.0)
    skew = 1e-3 * torch.triu(torch.ones(6, 6, dtype=F64), 1)
    b = rhs(6)
    result = DenseSolver().solve(lambda v: {"w": (h.matrix + skew) @ v["w"]}, b)
    truth = torch.linalg.solve(h.matrix + (skew + skew.T) / 2, b["w"])
    assert error(result.x["w"], truth) <= tol(F64, 10.0)


def test_agrees_with_cg() -> None:
    h = spread(30, 1e3)
    b = rhs(30)
    dense, cg = DenseSolver().solve(h.matvec, b), CGSolver(30).solve(h.matvec, b)
    assert error(cg.x["w"], dense.x["w"]) <= tol(F64, 1e3, "solve", 1e-6)


def test_dictionaries_of_all_shapes() -> None:
    b: Named = {
        "scalar": torch.tensor(2.0, dtype=F64),
        "empty": torch.zeros(0, 3, dtype=F64),
        "view": torch.arange(6.0, dtype=F64).reshape(2, 3).T,
    }

    def matvec(v: Named) -> Named:  # answers in another order
        total = sum(t.sum() for t in v.values())
        return {n: 3 * v[n] + total for n in reversed(list(v))}

    result = DenseSolver().solve(matvec, b)
    total = sum(float(t.sum()) for t in b.values())
    for name, t in b.items():
        assert result.x[name].shape == t.shape
        assert error(result.x[name], (t - total / 10) / 3) <= tol(F64, 4.0)


def test_zero_gives_exact_zeros_without_a_product() -> None:
    def never(v: Named) -> Named:
        raise AssertionError(v)

    result = DenseSolver(max_size=1).solve(never, {"w": torch.zeros(3)})
    assert torch.equal(result.x["w"], torch.zeros(3))
    assert result.n_matvec == 0


def test_too_large() -> None:
    def never(v: Named) -> Named:
        raise AssertionError(v)

    with pytest.raises(ValueError, match=r"11 parameters.*max_size is 10.*Use CG"):
        DenseSolver(10).solve(never, rhs(11))


@pytest.mark.parametrize(
    ("values", "damping"),
    [([0.0, 1.0, 2.0], 0.0), ([-0.5, 1.0, 2.0], 0.5), ([0.0, 0.0], 0.0)],
)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_singular(values: list[float], damping: float, dtype: torch.dtype) -> None:
    # LU finds a pivot of 1e-17 and would return 1e16.
    h = system(values)
    with pytest.raises(SolveError, match=r"singular.*eigenvalues.*Pass damping"):
        DenseSolver(damping=damping).solve(h.matvec, rhs(len(values), dtype=dtype))
    fine = DenseSolver(damping=damping + 1.0)
    fine.solve(h.matvec, rhs(len(values), dtype=dtype))


def test_an_indefinite_matrix_is_solved_and_said() -> None:
    h = system([-1.0, 2.0, 3.0])
    b = rhs(3)
    result = DenseSolver(damping=0.5).solve(h.matvec, b)
    assert error(result.x["w"], h.solution(b["w"], 0.5)) <= 1e-14
    assert "is -1 along one direction" in result.reason
    assert "set damping above 1" in result.reason
    assert DenseSolver(damping=1.5).solve(h.matvec, b).reason == ""


def test_products_of_no_symmetric_matrix() -> None:
    crooked = torch.tensor([[2.0, 1.0], [-1.0, 2.0]], dtype=F64)
    with pytest.raises(SolveError, match="not those of a symmetric matrix"):
        DenseSolver().solve(lambda v: {"w": crooked @ v["w"]}, rhs(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="right-hand side"):
        DenseSolver().solve(lambda v: v, {"w": torch.tensor([bad])})
    with pytest.raises(NonFiniteError, match="a product with the inner Hessian"):
        DenseSolver().solve(lambda v: {"w": v["w"] + bad}, rhs(2))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"max_size": 0}, ValueError, "max_size=0 must be at least 1"),
        ({"max_size": 1e3}, TypeError, "max_size=1000.0 must be a whole number"),
        ({"damping": math.nan}, ValueError, "damping=nan must be finite"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        DenseSolver(**settings)
