"""The Gram regulariser against the materialised matrix."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from transformers.pytorch_utils import Conv1D

from bidora.dora import norms as _norms
from bidora.dora import orthogonality as _orthogonality
from bidora.dora import use_exact_dora
from bidora.dora.orthogonality import gram_penalty, orthogonality

OUT, IN, RANK, SCALING = 7, 10, 3, 1.7


def factors(out: int = OUT, in_: int = IN) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (out, in_), (RANK, in_), (out, RANK)
    w, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return w, a, b


def rows_normalised(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(w + SCALING * b @ a, dim=1)


def row_gram(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    v = rows_normalised(w, a, b)
    return (v @ v.T - torch.eye(v.shape[0], dtype=v.dtype)).square().sum()


def column_gram(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    v = rows_normalised(w, a, b)
    return (v.T @ v - torch.eye(v.shape[1], dtype=v.dtype)).square().sum()


@pytest.fixture(params=[1 << 22, 3 * IN], ids=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_norms, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("out", [1, OUT, 3 * IN])
def test_value_gradient_and_second_derivative(out: int) -> None:
    w, a, b = factors(out)
    a.requires_grad_()
    b.requires_grad_()
    c, d = torch.randn_like(a), torch.randn_like(b)
    found: list[tuple[Tensor, ...]] = []
    for value in (gram_penalty(w, a, b, SCALING), row_gram(w, a, b)):
        first = torch.autograd.grad(value, [a, b], create_graph=True)
        second = torch.autograd.grad(
            (first[0] * c).sum() + (first[1] * d).sum(), [a, b]
        )
        found.append((value, *first, *second))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13 * out)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("out", [1, OUT, 3 * IN])
@pytest.mark.parametrize("wanted", ["a", "b", "both"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_the_gradient_in_closed_form(
    out: int, wanted: str, create_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_orthogonality, "SQUARED_ELEMENTS", 2 * out)
    w, a, b = factors(out)
    own = [t.requires_grad_() for n, t in (("a", a), ("b", b)) if wanted in (n, "both")]
    got, expected = (
        torch.autograd.grad(value, own, create_graph=create_graph)
        for value in (3 * gram_penalty(w, a, b, SCALING), 3 * row_gram(w, a, b))
    )
    assert all(t.requires_grad == create_graph for t in got)
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12 * out)


def test_rows_that_cancel_are_computed_from_their_entries() -> None:
    w, a, b = factors()
    w[2] = -1.3 * SCALING * (b[2] @ a)  # three parts of thirteen stay of its norm
    a.requires_grad_()
    b.requires_grad_()
    got, expected = (
        (value, *torch.autograd.grad(value, [a, b]))
        for value in (gram_penalty(w, a, b, SCALING), row_gram(w, a, b))
    )
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)


def test_derivatives_in_both_modes() -> None:
    w, a, b = factors()

    def penalty(a: Tensor, b: Tensor) -> Tensor:
        return gram_penalty(w, a, b, SCALING)

    inputs = [a.requires_grad_(), b.requires_grad_()]
    assert torch.autograd.gradcheck(penalty, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(penalty, inputs, check_fwd_over_rev=True)
    many = torch.randn(4, *a.shape, dtype=a.dtype)
    a, b = a.detach(), b.detach()
    ours, plain = grad(lambda q: penalty(q, b)), grad(lambda q: row_gram(w, q, b))
    products = vmap(lambda t: jvp(ours, (a,), (t,))[1])(many)
    first = jvp(plain, (a,), (many[0],))[1]
    torch.testing.assert_close(products[0], first)


def test_a_trainable_base_weight_is_in_the_graph() -> None:
    w, a, b = factors()
    w.requires_grad_()
    got, expected = (
        torch.autograd.grad(value, w)[0]
        for value in (gram_penalty(w, a, b, SCALING), row_gram(w, a, b))
    )
    torch.testing.assert_close(got, expected)


def test_the_gram_of_the_columns_differs_by_a_constant() -> None:
    for _ in range(3):
        w, a, b = factors()
        difference = column_gram(w, a, b) - gram_penalty(w, a, b, SCALING)
        assert difference.item() == pytest.approx(IN - OUT, abs=1e-12)


def test_orthonormal_rows_cost_nothing() -> None:
    w = torch.linalg.qr(torch.randn(IN, OUT, dtype=torch.float64))[0].T
    a, b = torch.randn(RANK, IN).double(), torch.zeros(OUT, RANK).double()
    assert abs(gram_penalty(3 * w, a, b).item()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_that_of_the_number_of_rows(dtype: torch.dtype) -> None:
    w, a, b = factors(64, 200)
    w = (w / 14).to(dtype)
    a, b = a.float() / 14, b.float() / 3
    truth = row_gram(w.double(), a.double(), b.double())
    value = gram_penalty(w, a, b, SCALING)
    assert value.dtype == torch.float32
    assert abs(value.item() - truth.item()) < 1e-6 * 64


def test_gradient_in_float32() -> None:
    w, a, b = (t.float() for t in factors(64, 200))
    w, a, b = w / 14, (a / 14).requires_grad_(), (b / 3).requires_grad_()
    found = torch.autograd.grad(gram_penalty(w, a, b, SCALING), [a, b])
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    expected = torch.autograd.grad(row_gram(w.double(), *wide), wide)
    for got, truth in zip(found, expected, strict=True):
        # 10 eps; the large terms of the expansion are of the gradient's size here.
        assert float((got - truth).norm() / truth.norm()) < 1.2e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(IN, OUT), Conv1D(4, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def dora_net(**lora: Any) -> Any:
    config = LoraConfig(
        r=RANK,
        lora_alpha=SCALING * RANK,  # pyright: ignore[reportArgumentType]
        target_modules=["one", "two"],
        **{"use_dora": True, **lora},
    )
    model = get_peft_model(cast(Any, Net().double()), config).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def materialised(model: Any, adapter: str = "default") -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for layer in (model.base_model.model.one, model.base_model.model.two):
        w = layer.base_layer.weight
        w = w.T if layer.fan_in_fan_out else w
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        total = total + row_gram(w, a, b)
    return total


# A model of both kinds of layers; PEFT sets fan_in_fan_out for each, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("max_cache_bytes", [1 << 30, 0])
def test_the_sum_over_a_model(exact: bool, max_cache_bytes: int) -> None:
    model = dora_net()
    if exact:
        use_exact_dora(model)
    params = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    for _ in range(2):  # the second time from the cache
        value = orthogonality(model, max_cache_bytes=max_cache_bytes)
        truth = materialised(model)
        assert value.item() == pytest.approx(truth.item(), rel=1e-12)
        got, expected = (torch.autograd.grad(v, params) for v in (value, truth))
        torch.testing.assert_close(got, expected)


def test_the_cache_follows_the_base_weight() -> None:
    model = dora_net()
    orthogonality(model)
    weight = model.base_model.model.one.base_layer.weight
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight))
    assert orthogonality(model).item() == pytest.approx(materialised(model).item())
    weight.data = torch.randn_like(weight)
    assert orthogonality(model).item() == pytest.approx(materialised(model).item())
    twin = copy.deepcopy(model)
    twin.base_model.model.one.base_layer.weight.data.normal_()
    assert orthogonality(twin).item() == pytest.approx(materialised(twin).item())


def test_which_adapter() -> None:
    model = dora_net()
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.second" in name:
                p.normal_()
    first, second = (materialised(model, name).item() for name in ("default", "second"))
    assert orthogonality(model).item() == pytest.approx(first)
    assert orthogonality(model, adapter="second").item() == pytest.approx(second)
    model.set_adapter("second")
    assert orthogonality(model).item() == pytest.approx(second)
    model.base_model.set_adapter(["default", "second"])
    assert orthogonality(model).item() == pytest.approx(first + second)


def test_refusals() -> None:
    model = dora_net()
    with pytest.raises(ValueError, match="max_cache_bytes=-1"):
        orthogonality(model, max_cache_bytes=-1)
    with pytest.raises(ValueError, match="DoRA adapter 'other'"):
        orthogonality(model, adapter="other")
    with pytest.raises(ValueError, match="LoraConfig"):
        orthogonality(dora_net(use_dora=False))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        orthogonality(model)
