"""The identity in the place of an inverse."""

from __future__ import annotations

import math

import pytest
import torch

from hypergrad.errors import NonFiniteError
from hypergrad.solvers import IdentitySolver
from tests.hypergrad.solvers.systems import Named


def never(v: Named) -> Named:
    raise AssertionError(v)


def test_scales_without_a_product() -> None:
    b = {"w": torch.tensor([1.0, -2.0]), "v": torch.tensor(4.0, dtype=torch.bfloat16)}
    result = IdentitySolver(0.25).solve(never, b)
    assert result.x["w"].tolist() == [0.25, -0.5]
    assert result.x["v"].item() == 1.0
    assert result.x["v"].dtype == torch.bfloat16
    assert result.n_matvec == 0
    assert result.residual_norm is None
    assert b["w"].tolist() == [1.0, -2.0]


def test_zero_gives_exact_zeros() -> None:
    result = IdentitySolver().solve(never, {"w": torch.zeros(2)})
    assert torch.equal(result.x["w"], torch.zeros(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_right_hand_side_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="right-hand side"):
        IdentitySolver().solve(never, {"w": torch.tensor([bad])})


def test_overflow_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="solution of the linear solve"):
        IdentitySolver(1e30).solve(never, {"w": torch.tensor([1e20])})


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale={scale} must be positive and finite"):
        IdentitySolver(scale)
