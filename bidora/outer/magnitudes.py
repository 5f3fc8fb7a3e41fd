"""BiDoRA's outer level: the magnitudes of DoRA."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bidora.dora import magnitudes
from bidora.dora.peft import dora_layers
from bidora.outer.base import OuterLevel

__all__ = ["Magnitudes", "trainable_magnitudes"]


class Magnitudes(OuterLevel):
    """The magnitudes of a model's DoRA adapter [QZX24]."""

    name: ClassVar[str] = "magnitudes"
    adapter: ClassVar[str] = "use_dora"

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trainable magnitudes.

        Args:
            model: A model with a DoRA adapter.

        Raises:
            TypeError: If it is no module.
            ValueError: If it has no magnitudes, none that is trainable, those of several
                adapters, or those of one that is not active.
        """
        return trainable_magnitudes(model)

    def settle(self, model: nn.Module) -> None:
        """Freeze all magnitudes, of whichever adapter.

        Args:
            model: The model.
        """
        for parameter in magnitudes(model).values():
            parameter.requires_grad_(False)


def trainable_magnitudes(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the magnitudes that a search would move, by name.

    Args:
        model: a model with a DoRA adapter.

    Raises:
        TypeError: not a module.
        ValueError: no magnitudes, none that is trainable, those of several adapters, or
            those of one that is not active.
    """
    if not isinstance(model, nn.Module):
        msg = f"model must be a torch.nn.Module, got {type(model).__name__}."
        raise TypeError(msg)
    found = magnitudes(model)
    if not found:
        msg = (
            "the model has no DoRA magnitudes: no adapter with use_dora=True is in it. "
            "Make one with get_peft_model(model, LoraConfig(use_dora=True, ...)) or "
            "model.add_adapter(LoraConfig(use_dora=True, ...))."
        )
        raise ValueError(msg)
    trainable = {n: p for n, p in found.items() if p.requires_grad}
    if not trainable:
        msg = (
            f"all {len(found)} DoRA magnitudes of the model are frozen: an adapter "
            "loaded for inference, perhaps. Load it with is_trainable=True, or make it "
            "active with model.set_adapter(name)."
        )
        raise ValueError(msg)
    adapters = {
        name.split("lora_magnitude_vector.")[1].split(".")[0] for name in trainable
    }
    if len(adapters) > 1:
        msg = (
            f"magnitudes of several adapters are trainable ({sorted(adapters)}): BiDoRA "
            "trains one. Make one active with model.set_adapter(name)."
        )
        raise ValueError(msg)
    (adapter,) = adapters
    layers = [layer for _, layer in dora_layers(model) if layer.adapter == adapter]
    if not any(layer.is_active for layer in layers):
        msg = (
            f"the magnitudes of the adapter {adapter!r} are trainable, but it is not "
            "active, so that no output depends on them. Call "
            f"model.set_adapter({adapter!r}) first."
        )
        raise ValueError(msg)
    return trainable
