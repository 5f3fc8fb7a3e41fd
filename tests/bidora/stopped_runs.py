"""Runs of a BiDoRA trainer that are killed and resumed, and what must be equal then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    set_seed,
)

from bidora.trainer import BiDoRATrainer, BiDoRATrainingArguments

__all__ = [
    "Kill",
    "Killed",
    "Sentences",
    "collate",
    "differences",
    "make_model",
    "make_trainer",
    "outcome",
]

VOCABULARY = 20


class Sentences(Dataset[dict[str, Any]]):
    """Sequences of 3 to 7 tokens; the label tells whether the second is a late one."""

    def __init__(self, count: int, seed: int = 0) -> None:
        drawn = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, VOCABULARY, (count, 7), generator=drawn).tolist()
        lengths = torch.randint(3, 8, (count,), generator=drawn).tolist()
        self.rows = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        self.labels = [int(row[1] > VOCABULARY // 2) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad with 0."""
    longest = max(len(row["input_ids"]) for row in rows)
    padding = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [0] * n for row, n in zip(rows, padding, strict=True)]
        ),
        "attention_mask": torch.tensor(
            [[1] * (longest - n) + [0] * n for n in padding]
        ),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def make_model(*, adapter: str = "peft", norm: bool = False, width: int = 8) -> Any:
    """Return a BERT of one layer with a DoRA adapter and a head that is trained.

    Dropout acts on the hidden states, the attention and the adapter.

    Args:
        adapter: `peft`, in a PeftModel; `transformers`, by `add_adapter`, with a head
            that PEFT knows nothing of; `lora` for one without magnitudes; `none`.
        norm: whether the head begins with a BatchNorm.
        width: of the hidden states.
    """
    set_seed(7)
    model: Any = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )
    if norm:
        model.classifier = torch.nn.Sequential(
            torch.nn.BatchNorm1d(width), model.classifier
        )
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0.1,
        use_dora=adapter != "lora",
        task_type="SEQ_CLS" if adapter != "transformers" else None,
        target_modules=["query", "value"],
    )
    if adapter == "none":
        return model
    if adapter == "transformers":
        model.add_adapter(config)
        model.classifier.requires_grad_(True)
        return model
    return get_peft_model(model, config)


SETTINGS: dict[str, Any] = {
    "budget": "full",
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "estimator": "darts",
    "outer_every": 2,
    "outer_warmup_steps": 0,
    "max_steps": 6,
    "retrain_max_steps": 4,
    "per_device_train_batch_size": 8,
    "per_device_outer_batch_size": 4,
    "learning_rate": 1e-2,
    "orthogonality": 1e-3,
    "save_steps": 1,
    "logging_steps": 1,
    "seed": 3,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def make_trainer(
    folder: Path,
    *,
    model: Any = None,
    data: Any = None,
    parts: dict[str, Any] | None = None,
    cls: type = BiDoRATrainer,
    **settings: Any,
) -> BiDoRATrainer:
    """Return a trainer of 6 steps of search, 3 an epoch, and 4 of retraining.

    Args:
        folder: its `output_dir`.
        model: None for `make_model()`.
        data: None for 30 examples, of which 6 are held back.
        parts: other arguments of the trainer.
        cls: its class.
        settings: in place of those here.
    """
    own: dict[str, Any] = {
        "train_dataset": Sentences(30) if data is None else data,
        "eval_dataset": Sentences(16, seed=1),
        "data_collator": collate,
        **(parts or {}),
    }
    args = BiDoRATrainingArguments(str(folder), **{**SETTINGS, **settings})
    if "model_init" in own:
        return cls(args=args, **own)
    return cls(make_model() if model is None else model, args, **own)


class Killed(KeyboardInterrupt):
    """The run was stopped by a test."""


class Kill(TrainerCallback):
    """Stop a run at the end of a step, before what is logged and saved of it.

    Args:
        trainer: the trainer; it takes this as a callback.
        phase: of which phase.
        step: of that phase.
    """

    def __init__(self, trainer: BiDoRATrainer, phase: str, step: int) -> None:
        self.trainer, self.phase, self.step = trainer, phase, step
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.phase == self.phase and state.global_step == self.step:
            raise Killed


def outcome(trainer: BiDoRATrainer) -> dict[str, Any]:
    """Return what a resumed run must share with one that was not stopped.

    All parameters and buffers, the state of the last optimizer, and of each line of the
    logs what does not tell the time. A phase that was over is not logged again.
    """
    made: Any = trainer.optimizer
    parts: dict[str, Any] = {
        "values": {n: t.clone() for n, t in trainer.model.state_dict().items()},
        "optimizer": made.state_dict() if made else None,
        "retrain": _lines(trainer.state),
        "search": _lines(trainer.search_state) if trainer.search_state else None,
    }
    return parts


def _lines(state: Any) -> list[dict[str, Any]]:
    timed = ("runtime", "per_second", "train_loss", "total_flos")
    return [
        {k: v for k, v in line.items() if not k.endswith(timed)}
        for line in state.log_history
        if "train_runtime" not in line
    ]


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Return where two nests of containers are not the same bit for bit.

    None stands for what is not known, and differs from nothing.
    """
    if a is None or b is None:
        return []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{place}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return [
            d
            for i, (x, y) in enumerate(pairs)
            for d in differences(x, y, f"{place}/{i}")
        ]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    else:
        same = type(a) is type(b) and bool(a == b)
    return [] if same else [f"{place}: {a!r} and {b!r}"]
