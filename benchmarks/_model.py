"""What is measured: a model of RoBERTa-base's width, and every estimator."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from hypergrad import estimator_names
from hypergrad.products import FiniteDifference

VOCABULARY = 1000
# Beside the default of every registered estimator. `unrolled` is given by its K;
# `implicit` is `cg` again.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "darts": [
        {},
        {"product": FiniteDifference(scheme="forward")},
        {"product": "exact"},
    ],
    "sama": [{}, {"product": "exact"}],
    "unrolled": [{"num_steps": 1}, {"num_steps": 5}],
    "forward": [{"num_steps": 5, "num_directions": 1}, {"num_steps": 5}],
    "zeroth-order": [{"num_steps": 5, "num_directions": 1}],
    "implicit": [],
    "f2sa": [{}, {"num_points": 2}],
}
# What is adapted, and PEFT's name of the task: with SEQ_CLS the head is trained too.
ADAPTED = {
    "roberta": (["query", "value"], "SEQ_CLS"),
    "llama": (["q_proj", "v_proj"], "CAUSAL_LM"),
}

warnings.filterwarnings(
    "ignore", "`is_gradient_checkpointing`", FutureWarning
)  # transformers' own, raised when PEFT reads its model


def roberta(layers: int, tokens: int, attention: str) -> nn.Module:
    """Return a classifier of RoBERTa-base's width without dropout."""
    torch.manual_seed(0)
    kernel: dict[str, Any] = {"attn_implementation": attention}
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=tokens + 2,  # positions start after the padding index
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kernel,
    )
    return RobertaForSequenceClassification(config)


def with_adapter(base: nn.Module, rank: int, *, dora: bool) -> nn.Module:
    """Return a PEFT model in training mode; it shares the weights of `base`."""
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    targets, task = ADAPTED[family(base)]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        use_dora=dora,
        target_modules=targets,
        task_type=task,
    )
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(base, shared), config).train()


def family(model: Any) -> str:
    """Return transformers' name for the kind of a model: roberta, llama."""
    return model.config.model_type


def draw_batch(examples: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Return random examples with random labels."""
    make = torch.Generator().manual_seed(seed)
    shape = (examples, tokens)
    # From 2 on: 0 and 1 are RoBERTa's start and padding.
    return {
        "input_ids": torch.randint(2, VOCABULARY, shape, generator=make),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, (examples,), generator=make),
    }


def estimator_variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield label, registered name and settings of what there is to measure."""
    for name in estimator_names():
        for settings in VARIANTS.get(name, [{}]):
            told = (_told(k, v) for k, v in settings.items())
            yield ", ".join([name, *told]), name, settings


def _told(setting: str, value: Any) -> str:
    if isinstance(value, FiniteDifference):
        return value.scheme
    told = {
        "product": "{} product",
        "num_steps": "K = {}",
        "num_points": "p = {}",
        "num_directions": "m = {}",
    }
    return told[setting].format(value)
