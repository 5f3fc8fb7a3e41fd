"""Conjugate gradients against solutions by eigenvectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad.solvers import CGSolver
from tests.hypergrad.solvers.systems import Named, rhs, spread, system
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


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
def test_a_thousand_log_uniform_eigenvalues(cond: float, dtype: torch.dtype) -> None:
    # Drawn, not spaced. The energy norm of the error lies below the Chebyshev bound at
    # every number of products, and no further product makes it larger.
    n = 1000
    make = torch.Generator().manual_seed(4)
    h = cond ** -torch.rand(n, generator=make, dtype=F64)
    h[:2] = torch.tensor([1.0, 1 / cond])
    h = h.to(dtype)
    b = rhs(n, dtype=dtype)
    x = b["w"].double() / h.double()

    def energy(e: torch.Tensor) -> float:
        return math.sqrt(float(h.double() @ e.square()))

    rate = (math.sqrt(cond) - 1) / (math.sqrt(cond) + 1)
    last = 1.0
    # What rounding leaves: of the solution, times the root of its condition.
    rounding = 10 * torch.finfo(dtype).eps * math.sqrt(cond)
    for k in (10, 30, 100, 300):
        got = quiet(k, rtol=0.0).solve(lambda v: {"w": h * v["w"]}, b)
        assert got.n_matvec <= k
        off = energy(got.x["w"].double() - x) / energy(x)
        assert off <= 2 * rate**k + rounding
        assert off <= last + rounding
        last = off
    # What clusters of eigenvalues save: the bound alone would allow 5e-3 and 1.1.
    assert last < {1e2: 1e-5, 1e4: 1e-3, 1e6: 0.5}[cond]


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
