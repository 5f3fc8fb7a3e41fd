"""What is done where the Trainer begins a phase or an epoch, or writes a card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from bidora.trainer.checkpoint import SPLIT_FILE, write_json
from bidora.trainer.upstream import TRAINER_STATE

__all__ = [
    "AtTheSeams",
    "OrderByEpoch",
    "end_again",
    "lines_without_phase",
    "read_state",
    "tag_card",
]


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
        """Forget the batches of a step that a callback broke off."""
        self.trainer._queue = []


class OrderByEpoch(TrainerCallback):
    """Give groups by length an order that depends on the epoch's number alone.

    Their sampler draws from the global random state otherwise, which a run that goes on
    from a checkpoint does not have at the beginning of its epoch.

    Attributes:
        generator: what the order is drawn from; see `choose_order`.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Seed the order of the epoch."""
        self.generator.manual_seed(args.seed + int(state.epoch or 0))


def read_state(folder: Path) -> TrainerState | None:
    """Return the Trainer's state that a folder holds; None where it holds none.

    Args:
        folder: the folder of a phase, or a checkpoint.
    """
    path = folder / TRAINER_STATE
    return TrainerState.load_from_json(str(path)) if path.is_file() else None


def end_again(trainer: Any, folder: Path) -> TrainOutput:
    """Begin and end a phase that was over when the run was stopped.

    Args:
        trainer: the trainer, with the values of that checkpoint in its model, and with
            `load_values_of`.
        folder: the last checkpoint of the phase.

    Returns:
        That of a phase without a step.
    """
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE))
    args, ends, trainer.state = trainer.args, trainer.callback_handler, state
    # Callbacks see the phase end: when it did, they may not have.
    trainer.control = ends.on_train_begin(args, state, trainer.control)
    best = state.best_model_checkpoint
    if args.load_best_model_at_end and best and Path(best).is_dir():
        trainer.load_values_of(best)
    trainer.control = ends.on_train_end(args, state, trainer.control)
    return TrainOutput(state.global_step, 0.0, {})


@contextmanager
def lines_without_phase(state: TrainerState) -> Iterator[None]:
    """Leave the phase out of the lines of a log, in which a card sees metrics alone.

    Args:
        state: whose lines they are.

    Yields:
        Control, while they are without.
    """
    lines = state.log_history
    state.log_history = [
        {k: v for k, v in line.items() if k != "phase"} for line in lines
    ]
    try:
        yield
    finally:
        state.log_history = lines


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
