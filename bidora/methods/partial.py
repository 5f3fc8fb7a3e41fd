"""Methods that train some of a model's own tensors, and save those alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.methods._tensors import load_trained, save_trained
from bidora.methods.base import (
    OF_ADAPTERS,
    OF_LORA_PLUS,
    OF_MAGNITUDES,
    OF_WEIGHTS,
    SEARCH_ONLY,
    Method,
)
from bidora.methods.loading import base_lines

if TYPE_CHECKING:
    from torch import nn

    from bidora.models import Base
    from bidora.runs.job_settings import JobSettings

__all__ = ["Partial", "Probe"]

FILE = "trained.safetensors"


class Partial(Method):
    """What is trained is frozen or not by tensor; the saved file holds no others."""

    ignores: ClassVar[tuple[str, ...]] = (
        *SEARCH_ONLY,
        *OF_MAGNITUDES,
        *OF_LORA_PLUS,
        *OF_ADAPTERS,
    )

    def save(self, model: Any, folder: Path) -> None:
        """Write the trained tensors, as one safetensors file.

        Args:
            model: The model.
            folder: Where to.
        """
        save_trained(model, folder / FILE)

    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the base with the saved tensors.

        Args:
            base: The loaded model.
            folder: Where they are.
        """
        load_trained(base.model, folder / FILE)
        return base.model

    def loading_code(self, names: Mapping[str, str]) -> str:
        """Return lines that load the tensors in plain transformers.

        Args:
            names: `folder`, `base`, `auto_model` and `pooling`.
        """
        lines = base_lines(names, "from safetensors.torch import load_file\n")
        return f"""\
{lines}
trained = load_file({names["folder"]!r} + "/{FILE}")
foreign = base.load_state_dict(trained, strict=False).unexpected_keys
if foreign:
    raise ValueError(f"the trained weights do not fit the base model: {{foreign}}")
model = base.eval()
"""


class Probe(Partial):
    """The frozen model and a linear head that is fitted, not trained: phase 0 alone."""

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "a linear head on the frozen model, fitted within seconds"
    phases: ClassVar[tuple[str, ...]] = ("probe",)
    ignores: ClassVar[tuple[str, ...]] = (
        *Partial.ignores,
        *OF_WEIGHTS,
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "warmup_ratio",
        "lr_scheduler_type",
        "gradient_checkpointing",
        "start",
        "average_last",
        "early_stopping_patience",
    )

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the model with everything but the head frozen.

        Args:
            base: The loaded model.
            settings: Not used.
        """
        del settings
        model = base.model.requires_grad_(False)
        for name in base.head:
            model.get_submodule(name).requires_grad_(True)
        return model
