"""Exact DoRA: the same outputs as PEFT's, and the gradient of the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)
from transformers.pytorch_utils import Conv1D

from bidora.dora import (
    check_norms,
    direction_norms,
    exact_dora_layers,
    magnitudes,
    use_exact_dora,
)
from bidora.dora import norms as _norms

IN, HIDDEN, OUT, RANK = 6, 5, 3, 2
Params = dict[str, Tensor]


class MLP(nn.Module):
    """Two layers and a curved activation between them."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        if kind == "conv1d":
            self.fc1, self.fc2 = Conv1D(HIDDEN, IN), Conv1D(OUT, HIDDEN)
            nn.init.normal_(self.fc1.weight)
            nn.init.normal_(self.fc1.bias)
            nn.init.normal_(self.fc2.weight)
        else:
            bias = kind == "linear"
            self.fc1, self.fc2 = (
                nn.Linear(IN, HIDDEN, bias),
                nn.Linear(HIDDEN, OUT, bias),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def randomise(model: nn.Module) -> Any:
    """Move the adapters away from their start, where B = 0 and the gain is 1."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
        if "lora_magnitude" in name:
            p.data.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
    return model


def peft_mlp(
    kind: str = "linear", dtype: torch.dtype = torch.float64, **lora: Any
) -> Any:
    config = LoraConfig(
        r=RANK,
        lora_alpha=3,
        target_modules=["fc1", "fc2"],
        fan_in_fan_out=kind == "conv1d",
        **{"use_dora": True, **lora},
    )
    return randomise(get_peft_model(MLP(kind).to(dtype), config)).to(dtype)


def exact_copy(model: Any, **settings: Any) -> Any:
    twin = copy.deepcopy(model)
    use_exact_dora(twin, **settings)
    return twin


def trainable(model: nn.Module) -> Params:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch(dtype: torch.dtype = torch.float64, rows: int = 4) -> Tensor:
    return torch.randn(rows, IN, dtype=dtype)


def scalar(output: Tensor) -> Tensor:
    """A loss in which every entry has its own weight and curvature."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
    return (output * weights.view_as(output)).sum() + (output**2).mean()


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def along(f: Callable[[Any], Any], point: Any, direction: Any) -> Any:
    """The derivative of `f` at `point` along `direction`, in forward mode."""
    return cast(tuple[Any, Any], jvp(f, (point,), (direction,)))[1]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def loss_gradient(model: nn.Module, x: Tensor) -> Tensor:
    return flat(torch.autograd.grad(scalar(model(x)), list(trainable(model).values())))


def finite_difference(model: nn.Module, x: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of the loss in every trainable entry, by central differences."""
    entries: list[float] = []
    with torch.no_grad():
        for p in trainable(model).values():
            for i in range(p.numel()):
                view, old = p.view(-1), p.view(-1)[i].item()
                view[i] = old + step
                above = scalar(model(x)).item()
                view[i] = old - step
                below = scalar(model(x)).item()
                view[i] = old
                entries.append((above - below) / (2 * step))
    return torch.tensor(entries, dtype=torch.float64)


# --- outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_outputs_are_those_of_peft(kind: str, training: bool, rslora: bool) -> None:
    model = peft_mlp(kind, use_rslora=rslora).train(training)
    x = batch()
    assert relative(exact_copy(model)(x), model(x)) < 1e-14


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, IN), (2, 1, 3, IN)])
def test_any_number_of_batch_dimensions(shape: tuple[int, ...]) -> None:
    model, x = peft_mlp(), torch.randn(shape, dtype=torch.float64)
    expected = model(x).view(*shape[:-1], OUT)  # PEFT's is (1, OUT) for one sample
    torch.testing.assert_close(exact_copy(model)(x), expected, rtol=1e-13, atol=1e-14)


TINY: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (
        lambda: BertModel(
            BertConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=12,
                max_position_embeddings=8,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ),
        ["query", "value", "dense"],
    ),
    "gpt2": (
        lambda: GPT2Model(
            GPT2Config(
                vocab_size=20,
                n_embd=8,
                n_layer=2,
                n_head=2,
                n_positions=8,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        ["c_attn", "c_fc", "c_proj"],
    ),
    "llama": (
        lambda: LlamaModel(
            LlamaConfig(
                vocab_size=20,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=8,
            )
        ),
        ["q_proj", "v_proj", "down_proj"],
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_transformers_compute_what_they_computed(name: str) -> None:
    make, targets = TINY[name]
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=targets,
        use_dora=True,
        fan_in_fan_out=name == "gpt2",
    )
    model = randomise(get_peft_model(cast(Any, make()), config)).double()
    exact = copy.deepcopy(model)
    names = use_exact_dora(exact)
    assert len(names) == sum("lora_magnitude" in n for n, _ in model.named_parameters())
    ids = torch.randint(0, 20, (2, 5))
    expected = model(input_ids=ids).last_hidden_state
    assert relative(exact(input_ids=ids).last_hidden_state, expected) < 1e-13


def test_dropout_as_in_peft_draws_the_same_numbers() -> None:
    model = peft_mlp(lora_dropout=0.5).train()
    exact, x = exact_copy(model, dropout="peft"), batch()
    torch.manual_seed(3)
    expected, state = model(x), torch.get_rng_state()
    torch.manual_seed(3)
    assert relative(exact(x), expected) < 1e-14
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    use_exact_dora(exact, dropout="lora")
    assert relative(exact(x), expected) > 1e-2  # only A's input was dropped
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_on_the_adapter_alone() -> None:
    model = peft_mlp(lora_dropout=0.5)
    exact, x = exact_copy(model), batch()
    assert relative(exact.eval()(x), model.eval()(x)) < 1e-14

    layer = exact.train().base_model.model.fc1
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout["default"](x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w, s = layer.base_layer.weight, layer.scaling["default"]
    gain = layer.lora_magnitude_vector["default"].weight / (w + s * b @ a).norm(dim=1)
    expected = gain * (x @ w.T + s * dropped @ a.T @ b.T) + layer.base_layer.bias
    assert relative(got, expected) < 1e-14


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("second", ["dora", "lora"])
def test_two_active_adapters(second: str, dropout: float) -> None:
    model = peft_mlp(lora_dropout=dropout)
    config = LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=["fc1", "fc2"],
        use_dora=second == "dora",
        lora_dropout=dropout,
    )
    model.add_adapter("second", config)
    randomise(model).double()
    x = batch()
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        exact = exact_copy(model.train(), dropout="peft")
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert relative(exact(x), expected) < 1e-14
        assert relative(exact.eval()(x), model.eval()(x)) < 1e-14


# --- dtypes --------------------------------------------------------------------------


def bf16_mlp(**settings: Any) -> Any:
    model = peft_mlp(dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    return model


def test_bf16_base_with_float32_adapters() -> None:
    model, x = bf16_mlp(), batch(torch.bfloat16)
    got, expected = exact_copy(model)(x), model(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    truth = copy.deepcopy(model).double()(x.double())
    assert relative(got, truth) < 1e-2  # bfloat16 has a spacing of 8e-3
    assert relative(got, truth) < 2 * relative(expected, truth)


def test_bf16_throughout() -> None:
    model, x = peft_mlp(dtype=torch.bfloat16), batch(torch.bfloat16)
    exact = exact_copy(model)
    got = exact(x)
    assert got.dtype == torch.bfloat16
    assert relative(got, copy.deepcopy(model).double()(x.double())) < 2e-2
    scalar(got).backward()
    grads = [p.grad for p in trainable(exact).values()]
    assert all(g is not None and g.dtype == torch.bfloat16 for g in grads)


def test_autocast() -> None:
    model, x = peft_mlp(dtype=torch.float32), batch(torch.float32)
    exact = exact_copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = exact(x), model(x)
        norms = exact.base_model.model.fc1
    assert got.dtype == expected.dtype == torch.bfloat16
    assert relative(got, model(x)) < 2e-2
    # The norm is not computed in bfloat16: changing only A moves it smoothly.
    a = norms.lora_A["default"].weight
    b, w = norms.lora_B["default"].weight, norms.base_layer.weight
    plain = direction_norms(w, a, b, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(direction_norms(w, a, b, 1.5), plain)


def test_a_trainable_bias_gets_its_gradient() -> None:
    model = peft_mlp(bias="lora_only")
    exact, x = exact_copy(model, norm_grad="detached"), batch()
    assert any(name.endswith("base_layer.bias") for name in trainable(exact))
    assert relative(loss_gradient(exact, x), loss_gradient(model, x)) < 1e-13


# --- derivatives ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_the_gradient_is_that_of_the_loss(kind: str) -> None:
    model, x = peft_mlp(kind), batch()
    truth = finite_difference(model, x)
    assert relative(loss_gradient(exact_copy(model), x), truth) < 1e-9
    # PEFT's is not: it takes the norm, which depends on A and B, for a constant. This
    # is why the forward is replaced at all.
    assert relative(loss_gradient(model, x), truth) > 1e-2


def test_detached_is_the_surrogate_of_peft() -> None:
    model, x = peft_mlp(lora_dropout=0.3).train(), batch()
    exact = exact_copy(model, norm_grad="detached", dropout="peft")
    for training in (True, False):
        torch.manual_seed(3)
        expected = loss_gradient(model.train(training), x)
        torch.manual_seed(3)
        assert relative(loss_gradient(exact.train(training), x), expected) < 1e-13


def hessian(model: nn.Module, x: Tensor) -> Tensor:
    params = list(trainable(model).values())
    gradient = flat(torch.autograd.grad(scalar(model(x)), params, create_graph=True))
    rows = [
        flat(torch.autograd.grad(entry, params, retain_graph=True, allow_unused=False))
        for entry in gradient
    ]
    return torch.stack(rows)


def jacobian_of_gradient(model: nn.Module, x: Tensor, step: float = 1e-5) -> Tensor:
    """How the gradient changes with each entry, by central differences."""
    rows: list[Tensor] = []
    for p in trainable(model).values():
        for i in range(p.numel()):
            old = p.detach().view(-1)[i].item()
            sides: list[Tensor] = []
            for value in (old + step, old - step, old):
                with torch.no_grad():
                    p.view(-1)[i] = value
                sides.append(loss_gradient(model, x))
            rows.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(rows)


def test_the_hessian_is_symmetric_and_that_of_the_loss() -> None:
    model, x = peft_mlp(), batch()
    exact = hessian(exact_copy(model), x)
    assert relative(exact, exact.T) < 1e-14
    assert relative(jacobian_of_gradient(exact_copy(model), x), exact) < 1e-8
    # With the norm detached, double backward differentiates a function whose norms are
    # fixed numbers: symmetric, and not how PEFT's gradient changes, which is not.
    surrogate = jacobian_of_gradient(model, x)
    assert relative(surrogate, surrogate.T) > 1e-2
    assert relative(surrogate, hessian(model, x)) > 1e-2


def test_mixed_derivatives_agree_either_way_round() -> None:
    model = exact_copy(peft_mlp())
    outer = magnitudes(model)
    inner = {n: p for n, p in trainable(model).items() if n not in outer}
    assert inner
    assert outer
    sizes = [sum(p.numel() for p in group.values()) for group in (inner, outer)]
    v, u = (torch.randn(size, dtype=torch.float64) for size in sizes)
    loss = scalar(model(batch()))
    inner_grad = torch.autograd.grad(loss, list(inner.values()), create_graph=True)
    outer_grad = torch.autograd.grad(loss, list(outer.values()), create_graph=True)
    one = torch.autograd.grad(
        flat(inner_grad) @ v, list(outer.values()), retain_graph=True
    )
    other = torch.autograd.grad(flat(outer_grad) @ u, list(inner.values()))
    assert (flat(one) @ u).item() == pytest.approx((flat(other) @ v).item(), rel=1e-12)


def layer_function(model: Any, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The first layer's output as a function of A, B and magnitude."""
    layer = model.base_model.model.fc1
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def function(*tensors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    return function, values


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_first_and_second_derivatives_in_both_modes(kind: str) -> None:
    function, values = layer_function(exact_copy(peft_mlp(kind)), batch(rows=2))
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, values, check_fwd_over_rev=True)


def test_forward_over_reverse_equals_double_backward() -> None:
    model, x = exact_copy(peft_mlp()), batch()
    params = trainable(model)
    tangents = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(values: Params) -> Tensor:
        return scalar(functional_call(model, values, (x,)))

    primals = {n: p.detach() for n, p in params.items()}
    one = along(grad(loss), primals, tangents)
    gradient = torch.autograd.grad(
        scalar(model(x)), list(params.values()), create_graph=True
    )
    other = torch.autograd.grad(
        gradient, list(params.values()), grad_outputs=list(tangents.values())
    )
    assert relative(flat(one.values()), flat(other)) < 1e-13


def test_vmap_over_tangents_and_over_samples() -> None:
    model, x = exact_copy(peft_mlp()), batch()
    params = {n: p.detach() for n, p in trainable(model).items()}
    expected = hessian(model, x)

    def loss(values: Params, inputs: Tensor) -> Tensor:
        return scalar(functional_call(model, values, (inputs,)))

    sizes = [p.numel() for p in params.values()]

    def column(direction: Tensor) -> Tensor:
        parts = direction.split(sizes)
        tangent = {
            n: v.view_as(p) for (n, p), v in zip(params.items(), parts, strict=True)
        }
        product = along(lambda q: grad(loss)(q, x), params, tangent)
        return flat(product.values())

    columns = vmap(column)(torch.eye(sum(sizes), dtype=torch.float64))
    assert relative(columns, expected) < 1e-12

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x)
    first = grad(loss)(params, x[0])
    for name, value in first.items():
        torch.testing.assert_close(per_sample[name][0], value)


def test_vmap_over_parameters() -> None:
    """A batch of norms: whether one of them cancels has no single answer."""
    model, x = exact_copy(peft_mlp()), batch()
    params = {n: p.detach() for n, p in trainable(model).items()}
    twice = {n: torch.stack([p, 1.1 * p]) for n, p in params.items()}
    outputs = vmap(lambda q: functional_call(model, q, (x,)))(twice)
    second = functional_call(model, {n: 1.1 * p for n, p in params.items()}, (x,))
    assert relative(outputs[1], second) < 1e-13


def test_a_trainable_base_weight_is_in_the_graph() -> None:
    model, x = peft_mlp(), batch()
    exact = exact_copy(model)
    assert len(trainable(exact)) == 6
    for m in (model, exact):
        m.base_model.model.fc1.base_layer.weight.requires_grad_(True)
    assert len(trainable(exact)) == 7
    assert relative(loss_gradient(exact, x), finite_difference(model, x)) < 1e-9


def test_base_weights_given_to_functional_call_are_differentiated() -> None:
    exact, x = exact_copy(peft_mlp()), batch()
    exact(x)  # fills the caches with the model's own weights
    name = "base_model.model.fc1.base_layer.weight"
    weight = dict(exact.named_parameters())[name].detach()

    def loss(value: Tensor) -> Tensor:
        return scalar(functional_call(exact, {name: value}, (x,)))

    direction = torch.randn_like(weight)
    slope = (grad(loss)(weight) * direction).sum()
    tangent = along(loss, weight, direction)
    step = 1e-5
    difference = loss(weight + step * direction) - loss(weight - step * direction)
    assert slope.item() == pytest.approx(difference.item() / (2 * step), rel=1e-8)
    assert tangent.item() == pytest.approx(slope.item(), rel=1e-12)


def test_a_tangent_of_the_base_weight_is_not_lost() -> None:
    w, a, b = factors()
    w = w.bfloat16()
    v = torch.randn_like(w)
    with forward_ad.dual_level():
        norms = direction_norms(forward_ad.make_dual(w, v), a, b)
        tangent = forward_ad.unpack_dual(norms).tangent
    assert tangent is not None
    expected = along(lambda w: (w + b @ a).norm(dim=1), w.float(), v.float())
    assert relative(tangent, expected) < 1e-6


def test_activation_checkpointing_changes_nothing() -> None:
    exact, x = exact_copy(peft_mlp()), batch().requires_grad_()
    expected = loss_gradient(exact, x)
    fresh = copy.deepcopy(exact)  # its caches are filled by the checkpointed forward
    params = list(trainable(fresh).values())
    loss = scalar(cast(Tensor, checkpoint(fresh, x, use_reentrant=False)))
    assert torch.equal(flat(torch.autograd.grad(loss, params)), expected)


def test_inference_mode_leaves_nothing_unusable() -> None:
    exact, x = exact_copy(peft_mlp()), batch()
    fresh = copy.deepcopy(exact)
    with torch.inference_mode():
        fresh(x)
    assert torch.equal(loss_gradient(fresh, x), loss_gradient(exact, x))


def test_compiles_to_one_graph() -> None:
    exact, x = exact_copy(peft_mlp()), batch()
    compiled = torch.compile(exact, backend="eager", fullgraph=True)
    assert relative(compiled(x), exact(x)) < 1e-14
    torch._dynamo.reset()


def test_a_weight_moved_before_the_backward_pass_raises() -> None:
    exact = exact_copy(bf16_mlp())
    output = scalar(exact(batch(torch.bfloat16)))
    with torch.no_grad():
        exact.base_model.model.fc1.base_layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


# --- the norm ------------------------------------------------------------------------


def factors(out: int = 40, in_: int = 96, rank: int = 4) -> tuple[Tensor, ...]:
    w = torch.randn(out, in_) / math.sqrt(in_)
    return w, torch.randn(rank, in_) / math.sqrt(in_), torch.randn(out, rank) / 3


@pytest.fixture(params=[1 << 22, 7 * 96], ids=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_norms, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.bfloat16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)],
)
def test_norm_against_the_materialised_one(dtype: torch.dtype, limit: float) -> None:
    w, a, b = factors()
    w = w.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    truth = (w.double() + 1.7 * b.double() @ a.double()).norm(dim=1)
    norms = direction_norms(w, a, b, 1.7)
    assert norms.dtype == wide
    assert float(((norms - truth) / truth).abs().max()) < limit


@pytest.mark.usefixtures("blocks")
def test_norm_derivatives_on_a_bf16_base() -> None:
    """The frozen product keeps W in bfloat16; its derivatives are W's, exactly."""
    w, a, b = factors()
    w = w.bfloat16()
    a.requires_grad_()
    b.requires_grad_()
    c, d = torch.randn(40), torch.randn_like(a)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return (w.float() + 1.7 * b @ a).norm(dim=1)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return direction_norms(w, a, b, 1.7)

    def both(f: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(f(a, b) @ c, [a, b], create_graph=True)
        second = torch.autograd.grad((first[0] * d).sum(), [a, b])
        tangent = along(lambda a: f(a, b), a, d)
        mixed = along(grad(lambda a: f(a, b) @ c), a.detach(), d)
        many = vmap(lambda t: along(lambda a: f(a, b), a, t))(torch.stack([d, d * d]))
        return [*first, *second, tangent, mixed, many]

    for got, expected in zip(both(ours), both(plain), strict=True):
        assert relative(got, expected) < 2e-6


def test_difference_of_the_norm_agrees_with_autograd_on_a_bf16_base() -> None:
    w, a, b = factors()
    w, v = w.bfloat16(), torch.randn_like(a)
    v = v / v.norm()
    slope = along(lambda a: direction_norms(w, a, b, 1.7), a, v)
    radius = 4.9e-3 * float(a.norm())
    above = direction_norms(w, a + radius * v, b, 1.7)
    below = direction_norms(w, a - radius * v, b, 1.7)
    assert relative((above - below) / (2 * radius), slope) < 1e-3


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_rows_that_the_adapter_cancels(share: float) -> None:
    """Expanded, the squared norm is 5e-5 off at 0.9 and negative at 1."""
    w, a, _ = factors(out=6, rank=4)
    w[:4] = a + 0.01 * torch.randn_like(a)  # rows close to the adapter's
    b = torch.randn(6, 4) / 3
    b[:4] = -share * torch.eye(4)
    exact = (w.double() + b.double() @ a.double()).norm(dim=1)
    a.requires_grad_()
    norms = direction_norms(w, a, b)
    assert float(((norms.detach() - exact) / exact).abs().max()) < 3e-6
    (gradient,) = torch.autograd.grad(norms.sum(), a)
    wide = a.detach().double().requires_grad_()
    materialised = (w.double() + b.double() @ wide).norm(dim=1).sum()
    assert relative(gradient, torch.autograd.grad(materialised, wide)[0]) < 3e-6


def test_without_looking_the_norm_stays_finite_and_marked_rows_are_right() -> None:
    """What an accelerator does, where no forward pass waits for the device."""
    w, a, _ = factors(out=6, rank=4)
    w[:4] = a
    b = torch.zeros(6, 4)
    b[:4] = -torch.eye(4) * (1 - 1e-4)
    weight = _norms.BaseWeight.of(w)
    base = _norms.base_norms(weight, torch.float32)
    blind = base._replace(guard=torch.zeros(6))
    squared = _norms.squared_norms(weight, a, b, 1.0, blind)
    assert bool((squared > 0).all())
    assert bool(squared.rsqrt().isfinite().all())
    rows = _norms.cancelled_rows(squared, base, margin=2.0, wait=True)
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 3]
    squared = _norms.squared_norms(weight, a, b, 1.0, blind, rows)
    truth = (w.double() + b.double() @ a.double()).square().sum(1)
    assert float((squared / truth - 1).abs().max()) < 1e-3  # of entries 1e-4 of W's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_training_cancelled_is_found(dtype: torch.dtype) -> None:
    model = exact_copy(peft_mlp(dtype=dtype))
    check_norms(model)
    layer = model.base_model.model.fc1
    with torch.no_grad():
        layer.lora_A["default"].weight[0] = layer.base_layer.weight[2]
        layer.lora_B["default"].weight[2] = 0
        layer.lora_B["default"].weight[2, 0] = -1 / layer.scaling["default"]
    assert bool(model(batch(dtype)).isfinite().all())
    with pytest.raises(ValueError, match="row 2"):
        check_norms(model)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="norm nan"):
        check_norms(model)


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"dropout": "none"}, {"norm_grad": True}], ids=str
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    model = peft_mlp()
    with pytest.raises(ValueError, match=next(iter(settings))):
        use_exact_dora(model, **settings)
    assert not exact_dora_layers(model)


@pytest.mark.parametrize(
    "model", [MLP(), peft_mlp(use_dora=False)], ids=["bare", "lora"]
)
def test_a_model_without_dora_is_told_how_to_get_it(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"LoraConfig\(use_dora=True"):
        use_exact_dora(model)


def test_a_bias_in_b_is_refused() -> None:
    model = peft_mlp()  # PEFT refuses lora_bias with use_dora; made by hand here
    model.base_model.model.fc1.lora_B["default"].bias = nn.Parameter(
        torch.zeros(HIDDEN)
    )
    with pytest.raises(ValueError, match="fc1"):
        use_exact_dora(model)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = peft_mlp()
    model.base_model.model.fc1.base_layer.to("meta")
    with pytest.raises(ValueError, match=r"fc1 is on the meta device"):
        use_exact_dora(model)
    assert not exact_dora_layers(model)


def test_the_swap_draws_no_random_numbers_and_moves_no_weights() -> None:
    model = peft_mlp()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    use_exact_dora(model)
    check_norms(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(before) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# --- a quantised base ----------------------------------------------------------------


class EightBit(nn.Linear):
    """Stores integers and shows the interface by which PEFT knows HQQ's layers."""

    W_q: Tensor
    scale: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.bias = plain.bias
        scale = plain.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("W_q", (plain.weight / scale).round().to(torch.int8))

    def dequantize(self) -> Tensor:
        return self.W_q * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dequantize(), self.bias)


@pytest.mark.usefixtures("blocks")
def test_a_quantised_base() -> None:
    bare, dense = MLP().double(), MLP().double()
    layer = EightBit(cast(nn.Linear, bare.fc1))
    bare.fc1 = layer
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"], use_dora=True)
    quantised = randomise(get_peft_model(cast(Any, bare), config)).double()
    plain: Any = get_peft_model(cast(Any, dense), config).double()
    plain.load_state_dict(quantised.state_dict(), strict=False)
    plain.base_model.model.fc1.base_layer.weight.data = layer.dequantize().detach()
    use_exact_dora(quantised)
    use_exact_dora(plain)
    x = batch()
    assert relative(quantised(x), plain(x)) < 1e-13
    assert relative(loss_gradient(quantised, x), loss_gradient(plain, x)) < 1e-12
    assert relative(hessian(quantised, x), hessian(plain, x)) < 1e-12
