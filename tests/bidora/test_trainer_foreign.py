"""The mixin over Trainers that are not transformers' plain one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from bidora.trainer import BiDoRAArguments, BiDoRAMixin
from hypergrad import SecondOrderError
from tests.bidora.tiny_trainer import (
    VOCABULARY,
    adapter,
    collate,
    is_magnitude,
    next_word_loss,
    texts,
    watched,
)

SHORT: dict[str, Any] = {
    "budget": "full",
    "estimator": "darts",
    "outer_warmup_steps": 0,
    "max_steps": 3,
    "retrain_max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_outer_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def check_both_phases(trainer: Any, watch: Any, start: dict[str, Tensor]) -> None:
    """Each level moved where it is trained, and nowhere else."""
    searched, end = watch.last["search"], adapter(trainer.model)
    # B starts at 0 and A has no gradient before it moves: AdamW moves the rest at once.
    for name, value in end.items():
        assert not torch.equal(searched[name], start[name]), name
        assert torch.equal(value, searched[name]) == is_magnitude(name), name
    lines = [e for e in trainer.search_state.log_history if "loss" in e]
    assert [e["outer_steps"] for e in lines] == [1, 2, 3]
    assert all(e["hypergrad_norm"] > 0 for e in lines)


# -- Seq2SeqTrainer --------------------------------------------------------------------


@dataclass
class Seq2SeqArguments(BiDoRAArguments, Seq2SeqTrainingArguments):
    pass


class BiDoRASeq2SeqTrainer(BiDoRAMixin, Seq2SeqTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


def test_seq2seq_generates_in_its_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    config.decoder_start_token_id = 0
    lora = LoraConfig(
        r=2, use_dora=True, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]
    )
    model = get_peft_model(T5ForConditionalGeneration(config), lora)
    shapes: list[tuple[Any, ...]] = []

    def compute_metrics(predictions: Any) -> dict[str, float]:
        shapes.append(predictions.predictions.shape)
        return {"words": float((predictions.predictions > 0).sum())}

    t = BiDoRASeq2SeqTrainer(
        model,
        Seq2SeqArguments(
            str(tmp_path),
            predict_with_generate=True,
            generation_max_length=5,
            search_patience=9,
            **SHORT,
        ),
        train_dataset=texts(16),
        eval_dataset=texts(4, seed=1),
        data_collator=collate,
        compute_metrics=compute_metrics,
    )
    start, watch = adapter(t.model), watched(t)
    t.train()
    check_both_phases(t, watch, start)
    # Two evaluations and one, of ids and not of logits; nothing is generated for the
    # held-back loss.
    assert [shape[0] for shape in shapes] == [4, 4, 4]
    assert all(len(shape) == 2 for shape in shapes)
    assert t.search_state is not None
    for state in (t.search_state, t.state):
        assert any("eval_words" in line for line in state.log_history)
    assert any("held_back_loss" in line for line in t.search_state.log_history)


# -- TRL -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft() -> tuple[type, type]:
    """The trainer and its arguments, of TRL."""
    trl = pytest.importorskip("trl", reason="needs trl, of the extra test")

    @dataclass
    class SFTArguments(BiDoRAArguments, trl.SFTConfig):
        pass

    class BiDoRASFTTrainer(BiDoRAMixin, trl.SFTTrainer):
        pass

    return BiDoRASFTTrainer, SFTArguments


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    plain = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def language() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
            initializer_range=0.5,
            pad_token_id=0,
        )
    )


LORA = LoraConfig(
    r=2, use_dora=True, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
)


def make_sft(sft: tuple[type, type], out: Path, ready: bool, **changed: Any) -> Any:
    """A trainer over rows of 3 to 6 words, each of which an end follows."""
    cls, arguments = sft
    rows = [
        {"text": " ".join(f"w{word}" for word in (ids * 2)[:n])}
        for n, ids in zip([3, 4, 5, 6] * 4, texts(16)["input_ids"], strict=True)
    ]
    settings = SHORT | {"bf16": False, "max_length": 8, "eval_strategy": "no"} | changed
    return cls(
        get_peft_model(language(), LORA) if ready else language(),
        args=arguments(str(out), **settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer(),
        **({} if ready else {"peft_config": LORA}),
    )


@pytest.mark.parametrize("ready", [False, True])
def test_sft_counts_what_it_trains_on_once(
    tmp_path: Path, sft: tuple[type, type], ready: bool
) -> None:
    t = make_sft(
        sft,
        tmp_path,
        ready,
        gradient_accumulation_steps=2,
        validation_fraction=0.25,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        search_patience=9,
    )
    start, watch = adapter(t.model), watched(t)
    # Three steps of four are the twelve examples of the search's only epoch.
    t.train()
    check_both_phases(t, watch, start)

    words = [len(row) for row in t.train_dataset["input_ids"]]
    assert sum(words) == 16 * 4.5 + 16
    split = json.loads((tmp_path / "bidora_split.json").read_text())
    searched = [words[i] for i in split["inner_indices"]]
    lines = [line for line in t.search_state.log_history if "loss" in line]
    assert lines[-1]["num_tokens"] == sum(searched)
    assert all(0 <= line["mean_token_accuracy"] <= 1 for line in lines)
    # The count goes on in the retraining, by half of all examples.
    more = [e["num_tokens"] for e in t.state.log_history if "loss" in e]
    assert sum(searched) + 8 * 4 <= more[-1] <= sum(searched) + 8 * 7
    held_back = [e for e in t.search_state.log_history if "held_back_loss" in e]
    assert held_back
    assert not any("accuracy" in key for line in held_back for key in line)


def test_sft_s_fused_head_has_no_second_derivatives(
    tmp_path: Path, sft: tuple[type, type]
) -> None:
    t = make_sft(sft, tmp_path / "fused", True, estimator="cg")
    with pytest.raises(SecondOrderError, match="first-order estimator"):
        t.train()
    # A loss of ones own is computed from the logits.
    t = make_sft(sft, tmp_path / "plain", True, estimator="cg")
    t.compute_loss_func = own_loss
    start, watch = adapter(t.model), watched(t)
    t.train()
    check_both_phases(t, watch, start)


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return next_word_loss(outputs.logits, labels, num_items_in_batch)
