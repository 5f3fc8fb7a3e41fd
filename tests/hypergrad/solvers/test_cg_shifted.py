"""CG with a preconditioner or a start other than 0, against solutions by eigenvectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad.solvers import CGSolver, NystromSketch
from tests.hypergrad.solvers.systems import System, diagonal, rhs, spread, system
from tests.tolerances import error, tol

F64, F32 = torch.float64, torch.float32
SKETCH = NystromSketch(12, every=10)


def outliers(n: int = 200) -> System:
    """A few large eigenvalues over a low, flat rest: what deep networks show."""
    rest = torch.logspace(-3, -2, n - 20, dtype=F64)
    return system(torch.cat([rest, torch.logspace(-1, 1, 20, dtype=F64)]))


def solver(max_iter: int = 20, **settings: Any) -> CGSolver:
    return CGSolver(max_iter, on_failure="return", **settings)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_preconditioned_cg_is_exact_within_n_steps(
    damping: float, dtype: torch.dtype
) -> None:
    h = spread(40, 100.0)
    b = rhs(40, dtype=dtype)
    result = solver(40, rtol=0.0, damping=damping, preconditioner=SKETCH).solve(
        h.matvec, b
    )
    bar = 1e-12 if dtype is F64 else tol(dtype, h.cond)
    assert error(result.x["w"], h.solution(b["w"], damping)) <= bar
    assert result.converged
    assert result.reason == ""
    assert result.n_matvec == h.calls <= 52
    assert result.curvature is not None
    lowest, highest = result.curvature
    # Ritz values of H itself, without damping and preconditioner: in its spectrum.
    slack = 10 * h.n * torch.finfo(dtype).eps
    assert 0.01 - slack <= lowest < 0.02
    assert 0.5 < highest <= 1.0 + slack


def test_the_reported_residual_is_the_true_one() -> None:
    h = outliers()
    b = rhs(h.n)
    for k in (3, 8):
        result = solver(k, damping=1e-3, preconditioner=SKETCH).solve(h.matvec, b)
        true = h.residual(result.x["w"], b["w"], 1e-3)
        assert result.residual_norm == pytest.approx(true, rel=1e-6)
        assert not result.converged
        assert "Raise max_iter, or damping" in result.reason


def test_a_shared_sketch_pays_at_equal_products() -> None:
    """Ten solves: 20 products each, or 18 each and 20 for one sketch."""
    h = outliers()
    sketch = NystromSketch(20, every=10)
    plain = solver(20, damping=1e-3)
    better = solver(18, damping=1e-3, preconditioner=sketch)
    state: dict[str, Tensor] = {}
    for seed in range(10):
        b = rhs(h.n, seed=seed)
        truth = h.solution(b["w"], 1e-3)
        result = better.solve(h.matvec, b, state)
        assert result.n_matvec == (38 if seed == 0 else 18)
        state = result.state
        off = error(plain.solve(h.matvec, b).x["w"], truth)
        assert off > 1e-2
        assert error(result.x["w"], truth) < off / 100


def test_a_stale_sketch_is_slower_and_never_wrong() -> None:
    b = rhs(200)
    other = system(outliers().eigenvalues, seed=5)
    state = solver(1, preconditioner=SKETCH).solve(other.matvec, b).state
    h = outliers()
    result = solver(200, rtol=0.0, preconditioner=SKETCH).solve(h.matvec, b, state)
    assert result.n_matvec <= 200  # the sketch was not taken again
    assert error(result.x["w"], h.solution(b["w"])) <= tol(F64, h.cond)


@pytest.mark.parametrize("sketch", [None, SKETCH], ids=["plain", "sketch"])
def test_a_warm_start_from_the_solution_is_done_at_once(sketch: Any) -> None:
    h = spread(30, 50.0)
    b = rhs(30)
    warm = solver(40, rtol=1e-10, warm_start=True, preconditioner=sketch)
    first = warm.solve(h.matvec, b)
    again = warm.solve(h.matvec, {"w": 7 * b["w"]}, first.state)
    assert again.n_matvec == 1  # the scale of b does not matter
    assert error(again.x["w"], 7 * h.solution(b["w"])) <= 10 * 1e-10 * h.cond
    assert set(again.state) == set(first.state)


def test_a_warm_start_pays_where_b_changes_little() -> None:
    h = spread(200, 1e3)
    b = rhs(200)["w"]
    cold, warm = solver(20), solver(19, warm_start=True)
    state = warm.solve(h.matvec, {"w": b}).state
    for seed in range(5):
        b = b + 1e-3 * rhs(200, seed=seed + 2)["w"]
        truth = h.solution(b)
        result = warm.solve(h.matvec, {"w": b}, state)
        state = result.state
        assert result.n_matvec == 20
        assert error(result.x["w"], truth) < (
            error(cold.solve(h.matvec, {"w": b}).x["w"], truth) / 2
        )


def test_negative_curvature_is_damped_after_the_products_of_a_warm_start() -> None:
    h = system([-0.5, 0.2, 1.0, 2.0, 4.0])
    b = rhs(5)
    state = {"solution": rhs(5, seed=3)["w"]}
    result = solver(5, warm_start=True).solve(h.matvec, b, state)
    assert result.damping == pytest.approx(1.0)
    assert "curvature of the inner loss is -0.5" in result.reason
    # Five products and five dimensions: the damped system is solved, without another.
    assert result.n_matvec == 6
    assert error(result.x["w"], h.solution(b["w"], result.damping)) <= 1e-11


@pytest.mark.parametrize("rank", [2, 8])
def test_negative_curvature_under_a_preconditioner_is_said(rank: int) -> None:
    h = system([-0.5, *[0.1 * k for k in range(1, 20)]])
    b = rhs(20)
    result = solver(20, preconditioner=NystromSketch(rank)).solve(h.matvec, b)
    assert result.damping == pytest.approx(1.0, rel=1e-6)
    assert "curvature of the inner loss is -0.5" in result.reason
    # The preconditioner was made for another damping, and its Krylov space need not hold
    # the solution: the residual tells how far it is.
    true = h.residual(result.x["w"], b["w"], result.damping)
    assert result.residual_norm == pytest.approx(true, rel=1e-6, abs=1e-12)


def test_zero_right_hand_side_takes_no_product_and_keeps_the_state() -> None:
    zero = {"w": torch.zeros(4, dtype=F64)}
    state = {"solution": torch.ones(4, dtype=F64)}
    result = solver(warm_start=True, preconditioner=SKETCH).solve(
        diagonal([1.0] * 4), zero, state
    )
    assert not result.x["w"].any()
    assert result.n_matvec == 0
    assert result.state == state


def test_a_zero_matrix_has_no_solution() -> None:
    result = solver(preconditioner=SKETCH).solve(diagonal([0.0] * 4), rhs(4))
    assert not result.x["w"].any()
    assert "there is no solution" in result.reason


def test_state_of_another_size_is_not_used() -> None:
    h = spread(8, 10.0)
    state = {"solution": torch.ones(3, dtype=F64)}
    result = solver(warm_start=True).solve(h.matvec, rhs(8), state)
    assert result.n_matvec == 8
    assert error(result.x["w"], h.solution(rhs(8)["w"])) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"preconditioner": "nystrom"}, "preconditioner must be a NystromSketch"),
        ({"warm_start": 1}, "warm_start=1 must be True or False"),
    ],
)
def test_settings_of_another_kind(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        CGSolver(**settings)
