"""The data of one evaluation: one batch, or several that are accumulated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hypergrad._checks import check_number
from hypergrad.attention import AttentionBackend
from hypergrad.errors import BatchError
from hypergrad.rng import RngState

__all__ = [
    "Accumulated",
    "MicroBatch",
    "as_micro_batches",
    "check_fraction",
    "fixed",
    "part_of",
    "versions_in",
]


@dataclass(frozen=True)
class MicroBatch:
    """One batch and all that decides what a loss makes of it.

    Attributes:
        batch: handed to the loss as it is.
        weight: factor of its loss in the accumulated one.
        rng_state: random state that the evaluation starts from; None for the present.
        attention: attention backend that the evaluation runs under.
        training: train/eval mode of each submodule, in the order of `module.modules()`;
            None for that in which the estimate began.

    Example:
        >>> MicroBatch("a").weight, MicroBatch("a").rng_state is None
        (1.0, True)
    """

    batch: Any
    weight: float = 1.0
    rng_state: RngState | None = None
    attention: AttentionBackend = "default"
    training: tuple[bool, ...] | None = None


class Accumulated(tuple[MicroBatch, ...]):
    """Several batches whose weighted losses add up to one (gradient accumulation).

    Example:
        >>> [m.weight for m in Accumulated(["a", "b"])]
        [0.5, 0.5]
    """

    __slots__ = ()

    def __new__(
        cls, batches: Sequence[Any], weights: Sequence[float] | None = None
    ) -> Accumulated:
        """Pair each batch with its weight.

        Args:
            batches: the batches; one that is a `MicroBatch` already keeps its random
                state, and its weight becomes a factor.
            weights: one factor for each; None for the mean, `1 / len(batches)`.

        Returns:
            The micro-batches.

        Raises:
            TypeError: `batches` is a single batch.
            ValueError: no batch, another number of weights, or a weight that is not
                finite.
        """
        if isinstance(batches, (Mapping, Tensor, str, bytes, MicroBatch)):
            msg = (
                f"batches is a {type(batches).__name__}, which looks like a single "
                "batch. Pass a list of batches."
            )
            raise TypeError(msg)
        batches = list(batches)
        if not batches:
            msg = "batches is empty: there is nothing to accumulate. Pass one or more."
            raise ValueError(msg)
        if weights is None:
            weights = [1.0 / len(batches)] * len(batches)
        weights = [float(weight) for weight in weights]
        if len(weights) != len(batches):
            msg = (
                f"got {len(batches)} batches and {len(weights)} weights. Pass one "
                "weight for each batch, or None for their mean."
            )
            raise ValueError(msg)
        if not all(math.isfinite(weight) for weight in weights):
            msg = f"weights={weights} must be finite: each is a factor of a loss."
            raise ValueError(msg)
        pairs = zip(batches, weights, strict=True)
        return super().__new__(
            cls,
            [
                replace(b, weight=b.weight * w)
                if isinstance(b, MicroBatch)
                else MicroBatch(b, w)
                for b, w in pairs
            ],
        )

    def __getnewargs__(self) -> tuple[tuple[MicroBatch, ...], list[float]]:
        # What pickle and copy.deepcopy call __new__ with.
        return tuple(self), [1.0] * len(self)


def as_micro_batches(
    batch: Any, attention: AttentionBackend = "default"
) -> tuple[MicroBatch, ...]:
    """Read what a user passes as a batch: a batch, or an `Accumulated` of several.

    Args:
        batch: what was passed; a tuple of `MicroBatch` passes as it is.
        attention: backend for a plain batch.

    Returns:
        At least one micro-batch.

    Example:
        >>> as_micro_batches("a")[0].weight
        1.0
    """
    if isinstance(batch, MicroBatch):
        return (batch,)
    if (
        isinstance(batch, tuple)
        and batch
        and all(isinstance(part, MicroBatch) for part in batch)
    ):
        return tuple(batch)
    return (MicroBatch(batch, attention=attention),)


def fixed(
    batch: Any, state: RngState, training: tuple[bool, ...] | None = None
) -> tuple[MicroBatch, ...]:
    """Give each micro-batch without a random state this one, so that all see the same.

    Args:
        batch: as for `as_micro_batches`.
        state: the random state.
        training: the modes that go with it.

    Returns:
        At least one micro-batch.
    """
    return tuple(
        m if m.rng_state is not None else replace(m, rng_state=state, training=training)
        for m in as_micro_batches(batch)
    )


def check_fraction(name: str, value: float) -> None:
    """Refuse a part of a batch that is none, or more than all.

    Raises:
        TypeError: not a number.
        ValueError: outside of (0, 1].
    """
    check_number(name, value)
    if not 0 < value <= 1:
        msg = (
            f"{name}={value} must be in (0, 1]: it is the part of a batch that is used. "
            "Pass 1 for all of it."
        )
        raise ValueError(msg)


def part_of(batch: Any, fraction: float) -> Any:
    """Return the first examples of a batch.

    Args:
        batch: a tensor, or a dictionary, tuple or list of tensors (and of such), whose
            first axes are the examples. What has no axis is kept as it is.
        fraction: how many of them, rounded to the nearest number.

    Returns:
        A batch of the same form; views, not copies.

    Raises:
        BatchError: a batch of another kind, tensors of different lengths, or too few
            examples to divide.

    Example:
        >>> import torch
        >>> part = part_of({"x": torch.arange(8), "scale": 2.0}, 0.25)
        >>> part["x"].tolist(), part["scale"]
        ([0, 1], 2.0)
    """
    lengths = {len(t) for t in _leaves(batch) if isinstance(t, Tensor) and t.dim()}
    if len(lengths) != 1:
        found = f"tensors of {sorted(lengths)} examples" if lengths else "no tensor"
        msg = (
            f"a part of a {type(batch).__name__} was asked for, and it holds {found}: "
            "which entries are examples cannot be told. Pass tensors that share their "
            "first axis, or a fraction of 1."
        )
        raise BatchError(msg)
    (length,) = lengths
    count = round(fraction * length)
    if count < 1:
        msg = (
            f"{fraction} of a batch of {length} examples is less than one. Pass a larger "
            f"batch, or a fraction of at least {1 / length:.3g}."
        )
        raise BatchError(msg)
    return _cut(batch, count)


def versions_in(batches: Sequence[MicroBatch]) -> tuple[int, ...]:
    """Return the version counters of the tensors in batches, by which a write shows.

    Args:
        batches: the batches; tensors of inference mode, which have no counter, are left
            out, and so are objects that are no containers.

    Example:
        >>> import torch
        >>> one = MicroBatch({"x": torch.zeros(2)})
        >>> before = versions_in([one])
        >>> _ = one.batch["x"].add_(1)
        >>> versions_in([one]) == before
        False
    """
    leaves = (leaf for micro in batches for leaf in _leaves(micro.batch))
    return tuple(
        t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference()
    )


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _leaves(part)
    else:
        yield batch


def _cut(batch: Any, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:count] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, count) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_cut(part, count) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_cut(part, count) for part in batch)
    return batch
