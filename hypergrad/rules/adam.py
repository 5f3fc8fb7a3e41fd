"""Adam and AdamW, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad._checks import check_flag
from hypergrad.rules._many import Many
from hypergrad.rules.base import check_settings
from hypergrad.rules.elementwise import Counts, ElementwiseRule, ManySlots

__all__ = ["Adam", "AdamW"]


@dataclass(frozen=True)
class Adam(ElementwiseRule):
    r"""Step by the ratio of running means, as torch.optim.Adam [KB15, Alg. 1].

    $$m_+ = \beta_1 m + (1-\beta_1) g,\quad v_+ = \beta_2 v + (1-\beta_2) g^2,\quad
      w_+ = w - \frac{\mathrm{lr}}{c_1}\,\frac{m_+}{\sqrt{v_+/c_2} + \epsilon},
      \quad c_i = 1 - \beta_i^t$$

    The adjoint is exact at g = m = v = 0 too: $\sqrt{v_+}$ has no derivative there, but
    is multiplied by $m_+ = 0$, and $\partial w_+/\partial g$ is
    $-\mathrm{lr}\,(1-\beta_1)/(c_1\epsilon)$. With amsgrad, where the new v equals the
    largest so far, the derivative goes to the new one.

    Args:
        lr: learning rate.
        betas: decay of m, and of v.
        eps: ε.
        weight_decay: coupled (added to the gradient).
        amsgrad: whether to divide by the largest v so far.
        maximize: whether to climb.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a setting out of range.

    Example:
        The first step has length lr.

        >>> import torch
        >>> w, g = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
        >>> Adam(0.1).apply(w, {}, g)[0]["w"]
        tensor([0.9000])
    """

    kind: ClassVar[str] = "adam"
    counts_steps: ClassVar[bool] = True
    _decouples: ClassVar[bool] = False
    settings: ClassVar[frozenset[str]] = frozenset({"lr", "betas", "weight_decay"})
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        # A checkpoint brings a list back.
        betas = self.betas
        if not isinstance(betas, Sequence) or len(betas) != 2:
            msg = (
                f"betas={betas!r} must be two numbers: the decay of the mean gradient, "
                "and that of its square. Pass e.g. betas=(0.9, 0.999)."
            )
            raise TypeError(msg)
        object.__setattr__(self, "betas", tuple(betas))
        check_settings(
            {
                "lr": self.lr,
                "betas[0]": betas[0],
                "betas[1]": betas[1],
                "eps": self.eps,
                "weight_decay": self.weight_decay,
            },
            below_one=("betas[0]", "betas[1]"),
        )
        check_flag("amsgrad", self.amsgrad)
        check_flag("maximize", self.maximize)

    def adaptive(self, params: Mapping[str, Tensor]) -> frozenset[str]:
        """Return all parameters."""
        return frozenset(params)

    @property
    def _coupled(self) -> float:
        return 0.0 if self._decouples else self.weight_decay

    @property
    def _decoupled(self) -> float:
        return self.weight_decay if self._decouples else 0.0

    def _moments(self, w: Many, slots: ManySlots, g: Many) -> tuple[Many, Many, Many]:
        # The same operations as torch.optim, so that they round alike.
        g = -g if self.maximize else g
        if self._coupled:
            g = g.plus(w, self._coupled)
        beta1, beta2 = self.betas
        m = slots["exp_avg"] if "exp_avg" in slots else w.zeros()
        v = slots["exp_avg_sq"] if "exp_avg_sq" in slots else w.zeros()
        return g, m.lerp(g, 1 - beta1), (v * beta2).plus_product(g, g, 1 - beta2)

    def _corrections(self, counts: Counts) -> tuple[list[float], list[float]]:
        beta1, beta2 = self.betas
        return (
            [1 - beta1 ** (t + 1) for t in counts],
            [1 - beta2 ** (t + 1) for t in counts],
        )

    def step_many(
        self, w: Many, slots: ManySlots, g: Many, counts: Counts
    ) -> tuple[Many, ManySlots]:
        """Return tensors and their slots after a step."""
        _, m, v = self._moments(w, slots, g)
        new: ManySlots = {"exp_avg": m, "exp_avg_sq": v}
        top = v
        if self.amsgrad:
            top = v.maximum(slots["max_exp_avg_sq"]) if "max_exp_avg_sq" in slots else v
            new["max_exp_avg_sq"] = top
        c1, c2 = self._corrections(counts)
        d = top.sqrt() / [math.sqrt(c) for c in c2] + self.eps
        if self._decoupled:
            w = w * (1 - self.lr * self._decoupled)
        return w.plus_quotient(m, d, [-self.lr / c for c in c1]), new

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
        beta1, beta2 = self.betas
        g, m_bar, v_bar, out = self._bars(w, slots, g, counts, w_bar, slots_bar)
        g_bar = (1 - beta1) * m_bar + 2 * (1 - beta2) * g * v_bar
        out["exp_avg"] = beta1 * m_bar
        out["exp_avg_sq"] = beta2 * v_bar
        if self._decoupled:
            w_bar = w_bar * (1 - self.lr * self._decoupled)
        if self._coupled:
            w_bar = w_bar.plus(g_bar, self._coupled)
        return w_bar, out, -g_bar if self.maximize else g_bar

    def _bars(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_bar: Many,
        slots_bar: ManySlots,
    ) -> tuple[Many, Many, Many, ManySlots]:
        """Return the gradient with decay, and adjoints.

        They are those of the new moments, and that of the largest v so far.
        """
        g, m, v = self._moments(w, slots, g)
        c1, c2 = self._corrections(counts)
        top, newest = self._top(v, slots)
        s = (top / c2).sqrt()
        d = s + self.eps
        step = w_bar * [self.lr / c for c in c1]
        m_bar = -(step / d)
        if "exp_avg" in slots_bar:
            m_bar = m_bar + slots_bar["exp_avg"]
        # Where s = 0, m is 0 as well, and so is all that passes through the root.
        through = step * m / (d * d * s.at_least(_TINY) * [2 * c for c in c2])
        out: ManySlots = {}
        if self.amsgrad:
            if "max_exp_avg_sq" in slots_bar:
                through = through + slots_bar["max_exp_avg_sq"]
            if newest is not None:
                out["max_exp_avg_sq"] = through - through * newest
                through = through * newest
            else:
                out["max_exp_avg_sq"] = through * 0.0
        v_bar = through
        if "exp_avg_sq" in slots_bar:
            v_bar = v_bar + slots_bar["exp_avg_sq"]
        return g, m_bar, v_bar, out

    def _slopes(self, counts: Counts) -> tuple[list[float], list[float]]:
        """Return the derivatives of both corrections in their betas."""
        beta1, beta2 = self.betas
        return (
            [-(t + 1) * beta1**t for t in counts],
            [-(t + 1) * beta2**t for t in counts],
        )

    def _top(self, v: Many, slots: ManySlots) -> tuple[Many, Many | None]:
        """Return the second moment to divide by, and 1 where it is the new one."""
        known = slots.get("max_exp_avg_sq") if self.amsgrad else None
        if known is None:
            return v, None
        return v.maximum(known), v.is_at_least(known)

    def pull_settings(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_bar: Many,
        slots_bar: ManySlots,
    ) -> dict[str, list[Tensor]]:
        """Return the adjoints of learning rate, betas and weight decay."""
        beta1, beta2 = self.betas
        _, m, v = self._moments(w, slots, g)
        g, m_bar, v_bar, _ = self._bars(w, slots, g, counts, w_bar, slots_bar)
        (c1, c2), (slope1, slope2) = self._corrections(counts), self._slopes(counts)
        s = (self._top(v, slots)[0] / c2).sqrt()
        d = s + self.eps
        each = range(len(counts))
        along = w_bar * m / d  # times -lr/c1: what the step adds
        lr_bar = along * [-1 / c for c in c1]
        if self._decouples:
            lr_bar = lr_bar - w_bar * w * self._decoupled
            decay_bar = w_bar * w * -self.lr
        else:
            decay_bar = ((1 - beta1) * m_bar + 2 * (1 - beta2) * g * v_bar) * w
        # A beta acts on its moment, and on the correction of its bias.
        one = m_bar * (slots["exp_avg"] - g if "exp_avg" in slots else -g)
        one = one + along * [self.lr * slope1[i] / c1[i] ** 2 for i in each]
        two = v_bar * (
            slots["exp_avg_sq"] - g * g if "exp_avg_sq" in slots else -(g * g)
        )
        halves = [self.lr / c1[i] * slope2[i] / (2 * c2[i]) for i in each]
        two = two - along * s / d * halves
        betas = zip(one.sums(), two.sums(), strict=True)
        return {
            "lr": lr_bar.sums(),
            "betas": [torch.stack(pair) for pair in betas],
            "weight_decay": decay_bar.sums(),
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
        beta1, beta2 = self.betas
        g, m, v = self._moments(w, slots, g)
        (c1, c2), (slope1, slope2) = self._corrections(counts), self._slopes(counts)
        zeros, each = w.zeros(), range(len(counts))
        none = [0.0 for _ in each]
        lr_dot = settings_dot.get("lr", none)
        decay_dot = settings_dot.get("weight_decay", none)
        betas_dot = settings_dot.get("betas", [(0.0, 0.0) for _ in each])
        one_dot, two_dot = [b[0] for b in betas_dot], [b[1] for b in betas_dot]
        g_dot = -g_dot if self.maximize else g_dot
        if self._coupled:
            g_dot = g_dot.plus(w_dot, self._coupled)
        if not self._decouples:
            g_dot = g_dot + w * decay_dot
        m_dot = slots_dot.get("exp_avg", zeros) * beta1 + g_dot * (1 - beta1)
        m_dot = m_dot + (slots.get("exp_avg", zeros) - g) * one_dot
        v_dot = slots_dot.get("exp_avg_sq", zeros) * beta2 + g * g_dot * (2 - 2 * beta2)
        v_dot = v_dot + (slots.get("exp_avg_sq", zeros) - g * g) * two_dot
        out: ManySlots = {"exp_avg": m_dot, "exp_avg_sq": v_dot}
        top, newest = self._top(v, slots)
        top_dot = v_dot
        if newest is not None:
            known_dot = slots_dot.get("max_exp_avg_sq", zeros)
            top_dot = known_dot + (v_dot - known_dot) * newest
        if self.amsgrad:
            out["max_exp_avg_sq"] = top_dot
        s = (top / c2).sqrt()
        d = s + self.eps
        # In the order of the adjoint: where s = 0, m is 0 too.
        by_root = m / (d * d * s.at_least(_TINY) * [2 * c for c in c2])
        along_dot = m_dot / d - by_root * top_dot
        # A beta acts on its moment, and on the correction of its bias.
        along_dot = along_dot + m / d * s / d * [
            two_dot[i] * slope2[i] / (2 * c2[i]) for i in each
        ]
        moved = w_dot
        if self._decouples:
            shrunk = [
                lr_dot[i] * self._decoupled + self.lr * decay_dot[i] for i in each
            ]
            moved = moved * (1 - self.lr * self._decoupled) - w * shrunk
        rate_dot = [
            lr_dot[i] / c1[i] - self.lr * one_dot[i] * slope1[i] / c1[i] ** 2
            for i in each
        ]
        return moved - along_dot * [self.lr / c for c in c1] - m / d * rate_dot, out


_TINY = 1e-150
"""In the place of a root of 0, whose numerator is 0; float32 takes it for 0."""


@dataclass(frozen=True)
class AdamW(Adam):
    r"""Adam whose weight decay shrinks w itself, as torch.optim.AdamW [LH19, Alg. 2].

    $$w_+ = (1 - \mathrm{lr}\cdot\mathrm{weight\_decay})\, w -
      \frac{\mathrm{lr}}{c_1}\,\frac{m_+}{\sqrt{v_+/c_2} + \epsilon}$$

    Args: as `Adam`.

    Example:
        ∂update/∂g at g=.3, m=.1, v=.02, t=7, lr=1 is .111004:

        >>> import torch
        >>> f64 = torch.float64
        >>> state = {
        ...     "w": {
        ...         "step": torch.tensor(6.0),
        ...         "exp_avg": torch.tensor([0.1], dtype=f64),
        ...         "exp_avg_sq": torch.tensor([0.02], dtype=f64),
        ...     }
        ... }
        >>> one = {"w": torch.ones(1, dtype=f64)}
        >>> g = {"w": torch.tensor([0.3], dtype=f64)}
        >>> pulled = AdamW(1.0).pullback(one, state, g, one, {})
        >>> round(-pulled.grads["w"].item(), 6)
        0.111004
    """

    kind: ClassVar[str] = "adamw"
    _decouples: ClassVar[bool] = True
    weight_decay: float = 0.01
