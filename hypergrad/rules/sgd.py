"""Stochastic gradient descent, in all options of torch.optim.SGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad._checks import check_number
from hypergrad.rules.base import ElementwiseRule, Slots, check_settings
from hypergrad.solvers.base import check_flag

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(ElementwiseRule):
    r"""Step down the gradient, with momentum where asked.

    $$\tilde g = \pm g + \eta w,\quad b_+ = \mu b + (1 - \tau)\tilde g,\quad
      w_+ = w - \mathrm{lr}\, b_+ \;\text{or}\; w - \mathrm{lr}(\tilde g + \mu b_+)
      \text{ (nesterov)}$$

    The first step sets $b_+ = \tilde g$, as torch does. Without momentum the other two
    have no effect, and a buffer from before is kept as it is.

    Args:
        lr: learning rate.
        momentum: μ.
        dampening: τ, of either sign.
        weight_decay: η, coupled (added to the gradient).
        nesterov: whether to step along $\tilde g + \mu b_+$.
        maximize: whether to climb.

    Raises:
        TypeError: a setting of another kind.
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
        check_flag("nesterov", self.nesterov)
        check_flag("maximize", self.maximize)
        check_number("dampening", self.dampening)
        if not math.isfinite(self.dampening):
            msg = (
                f"dampening={self.dampening} must be finite. Pass the value that the "
                "inner optimizer has."
            )
            raise ValueError(msg)

    def step_one(self, w: Tensor, slots: Slots, g: Tensor) -> tuple[Tensor, Slots]:
        """Return one tensor and its slots after a step."""
        g = -g if self.maximize else g
        if self.weight_decay:
            g = torch.add(g, w, alpha=self.weight_decay)
        if not self.momentum:
            return torch.add(w, g, alpha=-self.lr), dict(slots)
        old = slots.get("momentum_buffer")
        if old is None:
            new = g.clone()
        else:
            new = torch.add(old * self.momentum, g, alpha=1 - self.dampening)
        along = torch.add(g, new, alpha=self.momentum) if self.nesterov else new
        return torch.add(w, along, alpha=-self.lr), {"momentum_buffer": new}

    def pull_one(
        self, w: Tensor, slots: Slots, g: Tensor, w_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Slots, Tensor]:
        """Return the adjoints of one tensor, its slots and its gradient."""
        along_bar = -self.lr * w_bar
        buffer = slots.get("momentum_buffer")
        buffer_bar = slots_bar.get("momentum_buffer", torch.zeros_like(w_bar))
        out: Slots = {}
        if not self.momentum:
            g_bar = along_bar
        else:
            g_bar = along_bar if self.nesterov else torch.zeros_like(w_bar)
            # along = g + μ·new with nesterov, else new.
            buffer_bar = (
                buffer_bar + (self.momentum if self.nesterov else 1) * along_bar
            )
            g_bar = g_bar + (1 if buffer is None else 1 - self.dampening) * buffer_bar
            buffer_bar = self.momentum * buffer_bar
        if buffer is not None:
            out["momentum_buffer"] = buffer_bar
        w_bar = w_bar + self.weight_decay * g_bar
        return w_bar, out, -g_bar if self.maximize else g_bar
