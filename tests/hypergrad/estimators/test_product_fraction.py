"""The mixed product on part of the inner batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import Accumulated, BilevelProblem, make_estimator
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.products import FiniteDifference
from hypergrad.rules import SGD
from hypergrad.tree import Params
from tests.tolerances import error, tol

F64 = torch.float64
LR = 0.1


class Losses:
    """A small network with an input scale as λ; notes the sizes of what it sees."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def inner(self, inner: Params, outer: Params, batch: Any) -> Tensor:
        self.sizes.append(len(batch["x"]))
        return self.value(inner["w"], outer["scale"], batch)

    def outer(self, inner: Params, outer: Params, batch: Any) -> Tensor:
        return self.value(inner["w"], outer["scale"], batch)

    @staticmethod
    def value(w: Tensor, scale: Tensor, batch: Any) -> Tensor:
        return (torch.tanh((batch["x"] * scale) @ w) - batch["y"]).square().mean()


def data(n: int, seed: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=make, dtype=F64)
    return {"x": x, "y": torch.randn(n, generator=make, dtype=F64)}


def problem(losses: Losses) -> BilevelProblem:
    w = torch.tensor([0.4, -0.3, 0.8], dtype=F64, requires_grad=True)
    scale = torch.tensor([1.0, 0.7, 1.3], dtype=F64, requires_grad=True)
    return BilevelProblem(losses.inner, losses.outer, {"w": w}, {"scale": scale})


def truth(part: Any, whole: Any, held: Any) -> Tensor:
    """Return -lr · ∂²g_part/∂λ∂w · v, v at the step on the whole batch, by torch.func."""
    w = torch.tensor([0.4, -0.3, 0.8], dtype=F64)
    scale = torch.tensor([1.0, 0.7, 1.3], dtype=F64)
    grad: Any = torch.func.grad(Losses.value)
    stepped = w - LR * grad(w, scale, whole)
    v = grad(stepped, scale, held)
    cross: Any = torch.func.jacrev(grad, argnums=1)(w, scale, part)
    return -LR * cross.T @ v


@pytest.mark.parametrize(
    "product", ["exact", "forward-over-reverse", "finite-difference"]
)
@pytest.mark.parametrize("name", ["darts", "sama"])
def test_it_is_the_product_of_the_first_examples(name: str, product: str) -> None:
    losses, whole, held = Losses(), data(8, 0), data(5, 1)
    rule: Any = {"inner_lr": LR} if name == "darts" else {"rule": SGD(LR)}
    estimator = make_estimator(name, product=product, product_fraction=0.25, **rule)
    result = estimator.estimate(problem(losses), inner_batch=whole, outer_batch=held)
    part = {key: value[:2] for key, value in whole.items()}
    exact = product != "finite-difference"
    bar = tol(F64, 10) if exact else tol(F64, 5, "difference")
    assert error(result.indirect["scale"], truth(part, whole, held)) <= bar
    # The virtual step on all eight, every evaluation of the product on two.
    assert losses.sizes[0] == 8
    assert set(losses.sizes[1:]) == {2}


def test_under_an_optimizer_nothing_is_kept_that_cannot_serve() -> None:
    losses = Losses()
    made = problem(losses)
    for product in ("exact", "finite-difference", FiniteDifference("forward")):
        estimator: Any = make_estimator("darts", product=product, product_fraction=0.5)
        assert not estimator.needs.byproduct
        assert not estimator.needs.graph
        opt = BilevelOptimizer(
            made,
            estimator=estimator,
            inner_optimizer=partial(torch.optim.SGD, lr=LR),
            outer_optimizer=partial(torch.optim.SGD, lr=LR),
            outer_warmup=0,
        )
        losses.sizes.clear()
        report = opt.step(data(8, 0), data(5, 1))
        assert report.outer_step
        assert opt.recorded_steps[0].graph is None
        assert opt.recorded_steps[0].outer_grads is None
        count = 1 if product == "exact" else 2  # the forward scheme has no by-product
        assert losses.sizes == [8] + [4] * count


def test_each_of_accumulated_batches_is_divided() -> None:
    losses, held = Losses(), data(5, 1)
    parts = [data(8, 0), data(4, 2)]
    estimator = make_estimator(
        "darts", product="exact", product_fraction=0.5, inner_lr=LR
    )
    losses.sizes.clear()
    estimator.estimate(
        problem(losses), inner_batch=Accumulated(parts), outer_batch=held
    )
    assert losses.sizes == [8, 4, 4, 2]


def test_a_batch_too_small_to_divide_changes_nothing() -> None:
    made = problem(Losses())
    before = [t.detach().clone() for t in made.tensors]
    estimator = make_estimator("darts", product_fraction=0.1, inner_lr=LR)
    with pytest.raises(ValueError, match=r"0\.1 of a batch of 4 examples is less than"):
        estimator.estimate(made, inner_batch=data(4, 0), outer_batch=data(4, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, made.tensors, strict=True))


@pytest.mark.parametrize("name", ["darts", "sama"])
def test_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match="product_fraction=0 must be in"):
        make_estimator(name, product_fraction=0)
