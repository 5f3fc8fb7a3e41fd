"""BitFit: the biases of a model and its head are trained, and nothing else [ZGR22]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bidora import defaults
from bidora.errors import UserError
from bidora.methods._tensors import load_trained, save_trained
from bidora.methods.base import (
    OF_ADAPTERS,
    OF_LORA_PLUS,
    OF_MAGNITUDES,
    SEARCH_ONLY,
    Method,
)

if TYPE_CHECKING:
    from torch import nn

    from bidora.models import Base
    from bidora.runs.settings import JobSettings

__all__ = ["BitFit", "biases"]

FILE = "bitfit.safetensors"


def biases(model: nn.Module) -> list[str]:
    """Return the names of a model's biases, those of its norms among them.

    Args:
        model: The model.

    Example:
        >>> from torch import nn
        >>> biases(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        ['0.bias', '1.bias']
    """
    return [name for name, _ in model.named_parameters() if name.endswith("bias")]


class BitFit(Method):
    """Train the biases and the head in a frozen model."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "BitFit: the biases of the model and its head"
    usual_rate: ClassVar[float | None] = defaults.BITFIT_LEARNING_RATE
    ignores: ClassVar[tuple[str, ...]] = (
        *SEARCH_ONLY,
        *OF_MAGNITUDES,
        *OF_LORA_PLUS,
        *OF_ADAPTERS,
    )

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the model, everything but its biases and head frozen.

        Args:
            base: The loaded model.
            settings: Its model is named where it does not fit.

        Raises:
            UserError: If the model has no biases.
        """
        model = base.model.requires_grad_(False)
        for name in base.head:
            model.get_submodule(name).requires_grad_(True)
        of_head = {name for name, p in model.named_parameters() if p.requires_grad}
        found = [name for name in biases(model) if name not in of_head]
        if not found:
            raise UserError(
                f"--method bitfit trains biases, and {settings.model!r} has none beside "
                "its head, as Llama and its kin; choose another method, such as lora."
            )
        for name in found:
            model.get_parameter(name).requires_grad_(True)
        return model

    def save(self, model: Any, folder: Path) -> None:
        """Write the biases and the head.

        Args:
            model: The model.
            folder: Where to.
        """
        save_trained(model, folder / FILE)

    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the base with the saved biases and head.

        Args:
            base: The loaded model.
            folder: Where they are.
        """
        load_trained(base.model, folder / FILE)
        return base.model

    def loading_code(self, names: Mapping[str, str]) -> str:
        """Return lines that load them in plain transformers.

        Args:
            names: `folder`, `base` and `auto_model`.
        """
        return f"""\
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, {names["auto_model"]}

config = AutoConfig.from_pretrained({names["folder"]!r})
model = {names["auto_model"]}.from_pretrained(
    {names["base"]!r}, config=config, ignore_mismatched_sizes=True
).eval()
trained = load_file({f"{names['folder']}/{FILE}"!r})
model.load_state_dict(trained, strict=False)
tokenizer = AutoTokenizer.from_pretrained({names["folder"]!r})
"""
