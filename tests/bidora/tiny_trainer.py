"""Tiny models, data and a trainer that takes a fraction of a second, for its tests."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
)

from bidora.trainer import BiDoRATrainer, BiDoRATrainingArguments

VOCABULARY = 40


def bert(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    """A DoRA classifier; float64, so that rounding and mistakes are far apart."""
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.5,  # random features that tell words apart
    )
    adapter = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=dropout,
        use_dora=True,
        task_type="SEQ_CLS",
        target_modules=["query", "value"],
    )
    return get_peft_model(BertForSequenceClassification(config), adapter).to(dtype)


def language_model() -> Any:
    """A DoRA language model, whose loss the Trainer divides by its count of labels."""
    torch.manual_seed(7)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        word_embed_proj_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=16,
        dropout=0.0,
        init_std=0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    adapter = LoraConfig(
        r=2,
        lora_alpha=4,
        use_dora=True,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
    )
    model = OPTForCausalLM(config)
    model.loss_function = next_word_loss
    return get_peft_model(model, adapter).to(torch.float64)


def next_word_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **unused: Any,
) -> Tensor:
    """As in transformers, which casts to float32 in between."""
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=-100,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    return losses if num_items_in_batch is None else losses / num_items_in_batch


def labelled(count: int = 24, seed: int = 0) -> Dataset:
    """Rows of 4 to 8 words; the label says in which half the second word is."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, VOCABULARY, (count, 8), generator=generator)
    lengths = torch.randint(4, 9, (count,), generator=generator).tolist()
    rows = [row[:n].tolist() for row, n in zip(words, lengths, strict=True)]
    return Dataset.from_dict(
        {"input_ids": rows, "labels": (words[:, 1] > VOCABULARY // 2).long().tolist()}
    )


def texts(count: int = 24, seed: int = 0) -> Dataset:
    """Rows of 3 to 9 words to be continued, so that batches hold unequal counts."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, VOCABULARY, (count, 9), generator=generator)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    rows = [row[:n].tolist() for row, n in zip(words, lengths, strict=True)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest row; labels of words are padded by -100."""
    longest = max(len(f["input_ids"]) for f in features)

    def padded(row: list[int], value: int) -> list[int]:
        return row + [value] * (longest - len(row))

    ids = torch.tensor([padded(f["input_ids"], 0) for f in features])
    labels = [f["labels"] for f in features]
    if isinstance(labels[0], list):
        labels = [padded(row, -100) for row in labels]
    mask = torch.tensor([padded([1] * len(f["input_ids"]), 0) for f in features])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def arguments(out: Any, **changed: Any) -> BiDoRATrainingArguments:
    """Settings of a short run."""
    settings: dict[str, Any] = {
        "budget": "full",
        "orthogonality": 0.0,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "estimator": "darts",
        "outer_warmup_steps": 0,
        "max_steps": 4,
        "retrain_max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_outer_batch_size": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return BiDoRATrainingArguments(str(out), **{**settings, **changed})


def trainer(
    out: Any,
    *,
    cls: type[BiDoRATrainer] = BiDoRATrainer,
    model: Any = None,
    parts: dict[str, Any] | None = None,
    **changed: Any,
) -> BiDoRATrainer:
    """A trainer; `parts` are what it is made with beside its arguments."""
    given = {
        "model": bert() if model is None else model,
        "train_dataset": labelled(),
        "data_collator": collate,
        **(parts or {}),
    }
    return cls(args=arguments(out, **changed), **given)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that either phase trains, by name."""
    marks = ("lora_", "modules_to_save")
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if any(mark in n for mark in marks)
    }


def is_magnitude(name: str) -> bool:
    return "lora_magnitude_vector" in name


class Watch(TrainerCallback):
    """Keep what a callback sees of a run, phase by phase."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.events: list[tuple[str, str | None]] = []
        self.rates: dict[str, list[tuple[float, float | None]]] = {}
        self.first: dict[str, dict[str, Tensor]] = {}
        self.last: dict[str, dict[str, Tensor]] = {}
        self.trained: dict[str, set[str]] = {}
        self.after: dict[tuple[str, int], dict[str, Tensor]] = {}

    def _see(self, event: str) -> str:
        self.events.append((event, self.trainer.phase))
        return self.trainer.phase

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        phase = self._see("train_begin")
        self.first[phase] = adapter(kw["model"])
        named = kw["model"].named_parameters()
        self.trained[phase] = {n for n, p in named if p.requires_grad}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        groups = kw["optimizer"].param_groups
        levels = {g.get("level", "inner"): g["lr"] for g in groups}
        rates = self.rates.setdefault(self.trainer.phase, [])
        rates.append((levels["inner"], levels.get("outer")))

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.after[self.trainer.phase, state.global_step] = adapter(kw["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self._see("evaluate")

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self._see("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.last[self._see("train_end")] = adapter(kw["model"])


def watched(trainer: Any) -> Watch:
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    return watch


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any entry; the names must be the same."""
    assert a.keys() == b.keys()
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a)
