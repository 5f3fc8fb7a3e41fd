"""Full fine-tuning: every weight is trained, and the whole model is saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bidora import defaults
from bidora.methods.base import (
    OF_ADAPTERS,
    OF_LORA_PLUS,
    OF_MAGNITUDES,
    SEARCH_ONLY,
    Method,
)
from bidora.methods.loading import whole_lines

if TYPE_CHECKING:
    from torch import nn

    from bidora.models import Base
    from bidora.runs.job_settings import JobSettings

__all__ = ["Full"]


class Full(Method):
    """Train everything."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "full fine-tuning: every weight of the model"
    saves_whole: ClassVar[bool] = True
    usual_rates: ClassVar[tuple[float, float]] = (
        defaults.FULL_LEARNING_RATE,
        defaults.OTHER_FULL_LEARNING_RATE,
    )
    ignores: ClassVar[tuple[str, ...]] = (
        *SEARCH_ONLY,
        *OF_MAGNITUDES,
        *OF_LORA_PLUS,
        *OF_ADAPTERS,
    )

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the model as it is.

        Args:
            base: The loaded model.
            settings: Not used.
        """
        del settings
        return base.model.requires_grad_(True)

    def save(self, model: Any, folder: Path) -> None:
        """Write the whole model.

        Args:
            model: The model.
            folder: Where to.
        """
        model.save_pretrained(str(folder))

    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the saved model.

        Args:
            base: A model of its class.
            folder: Where it is.
        """
        from bidora.models import without_bars

        with without_bars():
            return type(base.model).from_pretrained(str(folder), local_files_only=True)

    def loading_code(self, names: Mapping[str, str]) -> str:
        """Return lines that load the model in plain transformers.

        Args:
            names: `folder`, `auto_model` and `pooling`.
        """
        return whole_lines(names)
