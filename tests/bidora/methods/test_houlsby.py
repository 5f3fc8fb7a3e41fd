"""Houlsby's adapters: where they go, what they compute, and that they start as nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from bidora.errors import UserError
from bidora.methods import make_method
from bidora.methods._bottleneck import Bottleneck
from bidora.methods.houlsby import insert
from bidora.models import Base, ModelSource
from bidora.runs.settings import TrainSettings
from tests.tolerances import error, tol

SIZES: dict[str, Any] = {
    "vocab_size": 9,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = BertConfig(hidden_size=8, intermediate_size=12, **SIZES)
BERT.num_labels = 3
BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForSequenceClassification(BERT),
    "roberta": lambda: RobertaModel(
        RobertaConfig(hidden_size=8, intermediate_size=12, **SIZES)
    ),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=9, dim=8, hidden_dim=12, n_layers=2, n_heads=2)
    ),
    "llama": lambda: LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=12, **SIZES)
    ),
    "gpt2": lambda: GPT2Model(
        GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    ),
}
WORDS = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 5]])


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(input_ids=WORDS)[0]


@pytest.mark.parametrize("kind", BASES)
def test_two_adapters_a_layer_and_the_model_starts_as_it_was(kind: str) -> None:
    model = BASES[kind]()
    before = outputs(model)
    assert len(insert(model, 4)) == 4
    assert torch.equal(outputs(model), before)


def test_an_adapter_computes_what_its_formula_says() -> None:
    projection = nn.Linear(3, 5).double()
    adapter = Bottleneck(projection, 2).double()
    for p in adapter.up.parameters():
        nn.init.normal_(p)
    x = torch.randn(4, 3, dtype=torch.float64)
    h = x @ projection.weight.T + projection.bias
    inside = h @ adapter.down.weight.T + adapter.down.bias
    gelu = inside * torch.distributions.Normal(0.0, 1.0).cdf(inside)
    truth = h + gelu @ adapter.up.weight.T + adapter.up.bias
    assert error(adapter(x), truth) <= tol(torch.float64)


def test_adapters_and_head_are_trained_and_nothing_else(tiny_encoder: Path) -> None:
    model = BASES["bert"]()
    base = Base(ModelSource("b", "b", is_local=True), model, ["classifier"], "SEQ_CLS")
    adapted = make_method("houlsby").adapt(
        base, TrainSettings(method="houlsby", lora_r=2)
    )
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".down." in n or ".up." in n or "classifier" in n for n in trained)
    # Down and up of four adapters, and the head.
    assert sum(p.numel() for p in trained.values()) == 4 * (8 * 2 + 2 + 2 * 8 + 8) + 27


def test_saved_adapters_load_onto_the_base(tmp_path: Path) -> None:
    method = make_method("houlsby")
    first = BASES["bert"]()
    source = ModelSource("b", "b", is_local=True)
    again = Base(source, copy.deepcopy(first), ["classifier"], "SEQ_CLS")
    base = Base(source, first, ["classifier"], "SEQ_CLS")
    model = method.adapt(base, TrainSettings(method="houlsby", lora_r=3))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    truth = outputs(model)
    method.save(model.float(), tmp_path)
    loaded = method.load(again, tmp_path)
    assert error(outputs(loaded), truth) <= tol(torch.float32, cond=10)
    other = Base(source, nn.Sequential(nn.Linear(2, 2)), [], "SEQ_CLS")
    with pytest.raises(UserError, match="does not fit its base model: it has no bert"):
        method.load(other, tmp_path)


def test_unknown_layers_are_refused_by_name() -> None:
    config = BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)
    bloom = BloomForSequenceClassification(config)
    base = Base(ModelSource("b", "b", is_local=True), bloom, ["score"], "SEQ_CLS")
    settings = TrainSettings(method="houlsby", model="some/bloom")
    with pytest.raises(UserError, match=r"layers of 'some/bloom': .* such as lora"):
        make_method("houlsby").adapt(base, settings)
