"""Adam and AdamW, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hypergrad._checks import check_flag
from hypergrad.rules._many import Many
from hypergrad.rules.base import Counts, ElementwiseRule, ManySlots, check_settings

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
        return self.weight_decay

    @property
    def _decoupled(self) -> float:
        return 0.0

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
        g, m, v = self._moments(w, slots, g)
        c1, c2 = self._corrections(counts)
        beta1, beta2 = self.betas
        known = slots.get("max_exp_avg_sq") if self.amsgrad else None
        top = v if known is None else v.maximum(known)
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
            if known is not None:
                newest = v.is_at_least(known)
                out["max_exp_avg_sq"] = through - through * newest
                through = through * newest
            else:
                out["max_exp_avg_sq"] = through * 0.0
        v_bar = through
        if "exp_avg_sq" in slots_bar:
            v_bar = v_bar + slots_bar["exp_avg_sq"]
        g_bar = (1 - beta1) * m_bar + 2 * (1 - beta2) * g * v_bar
        out["exp_avg"] = beta1 * m_bar
        out["exp_avg_sq"] = beta2 * v_bar
        if self._decoupled:
            w_bar = w_bar * (1 - self.lr * self._decoupled)
        if self._coupled:
            w_bar = w_bar.plus(g_bar, self._coupled)
        return w_bar, out, -g_bar if self.maximize else g_bar


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
    weight_decay: float = 0.01

    @property
    def _coupled(self) -> float:
        return 0.0

    @property
    def _decoupled(self) -> float:
        return self.weight_decay
