"""Gains and the low-rank pair against the dense formula, to the third derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from benchmarks._counting import counted
from bidora.dora import gain as _gain
from bidora.dora import norms as _norms
from bidora.dora.row_gain import _RowGain, row_gains

OUT, IN, RANK, SCALING = 5, 6, 2, 1.7
F64 = torch.float64


def draw(*shape: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=make, dtype=F64).requires_grad_()


def point() -> list[Tensor]:
    """A, B and the magnitude: the adapter is of the size of the weight."""
    return [draw(RANK, IN, seed=1), draw(OUT, RANK, seed=2), draw(OUT, seed=3)]


WEIGHT = 3 * draw(OUT, IN, seed=0).detach()


def gains(a: Tensor, b: Tensor, m: Tensor, weight: Tensor = WEIGHT) -> Tensor:
    base = _norms.BaseWeight.of(weight)
    return row_gains(base, a, b, m, SCALING, _norms.base_norms(base, F64))


def dense_gains(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    return m / (WEIGHT + SCALING * b @ a).norm(dim=1)


def pair(result: Tensor, low: Tensor, up: Tensor) -> Tensor:
    return _gain.add_pair(result, low, up, SCALING)


def factors() -> list[Tensor]:
    return [draw(2, 3, OUT, seed=4), draw(2, 3, RANK, seed=5), draw(OUT, RANK, seed=6)]


def along(derivative: Sequence[Tensor], seed: int) -> Tensor:
    parts = (d * draw(*d.shape, seed=seed + i) for i, d in enumerate(derivative))
    return torch.stack([part.sum() for part in parts]).sum()


def derivatives(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return value and first, second and third derivatives, the last two along v."""
    value = fn(*inputs)
    first = torch.autograd.grad(along([value], 10), inputs, create_graph=True)
    second = torch.autograd.grad(along(first, 20), inputs, create_graph=True)
    third = torch.autograd.grad(along(second, 30), inputs)
    return [value, *first, *second, *third]


def test_three_derivatives_are_those_of_the_dense_formula() -> None:
    found, expected = derivatives(gains, point()), derivatives(dense_gains, point())
    for got, want in zip(found, expected, strict=True):
        # The expansion's sums of length IN, cubed and more by the derivatives' quotients.
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_what_is_fixed_has_no_part(fixed: int) -> None:
    def without(fn: Callable[..., Tensor]) -> list[Tensor]:
        inputs = point()
        rest = [t for i, t in enumerate(inputs) if i != fixed]
        inputs[fixed] = inputs[fixed].detach()
        first = torch.autograd.grad(along([fn(*inputs)], 10), rest, create_graph=True)
        products = [
            torch.autograd.grad(along([d], 20), rest, retain_graph=True)
            for d in first[:1]
        ]
        return [*first, *products[0]]

    for got, want in zip(without(gains), without(dense_gains), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("fn", "make"), [(gains, point), (pair, factors)])
def test_in_both_modes_and_batched(fn: Any, make: Any) -> None:
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(fn, make(), check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(
        fn, make(), check_fwd_over_rev=True, check_batched_grad=True
    )


def test_the_pair_has_three_derivatives() -> None:
    def written_out(result: Tensor, low: Tensor, up: Tensor) -> Tensor:
        return result + SCALING * low @ up.T

    # Of a quadratic the third derivative is zero, and of its cube it is not.
    def cubed(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: fn(*inputs) ** 3

    found = derivatives(cubed(pair), factors())
    for got, want in zip(
        found, derivatives(cubed(written_out), factors()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_multiply_add_has_three_derivatives() -> None:
    def written_out(z: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return gain * (z - bias) + bias

    def inputs() -> list[Tensor]:
        return [draw(2, 3, OUT, seed=7), draw(OUT, seed=8), draw(OUT, seed=9)]

    found = derivatives(lambda *t: _gain.apply_gain(*t) ** 3, inputs())
    expected = derivatives(lambda *t: written_out(*t) ** 3, inputs())
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_products_with_several_vectors_are_vmapped() -> None:
    inputs = point()
    first = torch.autograd.grad(along([gains(*inputs)], 10), inputs, create_graph=True)
    directions = [draw(4, *t.shape, seed=20 + i).detach() for i, t in enumerate(inputs)]

    def product(*vectors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(first, inputs, vectors, retain_graph=True)

    together = vmap(product)(*directions)
    for i in range(4):
        for got, want in zip(
            together, product(*(d[i] for d in directions)), strict=True
        ):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


def test_rows_at_the_floor_stand_still() -> None:
    """Off the CPU the expansion of a cancelled row is set to its rounding error."""
    a, b, m = inputs = point()
    weight = WEIGHT.clone()
    weight[1] = -SCALING * (b @ a)[1].detach()
    rows = _norms.BaseWeight.of(weight)
    base = _norms.base_norms(rows, F64)
    floor = 1e-9 * base.squared

    def value(*tensors: Tensor) -> Tensor:
        return _RowGain.apply(
            *tensors, weight, base.squared, floor, None, rows, SCALING
        )[0]

    gain = value(*inputs)
    torch.testing.assert_close(gain[1], m[1] / floor[1].sqrt())
    first = torch.autograd.grad(gain[1], inputs, create_graph=True)
    second = torch.autograd.grad(along(first, 20), inputs)
    fixed = tuple(t.detach() for t in inputs)
    moved = cast(Any, jvp)(value, fixed, (fixed[0], fixed[1], 0 * fixed[2]))[1]
    for still in (*first[:2], *second, moved[1]):
        assert not still.any()
    torch.testing.assert_close(first[2][1], floor[1].rsqrt())


def test_operations() -> None:
    """Counted; autograd's own derivatives of the same take 25 and 81."""
    inputs, ones = point(), torch.ones(OUT, dtype=F64)
    directions = [t.detach() for t in inputs[:2]]
    with counted() as forward:
        value = gains(*inputs)
    with counted() as backward:
        first = torch.autograd.grad(value, inputs, ones, create_graph=True)
    with counted() as double:
        torch.autograd.grad(first[:2], inputs, directions)
    found = [counts.operations for counts in (forward, backward, double)]
    # Three of the first look for rows of zeros, of a frozen weight once.
    assert found == [26, 11, 30]
