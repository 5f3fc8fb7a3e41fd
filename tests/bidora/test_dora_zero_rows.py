"""Rows of zeros in a base weight: the gain is 1 while the adapter leaves them zero."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import jvp, vmap

from bidora import BiDoRAOptimizer
from bidora.dora import check_norms, exact_dora_layers, use_exact_dora
from bidora.dora import norms as _norms
from bidora.dora.orthogonality import gram_penalty, orthogonality
from bidora.dora.row_gain import row_gains

IN, OUT, RANK, ROW = 6, 5, 2, 3  # ROW is the row of zeros
SCALE = 1.5
NOTE = "ignore:Base weights have rows of zeros"


def base() -> nn.Sequential:
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight[ROW] = 0
    return nn.Sequential(linear)


def plain(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    config = LoraConfig(
        r=RANK, lora_alpha=3, use_dora=True, target_modules=["0"], **changes
    )
    model = get_peft_model(cast(Any, base()), config).to(dtype)
    layer = cast(Any, model).base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.5)
        layer.lora_B["default"].weight[ROW] = 0
        layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    return model


def exact(model: Any, **settings: Any) -> Any:
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"1 in layer base_model\.model\.0\. Such"):
        use_exact_dora(twin, **settings)
    return twin


def parts(model: Any) -> dict[str, Tensor]:
    layer = model.base_model.model[0]
    return {
        "a": layer.lora_A["default"].weight,
        "b": layer.lora_B["default"].weight,
        "m": layer.lora_magnitude_vector["default"].weight,
        "w": layer.base_layer.weight,
        "bias": layer.base_layer.bias,
    }


def definition(x: Tensor, a: Tensor, b: Tensor, m: Tensor, w: Tensor, bias: Tensor):
    """The layer with each row written out, the row of zeros with the gain 1."""
    columns = []
    for i in range(OUT):
        v = w[i] + SCALE * b[i] @ a
        columns.append(x @ v if i == ROW else m[i] * (x @ v) / v.norm())
    return torch.stack(columns, -1) + bias


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, IN, dtype=dtype)


def weights_of(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


# --- value and gradient -----------------------------------------------------------------


def test_peft_starts_such_a_magnitude_at_zero_and_gives_nan() -> None:
    model, x = plain(), batch()
    assert parts(model)["m"][ROW] == 0
    nan = model(x).isnan()
    assert bool(nan[:, ROW].all())
    assert not nan[:, :ROW].any()
    merged = model.merge_and_unload()(x).isnan()
    assert bool(merged[:, ROW].all())
    assert not merged[:, :ROW].any()


@pytest.mark.parametrize("magnitude", [0.0, 0.7])
def test_value_and_gradient_are_those_of_a_gain_of_one(magnitude: float) -> None:
    model, x = plain(), batch()
    with torch.no_grad():
        parts(model)["m"][ROW] = magnitude
    model = exact(model)
    p = parts(model)
    y = model(x)
    assert torch.equal(y[:, ROW], p["bias"][ROW].expand(4))
    torch.testing.assert_close(y, definition(x, **p), rtol=1e-13, atol=1e-13)

    inputs = [p["a"], p["b"], p["m"]]
    up = weights_of(y)
    found = torch.autograd.grad((y * up).sum(), inputs)
    wanted = torch.autograd.grad(
        (definition(x, **p) * up).sum(), inputs, allow_unused=True
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    # By hand: LoRA's gradient in B, none in the magnitude; the row's part in A is B's
    # row, which is zero.
    lora = SCALE * up[:, ROW] @ (x @ p["a"].T)
    torch.testing.assert_close(found[1][ROW], lora, rtol=1e-13, atol=1e-13)
    assert bool(lora.any())
    assert found[2][ROW] == 0
    others = (model(x) * up)[:, [i for i in range(OUT) if i != ROW]].sum()
    torch.testing.assert_close(torch.autograd.grad(others, p["a"])[0], found[0])


def test_detached_has_the_same_row() -> None:
    model, x = exact(plain(), norm_grad="detached"), batch()
    p = parts(model)
    y = model(x)
    torch.testing.assert_close(y, definition(x, **p), rtol=1e-13, atol=1e-13)
    b, m = torch.autograd.grad((y * weights_of(y)).sum(), [p["b"], p["m"]])
    assert bool(b.isfinite().all())
    assert bool(b[ROW].any())
    assert m[ROW] == 0


WEIGHT = torch.randn(OUT, IN, dtype=torch.float64)
WEIGHT[ROW] = 0


def gain(a: Tensor, others: Tensor, m: Tensor) -> Tensor:
    """The gains as a function of what leaves the row zero: B's other rows."""
    b = torch.cat([others[:ROW], torch.zeros_like(others[:1]), others[ROW:]])
    weight = _norms.BaseWeight.of(WEIGHT)
    return row_gains(weight, a, b, m, SCALE, _norms.base_norms(weight, torch.float64))


def point() -> list[Tensor]:
    shapes = [(RANK, IN), (OUT - 1, RANK), (OUT,)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_derivatives_of_any_order_and_mode() -> None:
    assert gain(*point())[ROW] == 1
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(gain, point(), check_forward_ad=True, **batched)
    assert torch.autograd.gradgradcheck(gain, point(), check_fwd_over_rev=True)


def test_third_derivatives_are_finite_and_those_of_the_other_rows() -> None:
    def third(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        value = fn(*inputs)
        for _ in range(2):
            made = torch.autograd.grad(
                (value * weights_of(value)).sum(), inputs, create_graph=True
            )
            value = torch.cat([g.reshape(-1) for g in made]) ** 2
        return list(torch.autograd.grad(value.sum(), inputs))

    def written_out(a: Tensor, others: Tensor, m: Tensor) -> Tensor:
        b = torch.cat([others[:ROW], torch.zeros_like(others[:1]), others[ROW:]])
        rows = WEIGHT + SCALE * b @ a
        kept = torch.arange(OUT) != ROW
        safe = torch.where(kept[:, None], rows, 1.0)
        return torch.where(kept, m / safe.norm(dim=1), 1.0)

    inputs = point()
    for got, want in zip(third(gain, inputs), third(written_out, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_batches_of_parameters_and_a_trainable_weight() -> None:
    inputs = [t.detach() for t in point()]
    many = vmap(gain)(*(torch.stack([t, 2 * t]) for t in inputs))
    torch.testing.assert_close(many[1], gain(*(2 * t for t in inputs)))
    assert many[0, ROW] == many[1, ROW] == 1
    model, x = exact(plain()), batch()
    expected = model(x)
    weight = parts(model)["w"].requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    (slope,) = torch.autograd.grad((y * weights_of(y)).sum(), weight)
    assert bool(slope.isfinite().all())


def test_off_the_cpu_and_compiled_the_row_is_found_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An accelerator looks at no value: the same numbers from where it clamps them."""
    a, others, m = point()
    expected = gain(a, others, m)
    monkeypatch.setattr(_norms, "cancels", lambda *_: None)  # to `squared_norms`
    torch.testing.assert_close(gain(a, others, m), expected, rtol=1e-13, atol=0)
    model, x = exact(plain()), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-13, atol=1e-13)
    torch._dynamo.reset()


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_a_bf16_base(adapters: torch.dtype) -> None:
    model = plain(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapters)
    model, x = exact(model), batch(torch.bfloat16)
    y = model(x)
    p = parts(model)
    assert torch.equal(y[:, ROW], p["bias"][ROW].expand(4))
    found = torch.autograd.grad(y.sum(), [p["a"], p["b"], p["m"]])
    assert all(bool(g.isfinite().all()) for g in found)
    assert found[2][ROW] == 0
    lora = SCALE * (x.double() @ p["a"].detach().double().T).sum(0)
    assert float((found[1][ROW] - lora).norm() / lora.norm()) < 2e-2  # spacing 8e-3


# --- once the adapter has moved the row --------------------------------------------------


@pytest.mark.parametrize("magnitude", [0.0, 0.7])
def test_a_row_that_has_moved_is_one_like_all_others(magnitude: float) -> None:
    model, x = plain(), batch()
    with torch.no_grad():
        parts(model)["b"][ROW] = torch.tensor([1e-3, -2e-3])
        parts(model)["m"][ROW] = magnitude
    twin = exact(model)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-13)
    v = SCALE * parts(model)["b"][ROW] @ parts(model)["a"]
    expected = magnitude * (x @ v) / v.norm() + parts(model)["bias"][ROW]
    torch.testing.assert_close(twin(x)[:, ROW], expected, rtol=1e-12, atol=1e-13)


def test_training_takes_the_row_in_and_files_stay_finite(tmp_path: Path) -> None:
    model: Any = get_peft_model(
        cast(Any, base()),
        LoraConfig(r=RANK, use_dora=True, target_modules=["0"]),
    )
    target = torch.randn(4, OUT)
    x = batch(torch.float32)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - target).square().mean()

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        opt = BiDoRAOptimizer(
            model, "darts", loss_fn=loss, outer_every=1, outer_warmup=1, inner_lr=1e-2
        )
        first = loss(model, x).item()
        for _ in range(8):
            opt.step(x, x)
    assert sum("rows of zeros" in str(n.message) for n in notes) == 1
    assert loss(model, x).item() < first
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(bool(t.isfinite().all()) for t in saved.values())
    magnitude = next(t for n, t in saved.items() if "magnitude" in n)
    assert magnitude[ROW] != 0
    assert bool(next(t for n, t in saved.items() if "lora_B" in n)[ROW].any())
    fresh = base()
    fresh.load_state_dict(
        {
            n: p
            for n, p in copy.deepcopy(model).unload().state_dict().items()
            if "lora" not in n
        }
    )
    loaded = PeftModel.from_pretrained(cast(Any, fresh), tmp_path)  # PEFT's forward
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_untrained_row_is_nan_in_peft_and_is_not_here(tmp_path: Path) -> None:
    model = exact(plain())
    model.save_pretrained(tmp_path)
    fresh = cast(Any, base().double())
    fresh.load_state_dict(copy.deepcopy(model).unload().state_dict())
    loaded = PeftModel.from_pretrained(fresh, tmp_path).double()
    x = batch()
    assert bool(loaded(x)[:, ROW].isnan().all())
    assert torch.equal(exact(loaded)(x), model(x))


# --- notes, norms and merging -------------------------------------------------------------


def test_the_note_names_layers_and_rows_once() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    with torch.no_grad():
        for linear in net:
            cast(Any, linear).weight[1:3] = 0
    model = get_peft_model(
        cast(Any, net),
        LoraConfig(r=2, use_dora=True, target_modules=[str(i) for i in range(10)]),
    )
    with pytest.warns(UserWarning, match="rows of zeros") as notes:
        use_exact_dora(model)
    (text,) = [str(n.message) for n in notes]
    assert "2 in layer base_model.model.0, 2 in layer base_model.model.1, " in text
    assert "base_model.model.7 and in 2 more. " in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_norms(model)
        model(torch.randn(2, 4))
    assert len(exact_dora_layers(model)) == 10


def test_no_note_without_such_rows() -> None:
    model = get_peft_model(
        cast(Any, nn.Sequential(nn.Linear(4, 4))),
        LoraConfig(r=2, use_dora=True, target_modules=["0"]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_exact_dora(model)


def test_the_orthogonality_term_leaves_the_row_out() -> None:
    model = exact(plain())
    p = parts(model)
    kept = [i for i in range(OUT) if i != ROW]
    expected = gram_penalty(p["w"][kept], p["a"], p["b"][kept], SCALE)
    found = orthogonality(model)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    a, b = torch.autograd.grad(found, [p["a"], p["b"]])
    want_a, want_b = torch.autograd.grad(expected, [p["a"], p["b"]])
    torch.testing.assert_close(a, want_a, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(b, want_b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_leaves_the_row_as_it_is(safe: bool) -> None:
    model, x = exact(plain()), batch()
    expected, before = model(x), parts(model)["w"].clone()
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    model.unmerge_adapter()
    torch.testing.assert_close(parts(model)["w"], before, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-13)


def test_a_direction_through_the_row_in_forward_mode() -> None:
    fixed = tuple(t.detach() for t in point())
    _, moved = cast(Any, jvp)(gain, fixed, tuple(torch.ones_like(t) for t in fixed))
    assert moved[ROW] == 0
    assert bool(moved.isfinite().all())
