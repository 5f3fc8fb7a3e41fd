"""What a loss computes in, read from its graph, its weights and torch's settings."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import BilevelProblem, NumericalWarning, make_estimator, tree
from hypergrad.batches import as_micro_batches
from hypergrad.precision import FLOAT32, graph_unit, settings_unit, unit
from hypergrad.products import FiniteDifference, Tally, as_product
from hypergrad.rules import SGD
from tests.tolerances import error

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def functional(
    compute: torch.dtype, dtype: torch.dtype = F32, seed: int = 0
) -> BilevelProblem:
    """Float32 parameters through a frozen layer that only the loss knows of."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 6, generator=make)
    base = (torch.randn(6, 5, generator=make) / 2).to(BF16)
    y = torch.randn(12, generator=make)
    w = torch.randn(6, 2, generator=make) / 2, torch.randn(2, 5, generator=make) / 2

    def loss(inner: Any, outer: Any, batch: Any) -> Tensor:
        del batch
        low = (x.to(dtype) @ inner["a"] @ inner["b"]).to(compute)
        h = torch.tanh(x.to(compute) @ base.to(compute) + low) * outer["m"].to(compute)
        return (h.sum(1).to(dtype) - y.to(dtype)).square().mean()

    inner = {"a": leaf(w[0].to(dtype)), "b": leaf(w[1].to(dtype))}
    return BilevelProblem(loss, loss, inner, {"m": leaf(torch.ones(5, dtype=dtype))})


@pytest.mark.parametrize(
    ("dtype", "spacing"),
    [(F64, 2.0**-52), (F32, 2.0**-23), (BF16, 2.0**-7), (torch.float16, 2.0**-10)],
)
def test_unit(dtype: torch.dtype, spacing: float) -> None:
    assert unit(dtype) == spacing
    assert unit(torch.uint8) == 0.0


class WithARemark(torch.autograd.Function):
    """Twice x, and a result that is not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        twice, remark = 2 * x, x.detach() + 1
        ctx.mark_non_differentiable(remark)
        return twice, remark

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_what_is_not_differentiable_is_no_part_of_the_graph() -> None:
    x = torch.ones(3, dtype=F64, requires_grad=True)
    twice: Any = WithARemark.apply(x)
    assert graph_unit(twice[0].sum()) == unit(F64)


def test_a_graph_tells_the_coarsest_dtype_on_the_way() -> None:
    w = leaf(torch.ones(3))
    assert graph_unit((w * 2).sum()) == FLOAT32
    assert graph_unit((w.to(BF16) * 2).float().sum()) == unit(BF16)
    assert graph_unit((w.double() * 2).sum()) == FLOAT32  # w itself is the coarsest
    with torch.autocast("cpu", dtype=BF16):
        assert graph_unit(nn.Linear(3, 2)(w).float().sum()) == unit(BF16)


def test_frozen_weights_and_autocast_are_seen_without_a_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[1].to(BF16).requires_grad_(False)
    problem = BilevelProblem.from_module(
        model, lambda m, x: m[1](m[0](x).to(BF16)).float().sum(), outer="0.bias"
    )
    assert settings_unit(problem) == unit(BF16)
    model[1].float()
    assert settings_unit(problem) == FLOAT32
    with torch.autocast("cpu", dtype=BF16):
        assert settings_unit(problem) == unit(BF16)


def test_tensorfloat32_counts_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypergrad import precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision._product_unit("cuda", None) == 2.0**-10
        assert precision._product_unit("cpu", None) == 0.0
        torch.set_float32_matmul_precision("highest")
        assert precision._product_unit("cuda", None) == 0.0
        # Convolutions take it by default.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert precision._product_unit("cuda", nn.Conv1d(1, 1, 1)) == 2.0**-10
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["darts", "sama"])
@pytest.mark.parametrize("compute", [F32, BF16])
def test_auto_takes_the_product_that_the_precision_allows(
    name: str, compute: torch.dtype
) -> None:
    settings = {"inner_lr": 0.1} if name == "darts" else {"rule": SGD(0.1)}
    estimator = make_estimator(name, **settings)
    chosen: Any = estimator.resolve(functional(compute), None, SGD(0.1)).estimator
    assert chosen.product == ("finite-difference" if compute == F32 else "exact")
    assert chosen.needs.order == (1 if compute == F32 else 2)
    assert chosen.resolve(functional(compute), None, None).estimator is chosen
    found, true = (
        estimator.estimate(problem, inner_batch=None, outer_batch=None).indirect
        for problem in (functional(compute), functional(F64, F64))
    )
    assert error(found, true) < (2e-3 if compute == F32 else 0.05)


def test_auto_falls_back_on_differences_that_know_their_error() -> None:
    def loss(inner: Any, outer: Any, batch: Any) -> Tensor:
        q = (inner["w"] * outer["m"]).to(BF16).reshape(1, 1, 4, 2)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(q, q, q)[0].float().sin().sum()

    w = torch.linspace(-1, 1, 8)
    problem = BilevelProblem(loss, loss, {"w": leaf(w)}, {"m": leaf(torch.ones(()))})
    darts = make_estimator("darts", inner_lr=0.1)
    chosen: Any = darts.resolve(problem, None, None).estimator
    assert chosen.product == "finite-difference"
    product, why = as_product("auto").chosen(problem, as_micro_batches(None))
    assert product == FiniteDifference()
    assert "cannot be derived twice" in why
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        info = chosen.estimate(problem, inner_batch=None, outer_batch=None).info
    assert info.fd_radius == pytest.approx(unit(BF16) ** (1 / 3) / 2)
    assert info.fd_error is not None


@pytest.mark.parametrize("scheme", ["central", "forward", "richardson"])
def test_a_closure_in_bfloat16_is_found_out_at_the_first_product(scheme: Any) -> None:
    problem, double = functional(BF16), functional(F64, F64)
    make = torch.Generator().manual_seed(1)
    u = {
        n: torch.randn(t.shape, generator=make) for n, t in problem.inner_params.items()
    }
    tally = Tally()
    product: Any = FiniteDifference(scheme).bind(problem, as_micro_batches(None), tally)
    assert product.unit == FLOAT32  # nothing tells yet
    found = product.mixed_vjp(u)
    assert product.unit == unit(BF16)
    exact = as_product("exact").bind(double, as_micro_batches(None), Tally())
    true = exact.mixed_vjp(tree.map_params(Tensor.double, u))
    assert error(found, true) < 0.5  # 3 to 30 at the radius of float32
    assert "fd_error" in product.info
    assert tally.n_hvp == 1


def test_the_radius_that_is_asked_for_is_kept_and_judged() -> None:
    problem = functional(BF16)
    darts = make_estimator("darts", inner_lr=0.1, product=FiniteDifference(radius=1e-4))
    with pytest.warns(NumericalWarning, match="off by about .* Pass product='exact'"):
        info = darts.estimate(problem, inner_batch=None, outer_batch=None).info
    assert info.fd_radius == 1e-4
    assert info.fd_error is not None
    assert info.fd_error > 0.1
    quiet = FiniteDifference(radius=1e-4, error_estimate=False)
    darts = make_estimator("darts", inner_lr=0.1, product=quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        info = darts.estimate(functional(BF16), inner_batch=None, outer_batch=None).info
    assert info.fd_error is None
