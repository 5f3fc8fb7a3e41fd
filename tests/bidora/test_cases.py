"""Whole jobs on inputs that once failed: bases trained before, bases without padding.

Those of files, labels and Hub data sets are in `data` and `tasks`, those of the Trainer
in `test_trainer_*.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from tests.bidora.conftest import Finished, finish
from tests.tolerances import error, tol

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def trained_before(folder: Path, encoder: Path, **head: Any) -> str:
    """Save a classifier whose head is of another kind and size than the task's."""
    config = BertConfig.from_pretrained(encoder, **head)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)


def without_padding(folder: Path, encoder: Path) -> str:
    """Save a GPT-2, whose tokenizer has an end token and none for padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.3,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def loaded_by_its_lines(run: Finished) -> tuple[Any, Any]:
    lines: dict[str, Any] = {}
    exec(run.result.loading_code, lines)
    return lines["model"], lines["tokenizer"]


@pytest.mark.parametrize("method", ["lora", "full", "houlsby"])
def test_printed_lines_load_a_base_without_a_padding_token(
    small_job: dict[str, Any], tiny_encoder: Path, tmp_path: Path, method: str
) -> None:
    base = without_padding(tmp_path / "gpt2", tiny_encoder)
    given = {**small_job, "model": base, "method": method, "max_steps": 2}
    run = finish(**given, output_dir=str(tmp_path / "run"))
    model, tokenizer = loaded_by_its_lines(run)
    assert error(run.logits(model), run.logits()) <= tol(torch.float32)
    # Rows of unequal length, which need the padding token in tokenizer and model.
    batch = tokenizer(["apple", "iron tin the of a"], padding=True, return_tensors="pt")
    alone = tokenizer(["apple"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    alone.pop("token_type_ids", None)
    with torch.no_grad():
        both, one = model(**batch).logits, model(**alone).logits
    assert error(both[:1], one) <= tol(torch.float32, cond=10)


def test_printed_lines_load_a_base_with_a_head_of_another_size(
    small_job: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    base = trained_before(tmp_path / "five", tiny_encoder, num_labels=5)
    given = {**small_job, "model": base, "method": "lora", "max_steps": 2}
    run = finish(**given, output_dir=str(tmp_path / "run"))
    model, _ = loaded_by_its_lines(run)
    assert model.config.num_labels == 3
    assert error(run.logits(model), run.logits()) <= tol(torch.float32)


def test_classes_are_learnt_by_cross_entropy_whatever_the_base_was_for(
    small_job: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    """As many examples as classes: squared error would be computed without a word."""
    head = {"num_labels": 1, "problem_type": "regression"}
    base = trained_before(tmp_path / "regression", tiny_encoder, **head)
    given = {**small_job, "model": base, "method": "lora", "max_steps": 1}
    given |= {"per_device_train_batch_size": 48}  # all of them in one step
    given |= {"start": "random"}  # a probe's large weights would enlarge the dropout
    run = finish(**given, output_dir=str(tmp_path / "run"))
    history = run.read("history.jsonl")
    before = next(
        r["evaluation"]["train"]["loss"] for r in history if "evaluation" in r
    )
    # Dropout is on in the step and off in the evaluation.
    first = next(r["inner_loss"] for r in history if "inner_loss" in r)
    assert first == pytest.approx(before, rel=0.2)
    assert run.job.model.config.problem_type == "single_label_classification"


def test_a_short_search_moves_its_magnitudes(
    small_job: dict[str, Any], tmp_path: Path
) -> None:
    """Fewer steps than the usual warm-up, which is scaled to them."""
    given = {**small_job, "method": "bidora", "max_steps": 4, "eval_steps": 4}
    run = finish(**given, output_dir=str(tmp_path / "run"))
    search = run.result.phases[0]
    assert (search.steps, search.outer_steps) == (2, 1)
    before, after = run.values["search begins"], run.values["search ends"]
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert any("magnitude" in name for name in moved)
