"""Models of published shapes with random weights, and what a training step needs of them.

Nothing is downloaded: sizes are those of the published configurations, weights are drawn
on the device itself, so that a model of seven billion takes seconds. Where positions
are rotary, their scaling is left out: it costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from benchmarks import _model

_ROBERTA: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "use_cache": False,  # keys and values of a generation, which training has no use for
}
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "roberta-base": (
        RobertaConfig,
        {
            **_ROBERTA,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
    "roberta-large": (
        RobertaConfig,
        {
            **_ROBERTA,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        {
            **_LLAMA,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "llama-2-7b": (
        LlamaConfig,
        {
            **_LLAMA,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
}


def make_model(
    shape: str,
    layers: int | None,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Return a model of one shape; a classifier of two classes or a language model.

    Args:
        shape: one of `SHAPES`.
        layers: number of layers; None for all.
        attention: attention implementation of transformers.
        dtype: dtype of the weights.
        device: where they are drawn.

    Returns:
        The model, without dropout.
    """
    kind, sizes = SHAPES[shape]
    if layers is not None:
        sizes = {**sizes, "num_hidden_layers": layers}
    generative = kind is LlamaConfig
    maker: Any = (
        AutoModelForCausalLM if generative else AutoModelForSequenceClassification
    )
    torch.manual_seed(0)
    with device:
        return maker.from_config(
            kind(**sizes), dtype=dtype, attn_implementation=attention
        )


def make_batches(
    base: nn.Module, examples: int, tokens: int, device: torch.device, count: int
) -> list[dict[str, Tensor]]:
    """Return random batches with the labels that the model's loss is computed from."""
    batches = []
    for seed in range(count):
        batch = _model.draw_batch(examples, tokens, seed)
        if _model.family(base) == "llama":
            batch["labels"] = batch["input_ids"]  # the model shifts them by itself
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches
