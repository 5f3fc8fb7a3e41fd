"""What every run starts from: a model, tokenised examples, and their split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bidora.errors import UserError
from bidora.models import ModelSource, build_model, load_tokenizer, longest_input
from bidora.report import Listener
from bidora.settings import TrainSettings
from bidora.tasks import (
    Columns,
    Encoded,
    Task,
    encode,
    holdout_split,
    is_hub_task,
    load_task,
)
from hypergrad import HypergradEstimator, make_estimator

__all__ = ["Prepared", "find_device", "prepare"]


@dataclass
class Prepared:
    """What a run works on.

    Args:
        settings: What the user asked for.
        task: Texts and labels.
        tokenizer: The model's tokenizer.
        model: The PEFT model, on its device.
        train_set: The tokenised training examples.
        test_set: The tokenised test examples.
        inner_indices: Which training examples the directions learn on in a search.
        outer_indices: Which ones are held back for the magnitudes.
        estimator: How the magnitudes' gradient is estimated; None without a search.
    """

    settings: TrainSettings
    task: Task
    tokenizer: Any
    model: Any
    train_set: Encoded
    test_set: Encoded
    inner_indices: list[int] = field(default_factory=list)
    outer_indices: list[int] = field(default_factory=list)
    estimator: HypergradEstimator | None = None

    def split(self) -> dict[str, Any]:
        """Return which training examples went where."""
        return {
            "task": self.task.name,
            "source": self.task.source,
            "seed": self.settings.seed,
            "label_names": self.task.label_names,
            "train_examples": len(self.task.train),
            "test_examples": len(self.task.test),
            "inner_indices": self.inner_indices,
            "outer_indices": self.outer_indices,
        }


def prepare(
    settings: TrainSettings,
    source: ModelSource,
    device: torch.device,
    listener: Listener,
) -> Prepared:
    """Load model and data, split and tokenise; nothing is written yet.

    Args:
        settings: What to load, and how.
        source: Where the base model is.
        device: Where the model goes.
        listener: Told what was loaded.

    Returns:
        What a run works on.

    Raises:
        UserError: If something the user gave can't be used.
    """
    estimator = _estimator(settings) if settings.method == "bidora" else None
    remote = [] if source.is_local else [source.name]
    remote += [settings.task] if is_hub_task(settings.task) else []
    if remote:
        listener.message(
            f"Fetching {' and '.join(remote)} from the cache or the Hub ..."
        )
    tokenizer = load_tokenizer(source)
    task = load_task(
        settings.task,
        seed=settings.seed,
        columns=Columns(
            settings.text_column, settings.text_pair_column, settings.label_column
        ),
        test_file=settings.test_file,
        column_names=settings.column_names,
        quoting=settings.quoting,
    )
    listener.message(f"Task   {task.describe()}")
    inner, outer = list(range(len(task.train))), []
    if estimator is not None:
        inner, outer = holdout_split(
            task.train.labels,
            settings.validation_fraction,
            settings.seed,
            task.label_names,
        )
    model: Any = build_model(
        source,
        tokenizer,
        task.label_names,
        use_dora=settings.method != "lora",
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        seed=settings.seed,
    ).to(device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    listener.message(
        f"Model  {settings.model}: {settings.method} trains {trained:,} of its "
        f"{total:,} parameters, on {device}"
    )
    length = settings.tokens_kept(longest_input(model))
    return Prepared(
        settings=settings,
        task=task,
        tokenizer=tokenizer,
        model=model,
        train_set=encode(task.train, tokenizer, length),
        test_set=encode(task.test, tokenizer, length),
        inner_indices=inner,
        outer_indices=outer,
        estimator=estimator,
    )


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU where there is one.

    Args:
        name: What the user called it.

    Returns:
        The device, with its index.

    Raises:
        UserError: If it can't be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used ({str(error).splitlines()[0][:160]}); "
            "choose cpu, or leave it out."
        ) from error


def _estimator(settings: TrainSettings) -> HypergradEstimator:
    """Make the estimator; its own errors list the known names and settings."""
    try:
        return make_estimator(settings.estimator, **settings.estimator_settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--estimator {settings.estimator}: {error}") from error
