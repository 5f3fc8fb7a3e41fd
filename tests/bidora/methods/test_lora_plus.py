"""LoRA+: two rates, the one grouping of what decays, and PEFT's own classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bidora.errors import UserError
from bidora.methods import METHODS, make_method
from bidora.methods.training import parameter_groups
from bidora.runs.settings import TrainSettings

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


class Head(nn.Module):
    """A head with a norm that PEFT's function does not know as one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def model(targets: list[str]) -> Any:
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    config.num_labels = 3
    base: Any = BertForSequenceClassification(config)
    base.classifier = Head()
    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
    return get_peft_model(base, lora)


def rates(found: Any, **given: Any) -> dict[str, float]:
    settings = TrainSettings(method="lora-plus", **given)
    return dict(make_method("lora-plus").rates(found, settings))


def test_b_learns_at_the_ratio_times_the_rate_of_a() -> None:
    found = rates(model(["query"]), learning_rate=0.5, loraplus_lr_ratio=8.0)
    for name, rate in found.items():
        fast = "lora_B" in name or name.endswith(("bias", "norm.weight"))
        assert rate == (4.0 if fast else 0.5), name
    assert sum("lora_A" in n for n in found) == sum("lora_B" in n for n in found) == 1
    assert sum(n.endswith("out.weight") for n in found) == 1  # the head's, with A


def test_the_ratio_is_16_where_none_is_given() -> None:
    found = rates(model(["query"]), learning_rate=1.0)
    assert set(found.values()) == {1.0, 16.0}


def test_an_embedding_has_the_rate_that_peft_gives_it() -> None:
    found = rates(model(["query", "word_embeddings"]), learning_rate=1.0)
    of_embedding = {rate for n, rate in found.items() if "lora_embedding" in n}
    assert of_embedding == {1e-6}


def test_groups_are_those_of_peft_but_for_what_decays() -> None:
    made = model(["query", "word_embeddings"])
    names = {id(p): n for n, p in made.named_parameters()}

    def told(groups: Any) -> dict[str, tuple[float, float]]:
        return {
            names[id(p)]: (g["lr"], g["weight_decay"])
            for g in groups
            for p in g["params"]
        }

    theirs = create_loraplus_optimizer(
        made,
        torch.optim.AdamW,
        lr=0.1,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.2,
    )
    settings = {"learning_rate": 0.1, "loraplus_lr_ratio": 16.0}
    decaying = {n for n in names.values() if not n.endswith(("bias", "norm.weight"))}
    groups = parameter_groups(
        made, decaying, lr=0.1, weight_decay=0.2, rates=rates(made, **settings)
    )
    ours, other = told(groups), told(theirs.param_groups)
    assert {n for n in ours if ours[n] != other[n]} == {
        "base_model.model.classifier.modules_to_save.default.norm.weight"
    }
    (norm,) = (v for n, v in ours.items() if "norm.weight" in n)
    assert norm == (1.6, 0.0)
    assert groups[0]["lr"] == 0.1  # the one that is logged
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)


def test_a_run_has_both_rates_and_the_decay_of_every_method(
    finished: Callable[[str], Any],
) -> None:
    run = finished("lora-plus")
    (found,) = run.groups.values()
    assert type(run.trainer.optimizer.optimizer) is torch.optim.AdamW
    kinds = {
        "lora_A": (1e-2, 0.1),
        "lora_B": (0.16, 0.1),
        "default.weight": (1e-2, 0.1),
        "default.bias": (0.16, 0.0),
    }
    for name, values in found.items():
        kind = next(k for k in kinds if k in name.replace("lora_A.default", "lora_A"))
        assert values == pytest.approx(kinds["lora_B" if "lora_B" in name else kind])
    first = next(r for r in run.read("history.jsonl") if "lr" in r)
    assert first["lr"] <= 1e-2


@pytest.mark.parametrize("method", sorted(set(METHODS.names()) - {"lora-plus"}))
def test_other_methods_refuse_the_ratio(method: str) -> None:
    settings = TrainSettings(method=method, loraplus_lr_ratio=4.0)
    with pytest.raises(UserError) as refused:
        make_method(method).check(settings)
    assert f"--loraplus-lr-ratio has no meaning with --method {method}" in str(
        refused.value
    )
    assert str(refused.value).endswith("Leave it out, or choose --method lora-plus.")


@pytest.mark.parametrize("ratio", [0.5, 0, -1.0, float("inf"), "high"])
def test_ratios_below_1_are_refused(ratio: Any) -> None:
    with pytest.raises(UserError, match="--loraplus-lr-ratio is"):
        TrainSettings(loraplus_lr_ratio=ratio)
