"""Several Hessian-vector products from one vmapped backward pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergrad import BilevelProblem, HypergradError, NonFiniteError
from hypergrad.batches import Accumulated, as_micro_batches
from hypergrad.products import (
    Product,
    Tally,
    exact,
    product_names,
    register_product,
    second_order,
)
from hypergrad.tree import Params
from tests.tolerances import error, tol


class Attention(nn.Module):
    """A small transformer block, by torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)[:, None]
        mixed = functional.scaled_dot_product_attention(q, q, x[:, None])
        return self.head(self.norm(mixed[:, 0])).mean(1)


def problem() -> BilevelProblem:
    torch.manual_seed(0)
    model = Attention().double()
    return BilevelProblem.from_module(
        model, lambda m, b: functional.cross_entropy(m(b[0]), b[1]), outer="norm.*"
    )


def batch(seed: int = 1) -> Any:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 4, generator=make, dtype=torch.float64)
    return x, torch.randint(0, 2, (3,), generator=make)


def directions(made: BilevelProblem, count: int) -> Params:
    make = torch.Generator().manual_seed(2)
    return {
        n: torch.randn(count, *p.shape, generator=make, dtype=torch.float64)
        for n, p in made.inner_params.items()
    }


@pytest.mark.parametrize("count", [1, 3, 2 * exact._VMAPPED + 1])
@pytest.mark.parametrize("name", product_names())
def test_they_equal_single_products(name: str, count: int) -> None:
    made = problem()
    several = directions(made, count)
    for batches in (
        as_micro_batches(batch()),
        Accumulated([batch(1), batch(3)], [0.25, 0.75]),
    ):
        tallies = Tally(), Tally()
        with second_order(name, made, batches, tallies[0]) as product:
            together = product.hvps(several)
        with second_order(name, made, batches, tallies[1]) as product:
            one_by_one = [
                product.hvp({n: t[i] for n, t in several.items()}) for i in range(count)
            ]
        truth = {n: torch.stack([row[n] for row in one_by_one]) for n in several}
        assert error(together, truth) <= tol(torch.float64)
        assert tallies[0].n_hvp == tallies[1].n_hvp
        if len(batches) == 1:
            assert tallies[0] == tallies[1]


def test_one_backward_pass_serves_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    made, passes = problem(), []
    real = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs.get("is_grads_batched", False))
        return real(*args, **kwargs)

    with second_order("exact", made, as_micro_batches(batch()), Tally()) as product:
        monkeypatch.setattr(torch.autograd, "grad", counted)
        product.hvps(directions(made, 2 * exact._VMAPPED))
    assert passes == [False, True, True]  # the graph, then eight at a time


class NoBatching(torch.autograd.Function):
    """A square whose second derivative torch.vmap does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return Doubled.apply(ctx.saved_tensors[0], grads[0])


class Doubled(torch.autograd.Function):
    """2xg, whose own backward reads a number, which vmap cannot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return 2 * x * g

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        if float(grads[0].abs().sum()) < 0:
            raise AssertionError
        return 2 * g * grads[0], 2 * x * grads[0]


def test_what_cannot_be_vmapped_is_taken_one_by_one() -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    lam = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        cubed: Any = NoBatching.apply(inner["w"])
        return (cubed * inner["w"]).sum() * outer["lam"]

    made = BilevelProblem(loss, loss, {"w": w}, {"lam": lam})
    tally = Tally()
    with second_order("exact", made, as_micro_batches(None), tally) as product:
        got = product.hvps({"w": torch.eye(3, dtype=torch.float64)})["w"]
    # w³ has the second derivative 6w.
    assert error(got, torch.diag(6 * w.detach())) <= tol(torch.float64)
    assert tally.n_hvp == 3


def test_a_loss_is_looked_at_where_its_products_cannot_be_vmapped() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    lam = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        # Infinite, though none of its derivatives is.
        cubed: Any = NoBatching.apply(inner["w"])
        return (cubed * inner["w"]).sum() * outer["lam"] + batch

    made = BilevelProblem(loss, loss, {"w": w}, {"lam": lam})
    eye = {"w": torch.eye(2, dtype=torch.float64)}
    tally = Tally()
    with second_order("exact", made, as_micro_batches(0.0), tally) as product:
        product.hvps(eye)
    assert (tally.n_forward, tally.n_backward, tally.n_hvp) == (1, 3, 2)
    with (
        pytest.raises(NonFiniteError, match="the inner loss is inf"),
        second_order("exact", made, as_micro_batches(math.inf), Tally()) as product,
    ):
        product.hvps(eye)


def test_errors_come_through() -> None:
    made = problem()
    several = directions(made, 3)
    several["head.bias"][1, 0] = float("nan")
    with (
        pytest.raises(NonFiniteError, match="direction of a second-derivative product"),
        second_order("exact", made, as_micro_batches(batch()), Tally()) as product,
    ):
        product.hvps(several)
    with second_order("exact", made, as_micro_batches(batch()), Tally()) as product:
        product.hvp({n: t[0] for n, t in directions(made, 1).items()})
        with torch.no_grad():
            made.inner_params["head.bias"].add_(1)
        with pytest.raises(HypergradError, match="moved after the graph"):
            product.hvps(directions(made, 2))


def test_registering_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypergrad import make_estimator
    from hypergrad.products import registry

    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))

    class Mine(exact.DoubleBackward):
        order = 1

    register_product("mine", Mine)
    assert "mine" in product_names()
    assert make_estimator("cg", product="mine").needs.order == 1
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_product("mine", Mine)
    with pytest.raises(ValueError, match="lower-case letters"):
        register_product("Mine", Mine)
    with pytest.raises(TypeError, match="subclass of hypergrad"):
        register_product("other", Tally)  # pyright: ignore[reportArgumentType]
    assert issubclass(Mine, Product)
