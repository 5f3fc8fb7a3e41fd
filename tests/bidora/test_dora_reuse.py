"""Gains that are kept in eval: when they are, and when they are computed anew."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bidora import check_norms, use_exact_dora
from bidora.dora.forward import ExactDora
from bidora.dora.peft import _CACHE

IN, OUT = 5, 4


def make(**changes: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0", "1"])
    net = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 3))
    model: Any = get_peft_model(cast(Any, net), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    use_exact_dora(model, **changes)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, IN, dtype=torch.float64)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters whose gain was computed, in order."""
    calls: list[str] = []
    whole = ExactDora._new_gain

    def noted(self: ExactDora, layer: Any) -> Tensor:
        calls.append(layer.adapter)
        return whole(self, layer)

    monkeypatch.setattr(ExactDora, "_new_gain", noted)
    return calls


def output(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def fresh(model: Any, x: Tensor) -> Tensor:
    """What a copy gives, which has kept nothing."""
    return output(copy.deepcopy(model), x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm_grad", ["attached", "detached"])
def test_computed_once(
    norm_grad: Any, context: Any, x: Tensor, computed: list[str]
) -> None:
    model = make(norm_grad=norm_grad)
    with context():
        first = model(x)
        assert len(computed) == 2  # a layer each
        for _ in range(3):
            assert torch.equal(model(x), first)
    assert len(computed) == 2
    assert model(x).requires_grad  # what was kept has no part in a graph
    assert len(computed) == 4


def test_never_in_training_nor_with_gradients(
    model: Any, x: Tensor, computed: list[str]
) -> None:
    output(model.train(), x)
    output(model, x)
    model.eval()(x)
    model(x)
    assert len(computed) == 8


def test_never_under_a_transform(model: Any, x: Tensor) -> None:
    output(model, x)
    name = "base_model.model.0.lora_magnitude_vector.default.weight"
    m = dict(model.named_parameters())[name].detach()

    def value(m: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, {name: m}, (x,))

    _, moved = cast(Any, torch.func.jvp)(value, (m,), (m,))
    assert bool(moved.any())  # homogeneous in m, but for the biases
    many = torch.func.vmap(value)(torch.stack([m, 2 * m]))
    torch.testing.assert_close(many[0], output(model, x))
    torch.testing.assert_close(many[1], value(2 * m))


def parameter(model: Any, part: str) -> nn.Parameter:
    return next(p for n, p in model.named_parameters() if part in n)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "A in place": lambda model: parameter(model, "lora_A").mul_(2),
    "B in place": lambda model: parameter(model, "lora_B").mul_(2),
    "m in place": lambda model: parameter(model, "magnitude").mul_(2),
    "W in place": lambda model: parameter(model, "base_layer.weight").mul_(2),
    "another tensor": lambda model: setattr(
        parameter(model, "lora_B"), "data", 2 * parameter(model, "lora_B")
    ),
    "state dict": lambda model: model.load_state_dict(
        {n: 1.5 * p for n, p in model.state_dict().items()}
    ),
    "scaling": lambda model: model.base_model.model[0].set_scale("default", 3.0),
    "reset": lambda model: model.base_model.model[0].reset_lora_parameters(
        "default", True
    ),
    "merge and back": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "foreach": lambda model: cast(Any, torch)._foreach_mul_(
        [p for n, p in model.named_parameters() if "lora_" in n], 2.0
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str, model: Any, x: Tensor) -> None:
    before = output(model, x)
    with torch.no_grad():
        CHANGES[change](model)
    after = output(model, x)
    torch.testing.assert_close(after, fresh(model, x), rtol=1e-14, atol=0)
    assert torch.allclose(after, before) == (change == "merge and back")


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}], ids=str)
def test_an_optimizer_step_is_seen(
    settings: dict[str, Any], model: Any, x: Tensor
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=0.1, **settings)
    for _ in range(3):
        before = output(model, x)
        model.train()(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
        after = output(model.eval(), x)
        assert torch.equal(after, fresh(model, x))
        assert not torch.allclose(after, before)


def test_a_step_without_a_forward_pass_is_seen(model: Any, x: Tensor) -> None:
    output(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(trained, lr=0.1).step()
    assert torch.equal(output(model, x), fresh(model, x))


def test_another_dtype_is_seen(model: Any, x: Tensor) -> None:
    expected = output(model, x)
    single = output(model.float(), x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)
    back = output(model.double(), x)
    assert torch.equal(back, fresh(model, x))


def test_an_edit_through_data_is_seen_after_training_or_a_call(
    model: Any, x: Tensor
) -> None:
    """The one change that torch does not count."""
    before = output(model, x)
    parameter(model, "magnitude").data.mul_(2)
    assert torch.equal(output(model, x), before)  # not seen
    use_exact_dora(model)
    after = output(model, x)
    assert torch.equal(after, fresh(model, x))
    assert not torch.allclose(after, before)
    parameter(model, "magnitude").data.mul_(2)
    model.train()(x)
    assert torch.equal(output(model.eval(), x), fresh(model, x))
    parameter(model, "magnitude").data.mul_(2)
    check_norms(model)
    assert torch.equal(output(model, x), fresh(model, x))


def test_every_adapter_has_its_own(model: Any, x: Tensor, computed: list[str]) -> None:
    config = LoraConfig(r=3, use_dora=True, target_modules=["0", "1"])
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            if "lora_B.second" in name:
                p.normal_()
    use_exact_dora(model)
    outputs = {}
    for _ in range(3):
        for name in ("default", "second"):
            model.set_adapter(name)
            found = output(model.eval(), x)
            assert torch.equal(outputs.setdefault(name, found), found)
    assert sorted(computed) == ["default", "default", "second", "second"]
    assert not torch.allclose(outputs["default"], outputs["second"])


def test_one_gain_a_layer_is_kept_and_no_weight(model: Any, x: Tensor) -> None:
    def kept() -> list[str]:
        cache = model.base_model.model[0].__dict__[_CACHE]
        return sorted(cache._entries[1])

    output(model, x)
    names = kept()
    for _ in range(5):
        with torch.no_grad():
            parameter(model, "lora_B").mul_(1.1)
        output(model, x)
    assert kept() == names == ["gain-default", "norms-torch.float64", "rows-default"]
    _, gain = model.base_model.model[0].__dict__[_CACHE]._entries[1]["gain-default"]
    assert gain.shape == (OUT,)
    assert not gain.requires_grad
    old = weakref.ref(parameter(model, "base_layer.weight").data.untyped_storage())
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.clone()
    gc.collect()
    assert old() is None
    output(model, x)
    assert kept() == ["gain-default", "norms-torch.float64"]  # of the new weight
