"""Stochastic gradient descent, in all options of torch.optim.SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hypergrad.rules.base import ElementwiseRule, Slots, check_settings

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(ElementwiseRule):
    r"""Step down the gradient, with momentum where asked.

    $$\tilde g = \pm g + \eta w,\quad b_+ = \mu b + (1 - \tau)\tilde g,\quad
      w_+ = w - \mathrm{lr}\, b_+ \;\text{or}\; w - \mathrm{lr}(\tilde g + \mu b_+)
      \text{ (nesterov)}$$

    The first step sets $b_+ = \tilde g$, as torch does.

    Args:
        lr: learning rate.
        momentum: μ.
        dampening: τ.
        weight_decay: η, coupled (added to the gradient).
        nesterov: whether to step along $\tilde g + \mu b_+$.
        maximize: whether to climb.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import torch
        >>> w, g = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
        >>> SGD(0.1).apply(w, {}, g)[0]["w"]
        tensor([0.8000])
    """

    kind: ClassVar[str] = "sgd"
    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check_settings(
            {
                "lr": self.lr,
                "momentum": self.momentum,
                "weight_decay": self.weight_decay,
            }
        )

    def step_one(self, w: Tensor, slots: Slots, g: Tensor) -> tuple[Tensor, Slots]:
        """Return one tensor and its slots after a step."""
        g = (-g if self.maximize else g) + self.weight_decay * w
        if not self.momentum:
            return w - self.lr * g, {}
        old = slots.get("momentum_buffer")
        new = g if old is None else self.momentum * old + (1 - self.dampening) * g
        along = g + self.momentum * new if self.nesterov else new
        return w - self.lr * along, {"momentum_buffer": new}

    def pull_one(
        self, w: Tensor, slots: Slots, g: Tensor, w_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Slots, Tensor]:
        """Return the adjoints of one tensor, its slots and its gradient."""
        along_bar = -self.lr * w_bar
        out: Slots = {}
        if not self.momentum:
            g_bar = along_bar
        else:
            g_bar = along_bar if self.nesterov else 0 * along_bar
            new_bar = along_bar * self.momentum if self.nesterov else along_bar
            if "momentum_buffer" in slots_bar:
                new_bar = new_bar + slots_bar["momentum_buffer"]
            if slots.get("momentum_buffer") is None:
                g_bar = g_bar + new_bar
            else:
                g_bar = g_bar + (1 - self.dampening) * new_bar
                out["momentum_buffer"] = self.momentum * new_bar
        w_bar = w_bar + self.weight_decay * g_bar
        return w_bar, out, -g_bar if self.maximize else g_bar
