"""Low-rank models of a matrix from a few of its products, and solves with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import NumericalWarning, SolveError
from hypergrad.solvers import NystromSketch, NystromSolver
from hypergrad.tree import Params
from tests.hypergrad.solvers.systems import diagonal, rhs, spread, system
from tests.tolerances import error, tol

F64, F32 = torch.float64, torch.float32
KINDS: list[Any] = ["gaussian", "columns"]


def quiet(rank: int, **settings: Any) -> NystromSolver:
    return NystromSolver(rank, on_failure="return", **settings)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1e-3, 0.3])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_full_rank_is_the_damped_inverse(
    n: int, damping: float, kind: Any, dtype: torch.dtype
) -> None:
    h = spread(n, 100.0)
    b = rhs(n, dtype=dtype)
    result = quiet(n + 5, damping=damping, kind=kind).solve(h.matvec, b)
    truth = h.solution(b["w"], damping)
    # The core ΩᵀHΩ is inverted once more than H itself is: its κ comes on top.
    bar = tol(dtype, h.cond) * h.cond
    assert error(result.x["w"], truth) <= bar
    assert result.n_matvec == h.calls == n + 1
    assert result.damping == damping
    assert result.reason == ""
    # The residual is computed from a product that rounds by ε ‖H‖‖x‖.
    assert result.residual_norm == pytest.approx(
        h.residual(result.x["w"], b["w"], damping), abs=tol(dtype, h.cond)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_exact_where_the_rank_is_that_of_the_matrix(kind: Any) -> None:
    h = system([0.0] * 30 + [1.0, 2.0, 5.0, 9.0])
    b = rhs(34)
    for rank in (4, 10):
        result = quiet(rank, damping=0.1, kind=kind).solve(h.matvec, b)
        # κ of the damped matrix is 91; random columns see four directions unevenly
        assert error(result.x["w"], h.solution(b["w"], 0.1)) <= 1e-11
        assert result.curvature == (pytest.approx(0.0, abs=1e-12), pytest.approx(9.0))


def test_the_error_falls_with_the_rank_below_the_tail() -> None:
    """‖H - Ĥ‖ is at most a small multiple of the first eigenvalue left out [FTU21]."""
    h = spread(200, 1e6)
    b = rhs(200)
    values = h.eigenvalues.sort(descending=True).values
    for rank in (10, 20, 40, 80):
        model = NystromSketch(rank).learn(h.matvec, b, {})
        low_rank = (model.basis.T * model.eigenvalues) @ model.basis
        off = torch.linalg.matrix_norm(h.matrix - low_rank, 2)
        # Expected error of a Gaussian sketch of rank 2p - 1 is at most
        # 3 λ_p + (4e²/p) Σ_{j≥p} λ_j [FTU21, §2].
        p = rank // 2
        bound = 3 * values[p - 1] + 4 * torch.e**2 / p * values[p - 1 :].sum()
        assert off <= bound
        assert model.n_matvec == rank


def test_what_the_model_does_not_know_is_divided_by_the_damping() -> None:
    matvec = diagonal([4.0, 1.0])
    b = {"w": torch.tensor([0.0, 1.0], dtype=F64)}
    # A seed whose single column is the first: the second direction counts as flat.
    for seed in range(8):
        result = quiet(1, damping=0.5, kind="columns", seed=seed).solve(matvec, b)
        if result.curvature == (0.0, 4.0):
            assert result.x["w"].tolist() == [0.0, 2.0]
            # (1 + 0.5)·2 - 1 = 2 is left of a right-hand side of norm 1
            assert result.residual_norm == pytest.approx(2.0)
            assert not result.converged
            assert "leaves a relative residual of 2, more than" in result.reason
            return
    pytest.fail("no seed of eight drew the first column")


def test_negative_curvature_raises_the_damping_and_says_so() -> None:
    h = system([-1.0, 0.5, 2.0, 3.0])
    b = rhs(4)
    with pytest.warns(NumericalWarning, match="is -1 along one direction"):
        result = NystromSolver(4, damping=0.01).solve(h.matvec, b)
    assert result.damping == pytest.approx(1.99)  # turns -1 + 0.01 around
    assert error(result.x["w"], h.solution(b["w"], result.damping)) <= 1e-12
    assert result.curvature == (pytest.approx(-1.0), pytest.approx(3.0))
    with pytest.raises(SolveError, match="Damping was raised to"):
        NystromSolver(4, on_failure="raise").solve(h.matvec, b)


def test_no_damping_below_full_rank_is_singular_and_said() -> None:
    h = spread(20, 10.0)
    result = quiet(5, damping=0.0).solve(h.matvec, rhs(20))
    assert "singular to working precision" in result.reason
    assert result.damping > 0
    full = quiet(20, damping=0.0).solve(h.matvec, rhs(20))
    assert full.reason == ""
    assert error(full.x["w"], h.solution(rhs(20)["w"])) <= 1e-11


def test_a_zero_matrix() -> None:
    b = rhs(3)
    damped = quiet(2, damping=0.5).solve(diagonal([0.0] * 3), b)
    assert torch.equal(damped.x["w"], 2 * b["w"])
    flat = quiet(2, damping=0.0).solve(diagonal([0.0] * 3), b)
    assert not flat.x["w"].any()
    assert not flat.converged
    assert "there is no solution" in flat.reason


def test_zero_right_hand_side_keeps_the_model() -> None:
    h = spread(10, 10.0)
    zero = {"w": torch.zeros(10, dtype=F64)}
    kept = quiet(3, every=5).solve(h.matvec, rhs(10)).state
    calls = h.calls
    result = quiet(3, every=5).solve(h.matvec, zero, kept)
    assert not result.x["w"].any()
    assert h.calls == calls
    assert result.state == kept


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scaling_b_scales_x(scale: float) -> None:
    h = spread(12, 50.0)
    b = rhs(12)
    plain = quiet(6).solve(h.matvec, b).x["w"]
    scaled = quiet(6).solve(h.matvec, {"w": scale * b["w"]}).x["w"]
    assert error(scaled / scale, plain) <= tol(F64, h.cond)


def test_a_model_is_shared_and_renewed() -> None:
    h = spread(30, 100.0)
    solver = quiet(7, every=3)
    state: dict[str, Any] = {}
    taken, models = [], []
    for _ in range(7):
        before = h.calls
        result = solver.solve(h.matvec, rhs(30), state)
        assert result.n_matvec == h.calls - before
        state = result.state
        taken.append(result.n_matvec)
        models.append(state["sketch_basis"])
    assert taken == [8, 1, 1, 8, 1, 1, 8]
    assert models[0] is models[2]
    # A new one is drawn anew, and each is drawn alike in each run.
    assert not torch.equal(models[0], models[3])
    again = quiet(7, every=3).solve(h.matvec, rhs(30)).state["sketch_basis"]
    assert torch.equal(models[0], again)


def test_a_model_of_another_size_is_not_used() -> None:
    kept = quiet(3, every=9).solve(spread(10, 10.0).matvec, rhs(10)).state
    h = spread(6, 10.0)
    result = quiet(6, damping=0.1, every=9).solve(h.matvec, rhs(6), kept)
    assert error(result.x["w"], h.solution(rhs(6)["w"], 0.1)) <= 1e-12


def test_torchs_random_numbers_are_neither_read_nor_moved() -> None:
    h = spread(10, 10.0)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(quiet(4).solve(h.matvec, rhs(10)).x["w"])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


class Block:
    """A matvec that can take several vectors at once, and counts how."""

    def __init__(self) -> None:
        self.system = spread(10, 10.0)
        self.single = self.block = 0

    def __call__(self, vector: Params) -> Params:
        self.single += 1
        return self.system.matvec(vector)

    def many(self, vectors: Params) -> Params:
        self.block += 1
        return {"w": vectors["w"] @ self.system.matrix}


def test_columns_are_asked_for_at_once_where_they_can_be() -> None:
    h = Block()
    result = quiet(10, damping=0.1).solve(h, rhs(10))
    assert (h.block, h.single) == (1, 1)  # the model, and the residual
    assert error(result.x["w"], h.system.solution(rhs(10)["w"], 0.1)) <= 1e-12


def test_products_that_are_not_symmetric_are_said() -> None:
    skew = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)
    result = quiet(2).solve(lambda v: {"w": skew @ v["w"]}, rhs(2))
    assert "not those of a symmetric matrix" in result.reason
    assert not result.converged


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"rank": 0}, ValueError, "rank=0"),
        ({"rank": 2.0}, TypeError, r"rank=2\.0"),
        ({"every": 0}, ValueError, "every=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"kind": "rows"}, ValueError, "kind='rows' is unknown; choose one of"),
        ({"damping": -1.0}, ValueError, r"damping=-1\.0"),
        ({"damping": float("nan")}, ValueError, "damping=nan"),
        ({"on_failure": "ignore"}, ValueError, "on_failure='ignore'"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        NystromSolver(**settings)
