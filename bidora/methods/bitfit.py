"""BitFit: the biases of a model and its head are trained, and nothing else [ZGR22]."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bidora import defaults
from bidora.errors import UserError
from bidora.methods.base import OF_WEIGHTS
from bidora.methods.partial import Partial

if TYPE_CHECKING:
    from torch import nn

    from bidora.models import Base
    from bidora.runs.job_settings import JobSettings

__all__ = ["BitFit", "biases"]


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


class BitFit(Partial):
    """Train the biases and the head in a frozen model."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "BitFit: the biases of the model and its head"
    usual_rates: ClassVar[tuple[float, float]] = (
        defaults.BITFIT_LEARNING_RATE,
        defaults.BITFIT_LEARNING_RATE,
    )
    ignores: ClassVar[tuple[str, ...]] = (*Partial.ignores, *OF_WEIGHTS)

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
