"""From a probe to the head that training starts from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from bidora.errors import UserError
from bidora.probing.features import extract
from bidora.probing.fit import Features, LinearFit, fit_linear
from bidora.trainer.upstream import collator_of

__all__ = ["Probe", "StartFromProbe", "probe", "set_head"]


@dataclass(frozen=True)
class Probe:
    """What `probe` did.

    Args:
        fit: The head that the model has now.
        features: What it was fitted on.
    """

    fit: LinearFit
    features: Features


def probe(
    trainer: Any,
    dataset: Any = None,
    *,
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> Probe:
    """Fit a linear head on the frozen model, and let training start from it.

    With a Trainer, this is the one line to add to a script, before `train()`:

        bidora.probe(trainer)

    The head is fitted on its training examples and written into the model. A
    `BiDoRATrainer` fits it again when its search begins, on the examples that the
    directions learn on, and when a fresh retraining begins, on all: so the search's head
    has not seen what is held back for the magnitudes.

    The model's last linear layer is the head, whatever its name. Nothing else of the
    model changes, nor do modes, gradients and random numbers. A warning is given if the
    model has adapters and its head is frozen, for then it is not saved with them.

    Args:
        trainer: A Trainer; or a model, with `dataset` and `collator`.
        dataset: Examples with labels; the Trainer's training examples by default.
        collator: Makes a batch of a list of examples; the Trainer's by default.

    Returns:
        What was fitted, and on what.

    Raises:
        UserError: If the model's outputs are not those of a linear layer, or another part
            shares its weight; if the examples have no labels, or a label is a class that
            it has no output for.
    """
    if isinstance(trainer, nn.Module):
        if dataset is None or collator is None:
            raise UserError(
                "probe(model) needs dataset= and collator=; a Trainer has both itself."
            )
        return _fit_into(trainer, dataset, collator)
    dataset = trainer.train_dataset if dataset is None else dataset
    found = _fit_into(trainer.model, dataset, collator or collator_of(trainer))
    if hasattr(trainer, "outer_level"):
        trainer.remove_callback(StartFromProbe)  # that of an earlier call
        trainer.add_callback(StartFromProbe(trainer, collator))
    return found


class StartFromProbe(TrainerCallback):
    """Fit the head when a phase begins at its first step, on the phase's own examples.

    A warm retraining goes on from the search's head, which is left alone.

    Args:
        trainer: A `BiDoRATrainer`.
        collator: Makes a batch of a list of examples; the Trainer's by default.
    """

    def __init__(self, trainer: Any, collator: Any = None) -> None:
        self.trainer = trainer
        self.collator = collator or collator_of(trainer)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Set the head, unless the phase goes on from somewhere."""
        trainer = self.trainer
        if state.global_step > 0:
            return
        if trainer.phase == "retrain" and args.bidora_settings()["retrain"] != "fresh":
            return
        _fit_into(trainer.model, trainer.train_dataset, self.collator)


def _fit_into(model: Any, dataset: Any, collator: Any) -> Probe:
    features, layer = extract(model, dataset, collator)
    _check_head(model, layer)
    fit = fit_linear(features)
    set_head(layer, fit)
    return Probe(fit, features)


def _check_head(model: Any, layer: nn.Linear) -> None:
    """Refuse a head that is not the model's alone, and warn of one that is not saved.

    Args:
        model: The model.
        layer: Its head.

    Raises:
        UserError: If another module has the same weight.
    """
    names = {
        module: name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
    }
    name = names[layer].removesuffix(".base_layer")
    for other, place in names.items():
        if other is not layer and any(
            parameter is layer.weight for parameter in other.parameters(recurse=False)
        ):
            raise UserError(
                f"no probe can be fitted: the head {name} shares its weight with {place}, "
                "which would change too; language models share theirs with the input "
                "embeddings. Load the model with a head of its own, such as by "
                "AutoModelForSequenceClassification."
            )
    is_saved = layer.weight.requires_grad or "modules_to_save" in name
    if hasattr(model, "peft_config") and not is_saved:
        warnings.warn(
            f"the probe is written into the head {name}, which is frozen, and so no part "
            "of what is saved with the adapter: a model that is loaded from there will "
            f"have another head. Add modules_to_save=[{name!r}] to the adapter's config.",
            UserWarning,
            stacklevel=4,
        )


@torch.no_grad()
def set_head(layer: nn.Linear, fit: LinearFit) -> None:
    """Write a fit into a linear layer.

    Args:
        layer: The layer.
        fit: Weight and bias.
    """
    layer.weight.copy_(torch.as_tensor(fit.weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.as_tensor(fit.bias))
