"""Which examples each level learns on, and the batches of the outer one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from bidora.errors import UserError
from bidora.tasks.base import holdout_split

__all__ = [
    "OuterStream",
    "check_outer_batch",
    "outer_stream",
    "select",
    "split_indices",
]

LABEL_COLUMNS = ("labels", "label")


def split_indices(
    dataset: Any, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split a training set: indices for the directions, indices held back.

    Where the examples have a column of whole-number labels, both parts keep their
    shares.

    Args:
        dataset: a dataset with a length.
        fraction: part that is held back; 0 for none.
        seed: equal seeds give equal splits.

    Returns:
        Sorted indices of both parts.

    Raises:
        ValueError: too few examples.
        UserError: too few examples of a class; a ValueError too.
    """
    count = len(dataset)
    if fraction == 0:
        return list(range(count)), []
    labels = _labels(dataset)
    if labels is None:
        if count < 2:
            msg = (
                f"the training set has {count} example(s), too few to hold any of them "
                "back for the magnitudes. Add examples, or pass outer_dataset."
            )
            raise ValueError(msg)
        labels = [0] * count
    try:
        return holdout_split(labels, fraction, seed)
    except UserError as error:
        msg = (
            f"{error} Labels that are numbers and no classes are told from them by being "
            "floats; with outer_dataset, nothing is split."
        )
        raise UserError(msg) from error


def _labels(dataset: Any) -> list[int] | None:
    """Return whole-number labels where the dataset has a column or attribute of them."""
    names = getattr(dataset, "column_names", None) or ()
    for name in LABEL_COLUMNS:
        column = dataset[name] if name in names else getattr(dataset, name, None)
        if not hasattr(column, "__len__") or not hasattr(column, "__getitem__"):
            continue
        # A dataset's format may make arrays or tensors of them.
        values = [_plain(v) for v in _plain(column)]
        if len(values) == len(dataset) and all(type(v) is int for v in values):
            return values
    return None


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def select(dataset: Any, indices: Sequence[int]) -> Any:
    """Return part of a dataset, of the same kind where it can be."""
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    return Subset(dataset, list(indices))


def check_outer_batch(examples: int, batch_size: int, world_size: int) -> None:
    """Refuse outer batches in which an example would come twice.

    Raises:
        ValueError: there are fewer examples than a batch of all processes takes.
    """
    if batch_size * world_size > examples:
        msg = (
            f"an outer batch of {batch_size} examples for each of {world_size} "
            f"process(es) is more than the {examples} that are there for the magnitudes. "
            "Lower per_device_outer_batch_size, or raise validation_fraction."
        )
        raise ValueError(msg)


class OuterStream:
    """Draw shuffled batches without end, the same for the same seed.

    Every example comes once an epoch; a batch may reach over the end of an epoch, so
    that all batches have the same size. How many were drawn is its whole state: the next
    batch depends on nothing else, and on no global random number.

    Args:
        dataset: what to draw from.
        collate: makes a batch of a list of examples.
        batch_size: examples of a batch.
        seed: seed of the order.
        rank: number of this process.
        world_size: number of processes; each draws other examples.

    Raises:
        ValueError: there are fewer examples than a batch takes.

    Example:
        >>> stream = OuterStream(["a", "b", "c"], list, batch_size=2, seed=0)
        >>> first = stream() + stream()[:1]
        >>> sorted(first), stream.drawn
        (['a', 'b', 'c'], 2)
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset: Any = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.drawn = 0
        self._order: tuple[int, list[int]] = (-1, [])
        check_outer_batch(len(self.dataset), batch_size, world_size)

    def __call__(self) -> Any:
        """Return the next batch."""
        start = (self.drawn * self.world_size + self.rank) * self.batch_size
        indices = [self._index(p) for p in range(start, start + self.batch_size)]
        self.drawn += 1
        return self.collate([self.dataset[i] for i in indices])

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.dataset), generator=generator)
            self._order = epoch, order.tolist()
        return self._order[1][offset]


def outer_stream(trainer: Any, dataset: Any) -> OuterStream:
    """Return the outer batches, made as a trainer makes its own.

    Args:
        trainer: the trainer; its loader says what is kept of an example, and how a
            batch is made. Random numbers are as before afterwards.
        dataset: the examples held back.

    Raises:
        ValueError: the trainer's loader reads other data than its `train_dataset`.
    """
    held = trainer.train_dataset
    with torch.random.fork_rng():
        try:
            trainer.train_dataset = dataset
            loader = trainer.get_train_dataloader()
        finally:
            trainer.train_dataset = held
    if len(loader.dataset) != len(dataset):
        msg = (
            f"get_train_dataloader made a loader of {len(loader.dataset)} examples where "
            f"train_dataset was the {len(dataset)} held back: it looks elsewhere for its "
            "data, so that both levels would learn on the same. Let it read "
            "self.train_dataset."
        )
        raise ValueError(msg)
    args = trainer.args
    return OuterStream(
        loader.dataset,
        loader.collate_fn,
        args.bidora_settings()["per_device_outer_batch_size"],
        args.seed + 1,
        args.process_index,
        args.world_size,
    )


def divides_batches(args: Any, examples: int) -> bool:
    """Whether to leave out the last batch of an epoch: it may be too small to divide.

    Args:
        args: the training arguments.
        examples: how many there are; the only batch is not left out.

    Returns:
        Whether products are taken on parts of batches, and there is a whole one.
    """
    whole = args.train_batch_size * args.world_size <= examples
    return whole and getattr(args.make_estimator(), "product_fraction", 1.0) < 1.0
