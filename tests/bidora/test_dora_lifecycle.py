"""What PEFT's users do with a model goes on working when its DoRA is exact."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from bidora.dora import (
    exact_dora_layers,
    magnitudes,
    plain_dora_layers,
    use_exact_dora,
    use_peft_dora,
)
from bidora.dora import norms as _norms
from bidora.dora import peft as _peft
from bidora.dora.exact import ExactDora
from bidora.dora.orthogonality import _Gram, orthogonality

IN, HIDDEN, OUT = 6, 5, 3
LAYERS = ("base_model.model.fc1", "base_model.model.fc2")

# The model has a Linear and a Conv1D; PEFT sets fan_in_fan_out for each, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(IN, HIDDEN), Conv1D(OUT, HIDDEN)
        nn.init.normal_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def config(**changes: Any) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 3, "use_dora": True, **changes}
    return LoraConfig(target_modules=["fc1", "fc2"], **settings)


def randomise(model: nn.Module) -> Any:
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
        if "lora_magnitude" in name:
            p.data.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
    return model


@pytest.fixture
def plain() -> Any:
    return randomise(get_peft_model(cast(Any, MLP()), config())).double()


@pytest.fixture
def exact(plain: Any) -> Any:
    twin = copy.deepcopy(plain)
    use_exact_dora(twin)
    return twin


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, IN, dtype=torch.float64)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x).square().sum(), params)
    return torch.cat([g.reshape(-1) for g in found])


def close(a: Tensor, b: Tensor, limit: float = 1e-12) -> None:
    assert float((a - b).detach().norm() / b.detach().norm()) < limit


def compute_of(model: nn.Module) -> set[Any]:
    """The settings in force, over all layers and adapters."""
    variants = (
        layer.module.lora_variant[layer.adapter]
        for _, layer in _peft.dora_layers(model)
    )
    return {getattr(variant, "compute", None) for variant in variants}


# --- the swap itself -----------------------------------------------------------------


def test_names_and_reports(plain: Any) -> None:
    assert plain_dora_layers(plain) == dict.fromkeys(LAYERS, ("default",))
    assert exact_dora_layers(plain) == {}
    assert use_exact_dora(plain) == LAYERS
    assert exact_dora_layers(plain) == dict.fromkeys(LAYERS, ("default",))
    assert plain_dora_layers(plain) == {}
    modules = dict(plain.named_modules())
    assert all(isinstance(modules[name], _peft.LoraLayer) for name in LAYERS)


def test_a_second_call_changes_the_settings(plain: Any, x: Tensor) -> None:
    use_exact_dora(plain)
    expected = gradient(plain, x)
    assert use_exact_dora(plain) == LAYERS
    assert torch.equal(gradient(plain, x), expected)
    use_exact_dora(plain, norm_grad="detached", dropout="peft")
    assert compute_of(plain) == {ExactDora("peft", "detached")}
    assert not torch.allclose(gradient(plain, x), expected)


def test_reversible_to_the_bit(plain: Any, exact: Any, x: Tensor) -> None:
    assert use_peft_dora(exact) == LAYERS
    assert use_peft_dora(exact) == ()
    assert exact_dora_layers(exact) == {}
    assert torch.equal(exact(x), plain(x))
    assert torch.equal(gradient(exact, x), gradient(plain, x))
    assert b"bidora.dora.peft" not in pickle.dumps(exact)


def test_magnitudes(exact: Any) -> None:
    found = magnitudes(exact)
    named = dict(exact.named_parameters())
    assert set(found) == {f"{n}.lora_magnitude_vector.default.weight" for n in LAYERS}
    assert all(named[name] is p for name, p in found.items())
    exact.requires_grad_(False)
    assert list(magnitudes(exact)) == list(found)
    assert magnitudes(exact, "other") == {}
    assert magnitudes(nn.Linear(2, 2)) == {}
    exact.add_adapter("other", config())
    assert len(magnitudes(exact)) == 4
    assert set(magnitudes(exact, "default")) == set(found)


@pytest.mark.parametrize("version", ["0.20.3", "0.22.0", "0.22.0.dev0", "1.21"])
def test_other_versions_of_peft_are_refused(
    version: str, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_peft.peft, "__version__", version)
    with pytest.raises(ImportError, match=rf">=0\.21,<0\.22.*{version}"):
        use_exact_dora(plain)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.9.dev0"])
def test_tested_versions_of_peft(version: str) -> None:
    _peft.check_peft_version(version)


# --- copies and files ----------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_the_settings(
    duplicate: Callable[[Any], Any], exact: Any, x: Tensor
) -> None:
    use_exact_dora(exact, norm_grad="detached", dropout="peft")
    expected = gradient(exact, x)
    twin = duplicate(exact)
    assert compute_of(twin) == {ExactDora("peft", "detached")}
    assert torch.equal(gradient(twin, x), expected)
    # The copy has its own caches: a change of its base weight does not touch the model.
    twin.base_model.model.fc1.base_layer.weight.data.mul_(2)
    gradient(twin, x)
    assert torch.equal(gradient(exact, x), expected)


def test_pickles_carry_no_cache(exact: Any, x: Tensor) -> None:
    use_exact_dora(exact)
    exact(x)
    cached = exact.base_model.model.fc1.__dict__[_peft._CACHE]
    assert pickle.loads(pickle.dumps(cached)) == {}


@pytest.mark.parametrize("first_exact", [True, False])
def test_files_are_those_of_peft(
    first_exact: bool, plain: Any, exact: Any, x: Tensor, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path / "plain")
    exact.save_pretrained(tmp_path / "exact")
    name = "adapter_model.safetensors"
    contents = [load_file(tmp_path / kind / name) for kind in ("plain", "exact")]
    assert list(contents[0]) == list(contents[1])
    for key, tensor in contents[0].items():
        assert torch.equal(tensor, contents[1][key])
    weights = [(tmp_path / kind / name).read_bytes() for kind in ("plain", "exact")]
    assert weights[0] == weights[1]
    configs = []
    for kind in ("plain", "exact"):
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        # PEFT keeps these in a set, whose order depends on the process's hash seed.
        config["target_modules"] = sorted(config["target_modules"])
        configs.append(config)
    assert configs[0] == configs[1]

    base = cast(Any, MLP().double())
    base.load_state_dict(copy.deepcopy(plain).unload().state_dict())
    folder = tmp_path / ("exact" if first_exact else "plain")
    loaded = PeftModel.from_pretrained(base, folder, is_trainable=True).double()
    close(loaded(x), plain(x))
    use_exact_dora(loaded)
    close(loaded(x), plain(x))
    close(gradient(loaded, x), gradient(exact, x))


def test_state_dicts_are_those_of_peft(plain: Any, exact: Any, x: Tensor) -> None:
    assert list(plain.state_dict()) == list(exact.state_dict())
    other = randomise(copy.deepcopy(plain))
    with torch.no_grad():
        other.base_model.model.fc1.base_layer.weight.normal_()
    exact(x)
    assert not exact.load_state_dict(other.state_dict()).missing_keys
    close(exact(x), other(x))  # a new base weight, whose norms were not in the cache
    other.load_state_dict(exact.state_dict())


# --- the cache of the base weight's norms --------------------------------------------


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "another tensor": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "a transposed view": lambda weight: setattr(weight, "data", weight.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_new_base_weight_has_new_norms(
    change: str, plain: Any, exact: Any, x: Tensor
) -> None:
    exact(x)
    with torch.no_grad():
        CHANGES[change](exact.base_model.model.fc1.base_layer.weight)
    plain.load_state_dict(exact.state_dict())
    close(exact(x), plain(x))


def test_a_reused_address_is_not_taken_for_the_old_weight(
    exact: Any, x: Tensor
) -> None:
    """As in merge and unmerge: the version stays, and the address comes back."""
    weight = exact.base_model.model.fc1.base_layer.weight
    memory = np.random.default_rng(0).normal(size=weight.shape)
    keys: list[tuple[int, int]] = []
    for factor in (1, 3):
        memory *= factor
        weight.data = torch.from_numpy(memory)
        keys.append((weight.data_ptr(), weight._version))
        assert torch.equal(exact(x), copy.deepcopy(exact)(x))
    assert keys[0] == keys[1]


def test_what_depends_on_the_base_weight_is_computed_once(
    exact: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module, name in ((_norms, "base_norms"), (_Gram, "blocks")):
        whole = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=whole, n=name: calls.append(n) or f(*a)
        )
    use_exact_dora(exact)
    for _ in range(3):
        exact(x)
        orthogonality(exact)
    assert calls.count("base_norms") == 2  # one a layer
    assert calls.count("blocks") == 2 + 3 * 2  # to make the Gram, then to read it


def test_an_edit_through_data_needs_the_next_call(exact: Any, x: Tensor) -> None:
    """The one change that torch does not count."""
    exact(x)
    exact.base_model.model.fc1.base_layer.weight.data.mul_(2)
    use_exact_dora(exact)
    assert torch.equal(exact(x), copy.deepcopy(exact)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_another_dtype(
    dtype: torch.dtype, plain: Any, exact: Any, x: Tensor
) -> None:
    expected = plain(x)
    exact(x)
    limit = 1e-6 if dtype == torch.float32 else 5e-2
    close(exact.to(dtype)(x.to(dtype)), expected, limit)
    assert exact_dora_layers(exact)


# --- merging -------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_merge_and_unmerge(safe: bool, plain: Any, exact: Any, x: Tensor) -> None:
    expected, slopes = exact(x), gradient(exact, x)
    for _ in range(2):
        exact.merge_adapter(safe_merge=safe)
        close(exact(x), expected)
        exact.unmerge_adapter()
        close(exact(x), expected)
        close(gradient(exact, x), slopes)
    plain.merge_adapter(safe_merge=safe)
    exact.merge_adapter(safe_merge=safe)
    close(exact(x), plain(x))


def test_merge_and_unload(plain: Any, exact: Any, x: Tensor) -> None:
    expected = exact(x)
    merged, reference = exact.merge_and_unload(), plain.merge_and_unload()
    assert list(merged.state_dict()) == list(MLP().state_dict())
    assert torch.equal(merged.fc1.weight, reference.fc1.weight)
    close(merged(x), expected)
    assert exact_dora_layers(merged) == {}


def test_two_adapters_merge_as_in_peft(plain: Any, x: Tensor) -> None:
    plain.add_adapter("second", config(r=3))
    randomise(plain).double()
    plain.base_model.set_adapter(["default", "second"])
    exact = copy.deepcopy(plain)
    use_exact_dora(exact)
    close(exact(x), plain(x))
    plain.merge_adapter()
    exact.merge_adapter()
    assert torch.equal(exact(x), plain(x))
    exact.unmerge_adapter()
    plain.unmerge_adapter()
    close(exact(x), plain(x), 1e-10)


# --- adapters come and go ------------------------------------------------------------


def test_an_adapter_added_later_is_reported_and_swapped(exact: Any, x: Tensor) -> None:
    exact.add_adapter("second", config(r=3))
    assert plain_dora_layers(exact) == dict.fromkeys(LAYERS, ("second",))
    assert exact_dora_layers(exact) == dict.fromkeys(LAYERS, ("default",))
    randomise(exact).double()
    exact.set_adapter("second")
    before = exact(x)
    use_exact_dora(exact)
    assert plain_dora_layers(exact) == {}
    assert exact_dora_layers(exact) == dict.fromkeys(LAYERS, ("default", "second"))
    close(exact(x), before)


def test_an_adapter_loaded_later(plain: Any, exact: Any, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    exact.load_adapter(tmp_path, "loaded")
    assert plain_dora_layers(exact) == dict.fromkeys(LAYERS, ("loaded",))


def test_delete_disable_and_set(plain: Any, exact: Any, x: Tensor) -> None:
    for model in (plain, exact):
        model.add_adapter("second", config(r=3))
    randomise(plain).double()
    exact.double().load_state_dict(plain.state_dict())
    use_exact_dora(exact)
    for name in ("default", "second", "default"):
        plain.set_adapter(name)
        exact.set_adapter(name)
        close(exact(x), plain(x))
    with exact.disable_adapter(), plain.disable_adapter():
        assert torch.equal(exact(x), plain(x))
    close(exact(x), plain(x))
    plain.delete_adapter("default")
    exact.delete_adapter("default")
    assert exact_dora_layers(exact) == dict.fromkeys(LAYERS, ("second",))
    plain.set_adapter("second")
    exact.set_adapter("second")
    close(exact(x), plain(x))


def test_transformers_add_adapter() -> None:
    model = BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
        )
    ).eval()
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], use_dora=True))
    randomise(model)
    ids = torch.randint(0, 20, (2, 5))
    expected = model(input_ids=ids).last_hidden_state
    assert use_exact_dora(model) == ("encoder.layer.0.attention.self.query",)
    close(model(input_ids=ids).last_hidden_state, expected, 1e-6)
    model.disable_adapters()
    without = model(input_ids=ids).last_hidden_state
    assert not torch.equal(without, expected)
    model.enable_adapters()
    close(model(input_ids=ids).last_hidden_state, expected, 1e-6)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"], use_dora=True), "two")
    assert list(plain_dora_layers(model).values()) == [("two",)]
