"""Where conjugate gradients cannot do what is asked: no silent NaN, no silent zero."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from hypergrad.errors import NonFiniteError, NumericalWarning, SolveError
from hypergrad.solvers import CGSolver, SolveResult
from tests.hypergrad.solvers.systems import Named, diagonal, rhs, spread, system
from tests.tolerances import error, tol

F64 = torch.float64
F32 = torch.float32


def quiet(max_iter: int = 20, **settings: Any) -> CGSolver:
    return CGSolver(max_iter, on_failure="return", **settings)


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_finite_however_long_it_runs(seed: int, cond: float) -> None:
    # The textbook recurrence is NaN past convergence.
    h = spread(60, cond, seed)
    b = rhs(60, seed + 9, dtype=F32)
    result = quiet(100_000, rtol=0.0).solve(h.matvec, b)
    assert result.n_matvec <= 60
    assert bool(result.x["w"].isfinite().all())
    if cond <= 1e6:
        truth = h.solution(b["w"])
        assert error(result.x["w"], truth) <= tol(F32, cond)
    else:  # κ is above 1/ε: the smallest eigenvalues are rounding, and that is said
        assert "singular to working precision" in result.reason


def test_iteration_limit_says_what_why_and_what_to_do() -> None:
    h = spread(50, 1e4)
    b = rhs(50)
    result = quiet(5).solve(h.matvec, b)
    assert not result.converged
    assert result.n_matvec == 5
    assert "CG stopped after 5 products with relative residual" in result.reason
    assert f"{result.residual_norm:.2g} (rtol 1e-06)" in result.reason
    assert "eigenvalues between" in result.reason
    assert "Raise max_iter, or damping." in result.reason
    with pytest.warns(NumericalWarning, match="CG stopped after 5 products") as caught:
        warned = CGSolver(5).solve(h.matvec, b)
    assert str(caught[0].message) == result.reason
    assert torch.equal(warned.x["w"], result.x["w"])
    with pytest.raises(SolveError, match="CG stopped after 5 products"):
        CGSolver(5, on_failure="raise").solve(h.matvec, b)


def test_success_is_silent() -> None:
    h = spread(10, 10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CGSolver(10).solve(h.matvec, rhs(10))
    assert result.reason == ""


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_negative_curvature_is_answered_by_damping(damping: float) -> None:
    h = system([-2.0, -0.5, 0.1, 1.0, 3.0, 8.0])
    b = rhs(6)
    result = quiet(6, damping=damping).solve(h.matvec, b)
    assert result.n_matvec == 6
    assert result.curvature == (pytest.approx(-2.0), pytest.approx(8.0))
    # -2 + damping is turned around.
    assert result.damping == pytest.approx(2.0 + (2.0 - damping))
    truth = h.solution(b["w"], result.damping)
    assert error(result.x["w"], truth) <= tol(F64, 10.0)
    assert "curvature of the inner loss is -2 along one direction" in result.reason
    assert f"raised to {result.damping:.3g}" in result.reason
    assert "set `damping` above 2" in result.reason
    with pytest.warns(NumericalWarning, match="curvature"):
        CGSolver(6, damping=damping).solve(h.matvec, b)
    with pytest.raises(SolveError, match="curvature"):
        CGSolver(6, damping=damping, on_failure="raise").solve(h.matvec, b)


def test_enough_damping_leaves_negative_curvature_alone() -> None:
    h = system([-2.0, 1.0, 3.0])
    b = rhs(3)
    result = CGSolver(3, damping=2.5, on_failure="raise").solve(h.matvec, b)
    assert result.damping == 2.5
    assert error(result.x["w"], h.solution(b["w"], 2.5)) <= tol(F64, 11.0)


def test_negative_curvature_and_the_limit_are_both_told() -> None:
    h = system([-1.0, *torch.linspace(0.1, 5.0, 40).tolist()])
    result = quiet(4).solve(h.matvec, rhs(41))
    assert "curvature" in result.reason
    assert "CG stopped after 4 products" in result.reason
    assert not result.converged
    # of the damped system
    truth = h.residual(result.x["w"], rhs(41)["w"], result.damping)
    assert result.residual_norm == pytest.approx(truth, rel=1e-10)


def test_pivots_that_vanish() -> None:
    # bᵀHb = 0: the first pivot is 0, and the recurrence would divide by it.
    def swap(v: Named) -> Named:
        return {"w": v["w"].flip(0)}

    b = {"w": torch.tensor([1.0, 0.0], dtype=F64)}
    result = quiet(2).solve(swap, b)
    assert result.curvature == (pytest.approx(-1.0), pytest.approx(1.0))
    delta = result.damping
    assert delta == pytest.approx(2.0)
    truth = torch.linalg.solve(
        torch.tensor([[delta, 1.0], [1.0, delta]], dtype=F64), b["w"]
    )
    assert error(result.x["w"], truth) <= tol(F64, 3.0)


def test_a_pivot_that_vanishes_before_the_last_product() -> None:
    # bᵀHb = -1 + 1/2 + 1/2 = 0 in every bit, and two products are still to come.
    h = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
    b = {"w": torch.tensor([1.0, -1.0, 0.5], dtype=F64)}
    result = quiet(3).solve(diagonal(h.tolist()), b)
    assert result.n_matvec == 3
    assert result.damping == pytest.approx(2.0)
    assert error(result.x["w"], b["w"] / (h + result.damping)) <= tol(F64, 4.0)


def test_no_curvature_at_all() -> None:
    b = rhs(4)
    result = quiet().solve(lambda v: {"w": 0 * v["w"]}, b)
    assert torch.equal(result.x["w"], torch.zeros(4, dtype=F64))
    assert not result.converged
    assert result.residual_norm == 1.0
    assert "is 0 along the right-hand side" in result.reason
    with pytest.raises(SolveError, match="Pass damping above 0"):
        CGSolver(on_failure="raise").solve(lambda v: {"w": 0 * v["w"]}, b)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_no_curvature_with_damping_is_a_division(dtype: torch.dtype) -> None:
    b = rhs(4, dtype=dtype)
    solver = CGSolver(damping=0.25, on_failure="raise")
    result = solver.solve(lambda v: {"w": 0 * v["w"]}, b)
    assert result.n_matvec == 1
    assert error(result.x["w"], 4 * b["w"].double()) <= tol(dtype)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("rtol", [1e-6, 0.0])
@pytest.mark.parametrize("flat", [1, 2, 20])
def test_singular_and_consistent(flat: int, rtol: float, dtype: torch.dtype) -> None:
    # b lies in the range of H: the solution of least norm, without a word. What rounding
    # leaves of b outside it must not be solved for, also where rtol is 0.
    h = system([*[0.0] * flat, 1.0, 2.0, 3.0, 4.0])
    z = h.vectors[:, flat:] @ torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=F64)
    b = {"w": (h.matrix @ z).to(dtype)}
    result = CGSolver(50, rtol=rtol, on_failure="raise").solve(h.matvec, b)
    assert result.n_matvec == 4
    assert result.damping == 0.0
    assert error(result.x["w"], z) <= max(tol(dtype, 4.0), 4 * rtol)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_singular_and_inconsistent(dtype: torch.dtype) -> None:
    # Without damping the answer would be 1e7 to 1e16 of rounding.
    h = system([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    b = rhs(6, dtype=dtype)
    result = quiet(6).solve(h.matvec, b)
    assert "singular to working precision" in result.reason
    assert "flat directions" in result.reason
    assert result.damping == pytest.approx(5e-3, rel=1e-3)
    truth = h.solution(b["w"], result.damping)
    assert error(result.x["w"], truth) <= tol(dtype, 1e3)


def test_products_of_no_symmetric_matrix() -> None:
    crooked = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.5, -1.0, 2.0]])
    result = quiet(3).solve(lambda v: {"w": crooked.double() @ v["w"]}, rhs(3))
    assert not result.converged
    assert "not those of a symmetric matrix" in result.reason
    assert "compute the loss in full" in result.reason


@pytest.mark.parametrize("detached", [True, False])
def test_differences_of_a_gradient_with_a_detached_norm(detached: bool) -> None:
    # As PEFT's DoRA has it: the "gradient" is none, and its differences no Hessian.
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, n, dtype=F64, generator=make) for n in (6, 8))
    w0, w = (torch.randn(8, 6, dtype=F64, generator=make) for _ in range(2))

    def gradient(w: torch.Tensor) -> torch.Tensor:
        w = w.detach().requires_grad_()
        norms = (w0 + w).norm(dim=1, keepdim=True)
        direction = (w0 + w) / (norms.detach() if detached else norms)
        loss = (x @ direction.T - y).square().mean()
        return torch.autograd.grad(loss, w)[0]

    def matvec(v: Named) -> Named:
        h = 1e-5
        return {"w": (gradient(w + h * v["w"]) - gradient(w - h * v["w"])) / (2 * h)}

    result = quiet(48, damping=1.0).solve(matvec, {"w": gradient(w)})
    assert ("not those of a symmetric matrix" in result.reason) == detached


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_right_hand_side_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="right-hand side"):
        CGSolver().solve(diagonal([1.0]), {"w": torch.tensor([bad])})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="a product with the inner Hessian"):
        CGSolver().solve(lambda v: {"w": v["w"] * bad}, rhs(3))


def test_solution_that_overflows() -> None:
    b = {"w": torch.full((2,), 1e20)}
    with pytest.raises(NonFiniteError, match=r"solution of the linear solve.*damping"):
        CGSolver().solve(lambda v: {"w": v["w"] * 1e-30}, b)


def test_error_in_the_matvec_passes_through() -> None:
    def broken(v: Named) -> Named:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CGSolver().solve(broken, rhs(3))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"max_iter": 0}, ValueError, "max_iter=0 must be at least 1"),
        ({"max_iter": 2.5}, TypeError, "max_iter=2.5 must be a whole number"),
        ({"max_iter": True}, TypeError, "max_iter=True must be a whole number"),
        ({"rtol": 1.0}, ValueError, r"rtol=1.0 must be in \[0, 1\)"),
        ({"rtol": -1e-3}, ValueError, "rtol=-0.001 must be in"),
        ({"rtol": math.nan}, ValueError, "rtol=nan must be in"),
        ({"damping": -1.0}, ValueError, "damping=-1.0 must be finite"),
        ({"damping": math.inf}, ValueError, "damping=inf must be finite"),
        ({"on_failure": "ignore"}, ValueError, "on_failure='ignore' must be 'warn'"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        CGSolver(**settings)


def test_results_are_plain_records() -> None:
    result = CGSolver().solve(lambda v: v, rhs(2))
    assert isinstance(result, SolveResult)
    assert result.state == {}
    with pytest.raises(AttributeError):
        result.converged = False  # pyright: ignore[reportAttributeAccessIssue]
