"""Exact DoRA of Embedding and convolution layers, against PEFT's and its definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from bidora.dora import (
    check_norms,
    exact_dora_layers,
    magnitudes,
    plain_dora_layers,
    use_exact_dora,
)
from bidora.dora import peft as _peft
from bidora.dora.forward import squared_norms
from bidora.dora.orthogonality import gram_penalty, orthogonality

ENTRIES, WIDTH, RANK = 7, 4, 2
SCALE = 1.5
Kind = tuple[Callable[[], nn.Module], Callable[[torch.dtype], Tensor]]


class Scaled(nn.Embedding):
    """As Gemma's: the output is multiplied by a number."""

    def __init__(self) -> None:
        super().__init__(ENTRIES, WIDTH)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * cast(Tensor, self.embed_scale).to(
            self.weight.dtype
        )


def indices(_: torch.dtype) -> Tensor:
    return torch.randint(0, ENTRIES, (3, 4))


def image(channels: int, *sizes: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(3, channels, *sizes, dtype=dtype)


KINDS: dict[str, Kind] = {
    "embedding": (lambda: nn.Embedding(ENTRIES, WIDTH), indices),
    "padding": (lambda: nn.Embedding(ENTRIES, WIDTH, padding_idx=1), indices),
    "scaled": (Scaled, indices),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), image(3, 8)),
    "no bias": (lambda: nn.Conv1d(3, 5, 3, bias=False), image(3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding=1), image(3, 5, 4)),
    "1x1": (lambda: nn.Conv2d(3, 5, 1), image(3, 4, 4)),
    "same": (lambda: nn.Conv2d(3, 5, 3, padding="same"), image(3, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), image(2, 3, 4, 3)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), image(4, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), image(4, 5, 5)),
}
GROUPED = ("groups", "depthwise")


def plain(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    rank = 4 if kind in GROUPED else RANK
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        use_dora=True,
        target_modules=["0"],
        **changes,
    )
    model: Any = get_peft_model(cast(Any, nn.Sequential(KINDS[kind][0]())), config)
    return randomise(model).to(dtype)


def randomise(model: Any) -> Any:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                p.normal_(std=0.5)
            if "lora_magnitude" in name:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
    return model


def exact_copy(model: Any, **settings: Any) -> Any:
    twin = copy.deepcopy(model)
    assert use_exact_dora(twin, **settings)
    return twin


def batch(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return KINDS[kind][1](dtype)


def layer_of(model: Any) -> _peft.DoraAdapter:
    return _peft.DoraAdapter(model.base_model.model[0], "default")


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(y: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return (y * weights).sum() + y.square().mean()


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    return flat(torch.autograd.grad(loss_of(model(x)), trainable(model)))


def definition(model: Any, x: Tensor) -> Tensor:
    """Return the layer from its merged weight m (W + s·B·A) / ‖W + s·B·A‖."""
    layer = layer_of(model)
    base: Any = layer.module.get_base_layer()
    a, b, m = layer.lora_a, layer.lora_b, layer.magnitude.flatten()
    if layer.kind == "embedding":
        rows = base.weight.T + SCALE * b @ a
        table = (m[:, None] * rows / rows.norm(dim=1, keepdim=True)).T
        return F.embedding(x, table) * getattr(base, "embed_scale", 1.0)
    rows = base.weight + SCALE * (b @ a).view_as(base.weight)
    shape = (-1, *(1,) * (rows.dim() - 1))
    kernel = m.view(shape) * rows / rows.flatten(1).norm(dim=1).view(shape)
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[rows.dim()]
    return convolution(x, kernel, base.bias, base.stride, base.padding)


def difference(model: nn.Module, x: Tensor, step: float = 1e-5) -> Tensor:
    """The loss's gradient by central differences, along one direction each parameter."""
    found = []
    with torch.no_grad():
        for p in trainable(model):
            kept, direction = p.clone(), torch.sin(torch.arange(p.numel()) + 1.0)
            direction = direction.view_as(p).to(p.dtype)
            sides = []
            for sign in (1, -1):
                p.copy_(kept + sign * step * direction)
                sides.append(loss_of(model(x)))
            p.copy_(kept)
            found.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(found)


def slopes(model: nn.Module, x: Tensor) -> Tensor:
    parameters = trainable(model)
    grads = torch.autograd.grad(loss_of(model(x)), parameters)
    return torch.stack(
        [(g.flatten() * torch.sin(torch.arange(g.numel()) + 1.0)).sum() for g in grads]
    )


# --- value and derivatives ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_peft(kind: str) -> None:
    model, x = plain(kind), batch(kind)
    exact = exact_copy(model)
    assert relative(exact(x), model(x)) < 1e-14
    assert list(exact_dora_layers(exact)) == ["base_model.model.0"]
    assert not plain_dora_layers(exact)
    for name, p in model.state_dict().items():
        assert torch.equal(p, exact.state_dict()[name])


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in GROUPED])
def test_value_and_gradient_are_those_of_the_definition(kind: str) -> None:
    exact, x = exact_copy(plain(kind)), batch(kind)
    y = exact(x)
    assert relative(y, definition(exact, x)) < 1e-14
    expected = torch.autograd.grad(loss_of(definition(exact, x)), trainable(exact))
    assert relative(gradient(exact, x), flat(expected)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_loss(kind: str) -> None:
    model, x = plain(kind), batch(kind)
    exact = exact_copy(model)
    truth = difference(exact, x)
    # Central differences along any v: 50 · eps^(2/3).
    assert relative(slopes(exact, x), truth) < 2e-8
    assert relative(slopes(model, x), truth) > 1e-3  # PEFT's norm is a constant


@pytest.mark.parametrize("kind", KINDS)
def test_detached_is_the_surrogate_of_peft(kind: str) -> None:
    model, x = plain(kind), batch(kind)
    exact = exact_copy(model, norm_grad="detached")
    assert relative(gradient(exact, x), gradient(model, x)) < 1e-13


@pytest.mark.parametrize("kind", ["embedding", "scaled", "conv1d", "conv2d", "groups"])
def test_first_and_second_derivatives_in_both_modes(kind: str) -> None:
    exact, x = exact_copy(plain(kind)), batch(kind)[:1]
    module = exact.base_model.model[0]
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    values = [module.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def function(*tensors: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, values, check_forward_ad=True)
    # Along a direction, not entry by entry.
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_an_input_gradient_passes_through_a_convolution() -> None:
    exact, x = exact_copy(plain("conv2d")), batch("conv2d").requires_grad_()
    (found,) = torch.autograd.grad(loss_of(exact(x)), x)
    (expected,) = torch.autograd.grad(loss_of(definition(exact, x)), x)
    assert relative(found, expected) < 1e-13


def test_a_padding_entry_has_the_gradient_of_the_loss() -> None:
    """PEFT's lookup gives it none, though the output depends on it."""
    exact, x = exact_copy(plain("padding")), torch.ones(2, 3, dtype=torch.long)
    layer = layer_of(exact)
    (found,) = torch.autograd.grad(loss_of(exact(x)), layer.lora_a)
    (expected,) = torch.autograd.grad(loss_of(definition(exact, x)), layer.lora_a)
    assert bool(expected[:, 1].any())
    assert relative(found, expected) < 1e-13


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "groups"])
def test_dropout_as_in_peft_draws_the_same_numbers(kind: str) -> None:
    model, x = plain(kind, lora_dropout=0.5).train(), batch(kind)
    exact = exact_copy(model, dropout="peft")
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert relative(exact(x), expected) < 1e-14
    torch.manual_seed(3)
    alone = exact_copy(model)(x)
    assert relative(alone, expected) > 1e-2  # only A's input was dropped
    assert relative(exact.eval()(x), model.eval()(x)) < 1e-14


@pytest.mark.parametrize("kind", ["embedding", "conv2d", "groups"])
def test_a_bf16_base_with_float32_adapters(kind: str) -> None:
    model = plain(kind, torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    exact, x = exact_copy(model), batch(kind, torch.bfloat16)
    y = exact(x)
    assert y.dtype == torch.bfloat16
    wide = x.double() if x.is_floating_point() else x
    truth = exact_copy(copy.deepcopy(model).double())(wide)
    assert relative(y, truth) < 1.5e-2  # a spacing of 8e-3
    grads = torch.autograd.grad(loss_of(y.float()), trainable(exact))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_compiles_to_one_graph(kind: str) -> None:
    exact, x = exact_copy(plain(kind)), batch(kind)
    compiled = torch.compile(exact, backend="eager", fullgraph=True)
    assert relative(compiled(x), exact(x)) < 1e-14
    torch._dynamo.reset()


# --- what it costs --------------------------------------------------------------------


def test_an_embedding_never_builds_the_table_again() -> None:
    """Forward and backward make no tensor of the table's size but A's gradient's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    entries, width = 4000, 32

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not out._is_view():
                own = out.untyped_storage().nbytes() // out.itemsize
                known = {t.data_ptr() for t in args if isinstance(t, Tensor)}
                if out.data_ptr() not in known:
                    Sizes.largest = max(Sizes.largest, own)
            return out

    config = LoraConfig(r=RANK, use_dora=True, target_modules=["0"])
    net = nn.Sequential(nn.Embedding(entries, width))
    model = randomise(get_peft_model(cast(Any, net), config))
    use_exact_dora(model)
    x = torch.randint(0, entries, (2, 5))
    model(x)  # the table's own norms, once
    with Sizes():
        loss_of(model(x)).backward()
    assert 0 < Sizes.largest <= RANK * entries


# --- norms, the regulariser, zero rows ------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_peft_starts_from(kind: str) -> None:
    rank = 4 if kind in GROUPED else RANK
    config = LoraConfig(
        r=rank, use_dora=True, target_modules=["0"], init_lora_weights=False
    )
    net = nn.Sequential(KINDS[kind][0]())
    model: Any = get_peft_model(cast(Any, net), config)
    layer = layer_of(model)
    start = layer.magnitude.detach().flatten()
    torch.testing.assert_close(squared_norms(layer).detach().sqrt(), start)
    check_norms(model)


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_the_regulariser_is_that_of_the_rows(kind: str) -> None:
    exact = exact_copy(plain(kind))
    layer = layer_of(exact)
    weight = layer.weight.fetch()
    expected = gram_penalty(weight, layer.lora_a, layer.lora_b, SCALE)
    v = F.normalize(weight + SCALE * layer.lora_b @ layer.lora_a)
    dense = (v @ v.T - torch.eye(len(v))).square().sum()
    torch.testing.assert_close(orthogonality(exact), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", GROUPED)
def test_the_regulariser_refuses_groups(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model\.0 are convolutions in groups"):
        orthogonality(exact_copy(plain(kind)))


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "groups"])
def test_a_row_of_zeros(kind: str) -> None:
    model, x = plain(kind), batch(kind)
    layer = layer_of(model)
    with torch.no_grad():
        layer.weight.fetch()[2] = 0
        if kind == "groups":  # where the row takes a part of B's first row
            layer.lora_b.view(-1, 4)[1] = 0
        else:
            layer.lora_b[2] = 0
        layer.magnitude.flatten()[2] = 0
    with pytest.warns(UserWarning, match="rows of zeros: 1 in layer"):
        use_exact_dora(model)
    y = model(x)
    base = layer.module.get_base_layer()(x)
    assert torch.equal(y[..., 2], base[..., 2]) or torch.equal(y[:, 2], base[:, 2])
    grads = torch.autograd.grad(loss_of(y), trainable(model))
    assert all(bool(g.isfinite().all()) for g in grads)
    check_norms(model)


@pytest.mark.parametrize("kind", ["embedding", "conv1d"])
def test_a_row_that_training_cancelled_is_found(kind: str) -> None:
    exact = exact_copy(plain(kind))
    layer = layer_of(exact)
    with torch.no_grad():
        layer.lora_a[0] = layer.weight.fetch()[2]
        layer.lora_b[2] = torch.tensor([-1 / SCALE, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="first is row 2"):
        check_norms(exact)


# --- files, merging, several adapters -------------------------------------------------


@pytest.mark.parametrize("kind", ["embedding", "scaled", "conv1d", "conv2d", "groups"])
def test_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    model, x = plain(kind), batch(kind)
    exact = exact_copy(model)
    model.save_pretrained(tmp_path / "plain")
    exact.save_pretrained(tmp_path / "exact")
    name = "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / k / name) for k in ("exact", "plain"))
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in theirs.items()
    }
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    bare = nn.Sequential(KINDS[kind][0]()).double()
    bare[0].load_state_dict(model.base_model.model[0].base_layer.state_dict())
    loaded = PeftModel.from_pretrained(
        cast(Any, bare), tmp_path / "exact", is_trainable=True
    ).double()
    assert relative(loaded(x), exact(x)) < 1e-14  # PEFT's forward
    use_exact_dora(loaded)
    assert relative(gradient(loaded, x), gradient(exact, x)) < 1e-13


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "conv3d"])
def test_merge_and_unmerge(kind: str, safe: bool) -> None:
    exact, x = exact_copy(plain(kind)), batch(kind)
    expected = exact(x)
    exact.merge_adapter(safe_merge=safe)
    assert relative(exact(x), expected) < 1e-13
    exact.unmerge_adapter()
    assert relative(exact(x), expected) < 1e-13
    assert relative(exact.merge_and_unload()(x), expected) < 1e-13


@pytest.mark.parametrize("second", ["dora", "lora"])
@pytest.mark.parametrize("kind", ["embedding", "scaled", "conv1d", "conv2d"])
def test_two_active_adapters(kind: str, second: str) -> None:
    model, x = plain(kind), batch(kind)
    config = LoraConfig(
        r=3, lora_alpha=2, target_modules=["0"], use_dora=second == "dora"
    )
    model.add_adapter("second", config)
    randomise(model).double()
    for order in (["default", "second"], ["second", "default"], ["second"]):
        model.base_model.set_adapter(order)
        assert relative(exact_copy(model)(x), model(x)) < 1e-13


# --- what cannot be exact -------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(4, 3, max_norm=1.0), r"Embedding: its max_norm changes"),
        (lambda: nn.Conv1d(2, 2, 3, dilation=2), r"Conv1d: .* dilation of \(2,\)"),
        (
            lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"),
            r"Conv1d: PEFT's A pads with zeros, not reflect",
        ),
    ],
)
def test_refusals_name_the_layer_and_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    config = LoraConfig(r=2, use_dora=True, target_modules=["0"])
    model = get_peft_model(cast(Any, nn.Sequential(make())), config)
    with pytest.raises(ValueError, match=rf"base_model\.model\.0 \({reason}"):
        use_exact_dora(model)
    assert not exact_dora_layers(model)
    assert list(plain_dora_layers(model)) == ["base_model.model.0"]
    assert len(magnitudes(model)) == 1
