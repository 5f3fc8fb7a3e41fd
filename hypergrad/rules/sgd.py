"""Stochastic gradient descent, in all options of torch.optim.SGD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hypergrad._checks import check_flag, check_number
from hypergrad.rules._many import Many
from hypergrad.rules.base import check_settings
from hypergrad.rules.elementwise import Counts, ElementwiseRule, ManySlots

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
    settings: ClassVar[frozenset[str]] = frozenset({"lr", "momentum", "weight_decay"})
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
        g, new, along = self._along(w, slots, g)
        if not self.momentum:
            return w.plus(g, -self.lr), dict(slots)
        return w.plus(along, -self.lr), {"momentum_buffer": new}

    def _along(self, w: Many, slots: ManySlots, g: Many) -> tuple[Many, Many, Many]:
        """Return the gradient with decay, the new buffer, and what is stepped along."""
        g = -g if self.maximize else g
        if self.weight_decay:
            g = g.plus(w, self.weight_decay)
        if not self.momentum:
            return g, g, g
        if "momentum_buffer" in slots:
            new = (slots["momentum_buffer"] * self.momentum).plus(g, 1 - self.dampening)
        else:
            new = g.copies()
        return g, new, g.plus(new, self.momentum) if self.nesterov else new

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

    def pull_settings(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_bar: Many,
        slots_bar: ManySlots,
    ) -> dict[str, list[Tensor]]:
        """Return the adjoints of learning rate, momentum and weight decay."""
        found = self.pull_many(w, slots, g, counts, w_bar, slots_bar)
        # The adjoint of the gradient before its sign is that with decay.
        shrunk_bar = -found[2] if self.maximize else found[2]
        _, new, along = self._along(w, slots, g)
        along_bar = w_bar * -self.lr
        momentum_bar = w * 0.0
        if self.momentum:
            buffer_bar = along_bar * (self.momentum if self.nesterov else 1.0)
            if "momentum_buffer" in slots_bar:
                buffer_bar = buffer_bar + slots_bar["momentum_buffer"]
            if "momentum_buffer" in slots:
                momentum_bar = buffer_bar * slots["momentum_buffer"]
            if self.nesterov:
                momentum_bar = momentum_bar + along_bar * new
        return {
            "lr": (-(w_bar * along)).sums(),
            "momentum": momentum_bar.sums(),
            "weight_decay": (shrunk_bar * w).sums(),
        }

    def push_many(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_dot: Many,
        slots_dot: ManySlots,
        g_dot: Many,
        settings_dot: Mapping[str, Sequence[Any]],
    ) -> tuple[Many, ManySlots]:
        """Return the tangents of tensors and of their slots after a step."""
        del counts
        g, new, along = self._along(w, slots, g)
        g_dot = -g_dot if self.maximize else g_dot
        if self.weight_decay:
            g_dot = g_dot.plus(w_dot, self.weight_decay)
        if "weight_decay" in settings_dot:
            g_dot = g_dot + w * settings_dot["weight_decay"]
        known = slots.get("momentum_buffer")
        known_dot = slots_dot.get("momentum_buffer", w * 0.0)
        out: ManySlots = {}
        if not self.momentum:
            along_dot = g_dot
            if known is not None:
                out["momentum_buffer"] = known_dot
        else:
            new_dot = g_dot
            if known is not None:
                new_dot = (known_dot * self.momentum).plus(g_dot, 1 - self.dampening)
                if "momentum" in settings_dot:
                    new_dot = new_dot + known * settings_dot["momentum"]
            along_dot = new_dot
            if self.nesterov:
                along_dot = g_dot.plus(new_dot, self.momentum)
                if "momentum" in settings_dot:
                    along_dot = along_dot + new * settings_dot["momentum"]
            out["momentum_buffer"] = new_dot
        moved = w_dot.plus(along_dot, -self.lr)
        if "lr" in settings_dot:
            moved = moved - along * settings_dot["lr"]
        return moved, out
