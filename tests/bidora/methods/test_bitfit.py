"""BitFit: which parameters it trains, what it saves, and which models it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from bidora.errors import UserError
from bidora.methods import make_method
from bidora.methods.partial import FILE
from bidora.models import Base, ModelSource
from bidora.runs.settings import TrainSettings

SOURCE = ModelSource("b", "b", is_local=True)
Run = Callable[[str], Any]

# Of each of two layers: query, key, value, attention's output, its norm, the middle, the
# output, its norm. Then the norm of the embeddings and the pooler.
BIASES = 2 * (3 * 16 + 16 + 16 + 32 + 16 + 16) + 16 + 16
HEAD = 16 * 3 + 3


def test_biases_and_head_are_trained_and_counted(finished: Run) -> None:
    run = finished("bitfit")
    trained = {n: p for n, p in run.job.model.named_parameters() if p.requires_grad}
    assert all(n.endswith("bias") or n.startswith("classifier.") for n in trained)
    assert sum(p.numel() for p in trained.values()) == BIASES + HEAD
    assert any(f"bitfit trains {BIASES + HEAD:,} of its" in line for line in run.told)


def test_weights_stay_those_of_the_base(finished: Run, tiny_encoder: Path) -> None:
    model = finished("bitfit").job.model
    base = BertForSequenceClassification.from_pretrained(tiny_encoder)
    first = dict(base.named_parameters())
    moved = {
        name
        for name, p in model.named_parameters()
        if not name.startswith("classifier.") and not torch.equal(p, first[name])
    }
    assert moved
    assert all(name.endswith("bias") for name in moved)
    # A bias of keys shifts all scores of a query alike, so its gradient is rounding.
    unmoved = {n for n in first if n.endswith("bias")} - moved - {"classifier.bias"}
    assert all(".key." in n for n in unmoved)


def test_the_file_holds_what_was_trained_and_nothing_else(finished: Run) -> None:
    run = finished("bitfit")
    saved = load_file(run.folder / FILE)
    trained = {n: p for n, p in run.job.model.named_parameters() if p.requires_grad}
    assert set(saved) == set(trained)
    assert all(torch.equal(saved[n], p) for n, p in trained.items())
    assert not list(run.folder.glob("*model*.safetensors"))


def test_saved_biases_load_onto_the_base_alone(finished: Run, tmp_path: Path) -> None:
    method, model = make_method("bitfit"), copy.deepcopy(finished("bitfit").job.model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    method.save(model, tmp_path)
    again = copy.deepcopy(finished("bitfit").job.model)
    loaded = method.load(Base(SOURCE, again, ["classifier"], "SEQ_CLS"), tmp_path)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    other = Base(SOURCE, nn.Sequential(nn.Linear(2, 2)), [], "SEQ_CLS")
    with pytest.raises(UserError, match="does not fit its base model: it has no bert"):
        method.load(other, tmp_path)


def test_a_model_without_biases_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    llama = LlamaForSequenceClassification(config)
    llama.score = nn.Linear(8, 2)  # biases of the head are not the model's
    settings = TrainSettings(method="bitfit", model="some/llama")
    with pytest.raises(UserError) as refused:
        make_method("bitfit").adapt(Base(SOURCE, llama, ["score"], "SEQ_CLS"), settings)
    message = str(refused.value)
    assert message.startswith(
        "--method bitfit trains biases, and 'some/llama' has none"
    )
    assert message.endswith("choose another method, such as lora.")


def test_its_usual_rate_is_its_own() -> None:
    assert TrainSettings(method="bitfit").rate == 1e-3
    assert TrainSettings(method="bitfit", learning_rate=0.1).rate == 0.1
