"""Conjugate gradients against solutions by eigenvectors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad.errors import NonFiniteError, NumericalWarning, SolveError
from hypergrad.solvers import CGSolver, SolveResult
from tests.hypergrad.solvers.systems import Named, diagonal, rhs, spread, system
from tests.tolerances import error, tol

F64 = torch.float64
F32 = torch.float32


def quiet(max_iter: int = 20, **settings: Any) -> CGSolver:
    return CGSolver(max_iter, on_failure="return", **settings)


# -- exactness ------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("n", [1, 2, 10, 60])
def test_exact_within_n_steps(n: int, damping: float) -> None:
    h = spread(n, 100.0)
    b = rhs(n)
    result = CGSolver(5 * n, rtol=0.0, damping=damping).solve(h.matvec, b)
    assert result.converged
    assert result.n_matvec == h.calls <= n
    assert error(result.x["w"], h.solution(b["w"], damping)) <= 1e-12
    assert result.damping == damping
    assert result.reason == ""


def test_hard_system_within_n_products() -> None:
    # The textbook recurrence is off by .13 here after three times as many products.
    h = spread(100, 1e6)
    b = rhs(100)
    result = CGSolver(100, rtol=0.0).solve(h.matvec, b)
    assert result.n_matvec <= 100
    assert error(result.x["w"], h.solution(b["w"])) <= 1e-10


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("distinct", [1, 2, 3, 6])
def test_as_many_products_as_distinct_eigenvalues(
    distinct: int, dtype: torch.dtype
) -> None:
    h = system([1.0 + k % distinct for k in range(24)])
    b = rhs(24, dtype=dtype)
    result = CGSolver(24).solve(h.matvec, b)
    assert result.n_matvec == distinct
    assert error(result.x["w"], h.solution(b["w"])) <= tol(dtype, h.cond)


def test_eigenvector_takes_one_product() -> None:
    h = spread(10, 1e3)
    b = {"w": 3.0 * h.vectors[:, 4]}
    result = CGSolver(10).solve(h.matvec, b)
    assert result.n_matvec == 1
    assert error(result.x["w"], b["w"] / h.eigenvalues[4]) <= tol(F64, h.cond)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_twice_the_identity(dtype: torch.dtype) -> None:
    # Two published libraries return exact zeros here.
    b = rhs(7, dtype=dtype)
    result = CGSolver().solve(lambda v: {"w": 2 * v["w"]}, b)
    assert result.n_matvec == 1
    assert error(result.x["w"], b["w"].double() / 2) <= tol(dtype)
    assert result.curvature == (pytest.approx(2.0), pytest.approx(2.0))


@pytest.mark.parametrize("cond", [10.0, 100.0, 1e4])
def test_error_stays_below_the_chebyshev_bound(cond: float) -> None:
    h = spread(80, cond)
    b = rhs(80)["w"]
    x = h.solution(b)

    def energy(e: torch.Tensor) -> float:
        return math.sqrt(float(e @ h.matrix @ e))

    rate = (math.sqrt(cond) - 1) / (math.sqrt(cond) + 1)
    for k in (1, 2, 5, 10, 20, 40):
        got = quiet(k, rtol=0.0).solve(h.matvec, {"w": b}).x["w"]
        # Hestenes-Stiefel: in the energy norm, where the bound has no factor of √κ.
        assert energy(got - x) <= 2 * rate**k * energy(x) + 1e-13 * energy(x)
        bound = 2 * math.sqrt(cond) * rate**k
        assert float((got - x).norm()) <= (bound + 1e-12 * cond) * float(x.norm())


def test_iterates_are_those_of_the_textbook() -> None:
    # Before rounding tells the two apart.
    h = spread(30, 50.0)
    b = rhs(30)["w"]
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for k in range(1, 9):
        hp = h.matrix @ p
        alpha = float(r @ r) / float(p @ hp)
        x, old = x + alpha * p, float(r @ r)
        r = r - alpha * hp
        p = r + float(r @ r) / old * p
        got = quiet(k, rtol=0.0).solve(h.matvec, {"w": b})
        assert error(got.x["w"], x) <= tol(F64, h.cond)
        assert got.residual_norm == pytest.approx(float(r.norm() / b.norm()), rel=1e-9)


# -- what it says of itself -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("k", [1, 3, 10, 25])
def test_residual_is_the_true_one(k: int, dtype: torch.dtype) -> None:
    h = spread(40, 1e4)
    b = rhs(40, dtype=dtype)
    result = quiet(k, damping=1e-4).solve(h.matvec, b)
    truth = h.residual(result.x["w"], b["w"], 1e-4)
    assert result.residual_norm == pytest.approx(truth, rel=1e3 * tol(dtype))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
def test_residual_that_rounding_leaves_is_reported(
    cond: float, dtype: torch.dtype
) -> None:
    # The recurrence goes on to 0; what is reported stops where the truth does.
    h = spread(50, cond)
    b = rhs(50, dtype=dtype)
    result = quiet(50, rtol=0.0).solve(h.matvec, b)
    truth = h.residual(result.x["w"], b["w"])
    assert result.residual_norm is not None
    assert truth / 3 <= result.residual_norm <= 30 * truth


@settings(max_examples=40)
@given(
    cond=st.floats(0, 6).map(lambda x: 10.0**x),
    n=st.integers(2, 40),
    rtol=st.sampled_from([1e-2, 1e-5, 1e-9]),
    seed=st.integers(0, 10**6),
)
def test_stops_at_the_residual_asked_for(
    cond: float, n: int, rtol: float, seed: int
) -> None:
    h = spread(n, cond, seed)
    b = rhs(n, seed + 1)
    result = CGSolver(n, rtol=rtol, on_failure="raise").solve(h.matvec, b)
    assert result.converged
    assert h.residual(result.x["w"], b["w"]) <= rtol + tol(F64, cond)
    # and the error follows
    assert error(result.x["w"], h.solution(b["w"])) <= tol(F64, cond, "solve", rtol)
    if result.n_matvec > 1:  # not later than needed
        before = quiet(result.n_matvec - 1, rtol=0.0).solve(h.matvec, b)
        assert h.residual(before.x["w"], b["w"]) > rtol


def test_curvature_is_that_of_h() -> None:
    h = spread(20, 1e3)
    result = CGSolver(20, rtol=0.0).solve(h.matvec, rhs(20))
    assert result.curvature == (pytest.approx(1e-3), pytest.approx(1.0))


# -- laws -----------------------------------------------------------------------------


def test_zero_gives_exact_zeros_without_a_product() -> None:
    def never(v: Named) -> Named:
        raise AssertionError(v)

    b = {"w": torch.zeros(3), "v": torch.zeros((), dtype=F64)}
    result = CGSolver().solve(never, b)
    assert result.n_matvec == 0
    assert result.residual_norm == 0.0
    assert result.converged
    for name, t in b.items():
        assert torch.equal(result.x[name], t)
        assert result.x[name].dtype == t.dtype


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e20, 1e30])
def test_scaling_b_scales_x(size: float) -> None:
    # In float32, where |b|² is out of range; a tolerance that is not relative loses all.
    h = spread(20, 100.0)
    b = rhs(20, dtype=F32)
    one = CGSolver(20).solve(h.matvec, b)
    many = CGSolver(20).solve(h.matvec, {"w": b["w"] * size})
    assert many.n_matvec == one.n_matvec
    assert error(many.x["w"].double() / size, one.x["w"]) <= tol(F32, h.cond)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_scaling_h_divides_x(size: float) -> None:
    h = spread(20, 100.0)
    b = rhs(20, dtype=F32)
    one = CGSolver(20).solve(h.matvec, b)
    many = CGSolver(20).solve(lambda v: {"w": h.matvec(v)["w"] * size}, b)
    assert error(many.x["w"].double() * size, one.x["w"]) <= tol(F32, h.cond)


def test_arguments_are_unchanged_and_answers_repeat() -> None:
    h = spread(10, 10.0)
    b = rhs(10)
    before = b["w"].clone()
    first, second = (CGSolver(10).solve(h.matvec, b, {}) for _ in range(2))
    assert torch.equal(b["w"], before)
    assert torch.equal(first.x["w"], second.x["w"])


def test_dictionaries_of_all_shapes() -> None:
    # A scalar, an empty tensor, a transposed view, two dtypes: one system.
    b: Named = {
        "scalar": torch.tensor(2.0, dtype=F64),
        "empty": torch.zeros(0, 3),
        "view": torch.arange(6.0, dtype=F64).reshape(2, 3).T,
        "float": torch.ones(2),
    }

    def matvec(v: Named) -> Named:
        assert {n: (t.shape, t.dtype) for n, t in v.items()} == {
            n: (t.shape, t.dtype) for n, t in b.items()
        }
        total = sum(t.double().sum() for t in v.values())
        return {n: (3 * t + total).to(t.dtype) for n, t in v.items()}

    result = CGSolver(9).solve(matvec, b)
    # H = 3 I + 1 1ᵀ over nine entries: Sherman-Morrison.
    total = sum(float(t.sum()) for t in b.values())
    for name, t in b.items():
        assert result.x[name].shape == t.shape
        assert result.x[name].dtype == t.dtype
        truth = (t.double() - total / (3 + 9)) / 3
        assert error(result.x[name], truth) <= tol(F32, cond=4)


def test_bfloat16_is_as_good_as_its_products() -> None:
    h = spread(12, 4.0)
    b = rhs(12, dtype=torch.bfloat16)
    result = CGSolver(12).solve(h.matvec, b)
    assert result.x["w"].dtype == torch.bfloat16
    assert error(result.x["w"], h.solution(b["w"])) <= tol(torch.bfloat16, h.cond)
    assert result.converged


# -- failure --------------------------------------------------------------------------


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
    assert "Compute the loss in full" in result.reason


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
