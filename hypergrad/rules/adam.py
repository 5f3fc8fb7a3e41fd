"""Adam and AdamW, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.rules.base import ElementwiseRule, Slots, check_settings
from hypergrad.solvers.base import check_flag

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
        beta1: decay of m.
        beta2: decay of v.
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
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        check_settings(
            {
                "lr": self.lr,
                "beta1": self.beta1,
                "beta2": self.beta2,
                "eps": self.eps,
                "weight_decay": self.weight_decay,
            },
            below_one=("beta1", "beta2"),
        )
        check_flag("amsgrad", self.amsgrad)
        check_flag("maximize", self.maximize)

    def adaptive(self, params: Mapping[str, Tensor]) -> frozenset[str]:
        """Return all parameters."""
        return frozenset(params)

    @property
    def _coupled(self) -> float:
        return self.weight_decay

    @property
    def _decoupled(self) -> float:
        return 0.0

    def _moments(
        self, w: Tensor, slots: Slots, g: Tensor
    ) -> tuple[int, Tensor, Tensor, Tensor]:
        # The same operations as torch.optim, so that they round alike.
        t = int(slots["step"]) + 1 if "step" in slots else 1
        g = -g if self.maximize else g
        if self._coupled:
            g = torch.add(g, w, alpha=self._coupled)
        zero = torch.zeros_like(w)
        m = torch.lerp(slots.get("exp_avg", zero), g, 1 - self.beta1)
        v = slots.get("exp_avg_sq", zero) * self.beta2
        return t, g, m, torch.addcmul(v, g, g, value=1 - self.beta2)

    def step_one(self, w: Tensor, slots: Slots, g: Tensor) -> tuple[Tensor, Slots]:
        """Return one tensor and its slots after a step."""
        t, _, m, v = self._moments(w, slots, g)
        new: Slots = {
            "step": torch.tensor(float(t)),
            "exp_avg": m,
            "exp_avg_sq": v,
        }
        top = v
        if self.amsgrad:
            top = torch.maximum(slots.get("max_exp_avg_sq", torch.zeros_like(v)), v)
            new["max_exp_avg_sq"] = top
        c1, c2 = 1 - self.beta1**t, 1 - self.beta2**t
        d = top.sqrt() / math.sqrt(c2) + self.eps
        if self._decoupled:
            w = w * (1 - self.lr * self._decoupled)
        return torch.addcdiv(w, m, d, value=-self.lr / c1), new

    def pull_one(
        self, w: Tensor, slots: Slots, g: Tensor, w_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Slots, Tensor]:
        """Return the adjoints of one tensor, its slots and its gradient."""
        t, g, m, v = self._moments(w, slots, g)
        c1, c2 = 1 - self.beta1**t, 1 - self.beta2**t
        zero = torch.zeros_like(w)
        top = v
        if self.amsgrad:
            top = torch.maximum(slots.get("max_exp_avg_sq", zero), v)
        s = (top / c2).sqrt()
        d = s + self.eps
        m_bar = slots_bar.get("exp_avg", zero) - self.lr / c1 * w_bar / d
        # Where s = 0, m is 0 as well, and so is all that passes through the root.
        live = s > 0
        safe = torch.where(live, s, torch.ones_like(s))
        through = torch.where(
            live, self.lr / c1 * w_bar * m / (d * d * (2 * c2) * safe), zero
        )
        v_bar = slots_bar.get("exp_avg_sq", zero)
        out: Slots = {}
        if self.amsgrad:
            top_bar = slots_bar.get("max_exp_avg_sq", zero) + through
            newest = v >= slots.get("max_exp_avg_sq", zero)
            v_bar = v_bar + torch.where(newest, top_bar, zero)
            out["max_exp_avg_sq"] = torch.where(newest, zero, top_bar)
        else:
            v_bar = v_bar + through
        g_bar = (1 - self.beta1) * m_bar + 2 * (1 - self.beta2) * g * v_bar
        out["exp_avg"] = self.beta1 * m_bar
        out["exp_avg_sq"] = self.beta2 * v_bar
        w_bar = (1 - self.lr * self._decoupled) * w_bar + self._coupled * g_bar
        return w_bar, out, -g_bar if self.maximize else g_bar


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
    weight_decay: float = 0.01

    @property
    def _coupled(self) -> float:
        return 0.0

    @property
    def _decoupled(self) -> float:
        return self.weight_decay
