"""ΔM, ΔD and the line through them: closed forms, and what has no answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bidora import analysis
from bidora.analysis import effective_weight, fit_line, weight_change

EPS = torch.finfo(torch.float64).eps


def base(rows: int = 5, columns: int = 4) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_scaled_weight_has_its_direction(factor: float) -> None:
    first = base()
    found = weight_change(factor * first, first)
    expected = abs(factor - 1) * first.norm(dim=1).mean().item()
    assert found.magnitude == pytest.approx(expected, rel=10 * EPS, abs=10 * EPS)
    assert 0 <= found.direction < EPS
    assert (found.rows, found.zero_rows) == (5, 0)


def test_an_opposite_weight_is_two_away() -> None:
    first = base()
    found = weight_change(-first, first)
    assert found.direction == pytest.approx(2.0, rel=10 * EPS)
    assert found.magnitude == 0.0


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.3, 2.0])
def test_a_turned_weight_keeps_its_norms(angle: float) -> None:
    # Rows in a plane, turned in it: each by the angle, whatever its direction.
    first = base(columns=2)
    turn = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    found = weight_change(first @ turn, first)
    expected = 2 * math.sin(angle / 2) ** 2  # 1 - cos, with digits at small angles
    # The rounding of an entry moves a row by EPS, and (d + EPS)² is d² (1 + 2 EPS / d).
    bound = 20 * EPS / angle
    assert found.direction == pytest.approx(expected, rel=bound)
    assert found.magnitude < 10 * EPS


def test_the_means_are_of_rows() -> None:
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    then = torch.tensor([[3.0, 4.0], [0.0, 4.0], [0.0, -1.0]])
    found = weight_change(then, first)
    assert found.magnitude == pytest.approx((0 + 3 + 1) / 3)
    assert found.direction == pytest.approx((0 + 1 + 2) / 3)


def test_rows_of_zeros_are_left_out_of_both_means() -> None:
    first = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    then = torch.tensor([[6.0, 8.0], [1.0, 1.0], [0.0, 0.0]])
    found = weight_change(then, first)
    assert (found.rows, found.zero_rows) == (1, 2)
    assert found.magnitude == pytest.approx(5.0)
    assert found.direction == pytest.approx(0.0, abs=EPS)
    nothing = weight_change(torch.zeros(2, 2), first[:2])
    assert (nothing.magnitude, nothing.direction, nothing.rows) == (0.0, 0.0, 0)


def test_what_is_not_finite_is_not_hidden() -> None:
    first = torch.ones(2, 2)
    found = weight_change(torch.tensor([[1.0, math.nan], [1.0, 1.0]]), first)
    assert math.isnan(found.magnitude)
    assert math.isnan(found.direction)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, then = base(7, 3), base(7, 3)
    whole = weight_change(then, first)
    monkeypatch.setattr(analysis, "CHUNK", 6)  # two rows at a time
    parts = weight_change(then, first)
    assert parts.magnitude == pytest.approx(whole.magnitude, rel=10 * EPS)
    assert parts.direction == pytest.approx(whole.direction, rel=10 * EPS)
    assert parts.rows == 7


@pytest.mark.parametrize("shape", [(5, 3), (4, 5), (20,)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot be compared with a base of shape"):
        weight_change(torch.ones(shape), base())


def test_the_weight_of_an_adapter_is_its_definition() -> None:
    first, a, b, m = base(), base(2, 4), base(5, 2), base(5, 1).squeeze(1)
    direction = first + 1.5 * b @ a
    plain = effective_weight(first, a, b, 1.5)
    assert torch.allclose(plain, direction, rtol=10 * EPS, atol=10 * EPS)
    scaled = effective_weight(first, a, b, 1.5, m)
    assert torch.allclose(scaled.norm(dim=1), m.abs(), rtol=10 * EPS)
    cosines = torch.cosine_similarity(scaled, direction)
    assert torch.allclose(cosines, m.sign(), rtol=10 * EPS)


def test_a_row_of_zeros_has_no_magnitude() -> None:
    a, b = torch.zeros(1, 2), torch.zeros(2, 1)
    first = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    found = effective_weight(first, a, b, magnitude=torch.tensor([1.0, 3.0]))
    assert found.tolist() == [[0.0, 0.0], [0.0, 3.0]]


def test_half_precision_is_computed_in_float32() -> None:
    first = base().to(torch.bfloat16)
    found = effective_weight(first, torch.ones(1, 4), torch.full((5, 1), 1e-4))
    assert found.dtype == torch.float32
    assert torch.all(found != first.float())  # 1e-4 is lost in bfloat16


def test_a_line_is_that_of_least_squares() -> None:
    order = np.random.default_rng(0)
    x = order.normal(size=30)
    y = -4.0 * x + order.normal(size=30)
    found = fit_line(x.tolist(), y.tolist())
    slope, intercept = np.polyfit(x, y, 1)
    assert found.slope == pytest.approx(slope, rel=1e-12)
    assert found.intercept == pytest.approx(intercept, rel=1e-12)
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    assert (found.points, found.reason) == (30, "")


@pytest.mark.parametrize(
    ("direction", "magnitude", "slope", "reason"),
    [
        ([], [], None, "0 point(s); a line needs two"),
        ([1.0], [2.0], None, "1 point(s); a line needs two"),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], None, "every point has the same ΔD"),
        ([1.0, 2.0], [0.1, 0.1], 0.0, "the same ΔM, so no correlation"),
    ],
)
def test_what_has_no_answer_says_why(
    direction: list[float], magnitude: list[float], slope: float | None, reason: str
) -> None:
    found = fit_line(direction, magnitude)
    assert found.slope == slope
    assert found.correlation is None
    assert reason in found.reason


def test_a_point_has_both() -> None:
    with pytest.raises(ValueError, match="2 values of ΔD and 1 of ΔM"):
        fit_line([1.0, 2.0], [1.0])
