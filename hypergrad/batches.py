"""The data of one evaluation: one batch, or several that are accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypergrad.attention import AttentionBackend
from hypergrad.rng import RngState

__all__ = ["Accumulated", "MicroBatch", "as_micro_batches"]


@dataclass(frozen=True)
class MicroBatch:
    """One batch and all that decides what a loss makes of it.

    Attributes:
        batch: handed to the loss as it is.
        weight: factor of its loss in the accumulated one.
        rng_state: random state that the evaluation starts from; None for the present.
        attention: attention backend that the evaluation runs under.
    """

    batch: Any
    weight: float = 1.0
    rng_state: RngState | None = None
    attention: AttentionBackend = "default"


class Accumulated(tuple[MicroBatch, ...]):
    """Several batches whose weighted losses add up to one (gradient accumulation).

    Args:
        batches: the batches.
        weights: one factor for each; None for the mean, `1 / len(batches)`.

    Raises:
        ValueError: no batch, or another number of weights.

    Example:
        >>> [m.weight for m in Accumulated(["a", "b"])]
        [0.5, 0.5]
    """

    __slots__ = ()

    def __new__(
        cls, batches: Sequence[Any], weights: Sequence[float] | None = None
    ) -> Accumulated:
        """Pair each batch with its weight."""
        if not batches:
            msg = "batches is empty: there is nothing to accumulate. Pass one or more."
            raise ValueError(msg)
        if weights is None:
            weights = [1.0 / len(batches)] * len(batches)
        if len(weights) != len(batches):
            msg = (
                f"got {len(batches)} batches and {len(weights)} weights. Pass one "
                "weight for each batch, or None for their mean."
            )
            raise ValueError(msg)
        return super().__new__(
            cls,
            [MicroBatch(b, float(w)) for b, w in zip(batches, weights, strict=True)],
        )


def as_micro_batches(
    batch: Any, attention: AttentionBackend = "default"
) -> tuple[MicroBatch, ...]:
    """Read what a user passes as a batch: a batch, or an `Accumulated` of several."""
    if isinstance(batch, MicroBatch):
        return (batch,)
    if (
        isinstance(batch, tuple)
        and batch
        and all(isinstance(part, MicroBatch) for part in batch)
    ):
        return tuple(batch)
    return (replace(MicroBatch(batch), attention=attention),)
