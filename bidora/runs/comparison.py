"""Estimators side by side on a real model and batch: the job of `bidora estimators`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bidora.errors import UserError
from bidora.methods import make_method
from bidora.models import find_model
from bidora.optimizer import BiDoRAOptimizer
from bidora.runs.comparison_settings import CompareSettings
from bidora.runs.examples import read_examples
from bidora.runs.folder import RunFolder
from bidora.runs.prepared import Prepared, find_device, prepare
from bidora.runs.results import Listener, environment
from bidora.trainer.data import OuterStream
from hypergrad import HypergradEstimator, NonFiniteError
from hypergrad.compare import Comparison, compare_estimators
from hypergrad.estimators import Unrolled

__all__ = ["ComparisonResult", "advice", "compare"]

NEAR_ENOUGH = 0.99
"""Cosine to the reference's indirect term from which an estimator is recommended."""


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison left behind.

    Args:
        folder: Where its files are.
        comparison: The rows.
        seconds: Seconds of the whole run.
    """

    folder: str
    comparison: Comparison
    seconds: float


def compare(
    settings: CompareSettings, listener: Listener | None = None
) -> ComparisonResult:
    """Compare estimators on a model and a task, after some steps of training.

    The directions take `steps` steps of AdamW as a search's would, on the part of the
    training examples that is theirs; the magnitudes stay. Then every estimator computes
    the magnitudes' gradient, from the last inner batch and one held-back batch.

    The folder `settings.folder` then holds `settings.json`, `split.json`,
    `history.jsonl` (the losses of the steps), `comparison.json`, `comparison.csv` and
    `comparison.png`. The global random numbers are as before afterwards.

    Args:
        settings: What to compare, and on what.
        listener: Told what happens.

    Returns:
        The comparison, and where it is saved.

    Raises:
        UserError: If something the user gave can't be used.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    estimators = settings.make()
    folder = RunFolder(settings.folder, settings.overwrite)
    method = make_method("bidora")
    examples = read_examples(settings, listener, searches=True)
    device = find_device(settings.device)
    source = find_model(settings.model)
    with torch.random.fork_rng():
        prepared = prepare(settings, method, source, examples, device, listener)
        folder.open()
        try:
            folder.write_json("settings.json", settings.as_dict())
            folder.write_json("split.json", examples.record())
            optimizer = _warm_up(settings, prepared, folder, listener)
            found = _compare(settings, prepared, optimizer, estimators, listener)
            seconds = time.perf_counter() - started
            _save(folder, settings, found, device, seconds)
        finally:
            folder.close()
    return ComparisonResult(str(folder.path), found, seconds)


def _warm_up(
    settings: CompareSettings, prepared: Prepared, folder: RunFolder, listener: Listener
) -> BiDoRAOptimizer:
    """Take the inner steps, and return the optimizer with the records of the last."""
    optimizer = BiDoRAOptimizer(
        prepared.model,
        Unrolled(settings.lookback),
        inner_lr=settings.rate,
        inner_weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        orthogonality=settings.orthogonality,
        reuse_graph=False,  # no one estimator is spared what the others compute
    )
    size = settings.per_device_train_batch_size
    stream = _stream(prepared, prepared.examples.inner, size, settings.seed)
    torch.manual_seed(settings.seed)
    prepared.model.train()
    listener.phase("warm-up", settings.steps)
    for number in range(1, settings.steps + 1):
        try:
            report = optimizer.inner_step(stream())
        except NonFiniteError as error:
            raise UserError(
                f"step {number} of the warm-up: {error} The learning rate is probably "
                "too high; lower --learning-rate."
            ) from error
        loss = report.inner_loss or 0.0
        folder.append_history(
            {
                "phase": "warm-up",
                "step": number,
                "inner_loss": loss,
                "grad_norm": report.grad_norm,
            }
        )
        listener.step(number, {"train": loss})
    return optimizer


def _compare(
    settings: CompareSettings,
    prepared: Prepared,
    optimizer: BiDoRAOptimizer,
    estimators: dict[str, HypergradEstimator],
    listener: Listener,
) -> Comparison:
    steps = optimizer.recorded_steps
    size = settings.per_device_outer_batch_size or settings.per_device_train_batch_size
    outer = _stream(prepared, prepared.examples.outer, size, settings.seed + 1)
    in_all = 0

    def tell(done: int, total: int, label: str) -> None:
        nonlocal in_all
        if done == 0:
            in_all = total
            listener.phase("compare", total)
        listener.working_on(done, label)

    found = compare_estimators(
        optimizer.problem,
        estimators,
        # As in training, where an implicit estimator sees the last step's batch.
        steps[-1].micro_batches,
        outer(),
        steps=steps,
        reference=settings.reference,
        repeats=settings.repeats,
        on_progress=tell,
    )
    listener.working_on(in_all, "")
    return found


def _stream(
    prepared: Prepared, indices: list[int], batch_size: int, seed: int
) -> Callable[[], Any]:
    """Return what draws shuffled batches without end, on the model's device."""
    data = prepared.sets["train"].select(indices)
    size = min(batch_size, len(data))
    stream = OuterStream(data, prepared.collate, size, seed)

    def draw() -> dict[str, Any]:
        return {name: t.to(prepared.device) for name, t in stream().items()}

    return draw


def _save(
    folder: RunFolder,
    settings: CompareSettings,
    found: Comparison,
    device: torch.device,
    seconds: float,
) -> None:
    staging: Path = folder.staging()
    found.to_frame().to_csv(staging / "comparison.csv", index=False)
    if found.points():
        found.plot(staging / "comparison.png")
    folder.publish()
    content = found.to_dict()
    content["settings"] |= settings.as_dict()
    content["environment"] |= environment(device)
    recommended = found.recommend(NEAR_ENOUGH)
    folder.write_json(
        "comparison.json",
        {"recommended": recommended, "seconds": seconds, **content},
    )


def advice(found: Comparison) -> list[str]:
    """Say what follows from a comparison, and how far it holds.

    Args:
        found: The comparison.

    Returns:
        Sentences, a paragraph each.
    """
    label = found.recommend(NEAR_ENOUGH)
    near = [row for row in found.rows if row.indirect_cosine is not None]
    if label is not None:
        row = found[label]
        text = (
            f"Cheapest with a cosine of at least {NEAR_ENOUGH} to the reference's "
            f"indirect term: {label} (cosine {row.indirect_cosine:.4f}, "
            f"{row.forwards:g} forward passes)."
        )
    elif near:
        row = max(near, key=lambda r: r.indirect_cosine or 0.0)
        text = (
            f"None reaches a cosine of {NEAR_ENOUGH} to the reference's indirect term; "
            f"the nearest is {row.label} (cosine {row.indirect_cosine:.4f}, "
            f"{row.forwards:g} forward passes)."
        )
    else:
        text = "No estimator gave an indirect term, so none can be recommended."
    paragraphs = [text]
    without = [r for r in found.rows if r.answers == "neither" and r.cosine is not None]
    if without and (without[0].cosine or 0.0) >= NEAR_ENOUGH:
        paragraphs.append(
            f"But {without[0].label} has a cosine of {without[0].cosine:.4f} in the "
            "total: here the indirect term hardly turns the hypergradient."
        )
    paragraphs.append(
        "This holds for one batch of each part, at one moment of one training, and for "
        "the question that the reference answers. Try other --seed, --steps and "
        "--lookback before you rely on it."
    )
    return paragraphs
