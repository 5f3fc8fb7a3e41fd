"""Texts that a model writes after prompts, by transformers' own search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bidora.runs.encoding import encode
from bidora.runs.results import Listener
from bidora.tasks.base import Rows

if TYPE_CHECKING:
    from bidora.tasks.base import Schema, Task

__all__ = ["write_texts", "written"]

BATCH = 16
"""Prompts of a batch; each has as many rows as there are beams."""


def written(
    model: Any,
    tokenizer: Any,
    task: Task,
    schema: Schema,
    rows: Rows,
    length: int,
    listener: Listener,
) -> list[str]:
    """Return a text for each example, as a task with a `generation` wants it.

    Args:
        model: What writes.
        tokenizer: Its tokenizer.
        task: What the examples mean.
        schema: Of the training data.
        rows: The examples; their labels are not looked at.
        length: Tokens kept of an example.
        listener: Told how far it is.

    Raises:
        UserError: If a prompt is too long.
    """
    from bidora.models import longest_input

    asked = {name: x for name, x in rows.columns.items() if name != "labels"}
    rows = Rows(asked, rows.places)
    bound = longest_input(model)
    task.check_lengths(rows, tokenizer, schema, length, bound)
    prompts = encode(rows, task, schema, tokenizer, length)
    generation = task.generation() or {}
    listener.phase("write", len(set(map(tuple, prompts["input_ids"]))))
    return write_texts(
        model,
        tokenizer,
        prompts,
        generation,
        bound,
        lambda done: listener.working_on(done, ""),
    )


def write_texts(
    model: Any,
    tokenizer: Any,
    prompts: Any,
    generation: Mapping[str, Any],
    longest: int | None,
    tell: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return one text for each prompt; equal prompts are worked on once.

    The model's mode is as before afterwards, and so are the tokenizer's settings.

    Args:
        model: A transformers model that writes, or a PEFT model around one.
        tokenizer: Its tokenizer, with a padding token.
        prompts: A `datasets.Dataset` with `input_ids`.
        generation: Fields of `GenerationConfig`.
        longest: Tokens that the model takes, the text's own included; None for no bound.
        tell: Called with the number of prompts that are done.

    Returns:
        Texts without special tokens, and without blanks around them.
    """
    import torch

    two_parts = model.config.is_encoder_decoder
    rows = [tuple(ids) for ids in prompts["input_ids"]]
    distinct = sorted(set(rows), key=lambda ids: (len(ids), ids))
    device = next(model.parameters()).device
    was_training = model.training
    found: dict[tuple[int, ...], str] = {}
    model.eval()
    try:
        for start in range(0, len(distinct), BATCH):
            some = distinct[start : start + BATCH]
            batch = tokenizer.pad(
                {"input_ids": [list(ids) for ids in some]},
                padding_side="right" if two_parts else "left",
                return_tensors="pt",
            ).to(device)
            width = 0 if two_parts else batch["input_ids"].shape[1]
            config = _configuration(model, tokenizer, generation)
            if longest is not None and not two_parts:
                room = longest - width
                config.max_new_tokens = max(1, min(config.max_new_tokens, room))
            with torch.no_grad():
                made = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    generation_config=config,
                )
            texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
            found |= zip(some, (text.strip() for text in texts), strict=True)
            tell(len(found))
    finally:
        model.train(was_training)
    return [found[ids] for ids in rows]


def _configuration(model: Any, tokenizer: Any, generation: Mapping[str, Any]) -> Any:
    """Return how to write: ours, and what the model says of its special tokens."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        eos_token_id=sorted(e for e in ends if e is not None),
        pad_token_id=tokenizer.pad_token_id,
        **generation,
    )
