"""From a task's rows to what a Trainer takes."""

from __future__ import annotations

from typing import Any

from bidora.tasks.base import Rows, Schema, Task

__all__ = ["by_length", "encode"]


def encode(rows: Rows, task: Task, schema: Schema, tokenizer: Any, length: int) -> Any:
    """Return the features of rows as a `datasets.Dataset`, in memory.

    Args:
        rows: The examples.
        task: What they mean.
        schema: What the task found out about the data.
        tokenizer: The model's tokenizer.
        length: Tokens kept of an example.
    """
    from datasets import (
        Dataset,
        disable_progress_bars,
        enable_progress_bars,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        table = Dataset.from_dict(rows.columns)
        return table.map(
            lambda batch: task.features(batch, tokenizer, schema, length),
            batched=True,
            remove_columns=table.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
        )
    finally:
        if shown:
            enable_progress_bars()


def by_length(features: Any) -> Any:
    """Return the features in the order of their lengths, for passes without gradients.

    Batches of texts alike in length are padded least, and scores depend on no order.

    Args:
        features: What `encode` returned, or a part of it.
    """
    if "input_ids" not in features.column_names:
        return features
    lengths = [len(ids) for ids in features["input_ids"]]
    return features.select(sorted(range(len(lengths)), key=lengths.__getitem__))
