"""Stochastic gradient descent, in all options of torch.optim.SGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hypergrad._checks import check_flag, check_number
from hypergrad.rules._many import Many
from hypergrad.rules.base import Counts, ElementwiseRule, ManySlots, check_settings

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

    def step_many(
        self, w: Many, slots: ManySlots, g: Many, counts: Counts
    ) -> tuple[Many, ManySlots]:
        """Return tensors and their slots after a step."""
        del counts
        g = -g if self.maximize else g
        if self.weight_decay:
            g = g.plus(w, self.weight_decay)
        if not self.momentum:
            return w.plus(g, -self.lr), dict(slots)
        if "momentum_buffer" in slots:
            new = (slots["momentum_buffer"] * self.momentum).plus(g, 1 - self.dampening)
        else:
            new = g.copies()
        along = g.plus(new, self.momentum) if self.nesterov else new
        return w.plus(along, -self.lr), {"momentum_buffer": new}

    def pull_many(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_bar: Many,
        slots_bar: ManySlots,
    ) -> tuple[Many, ManySlots, Many]:
        """Return the adjoints of tensors, of their slots and of their gradients."""
        del w, g, counts
        along_bar = w_bar * -self.lr
        known = "momentum_buffer" in slots
        out: ManySlots = {}
        if not self.momentum:
            g_bar = along_bar
            if known:
                out = {"momentum_buffer": slots_bar.get("momentum_buffer", w_bar * 0.0)}
        else:
            # along = g + μ·new with nesterov, else new.
            buffer_bar = along_bar * (self.momentum if self.nesterov else 1.0)
            if "momentum_buffer" in slots_bar:
                buffer_bar = buffer_bar + slots_bar["momentum_buffer"]
            g_bar = buffer_bar * (1.0 - self.dampening if known else 1.0)
            if self.nesterov:
                g_bar = g_bar + along_bar
            if known:
                out = {"momentum_buffer": buffer_bar * self.momentum}
        if self.weight_decay:
            w_bar = w_bar.plus(g_bar, self.weight_decay)
        return w_bar, out, -g_bar if self.maximize else g_bar
