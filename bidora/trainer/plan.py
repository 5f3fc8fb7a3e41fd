"""What a search will do, found out before its first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bidora import defaults
from bidora.budget import outer_steps_due
from bidora.errors import UserError
from bidora.optimizer import orthogonality_weight
from bidora.trainer.arguments import arguments_of_phase
from bidora.trainer.data import loader_over
from bidora.trainer.upstream import steps_of
from hypergrad import HypergradEstimator

__all__ = ["Plan", "make_plan"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a search goes about it.

    Attributes:
        steps: its steps; None where they cannot be known yet.
        estimator: the estimator.
        outer_every: inner steps from one outer step to the next.
        outer_warmup: inner steps before the first outer step.
        orthogonality: weight of the orthogonality term, of the retraining too.
        drop_last: whether to leave out the last batch of an epoch.
    """

    steps: int | None
    estimator: HypergradEstimator
    outer_every: int
    outer_warmup: int
    orthogonality: float
    drop_last: bool = False


def make_plan(trainer: Any, dataset: Any) -> Plan:
    """Find out how a search goes, and refuse one in which the outer level never moves.

    Args:
        trainer: the trainer; its arguments are as before afterwards.
        dataset: examples of the inner level; None where there is no search.

    Returns:
        What was found.

    Raises:
        UserError: no outer step would be due.
        ValueError: `product_fraction` of a batch is less than an example.
    """
    whole = trainer.args
    if dataset is None:
        estimator = whole.make_estimator()
        weight = _orthogonality(whole, estimator, trainer.model)
        return Plan(None, estimator, 1, 0, weight)
    trainer.args = arguments_of_phase(whole, "search")
    try:
        return _plan(trainer, dataset)
    finally:
        trainer.args = whole


def _plan(trainer: Any, dataset: Any) -> Plan:
    args = trainer.args
    estimator = _fitted(trainer, dataset)
    steps = args.max_steps if args.max_steps > 0 else None
    if steps is None:
        loader = loader_over(trainer, dataset)
        if hasattr(loader, "__len__"):
            steps = steps_of(args, len(loader))
    settings = args.bidora_settings()
    every, warmup = settings["outer_every"], args.outer_warmup_steps
    if steps is None:
        warmup = defaults.OUTER_WARMUP if warmup is None else warmup
    else:
        usual = every, defaults.OUTER_WARMUP if warmup is None else warmup
        every, warmup = args.outer_schedule(steps)
        due = {"steps": steps, "lookback": estimator.needs.lookback}
        if not outer_steps_due(every=usual[0], warmup=usual[1], **due):
            logger.warning(
                "outer_every=%d with outer_warmup_steps=%d leaves no outer step in the %d "
                "steps of the search: they are scaled to %d and %d, for %d outer step(s).",
                *(*usual, steps, every, warmup),
                outer_steps_due(every=every, warmup=warmup, **due),
            )
    weight = _orthogonality(args, estimator, trainer.model)
    return Plan(steps, estimator, every, warmup, weight, args.dataloader_drop_last)


def _orthogonality(args: Any, estimator: HypergradEstimator, model: Any) -> float:
    usual = args._budget()["orthogonality"]
    return orthogonality_weight(args.orthogonality, estimator, model, usual)


def _fitted(trainer: Any, dataset: Any) -> HypergradEstimator:
    """Return the estimator, whose products are on parts of batches that have parts.

    One batch is made for a look, where the product is on a part: packed sequences, or
    patches of several images, share a first axis that is not the examples'.

    Raises:
        UserError: the part is less than an example; a ValueError too.
    """
    args = trainer.args
    estimator: Any = args.make_estimator()
    fraction = getattr(estimator, "product_fraction", 1.0)
    if fraction == 1.0:
        return estimator
    loader = loader_over(trainer, dataset)
    count = min(args.train_batch_size, len(loader.dataset))
    with torch.random.fork_rng():
        batch = loader.collate_fn([loader.dataset[i] for i in range(count)])
    axes = {len(t) for t in _tensors(batch) if t.dim()}
    if axes != {count}:
        logger.warning(
            "product_fraction=%g asks for a part of each batch, and a batch of %d examples "
            "holds tensors whose first axes are %s: packed or flattened sequences, "
            "perhaps. The product is taken on whole batches.",
            *(fraction, count, sorted(axes)),
        )
        return replace(estimator, product_fraction=1.0)
    if round(fraction * count) < 1:
        msg = (
            f"product_fraction={fraction} of a batch of {count} examples is less than "
            "one. Raise per_device_train_batch_size, or set estimator_settings="
            f"{{'product_fraction': {1 / count:.3g}}} or more."
        )
        raise UserError(msg)
    if args.train_batch_size * args.world_size <= len(loader.dataset):
        # The last batch of an epoch may be too small to divide.
        args.dataloader_drop_last = True
    return estimator


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
