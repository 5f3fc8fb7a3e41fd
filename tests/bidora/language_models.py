"""Tiny language models with random weights, and a tokenizer of words, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [
    *("name", "area", "food", "is", "a", "in", "serves", "place", "the", "The", "pub"),
    *("cafe", "river", "city", "Aromi", "Wrestlers", "Cotto", "Indian", "Thai"),
    *("French", "Hello", "Bye", "What", "yes", "no", "you", "are", *".,[]:?"),
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)

MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tokenizer_of_words(
    *, pad: bool = True, ends: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words; `\\n` is one of them.

    Args:
        pad: Whether it has a padding token; that of GPT-2 has none.
        ends: Whether it puts the end after every text, as that of T5.
        template: The chat template.
    """
    special = ["<pad>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {w: i for i, w in enumerate([*special, "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Replace("\n", " \n ")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    if ends:
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=special[3:],
        **({"pad_token": "<pad>"} if pad else {}),
    )
    made.chat_template = template
    return made


def tokenizer_of_bytes(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that keeps blanks, and has several tokens for a letter like é.

    Args:
        template: The chat template.
    """
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {w: i for i, w in enumerate([*special, *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special[2:],
    )
    made.chat_template = template
    return made


def save_language_model(folder: Path, kind: str, template: str | None = None) -> Path:
    """Save a model of random weights with its tokenizer.

    Args:
        folder: Where to.
        kind: `gpt2`, `llama` or `t5`.
        template: The chat template.
    """
    tokenizer = tokenizer_of_words(
        pad=kind != "gpt2", ends=kind == "t5", template=template
    )
    size = len(tokenizer)
    end: Any = tokenizer.eos_token_id
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size,
                n_positions=48,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=end,
                eos_token_id=end,
            )
        )
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=48,
                tie_word_embeddings=True,
                bos_token_id=end,
                eos_token_id=end,
            )
        )
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=size,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                pad_token_id=0,
                eos_token_id=end,
                **start,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
