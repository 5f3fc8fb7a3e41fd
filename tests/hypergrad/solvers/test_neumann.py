"""The truncated Neumann series against the series itself, term by term."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad.errors import NonFiniteError, NumericalWarning, SolveError
from hypergrad.solvers import NeumannSolver
from tests.hypergrad.solvers.systems import (
    Named,
    System,
    diagonal,
    rhs,
    spread,
    system,
)
from tests.tolerances import error, tol

F64 = torch.float64
F32 = torch.float32


def quiet(num_terms: int = 10, **settings: Any) -> NeumannSolver:
    return NeumannSolver(num_terms, on_failure="return", **settings)


def series(
    h: System, b: Tensor, scale: float, num_terms: int, damping: float = 0.0
) -> Tensor:
    """Return α Σ (I - α(H + δI))^j b by a loop over its terms, as one would write it."""
    term = b.double()
    total = term
    for _ in range(num_terms):
        term = term - scale * (h.matrix @ term + damping * term)
        total = total + term
    return scale * total


# -- the series -----------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 5, 10, 20, 40])
@pytest.mark.parametrize("n", [1, 3, 30])
def test_equals_the_literal_series(n: int, num_terms: int, damping: float) -> None:
    # n = 1 and 3 also exhaust the Krylov space long before the terms.
    h = spread(n, 50.0)
    b = rhs(n)
    solver = NeumannSolver(num_terms, scale=0.7, damping=damping)
    result = solver.solve(h.matvec, b)
    truth = series(h, b["w"], 0.7, num_terms, damping)
    assert error(result.x["w"], truth) <= tol(F64, 10.0)
    assert result.n_matvec == h.calls == min(num_terms, n)
    assert result.converged
    assert result.reason == ""


@pytest.mark.parametrize("num_terms", [1, 10, 40])
def test_exhausted_after_one_product(num_terms: int) -> None:
    # H = 2I, α = .3: α (1 - .4^(k+1)) / .6.
    b = rhs(5)
    result = NeumannSolver(num_terms, scale=0.3).solve(lambda v: {"w": 2 * v["w"]}, b)
    assert result.n_matvec == 1
    truth = b["w"] * 0.3 * (1 - 0.4 ** (num_terms + 1)) / 0.6
    assert error(result.x["w"], truth) <= tol(F64)


@pytest.mark.parametrize("num_terms", [1, 5, 20])
def test_equals_the_literal_series_in_float32(num_terms: int) -> None:
    h = spread(40, 100.0)
    b = rhs(40, dtype=F32)
    result = NeumannSolver(num_terms, scale=1.5).solve(h.matvec, b)
    assert result.x["w"].dtype == F32
    truth = series(h, b["w"], 1.5, num_terms)
    assert error(result.x["w"], truth) <= tol(F32)


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5])
def test_error_stays_below_the_geometric_bound(scale: float) -> None:
    h = system([0.05, *torch.linspace(0.5, 1.0, 29).tolist()])
    b = rhs(30)
    x = h.solution(b["w"])
    rate = float((1 - scale * h.eigenvalues).abs().max())
    errors = []
    for k in (1, 2, 4, 8, 16, 32, 64, 128):
        result = NeumannSolver(k, scale=scale).solve(h.matvec, b)
        errors.append(error(result.x["w"], x))
        assert errors[-1] <= rate ** (k + 1) + tol(F64, h.cond)
        # and so does the residual that is reported: the last term
        assert result.residual_norm is not None
        assert h.residual(result.x["w"], b["w"]) <= result.residual_norm
    # The rate is the bound's, once the slowest direction is all that is left.
    assert errors[-1] / errors[-2] == pytest.approx(rate**64, rel=1e-6)


def test_scale_other_than_one_is_not_lost() -> None:
    # Slips in α hide at α = 1: x is linear in it for k = 0.
    b = rhs(3)
    h = spread(3, 2.0)
    for scale in (0.1, 1.0, 3.0):
        result = NeumannSolver(0, scale=scale).solve(h.matvec, b)
        assert torch.equal(result.x["w"], scale * b["w"])
        assert result.n_matvec == 0


# -- automatic scale ------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_automatic_scale_is_one_over_the_largest_eigenvalue(damping: float) -> None:
    h = spread(20, 1e3)
    b = rhs(20)
    result = NeumannSolver(20, damping=damping).solve(h.matvec, b)
    assert result.state["lambda_max"].item() == pytest.approx(1.0, rel=1e-12)
    truth = series(h, b["w"], 1 / (1 + damping), 20, damping)
    assert error(result.x["w"], truth) <= tol(F64, 10.0)


@pytest.mark.parametrize(
    ("num_terms", "least"), [(1, 0.3), (2, 0.7), (5, 0.95), (10, 0.999)]
)
def test_lambda_max_is_found_early(num_terms: int, least: float) -> None:
    h = spread(200, 1e3)
    result = NeumannSolver(num_terms).solve(h.matvec, rhs(200))
    found = result.state["lambda_max"].item()
    assert least <= found <= 1.1
    assert result.curvature is not None
    assert result.curvature[1] <= found


@settings(max_examples=300)
@given(
    powers=st.lists(st.floats(-4, 4), min_size=2, max_size=6, unique=True),
    weights=st.lists(st.floats(-10, 0), min_size=6, max_size=6),
    num_terms=st.integers(1, 7),
)
def test_automatic_scale_never_diverges(
    powers: list[float], weights: list[float], num_terms: int
) -> None:
    # Whatever b contains little of: an eigenvalue that the Krylov space sees too late to
    # learn from (b nearly an eigenvector of a small one) does no harm within k terms.
    values = [10.0**p for p in powers]
    b = torch.tensor([10.0**w for w in weights[: len(values)]], dtype=F64)
    result = NeumannSolver(num_terms).solve(diagonal(values), {"w": b})
    x = b / torch.tensor(values, dtype=F64)
    # Never further from the solution than nothing at all, never longer than it.
    assert error(result.x["w"], x) <= 1 + 1e-9
    assert float(result.x["w"].norm()) <= (1 + 1e-9) * float(x.norm())
    assert result.residual_norm is not None
    assert result.residual_norm <= math.sqrt(num_terms + 1)
    assert result.state["lambda_max"].item() <= 2 * max(values)
    assert result.converged


def test_largest_eigenvalue_behind_a_tiny_component() -> None:
    # α = 1/θ of the Ritz value alone, 1/2, would amplify the second entry by 5e5.
    b = torch.tensor([1.0, 1e-3], dtype=F64)
    result = NeumannSolver(1).solve(diagonal([1.0, 1e6]), {"w": b})
    assert result.state["lambda_max"].item() == pytest.approx(1002.0, rel=1e-3)
    assert error(result.x["w"], torch.tensor([1.0, 1e-9], dtype=F64)) <= 1
    # One more product and the eigenvalue is known.
    result = NeumannSolver(2).solve(diagonal([1.0, 1e6]), {"w": b})
    assert result.state["lambda_max"].item() == pytest.approx(1e6, rel=1e-6)


def test_more_terms_converge() -> None:
    h = spread(15, 10.0)
    b = rhs(15)
    errors = [
        error(NeumannSolver(k).solve(h.matvec, b).x["w"], h.solution(b["w"]))
        for k in (10, 50, 250)
    ]
    assert errors[1] <= 0.9**51
    assert errors[2] <= 0.9**251 + tol(F64, 10.0)
    assert errors[0] > errors[1] > errors[2]


# -- laws -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [NeumannSolver(3), NeumannSolver(0, scale=0.5)])
def test_zero_gives_exact_zeros_without_a_product(solver: NeumannSolver) -> None:
    def never(v: Named) -> Named:
        raise AssertionError(v)

    b = {"w": torch.zeros(3), "v": torch.zeros((), dtype=F64)}
    result = solver.solve(never, b)
    assert result.n_matvec == 0
    assert all(torch.equal(result.x[n], t) for n, t in b.items())


@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("scale", ["auto", 0.5])
def test_scaling_b_scales_x(size: float, scale: Any) -> None:
    h = spread(20, 100.0)
    b = rhs(20, dtype=F32)
    one = NeumannSolver(5, scale=scale).solve(h.matvec, b)
    many = NeumannSolver(5, scale=scale).solve(h.matvec, {"w": b["w"] * size})
    assert error(many.x["w"].double() / size, one.x["w"]) <= tol(F32)


@pytest.mark.parametrize("size", [1e-30, 1e12, 1e30])
def test_automatic_scale_follows_the_size_of_h(size: float) -> None:
    h = spread(20, 100.0)
    b = rhs(20, dtype=F32)
    one = NeumannSolver(5).solve(h.matvec, b)
    many = NeumannSolver(5).solve(lambda v: {"w": h.matvec(v)["w"] * size}, b)
    assert error(many.x["w"].double() * size, one.x["w"]) <= tol(F32)


def test_arguments_are_unchanged_and_answers_repeat() -> None:
    h = spread(10, 10.0)
    b = rhs(10)
    state = {"lambda_max": torch.tensor(1e9)}
    before = b["w"].clone()
    first = NeumannSolver(4).solve(h.matvec, b)
    second = NeumannSolver(4).solve(h.matvec, b, state)
    assert torch.equal(b["w"], before)
    assert state == {"lambda_max": torch.tensor(1e9)}
    # Each solve learns its own scale: what was true of another w does not enter.
    assert torch.equal(first.x["w"], second.x["w"])


def test_bfloat16_and_several_tensors() -> None:
    b = {
        "m": rhs(6)["w"].reshape(2, 3).T.to(torch.bfloat16),
        "s": torch.tensor(1.0, dtype=torch.bfloat16),
        "e": torch.zeros(0, dtype=torch.bfloat16),
    }
    result = NeumannSolver(3, scale=0.25).solve(
        lambda v: {n: 2 * t for n, t in v.items()}, b
    )
    for name, t in b.items():
        assert result.x[name].dtype == torch.bfloat16
        truth = t.double() * 0.25 * (1 + 0.5 + 0.25 + 0.125)
        assert error(result.x[name], truth) <= tol(torch.bfloat16)


# -- failure --------------------------------------------------------------------------


def test_divergent_scale_is_reported() -> None:
    h = spread(10, 10.0)
    b = rhs(10)
    result = quiet(10, scale=3.0, damping=0.5).solve(h.matvec, b)
    assert not result.converged
    assert "the Neumann series diverges: scale 3 times" in result.reason
    assert "is 4.5, and must be below 2" in result.reason
    assert "Pass scale='auto', or one below 1.33" in result.reason
    # It is what was asked for all the same.
    truth = series(h, b["w"], 3.0, 10, 0.5)
    assert error(result.x["w"], truth) <= tol(F64, 10.0)
    with pytest.warns(NumericalWarning, match="diverges"):
        NeumannSolver(10, scale=3.0).solve(h.matvec, b)
    with pytest.raises(SolveError, match="diverges"):
        NeumannSolver(10, scale=3.0, on_failure="raise").solve(h.matvec, b)


def test_at_the_limit_terms_do_not_shrink() -> None:
    # α = 1, H = 2: b - b + b - ...
    result = quiet(4, scale=1.0).solve(lambda v: {"w": 2 * v["w"]}, rhs(3))
    assert not result.converged
    assert result.residual_norm == pytest.approx(1.0)


def test_just_below_the_limit_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = NeumannSolver(10, scale=1.99).solve(spread(10, 10.0).matvec, rhs(10))
    assert result.converged


def test_divergence_that_overflows_is_an_error() -> None:
    with pytest.raises(
        NonFiniteError, match=r"not finite: the Neumann series diverges"
    ):
        quiet(500, scale=100.0).solve(lambda v: {"w": 2 * v["w"]}, rhs(3, dtype=F32))


def test_negative_curvature_is_answered_by_damping() -> None:
    h = system([-1.0, 0.5, 2.0, 4.0])
    b = rhs(4)
    result = quiet(50).solve(h.matvec, b)
    assert result.damping == pytest.approx(2.0)
    assert result.curvature == (pytest.approx(-1.0), pytest.approx(4.0))
    assert "curvature of the inner loss is -1 along one direction" in result.reason
    assert "raised to 2" in result.reason
    assert result.converged
    truth = series(h, b["w"], 1 / 6.0, 50, 2.0)
    assert error(result.x["w"], truth) <= tol(F64, 10.0)
    # which converges to the damped solution: slowest factor 1 - 1/6
    assert error(result.x["w"], h.solution(b["w"], 2.0)) <= (5 / 6) ** 51


def test_negative_curvature_under_a_scale_of_ones_own() -> None:
    h = system([-1.0, 0.5, 2.0])
    result = quiet(10, scale=0.4, damping=0.25).solve(h.matvec, rhs(3))
    assert not result.converged
    assert result.damping == 0.25  # as set: the scale is the user's, so is this
    assert "diverges: curvature of the inner loss is -1" in result.reason
    assert "damping above 1" in result.reason
    calm = quiet(10, scale=0.4, damping=1.5).solve(h.matvec, rhs(3))
    assert calm.converged
    assert calm.reason == ""


def test_all_curvature_negative() -> None:
    b = rhs(3)
    result = quiet(60).solve(lambda v: {"w": -v["w"]}, b)
    assert result.damping == pytest.approx(2.0)
    assert error(result.x["w"], b["w"]) <= tol(F64)  # (-1 + 2)⁻¹ b


@pytest.mark.parametrize("scale", ["auto", 0.2])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_flat_directions_are_harmless(dtype: torch.dtype, scale: Any) -> None:
    # H is singular: b grows by α in each term there, and converges elsewhere.
    h = system([0.0, 0.0, 1.0, 2.0, 4.0])
    b = rhs(5, dtype=dtype)
    result = NeumannSolver(8, scale=scale, on_failure="raise").solve(h.matvec, b)
    assert result.damping == 0.0
    used = 1 / result.state["lambda_max"].item() if scale == "auto" else scale
    assert error(result.x["w"], series(h, b["w"], used, 8)) <= tol(dtype, 10.0)


def test_no_curvature_at_all() -> None:
    b = rhs(4)

    def nothing(v: Named) -> Named:
        return {"w": 0 * v["w"]}

    result = quiet(5).solve(nothing, b)
    assert torch.equal(result.x["w"], torch.zeros(4, dtype=F64))
    assert not result.converged
    assert "is 0 along the right-hand side" in result.reason
    with pytest.raises(SolveError, match="Pass damping above 0"):
        NeumannSolver(5, on_failure="raise").solve(nothing, b)
    given = quiet(5, scale=0.5).solve(nothing, b)
    assert error(given.x["w"], 3.0 * b["w"]) <= tol(F64)  # six equal terms of b/2
    assert not given.converged
    assert "each term is as large as the last" in given.reason
    damped = NeumannSolver(5, damping=0.25, on_failure="raise").solve(nothing, b)
    assert error(damped.x["w"], 4.0 * b["w"]) <= tol(F64)


def test_products_of_no_symmetric_matrix() -> None:
    crooked = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.5, -1.0, 2.0]])
    result = quiet(3).solve(lambda v: {"w": crooked.double() @ v["w"]}, rhs(3))
    assert not result.converged
    assert "not those of a symmetric matrix" in result.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [NeumannSolver(3), NeumannSolver(0, scale=0.5)])
def test_right_hand_side_that_is_not_finite(solver: NeumannSolver, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="right-hand side"):
        solver.solve(diagonal([1.0]), {"w": torch.tensor([bad])})


def test_product_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="a product with the inner Hessian"):
        NeumannSolver(3).solve(lambda v: {"w": v["w"] * math.nan}, rhs(3))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"num_terms": -1}, ValueError, "num_terms=-1 must be at least 0"),
        ({"num_terms": 1.0}, TypeError, "num_terms=1.0 must be a whole number"),
        ({"num_terms": 0}, ValueError, "num_terms=0 takes no product.*pass scale"),
        ({"scale": 0.0}, ValueError, "scale=0.0 must be 'auto' or positive"),
        ({"scale": -1.0}, ValueError, "scale=-1.0 must be 'auto' or positive"),
        ({"scale": math.nan}, ValueError, "scale=nan must be"),
        ({"scale": math.inf}, ValueError, "scale=inf must be"),
        ({"scale": "best"}, ValueError, "scale='best' must be"),
        ({"damping": -0.1}, ValueError, "damping=-0.1 must be finite"),
        ({"on_failure": "no"}, ValueError, "on_failure='no' must be"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        NeumannSolver(**settings)
