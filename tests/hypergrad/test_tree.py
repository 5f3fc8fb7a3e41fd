"""Arithmetic on dictionaries of tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypergrad import tree
from tests.tolerances import tol

F64 = torch.float64


def two() -> tuple[tree.Params, tree.Params]:
    a = {"x": torch.tensor([[1.0, 2.0]]), "y": torch.tensor(3.0, dtype=F64)}
    b = {"y": torch.tensor(-1.0, dtype=F64), "x": torch.tensor([[10.0, 20.0]])}
    return a, b


def test_arithmetic_goes_by_name() -> None:
    a, b = two()
    assert tree.add(a, b)["x"].tolist() == [[11.0, 22.0]]
    assert tree.add(a, b, -2.0)["y"].item() == 5.0
    assert tree.sub(a, b)["y"].item() == 4.0
    assert tree.scale(a, 0.5)["x"].tolist() == [[0.5, 1.0]]
    assert tree.map_params(torch.maximum, a, b)["y"].item() == 3.0
    assert tree.dot(a, b) == 10.0 + 40.0 - 3.0
    assert list(tree.add(a, b)) == ["x", "y"]
    assert tree.add(a, b)["y"].dtype == F64


def test_copies_are_detached_and_own_their_memory() -> None:
    t = torch.ones(2, requires_grad=True)
    copy, zeros = tree.clone({"t": t})["t"], tree.zeros_like({"t": t})["t"]
    assert not copy.requires_grad
    assert not zeros.requires_grad
    assert copy.data_ptr() != t.data_ptr()
    assert zeros.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_wide_is_float64_without_a_graph(dtype: torch.dtype) -> None:
    wide = tree.wide(torch.ones(2, dtype=dtype, requires_grad=True))
    assert wide.dtype == F64
    assert not wide.requires_grad


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (F64, 1e300),
        (F64, 1e-300),
        (F64, 5e-324),
        (torch.float32, 1e38),
        (torch.float32, 1e-38),
        (torch.bfloat16, 1e38),
        (torch.float16, 6e-8),
    ],
    ids=str,
)
def test_norm_neither_overflows_nor_vanishes(dtype: torch.dtype, size: float) -> None:
    t = torch.full((4,), size, dtype=dtype)  # norm 2 size
    truth = 2 * t[0].double().item()
    assert tree.norm({"t": t}) == pytest.approx(truth, rel=1e-15)
    assert tree.norm([t[:1], t[1:]]) == pytest.approx(truth, rel=1e-15)


def test_norm_over_sizes_that_differ() -> None:
    parts = {
        "a": torch.tensor([3e30]),
        "b": torch.tensor([[4e30]]),
        "c": torch.ones(()),
    }
    assert tree.norm(parts) == pytest.approx(5e30, rel=1e-6)
    truth = math.sqrt(float(parts["a"]) ** 2 + float(parts["b"]) ** 2)
    assert tree.norm(parts) == pytest.approx(truth, rel=1e-15)


@given(st.lists(st.floats(-1e150, 1e150), min_size=1, max_size=8))
def test_norm_equals_hypot(values: list[float]) -> None:
    t = torch.tensor(values, dtype=F64)
    got = tree.norm({"a": t[:3], "b": t[3:]})
    assert got == pytest.approx(math.hypot(*values), rel=tol(F64))


def test_norm_of_nothing_and_of_what_is_not_finite() -> None:
    assert tree.norm({}) == 0.0
    assert tree.norm({"e": torch.zeros(0, 3)}) == 0.0
    assert tree.norm({"e": torch.zeros(0), "z": torch.zeros(2)}) == 0.0
    assert tree.norm({"t": torch.tensor([1.0, -math.inf])}) == math.inf
    assert math.isnan(tree.norm({"t": torch.tensor([1.0, math.nan])}))
    assert math.isnan(
        tree.norm({"a": torch.tensor([math.inf]), "b": torch.tensor(math.nan)})
    )


def test_norm_and_dot_leave_graphs_alone() -> None:
    t = torch.ones(2, requires_grad=True)
    assert isinstance(tree.norm({"t": 2 * t}), float)
    assert isinstance(tree.dot({"t": 2 * t}, {"t": t}), float)


def test_dot_accumulates_in_float64() -> None:
    # 1 + 1e-9 - 1 is 0 in float32, and float32 squares of 1e30 are infinite.
    a = {"a": torch.tensor([1.0, 1e-9, -1.0])}
    assert tree.dot(a, {"a": torch.ones(3)}) == pytest.approx(1e-9, rel=1e-6)
    big = {"a": torch.full((2,), 1e30)}
    assert tree.dot(big, big) == pytest.approx(2e60, rel=1e-6)
    assert tree.dot({}, {}) == 0.0
    strided = {"a": torch.arange(6.0).reshape(2, 3).T}
    assert tree.dot(strided, strided) == 55.0


def test_all_finite() -> None:
    assert tree.all_finite({})
    assert tree.all_finite({"e": torch.zeros(0)})
    assert tree.all_finite({"a": torch.ones(2), "b": torch.tensor(1e38)})
    for bad in (math.nan, math.inf, -math.inf):
        assert not tree.all_finite({"a": torch.ones(2), "b": torch.tensor([0.0, bad])})
