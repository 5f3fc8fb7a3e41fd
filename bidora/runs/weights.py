"""How far the weights of a run are from the base model's, at the points of its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bidora.analysis import WeightChange, effective_weight, weight_change
from bidora.dora.peft import DoraAdapter, lora_layers
from bidora.errors import UserError
from bidora.runs.recorder import Record

__all__ = ["WeightRecorder", "trained_weights"]

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

Pair = Callable[[], tuple[Tensor, Tensor]]
"""Gives a weight and its base, `(out, in)` both."""


class WeightRecorder(TrainerCallback):
    """Write down ΔM and ΔD of each trained weight, at every evaluation after a step.

    It draws no random numbers and writes to no tensor, so the training stays as it is. A
    point that a resumed run comes by again is not written twice.

    Args:
        trainer: The Trainer; in a `BiDoRATrainer`, its `phase` names the phase.
        weights: What `trained_weights` returned.
        record: Called with each record as it comes.
        history: Records of the run that this one goes on from.
    """

    def __init__(
        self,
        trainer: Any,
        weights: Mapping[str, Pair],
        record: Callable[[Record], None],
        history: Sequence[Record] = (),
    ) -> None:
        self.trainer = trainer
        self.weights = weights
        self.record = record
        self._seen = {(r["phase"], r["step"]) for r in history if "weights" in r}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the weights; evaluations of several sets make one record."""
        point = (getattr(self.trainer, "phase", None) or "train", state.global_step)
        if not state.global_step or point in self._seen:
            return
        self._seen.add(point)
        found = {name: _change(pair) for name, pair in self.weights.items()}
        self.record(
            {
                "phase": point[0],
                "step": point[1],
                "weights": {
                    name: {
                        "delta_m": change.magnitude,
                        "delta_d": change.direction,
                        **({"zero_rows": change.zero_rows} if change.zero_rows else {}),
                    }
                    for name, change in found.items()
                },
            }
        )


def trained_weights(
    model: nn.Module, linear_layers: Iterable[str], method: str
) -> dict[str, Pair]:
    """Return the weights of linear layers that a training changes, each with its base.

    The base of an adapted layer is in the layer. That of a weight which is trained itself
    is copied now, into memory of the CPU, so call this before a checkpoint is loaded.

    Args:
        model: What a method's `adapt` returned.
        linear_layers: Names of the linear layers before that.
        method: The method's name, for the message.

    Returns:
        What gives both, by the name of the layer in the base model.

    Raises:
        UserError: If there are none.
    """
    found: dict[str, Pair] = {
        name.removeprefix(PEFT_PREFIX): _adapted(layer)
        for name, layer in lora_layers(model)
    }
    modules = dict(model.named_modules())
    for name in linear_layers:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if name not in found and isinstance(weight, Tensor) and weight.requires_grad:
            found[name] = _trained(weight, transposed=not isinstance(module, nn.Linear))
    if not found:
        raise UserError(
            f"--record-weights: method {method} changes no weight of the base model's "
            "linear layers, so there is nothing to keep; leave it out."
        )
    return found


def _adapted(layer: DoraAdapter) -> Pair:
    def pair() -> tuple[Tensor, Tensor]:
        base = layer.weight.fetch()
        magnitude = layer.magnitude if layer.has_magnitude else None
        factors = layer.lora_a, layer.lora_b, layer.scaling
        return effective_weight(base, *factors, magnitude), base

    return pair


def _trained(weight: Tensor, *, transposed: bool) -> Pair:
    """Return the pair of a weight; that of transformers' Conv1D is `(in, out)`."""
    first = weight.detach().to("cpu", copy=True)

    def pair() -> tuple[Tensor, Tensor]:
        return (weight.T, first.T) if transposed else (weight, first)

    return pair


@torch.no_grad()
def _change(pair: Pair) -> WeightChange:
    return weight_change(*pair())
