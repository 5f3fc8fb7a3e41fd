"""The Trainer of every method of one phase: one grouping of parameters for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from bidora.dora import magnitudes
from bidora.trainer.data import without_rest
from bidora.trainer.seams import OrderByEpoch, end_again
from bidora.trainer.upstream import (
    TRAINER_STATE,
    choose_order,
    load_checkpoint_values,
    use_one_device,
    was_stopped,
)

__all__ = ["OneGrouping", "parameter_groups", "use_one_device"]


def parameter_groups(
    model: nn.Module,
    decaying: set[str],
    *,
    lr: float,
    weight_decay: float,
    magnitude_rate: float | None = None,
    magnitude_decay: float | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Group the trained parameters of a model by rate and decay.

    Biases and the parameters of norms do not decay, in any method; magnitudes may have a
    rate and a decay of their own, and what a method names a rate.

    Args:
        model: The model.
        decaying: Names of the parameters that decay, as the Trainer finds them.
        lr: Rate of all but magnitudes.
        weight_decay: Their decay.
        magnitude_rate: Rate of DoRA's magnitudes; None for `lr`.
        magnitude_decay: Their decay; None for `weight_decay`.
        rates: Other rates, by the names of the parameters.

    Returns:
        Groups for a torch optimizer; none is empty.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> groups = parameter_groups(model, {"weight"}, lr=0.1, weight_decay=0.01)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.01), (1, 0.0)]
    """
    outer = set(magnitudes(model))
    own = lr if magnitude_rate is None else magnitude_rate
    decay = weight_decay if magnitude_decay is None else magnitude_decay
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_outer, decays = name in outer, name in decaying
        rate = (rates or {}).get(name, own if is_outer else lr)
        most = decay if is_outer else weight_decay
        group = groups.setdefault(
            (is_outer, rate, not decays),
            {"params": [], "lr": rate, "weight_decay": most if decays else 0.0},
        )
        group["params"].append(parameter)
    # The first group's rate is the one that a Trainer logs.
    order = sorted(groups, key=lambda key: (key[0], key[1] != lr, key[1], key[2]))
    return [groups[key] for key in order]


class OneGrouping(Trainer):
    """A Trainer whose AdamW has the groups of `parameter_groups`.

    Args:
        args: As for the Trainer.
        magnitude_rate: See `parameter_groups`.
        magnitude_decay: Likewise.
        rates: Likewise.
        whole_batches: Whether the last, smaller batch of an epoch is left out, in
            training alone.
        kwargs: As for the Trainer.
    """

    def __init__(
        self,
        *args: Any,
        magnitude_rate: float | None = None,
        magnitude_decay: float | None = None,
        rates: Mapping[str, float] | None = None,
        whole_batches: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.magnitude_rate = magnitude_rate
        self.magnitude_decay = magnitude_decay
        self.rates = rates
        self.whole_batches = whole_batches
        self._order = OrderByEpoch()
        self.add_callback(self._order)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train; where the checkpoint is that of the last step, end once more.

        The Trainer's own way takes one step more then.

        Args:
            resume_from_checkpoint: As for the Trainer.
            args: As for the Trainer.
            kwargs: As for the Trainer.

        Returns:
            As from the Trainer.
        """
        if isinstance(resume_from_checkpoint, str):
            folder = Path(resume_from_checkpoint)
            state = json.loads((folder / TRAINER_STATE).read_text("utf-8"))
            if state["global_step"] >= state["max_steps"] or was_stopped(state):
                self.load_values_of(resume_from_checkpoint)
                return end_again(self, folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def load_values_of(self, folder: str) -> None:
        """Put the values of a checkpoint into the model.

        Args:
            folder: The checkpoint.
        """
        load_checkpoint_values(self, folder)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the Trainer's loader; an order at random follows the epoch."""
        with without_rest(self.args, self.whole_batches):
            loader = super().get_train_dataloader()
        choose_order(loader, self._order.generator)
        return loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, over those groups.

        Args:
            args: As for the Trainer.
            kwargs: As for the Trainer.

        Returns:
            The optimizer.
        """
        if self.optimizer is None:
            model: Any = self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model,
                set(self.get_decay_parameter_names(model)),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                magnitude_rate=self.magnitude_rate,
                magnitude_decay=self.magnitude_decay,
                rates=self.rates,
            )
            self.optimizer = cls(groups, **options)
        return self.optimizer
