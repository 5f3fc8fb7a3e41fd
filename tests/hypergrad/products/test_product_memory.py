"""Bytes that a product holds at once, in those of a gradient; counted, not timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import nn

from hypergrad import BilevelProblem
from hypergrad.batches import Accumulated, MicroBatch, as_micro_batches
from hypergrad.compare._measure import peak_bytes
from hypergrad.products import (
    DoubleBackward,
    FiniteDifference,
    ForwardOverReverse,
    Hints,
    Product,
    Tally,
    gradients,
)

DEPTH, WIDTH, ROWS = 24, 16, 512
CPU = [torch.device("cpu")]


def deep() -> tuple[BilevelProblem, torch.Tensor]:
    """A chain in which each layer saves one activation, and λ scales the input."""
    torch.manual_seed(0)
    layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    chain = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), *layers).double()
    problem = BilevelProblem.from_module(
        chain, lambda model, x: model(x).square().mean(), outer="0.weight"
    )
    return problem, torch.randn(ROWS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("product", "most"),
    [
        # Activations and their tangents, and a layer's own: 2. With the graph of the
        # backward pass, which torch.func.grad builds, it is above 4.
        pytest.param(ForwardOverReverse(), 2.5, id="forward-over-reverse"),
        # Activations, what the backward pass saves, and cotangents of both.
        pytest.param(DoubleBackward(), 4.0, id="exact"),
        # One gradient at a time.
        pytest.param(FiniteDifference(), 1.2, id="finite-difference"),
    ],
)
def test_a_product_holds_a_few_gradients_worth(product: Product, most: float) -> None:
    problem, x = deep()
    assert _held(problem, product, as_micro_batches(x)) < most * _held_by_gradient(
        problem, x
    )


def test_micro_batches_divide_what_the_exact_product_holds() -> None:
    problem, x = deep()
    whole = _held(problem, DoubleBackward(), as_micro_batches(x))
    quarters = as_micro_batches(Accumulated(list(x.chunk(4))))
    assert _held(problem, DoubleBackward(), quarters) < whole / 3  # w does not shrink


def _held(
    problem: BilevelProblem, product: Product, batches: Sequence[MicroBatch]
) -> int:
    torch.manual_seed(1)
    u = {n: torch.randn_like(p) for n, p in problem.inner_params.items()}

    def take() -> None:
        tally = Tally()
        bound = product.bind(problem, batches, tally, Hints(single_use=True))
        bound.vjp(u)
        tally.read()

    take()  # what is looked at once
    return peak_bytes(take, CPU) or 0


def _held_by_gradient(problem: BilevelProblem, x: torch.Tensor) -> int:
    take = partial(gradients, problem, "inner", as_micro_batches(x), Tally())
    take()
    return peak_bytes(take, CPU) or 0
