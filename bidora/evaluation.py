"""Scores of a model on examples, and how long a job will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bidora.tasks.base import classification_scores
from bidora.tasks.encoding import BatchStream, Encoded

__all__ = ["Scores", "evaluate", "outer_step_cost", "predict", "probe", "time_a_step"]

EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Scores:
    """How well a model does on a set of examples.

    Args:
        loss: Mean cross-entropy.
        accuracy: Share of right answers.
        macro_f1: Mean F1 over the classes.
    """

    loss: float
    accuracy: float
    macro_f1: float


def predict(model: torch.nn.Module, data: Encoded) -> torch.Tensor:
    """Return the logits `(len(data), classes)`, float32, on the CPU, without dropout.

    The model's train or eval mode is as before afterwards.
    """
    device = next(model.parameters()).device
    was_training = model.training
    parts: list[torch.Tensor] = []
    order: list[int] = []
    model.eval()
    try:
        with torch.no_grad():
            for indices in data.batches_by_length(EVALUATION_BATCH):
                batch = data.batch(indices, device)
                batch.pop("labels")
                parts.append(model(**batch).logits.float().cpu())
                order.extend(indices)
    finally:
        model.train(was_training)
    logits = torch.cat(parts)
    restored = torch.empty_like(logits)
    restored[torch.tensor(order)] = logits
    return restored


def evaluate(model: torch.nn.Module, data: Encoded) -> Scores:
    """Score a model on examples."""
    logits = predict(model, data)
    labels = torch.tensor(data.labels)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    scores = classification_scores(data.labels, logits.argmax(dim=-1).tolist())
    return Scores(loss=loss.item(), **scores)


def probe(data: Encoded, size: int, seed: int) -> Encoded:
    """Return at most `size` examples, drawn once: enough for a curve."""
    if len(data) <= size:
        return data
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[:size]
    return data.select(sorted(order.tolist()))


def time_a_step(model: torch.nn.Module, stream: BatchStream) -> float:
    """Return the seconds of one forward and backward, the mean of three after one.

    Parameters, `.grad` (none) and the random numbers are as before afterwards.
    """
    clock = _clock(next(model.parameters()).device)
    started = 0.0
    with torch.random.fork_rng():
        for repeat in range(4):
            if repeat == 1:
                started = clock()
            model(**stream()).loss.backward()
    seconds = (clock() - started) / 3
    model.zero_grad(set_to_none=True)
    return seconds


def outer_step_cost(estimator: Any) -> float:
    """Return about how many inner steps an outer step costs.

    An inner step is a gradient, 2F with F one forward. The direct gradient takes one
    more, a mixed product two, each Hessian-vector product one.

    Args:
        estimator: An estimator; its settings are read where it has them.

    Returns:
        The cost in inner steps, for an estimate of time and for nothing else.
    """
    products = getattr(estimator, "num_terms", None) or getattr(
        estimator, "max_iter", 0
    )
    revisited = getattr(estimator, "num_steps", 0)
    is_first_order = getattr(estimator, "name", "") == "first-order"
    return 1.0 if is_first_order else 3.0 + products + 2.25 * revisited


def _clock(device: torch.device) -> Callable[[], float]:
    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
