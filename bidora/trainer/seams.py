"""What is done where the Trainer begins a phase or an epoch, or writes a card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from bidora.dora import magnitudes
from bidora.trainer.checkpoint import SPLIT_FILE, write_json

__all__ = ["AtTheSeams", "freeze_magnitudes", "part_tensorboard", "tag_card"]


class AtTheSeams(TrainerCallback):
    """Act where the Trainer has loaded a checkpoint, and where an epoch begins.

    Args:
        trainer: a trainer with `BiDoRAMixin`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put back what the Trainer's own files do not hold."""
        trainer = self.trainer
        found, trainer._goes_on_from = trainer._goes_on_from, None
        if found is not None:
            trainer._restore(found)
        if args.should_save and trainer._split_file:
            write_json(Path(trainer._home) / SPLIT_FILE, trainer._split_file)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Give groups by length an order that depends on the epoch's number alone."""
        self.trainer._queue = []  # of a step that a callback broke off
        # A sampler without a generator, such as that of groups by length, draws from
        # the global random state otherwise, which a resumed run does not have at the
        # beginning of its epoch.
        self.trainer._order.manual_seed(args.seed + int(state.epoch or 0))


def freeze_magnitudes(model: nn.Module) -> None:
    """End the training of all magnitudes of a model.

    Args:
        model: the model.
    """
    for parameter in magnitudes(model).values():
        parameter.requires_grad_(False)


def part_tensorboard(trainer: Any) -> None:
    """Make TensorBoard's callback choose a folder again: it keeps its first one.

    Args:
        trainer: the trainer, at the beginning of a phase.
    """
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    own = os.path.join(chosen, trainer.phase) if chosen else None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = own


def tag_card(path: Path, tags: list[str]) -> None:
    """Add tags to a model card: PEFT, with the last word on its own, leaves only its own.

    Args:
        path: the card.
        tags: the tags.
    """
    card = ModelCard.load(path)
    own = card.data.to_dict().get("tags") or []
    card.data["tags"] = sorted({*own, *tags})
    card.save(path)
