"""From a task's rows to what a Trainer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from bidora.tasks.base import Rows, Schema, Task

__all__ = ["by_length", "encode", "unknown"]

MOST_BYTES = 2**30
"""What is kept of features that are made when they are needed."""


def encode(rows: Rows, task: Task, schema: Schema, tokenizer: Any, length: int) -> Any:
    """Return the features of rows as a `datasets.Dataset`.

    They are made at once and held in memory; those of a lazy task are made when a batch
    needs them, and a gigabyte of them is kept for the next epoch.

    Args:
        rows: The examples.
        task: What they mean.
        schema: What the task found out about the data.
        tokenizer: The model's tokenizer, or its image processor.
        length: Tokens kept of an example.
    """
    from datasets import (
        Dataset,
        disable_progress_bars,
        enable_progress_bars,
        is_progress_bar_enabled,
    )

    def features(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return task.features(batch, tokenizer, schema, length)

    table = Dataset.from_dict(rows.columns)
    if task.lazy:
        numbered = table.add_column("row", list(range(len(table))))
        return numbered.with_transform(_Remembering(features))
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        return table.map(
            features,
            batched=True,
            remove_columns=table.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            # Nothing is looked up by it; to make one, datasets would hash the tokenizer,
            # word by word.
            new_fingerprint=uuid4().hex,
        )
    finally:
        if shown:
            enable_progress_bars()


def unknown(features: Any, tokenizer: Any) -> tuple[int, float]:
    """Return how many examples have tokens that are unknown, and the share of those.

    Args:
        features: What `encode` returned.
        tokenizer: What made them.

    Returns:
        A number of examples, and the part of all tokens: 0 and 0 where inputs are no
        tokens, or where the tokenizer knows everything.
    """
    token = getattr(tokenizer, "unk_token_id", None)
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None else ()
    # A GPT-2 has one token for what is unknown, which never occurs, and for a text's end.
    if token is None or token in ends or "input_ids" not in features.column_names:
        return 0, 0.0
    read = [n for n in ("input_ids", "pair_input_ids") if n in features.column_names]
    texts = zip(*(features[name] for name in read), strict=True)
    joined = ([i for ids in several for i in ids] for several in texts)
    counts = [(ids.count(token), len(ids)) for ids in joined]
    of_all = sum(length for _, length in counts) or 1
    return sum(n > 0 for n, _ in counts), sum(n for n, _ in counts) / of_all


class _Remembering:
    """Make the features of a batch, and keep them while there is room.

    Args:
        make: Makes those of columns, a list an input.
    """

    def __init__(self, make: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]]):
        self.make = make
        self.kept: dict[int, dict[str, Any]] = {}
        self.room = MOST_BYTES

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the features of a batch of numbered rows."""
        rows = batch["row"]
        new = [i for i, row in enumerate(rows) if row not in self.kept]
        made: dict[int, dict[str, Any]] = {}
        if new:
            found = self.make({name: [v[i] for i in new] for name, v in batch.items()})
            for place, i in enumerate(new):
                one = {name: values[place] for name, values in found.items()}
                made[rows[i]] = one
                size = sum(getattr(value, "nbytes", 8) for value in one.values())
                if size <= self.room and rows[i] not in self.kept:
                    self.room -= size
                    self.kept[rows[i]] = one
        several = [made.get(row) or self.kept[row] for row in rows]
        return {name: [one[name] for one in several] for name in several[0]}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is kept: datasets takes a hash of this, and copies it."""
        return {"make": self.make, "kept": {}, "room": MOST_BYTES}


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
