"""The model of the benchmarks: RoBERTa-base's width, random weights, an adapter."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

VOCABULARY = 1000

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
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        use_dora=dora,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",  # the head is trained too
    )
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(base, shared), config).train()


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
