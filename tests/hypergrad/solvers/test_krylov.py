"""The Lanczos basis: orthonormal, invariant where it ends, H on it tridiagonal."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad.errors import NonFiniteError
from hypergrad.solvers import lanczos
from hypergrad.solvers.damping import positive_damping
from tests.hypergrad.solvers.systems import Named, diagonal, rhs, spread, system
from tests.tolerances import error, tol

F64 = torch.float64
DTYPES = [F64, torch.float32]


@pytest.mark.parametrize("cond", [1.0, 1e3, 1e8, 1e14])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basis_is_orthonormal_to_rounding(dtype: torch.dtype, cond: float) -> None:
    # Without re-orthogonalisation this is lost as soon as one Ritz value converges.
    h = spread(80, cond)
    krylov = lanczos(h.matvec, rhs(80, dtype=dtype), 80)
    assert krylov is not None
    q = krylov.basis.double()
    gram = q @ q.T
    worst = float((gram - torch.eye(len(q), dtype=F64)).abs().max())
    assert worst <= tol(dtype)  # whatever the condition


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_t_is_h_on_the_basis(dtype: torch.dtype, steps: int) -> None:
    h = spread(40, 1e3)
    krylov = lanczos(h.matvec, rhs(40, dtype=dtype), steps)
    assert krylov is not None
    assert krylov.steps == steps == h.calls
    q = krylov.basis.double()[:steps]
    size = float(h.eigenvalues.max())
    assert (
        float((q @ h.matrix @ q.T - torch.from_numpy(krylov.matrix())).abs().max())
        <= tol(dtype) * size
    )
    # H Q = Q T + the coupling to the next vector.
    rest = q @ h.matrix - torch.from_numpy(krylov.matrix()) @ q
    coupling = float(krylov.off_diagonal[-1])
    if steps < 40:
        rest[-1] -= coupling * krylov.basis[steps].double()
    else:
        assert coupling == 0.0
    assert float(rest.abs().max()) <= tol(dtype) * size
    assert krylov.asymmetry <= tol(dtype)


@pytest.mark.parametrize("distinct", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_after_as_many_products_as_distinct_eigenvalues(
    dtype: torch.dtype, distinct: int
) -> None:
    h = system([1.0 + k % distinct for k in range(30)])
    krylov = lanczos(h.matvec, rhs(30, dtype=dtype), 30)
    assert krylov is not None
    assert krylov.steps == distinct == h.calls == len(krylov.basis)
    assert float(krylov.off_diagonal[-1]) == 0.0
    ritz = torch.linalg.eigvalsh(torch.from_numpy(krylov.matrix()))
    truth = torch.arange(1.0, distinct + 1, dtype=F64)
    assert error(ritz, truth) <= tol(dtype)


def test_full_space_gives_all_eigenvalues() -> None:
    h = spread(30, 1e4)
    krylov = lanczos(h.matvec, rhs(30), 1000)
    assert krylov is not None
    assert krylov.steps == 30
    ritz = torch.linalg.eigvalsh(torch.from_numpy(krylov.matrix()))
    assert error(ritz, h.eigenvalues.sort().values) <= tol(F64)


def test_combine_is_a_polynomial_of_h() -> None:
    # |b| Q T² e1 = H² b.
    h = spread(20, 10.0)
    b = rhs(20)
    krylov = lanczos(h.matvec, b, 2)
    assert krylov is not None
    t = torch.from_numpy(
        krylov.matrix(3)
    )  # the third diagonal entry, unknown, is not reached
    e1 = torch.zeros(3, dtype=F64)
    e1[0] = 1.0
    squared = krylov.combine((t @ t @ e1).numpy(), b)["w"]
    assert error(squared, h.matrix @ h.matrix @ b["w"]) <= tol(F64)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_right_hand_sides_of_any_size(size: float) -> None:
    # Unit vectors, whatever |b|: its square is out of float32 at 1e20.
    h = spread(10, 10.0)
    b = {"w": (rhs(10)["w"] * size / 4).float()}
    krylov = lanczos(h.matvec, b, 3)
    assert krylov is not None
    assert krylov.norm == pytest.approx(float(b["w"].double().norm()), rel=1e-14)
    assert float(krylov.basis[0].double().norm()) == pytest.approx(1.0, rel=1e-6)


def test_stop_ends_the_pass() -> None:
    seen: list[tuple[float, float]] = []

    def stop(alpha: float, beta: float) -> bool:
        seen.append((alpha, beta))
        return len(seen) == 3

    krylov = lanczos(spread(10, 10.0).matvec, rhs(10), 9, stop)
    assert krylov is not None
    assert krylov.steps == 3
    assert len(krylov.basis) == 4
    assert [a for a, _ in seen] == krylov.diagonal.tolist()
    assert [b for _, b in seen] == krylov.off_diagonal.tolist()


def test_memory_grows_with_the_products_taken() -> None:
    # A thousand rows would be 8 MB; four products keep no more than sixteen.
    krylov = lanczos(diagonal([1.0, 2.0, 3.0, 4.0] * 250), rhs(1000), 900)
    assert krylov is not None
    assert krylov.steps == 4
    assert krylov.basis.untyped_storage().nbytes() == 16 * 1000 * 8


def test_zero_and_empty_right_hand_sides_take_no_product() -> None:
    def never(v: Named) -> Named:
        raise AssertionError(v)

    assert lanczos(never, {"w": torch.zeros(3)}, 5) is None
    assert lanczos(never, {"w": torch.zeros(0), "v": torch.zeros(2, 0)}, 5) is None
    assert lanczos(never, {}, 5) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_right_hand_side_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"right-hand side.*outer gradient"):
        lanczos(diagonal([1.0, 2.0]), {"w": torch.tensor([1.0, bad])}, 5)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite(bad: float, at: int) -> None:
    h = spread(5, 10.0)

    def matvec(v: Named) -> Named:
        out = h.matvec(v)["w"]
        return {"w": out * bad if h.calls == at else out}

    with pytest.raises(
        NonFiniteError, match=r"a product with the inner Hessian is not"
    ):
        lanczos(matvec, rhs(5), 5)
    assert h.calls == at


def test_answers_in_another_order_are_put_in_order() -> None:
    b = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    krylov = lanczos(lambda v: {"b": 5 * v["b"], "a": 5 * v["a"]}, b, 4)
    assert krylov is not None
    assert krylov.steps == 1  # 5 I
    assert float(krylov.diagonal[0]) == pytest.approx(5.0, rel=1e-6)


def test_answers_of_another_shape_are_refused() -> None:
    b = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"returned \(1,\) for 'b'.*\(2,\)"):
        lanczos(lambda v: {"a": v["a"], "b": v["b"][:1]}, b, 4)
    with pytest.raises(ValueError, match="returned nothing for 'b'"):
        lanczos(lambda v: {"a": v["a"]}, b, 4)


def test_asymmetry_is_seen() -> None:
    # H + S with S skew: T would be symmetric all the same.
    h = spread(8, 10.0)
    skew = torch.triu(torch.ones(8, 8, dtype=F64), 1)
    skew = 0.3 * (skew - skew.T)
    crooked = lanczos(lambda v: {"w": (h.matrix + skew) @ v["w"]}, rhs(8), 4)
    straight = lanczos(h.matvec, rhs(8), 4)
    assert crooked is not None
    assert straight is not None
    assert crooked.asymmetry > 0.1
    assert straight.asymmetry < 1e-14


@settings(max_examples=50)
@given(
    lowest=st.floats(-10, 10),
    above=st.floats(0, 10),
    damping=st.floats(0, 5),
)
def test_damping_makes_positive_definite_and_is_only_ever_raised(
    lowest: float, above: float, damping: float
) -> None:
    highest = lowest + above
    got, reason = positive_damping(lowest, highest, damping)
    size = max(abs(lowest), abs(highest))
    if not reason:
        assert got == damping
        assert lowest + got > 0
    elif size:
        assert got >= damping
        assert lowest + got >= 1e-3 * size * (1 - 1e-12)
        # No more than turning the sign around, or the floor.
        floor = 1e-3 * (size + damping)
        assert lowest + got <= max(-(lowest + damping), floor) + 1e-12
        assert f"{got:.3g}" in reason
    else:
        assert got == 0.0


@pytest.mark.parametrize(
    ("lowest", "highest", "eps", "words"),
    [
        (-1.0, 3.0, 2.0**-52, "curvature.*-1 along.*raised to 2;.*above 1"),
        (1e-17, 1.0, 2.0**-52, "singular to working precision.*flat.*raised to 0.001"),
        (-1e-17, 1.0, 2.0**-52, "singular to working precision"),
        (1e-8, 1.0, 2.0**-23, "singular to working precision"),
        (0.0, 0.0, 2.0**-52, "is 0 along the right-hand side.*Pass damping above 0"),
    ],
)
def test_damping_says_why(
    lowest: float, highest: float, eps: float, words: str
) -> None:
    assert re.search(words, positive_damping(lowest, highest, 0.0, eps)[1])


def test_damping_by_coarse_products_is_never_lowered() -> None:
    # In bfloat16 an eigenvalue of .01 of the largest cannot be told from 0.
    got, reason = positive_damping(-0.49, 1.0, 0.5, 2.0**-7)
    assert got > 0.5
    assert reason
