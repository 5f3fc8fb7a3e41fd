"""From texts to batches of token tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bidora.errors import UserError
from bidora.tasks.base import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BatchStream", "Encoded", "encode"]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, padded only when a batch of them is made.

    Args:
        features: One dict of lists (`input_ids`, `attention_mask`, ...) an example.
        labels: One label index an example.
        tokenizer: Pads the batches.
    """

    features: tuple[dict[str, list[int]], ...]
    labels: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example, unpadded, with its `labels`."""
        return {**self.features[index], "labels": self.labels[index]}

    def select(self, indices: Sequence[int]) -> Encoded:
        """Return the examples at `indices`, in that order."""
        return Encoded(
            tuple(self.features[i] for i in indices),
            tuple(self.labels[i] for i in indices),
            self.tokenizer,
        )

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Return a padded batch: tensors `(len(indices), longest)` and `labels`."""
        padded: Any = self.tokenizer.pad(
            [self.features[i] for i in indices], padding=True, return_tensors="pt"
        )
        batch = {name: tensor.to(device) for name, tensor in padded.items()}
        batch["labels"] = torch.tensor([self.labels[i] for i in indices], device=device)
        return batch

    def batches_by_length(self, size: int) -> Iterator[list[int]]:
        """Yield every index once, in batches of like length: little padding."""
        order = sorted(
            range(len(self)), key=lambda i: len(self.features[i]["input_ids"])
        )
        for start in range(0, len(order), size):
            yield order[start : start + size]


def encode(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Tokenise every example, cut at `max_length` tokens.

    Args:
        examples: Texts or pairs of texts.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of each example, special ones included.

    Returns:
        The tokens, still unpadded.
    """
    tokens = tokenizer(
        list(examples.texts),
        None if examples.pairs is None else list(examples.pairs),
        truncation=True,
        max_length=max_length,
    )
    names = list(tokens.keys())
    columns: list[Any] = [tokens[name] for name in names]
    features = tuple(
        dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
    )
    return Encoded(features, examples.labels, tokenizer)


class BatchStream:
    """Draw shuffled batches without end, the same for the same seed.

    Every example comes once an epoch; a batch may reach over the end of an epoch, so
    that all batches have the same size. A set smaller than a batch is one batch.

    Args:
        data: What to draw from.
        batch_size: Examples a batch.
        seed: Seed of the order.
        device: Where the batches go.

    Raises:
        UserError: If `data` is empty.
    """

    def __init__(
        self,
        data: Encoded,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Seed the order; nothing is drawn yet."""
        if len(data) == 0:
            raise UserError("there are no examples to draw batches from; add some.")
        self.data = data
        self.batch_size = min(batch_size, len(data))
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[int] = []

    def next_indices(self) -> list[int]:
        """Return the indices of the next batch."""
        while len(self._queue) < self.batch_size:
            order = torch.randperm(len(self.data), generator=self._generator)
            self._queue.extend(order.tolist())
        drawn = self._queue[: self.batch_size]
        del self._queue[: self.batch_size]
        return drawn

    def __call__(self) -> dict[str, torch.Tensor]:
        """Return the next batch."""
        return self.data.batch(self.next_indices(), self.device)
