"""The contract of an outer level: what is learned on held-back data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import nn

__all__ = ["OuterLevel"]


class OuterLevel(ABC):
    """Which parameters of a model are learned on held-back data, and what ends that.

    Attributes:
        name: Name in the registry.
        adapter: The adapter that it needs, as PEFT's configuration calls it, such as
            `use_dora`; empty for none.

    Example:
        A level of the biases of a model:

        >>> class Biases(OuterLevel):
        ...     name = "biases"
        ...
        ...     def parameters(self, model):
        ...         named = model.named_parameters()
        ...         return {n: p for n, p in named if n.endswith("bias")}
        >>> import torch
        >>> list(Biases().parameters(torch.nn.Linear(2, 1)))
        ['bias']
    """

    name: ClassVar[str]
    adapter: ClassVar[str] = ""

    @abstractmethod
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what a search would move, by name: trainable, and a part of the model.

        Args:
            model: The model.

        Raises:
            ValueError: If there is none.
        """

    def settle(self, model: nn.Module) -> None:
        """End the search: by default, what it moved is frozen at its values.

        It is called again where a retraining goes on, whose model is a new one.

        Args:
            model: The model.
        """
        for parameter in self.parameters(model).values():
            parameter.requires_grad_(False)
