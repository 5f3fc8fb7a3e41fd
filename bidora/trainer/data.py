"""Which examples each level learns on, and the batches of the outer one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from bidora.errors import UserError
from bidora.tasks.splits import stratified_split

if TYPE_CHECKING:
    from bidora.trainer.checkpoint import Checkpoint

__all__ = [
    "OuterStream",
    "check_outer_batch",
    "check_split",
    "loader_over",
    "outer_stream",
    "select",
    "split_indices",
    "split_of",
    "without_rest",
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
        return stratified_split(labels, fraction, seed)
    except UserError as error:
        msg = (
            f"{error} Whole-number labels are taken for classes; use floats for a "
            "regression. With outer_dataset or split, nothing is split here."
        )
        raise UserError(msg) from error


def check_split(split: Any, count: int) -> tuple[list[int], list[int]]:
    """Return a split that was made elsewhere: indices of both levels.

    Args:
        split: indices for the directions, and indices held back.
        count: examples of the training set.

    Raises:
        UserError: the indices are no parts of the training set, or not all of it.
    """
    try:
        inner, outer = ([int(i) for i in part] for part in split)
    except (TypeError, ValueError) as error:
        msg = (
            f"split is a {type(split).__name__}; pass two lists of indices, of the "
            "examples for the directions and of those held back."
        )
        raise UserError(msg) from error
    both = [*inner, *outer]
    if sorted(both) != list(range(count)):
        twice = len(both) - len(set(both))
        missing = len(set(range(count)) - set(both))
        strange = len(set(both) - set(range(count)))
        msg = (
            f"split has {len(inner)} and {len(outer)} indices of {count} training "
            f"examples: {missing} examples are in neither part, {twice} indices come "
            f"twice, {strange} are of no example. Put each example into one part, or "
            "pass outer_dataset for examples that overlap."
        )
        raise UserError(msg)
    if not inner:
        msg = "split holds all examples back: the directions would learn on none."
        raise UserError(msg)
    return inner, outer


def split_of(trainer: Any, found: Checkpoint | None) -> tuple[list[int], list[int]]:
    """Return the indices of both levels: of a checkpoint, as given, or made here.

    Args:
        trainer: the trainer.
        found: the checkpoint that a run goes on from.

    Raises:
        ValueError: the training set cannot be split, or was split in another way.
    """
    data, args = trainer.train_dataset, trainer.args
    given = None if trainer.split is None else check_split(trainer.split, len(data))
    if found is None:
        return given or split_indices(data, args.validation_fraction, args.seed)
    own = found.progress.inner_indices, found.progress.outer_indices
    if given is not None and set(given[1]) != set(own[1]):
        msg = (
            f"split holds {len(given[1])} examples back, and {found.path} comes from a run "
            f"that held {len(own[1])} others back. Give that split, or leave it out: it is "
            "in the checkpoint."
        )
        raise ValueError(msg)
    return own


def _labels(dataset: Any) -> list[int] | None:
    """Return whole-number labels where a dataset has a column or attribute of them.

    Stored columns are read without their format: a transform of the user's own may
    rename them, and is not run for the sake of a look.
    """
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset)
        return whole and [whole[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return [*chain.from_iterable(known)] if len(known) == len(parts) else None
    for name in LABEL_COLUMNS:
        column = _column(dataset, name)
        if not hasattr(column, "__len__") or not hasattr(column, "__getitem__"):
            continue
        values = [_plain(v) for v in _plain(column)]
        if len(values) == len(dataset) and all(type(v) is int for v in values):
            return values
    return None


def _column(dataset: Any, name: str) -> Any:
    """Return a column of labels as it is stored; None where there is none."""
    if not hasattr(dataset, "column_names"):
        return getattr(dataset, name, None)
    if name not in dataset.column_names:
        return None
    # One number an example; lists would be read for nothing.
    kind = getattr(dataset, "features", {}).get(name)
    if "int" not in str(getattr(kind, "dtype", "")):
        return None
    return dataset.with_format(None)[name][:]


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


def loader_over(trainer: Any, dataset: Any) -> Any:
    """Return a loader as a trainer makes it for its own training set.

    Args:
        trainer: the trainer. torch's random numbers are as before afterwards.
        dataset: what the loader reads.
    """
    held = trainer.train_dataset
    with torch.random.fork_rng():
        try:
            trainer.train_dataset = dataset
            return trainer.get_train_dataloader()
        finally:
            trainer.train_dataset = held


def outer_stream(trainer: Any, dataset: Any) -> OuterStream:
    """Return the outer batches, made as a trainer makes its own.

    Args:
        trainer: the trainer; its loader says what is kept of an example, and how a
            batch is made. Random numbers are as before afterwards.
        dataset: the examples held back.

    Raises:
        ValueError: the trainer's loader reads other data than its `train_dataset`.
    """
    loader = loader_over(trainer, dataset)
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


@contextmanager
def without_rest(args: Any, wanted: bool) -> Iterator[None]:
    """Let a Trainer make a loader that leaves out the last, smaller batch of an epoch.

    `dataloader_drop_last` itself leaves examples out of evaluations too, in silence.

    Args:
        args: the Trainer's arguments; as before afterwards.
        wanted: whether to leave it out.
    """
    held = args.dataloader_drop_last
    args.dataloader_drop_last = held or wanted
    try:
        yield
    finally:
        args.dataloader_drop_last = held
