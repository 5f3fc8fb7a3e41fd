"""Several adapters in one model: values as in PEFT, and whose magnitudes are trained."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bidora import BiDoRAOptimizer
from bidora.dora import exact_dora_layers, magnitudes, use_exact_dora

ENTRIES, WIDTH = 7, 6
ADAPTERS = ("default", "second", "third")


class Net(nn.Module):
    """An embedding, a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ENTRIES, WIDTH)
        self.slide = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.slide(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.fc(x)).mean(1))


def config(name: str) -> LoraConfig:
    """Return three that differ in rank, scaling, layers, and one is plain LoRA."""
    settings: dict[str, dict[str, Any]] = {
        "default": {"r": 2, "target_modules": ["words", "slide", "fc", "head"]},
        "second": {"r": 3, "target_modules": ["words", "fc", "slide"]},
        "third": {"r": 1, "target_modules": ["fc", "words"], "use_dora": False},
    }
    return LoraConfig(**{"use_dora": True, "lora_alpha": 3, **settings[name]})


@pytest.fixture
def plain() -> Any:
    model: Any = get_peft_model(cast(Any, Net()), config("default"))
    for name in ADAPTERS[1:]:
        model.add_adapter(name, config(name))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                p.normal_(std=0.5)
            if "magnitude" in name:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
    return model.double()


@pytest.fixture
def exact(plain: Any) -> Any:
    twin = copy.deepcopy(plain)
    use_exact_dora(twin)
    return twin


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, ENTRIES, (4, 5))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


CHOICES = [
    list(order)
    for count in (1, 2, 3)
    for order in itertools.permutations(ADAPTERS, count)
]


def test_any_choice_of_active_adapters(plain: Any, exact: Any, ids: Tensor) -> None:
    assert len(CHOICES) == 15
    values = []
    for training in (True, False):
        for names in CHOICES:
            for model in (plain, exact):
                model.base_model.set_adapter(names)
                model.train(training)
            close(exact(ids), plain(ids))
            with torch.no_grad():  # where gains are kept
                values.append(exact(ids))
                assert torch.equal(exact(ids), values[-1])
    assert len({round(v.sum().item(), 9) for v in values[:15]}) > 6


def test_added_set_disabled_deleted(plain: Any, exact: Any, ids: Tensor) -> None:
    for model in (plain, exact):
        torch.manual_seed(1)
        model.add_adapter("late", config("second"))
        model.double().set_adapter("late")
    use_exact_dora(exact)
    close(exact(ids), plain(ids))
    with exact.disable_adapter(), plain.disable_adapter():
        assert torch.equal(exact(ids), plain(ids))
    for model in (plain, exact):
        model.delete_adapter("second")
        model.set_adapter("default")
    close(exact(ids), plain(ids))
    names = {name for layer in exact_dora_layers(exact).values() for name in layer}
    assert names == {"default", "late"}


def test_batches_that_mix_adapters_are_refused_as_in_peft(
    plain: Any, exact: Any
) -> None:
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for model in (plain.eval(), exact.eval()):
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA"):
            model.base_model.model.fc(x, adapter_names=["default", "second"])


def test_files_of_several_adapters(exact: Any, ids: Tensor, tmp_path: Path) -> None:
    exact.save_pretrained(tmp_path)
    bare = Net().double()
    bare.load_state_dict(copy.deepcopy(exact).unload().state_dict())
    loaded: Any = PeftModel.from_pretrained(cast(Any, bare), tmp_path)
    for name in ADAPTERS[1:]:
        loaded.load_adapter(tmp_path / name, name)
    loaded.double()
    for names in CHOICES:
        for model in (loaded, exact):
            model.base_model.set_adapter(names)
        close(loaded(ids), exact(ids))


# --- whose magnitudes are outer parameters ----------------------------------------------


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def optimizer(model: Any) -> BiDoRAOptimizer:
    return BiDoRAOptimizer(
        model, loss_fn=loss_fn, inner_lr=1e-2, outer_every=1, outer_warmup=0
    )


def values(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_" in n and f".{adapter}" in n
    }


@pytest.mark.parametrize(("name", "other"), [ADAPTERS[:2], ADAPTERS[1::-1]])
def test_the_active_adapter_is_trained_and_no_other(
    name: str, other: str, exact: Any, ids: Tensor
) -> None:
    exact.set_adapter(name)
    opt = optimizer(exact)
    assert set(opt.problem.outer_params) == set(magnitudes(exact, name))
    before = {a: values(exact, a) for a in ADAPTERS}
    batch = ids, torch.arange(4) % 2
    for _ in range(2):
        opt.step(batch, batch)
    after = {a: values(exact, a) for a in ADAPTERS}
    for kept in (other, "third"):
        assert all(torch.equal(p, after[kept][n]) for n, p in before[kept].items())
    for moved, p in before[name].items():
        assert not torch.equal(p, after[name][moved]), moved


def test_over_a_frozen_adapter_that_is_active_too(exact: Any, ids: Tensor) -> None:
    exact.base_model.set_adapter(["default", "second"])
    for n, p in exact.named_parameters():
        if ".default" in n:
            p.requires_grad_(False)
    opt = optimizer(exact)
    assert set(opt.problem.outer_params) == set(magnitudes(exact, "second"))
    before = {a: values(exact, a) for a in ADAPTERS}
    batch = ids, torch.arange(4) % 2
    opt.step(batch, batch)
    after = {a: values(exact, a) for a in ADAPTERS}
    assert all(
        torch.equal(p, after["default"][n]) for n, p in before["default"].items()
    )
    moved = [
        not torch.equal(p, after["second"][n]) for n, p in before["second"].items()
    ]
    assert all(moved)


def test_two_trained_at_once_are_refused(exact: Any) -> None:
    exact.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"several adapters.*'default', 'second'"):
        optimizer(exact)


def test_one_that_is_trainable_and_not_active_is_refused(exact: Any) -> None:
    exact.set_adapter("default")
    for n, p in exact.named_parameters():
        p.requires_grad_(".second" in n)
    with pytest.raises(ValueError, match=r"'second'.*active.*set_adapter\('second'\)"):
        optimizer(exact)
