"""Warnings of PEFT that reach a user: none about what is seen to, all others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from bidora.methods import make_method
from bidora.models import Base, find_model, load_base, load_tokenizer
from bidora.runs.predict import load_run
from bidora.runs.settings import TrainSettings
from bidora.tasks.base import Schema
from bidora.tasks.registry import make_task
from tests.bidora.conftest import Finished
from tests.bidora.language_models import save_language_model

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def base_of(folder: Path) -> Base:
    source, task = find_model(str(folder)), make_task("generation")
    return load_base(source, load_tokenizer(source), task, Schema("generation"))


def adapted(method: str, folder: Path, *targets: str) -> tuple[Any, str]:
    """Return a model with adapters, and what was warned of as they were put in."""
    settings = TrainSettings(
        method=method, model=str(folder), target_modules=targets or None
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make_method(method).adapt(base_of(folder), settings)
    return model, told(caught)


def loaded(method: str, folder: Path, run: Path) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make_method(method).load(base_of(folder), run)
    return model, told(caught)


def told(caught: list[warnings.WarningMessage]) -> str:
    return "\n".join(str(w.message) for w in caught)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("method", ["lora", "dora-peft", "dora"])
def test_layers_of_gpt2_are_adapted_without_a_word(method: str, tmp_path: Path) -> None:
    model, said = adapted(method, save_language_model(tmp_path / "base", "gpt2"))
    assert model.peft_config["default"].fan_in_fan_out is True
    assert "fan_in_fan_out" not in said


def test_layers_of_both_kinds_are_each_taken_its_own_way(tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "base", "gpt2")
    model, said = adapted("lora", base, "c_attn", "lm_head")
    assert "fan_in_fan_out" not in said
    assert "tie_word_embeddings" in said  # a caution that training leaves to PEFT
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins as zeros
            torch.nn.init.normal_(parameter)
    make_method("lora").save(model, tmp_path / "run")
    again, said = loaded("lora", base, tmp_path / "run")
    assert "fan_in_fan_out" not in said
    for one in (model, again):
        layers = one.base_model.model
        assert layers.transformer.h[0].attn.c_attn.fan_in_fan_out
        assert not layers.lm_head.fan_in_fan_out
    assert torch.equal(logits(again), logits(model))


def test_a_run_is_loaded_without_what_its_training_told(tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "base", "llama")
    whole: Any = base_of(base).model
    with torch.no_grad():
        whole.model.layers[0].self_attn.o_proj.weight[3] = 0
    whole.save_pretrained(base)
    model, said = adapted("dora", base, "embed_tokens", "o_proj")
    assert "Base weights have rows of zeros: 1 in layer" in said
    assert "Model has `tie_word_embeddings=True`" in said
    make_method("dora").save(model, tmp_path / "run")
    _, said = loaded("dora", base, tmp_path / "run")
    assert "rows of zeros" not in said
    assert "tie_word_embeddings" not in said


def test_a_whole_model_is_loaded_without_a_bar(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Finished = finished("full")
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        capsys.readouterr()
        load_run(run.folder)
        assert capsys.readouterr().err == ""
        assert logging.is_progress_bar_enabled()
    finally:
        if not shown:
            logging.disable_progress_bar()
