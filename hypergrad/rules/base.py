"""What an inner optimizer's step did, as a function that can be pulled back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad._checks import check_number, some
from hypergrad.errors import NonFiniteError
from hypergrad.tree import Params, all_finite, wide

__all__ = ["ElementwiseRule", "Pullback", "Rule", "State"]

_PART = 1 << 16
"""Entries of a tensor that are pulled back at a time."""

Slots = dict[str, Tensor]
State = dict[str, Slots]
"""Optimizer state: parameter name, then slot name, as torch.optim names them.

An absent slot is one that the optimizer has not made yet: zeros, at step 0.
"""


@dataclass(frozen=True)
class Pullback:
    """Adjoints of everything that went into one step.

    Attributes:
        params: adjoint of w, same keys as w.
        state: adjoint of the floating point slots of the state.
        grads: adjoint of the gradient, before clipping.
    """

    params: Params
    state: State
    grads: Params


class Rule(ABC):
    r"""One step $(w_+, s_+) = U(w, s, g)$ and its adjoint.

    Laws: `apply` equals the optimizer's own step to rounding, and `pullback` is the
    transpose of the Jacobian of `apply` in (w, s, g) together, not in w alone. Neither
    changes its arguments.
    """

    @abstractmethod
    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""

    @abstractmethod
    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
    ) -> Pullback:
        """Return the adjoints of what went into a step, from those of what came out.

        Args:
            params: w before the step.
            state: s before the step.
            grads: g, before clipping.
            params_bar: adjoint of w after the step.
            state_bar: adjoint of s after the step; absent slots are zeros.

        Returns:
            Adjoints of w, s and g before the step.
        """

    @abstractmethod
    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter.

        Raises:
            ValueError: the rule has no learning rate of its own.
        """

    def adaptive(self, params: Mapping[str, Tensor]) -> frozenset[str]:
        """Return the parameters whose step is divided by their past gradients.

        Where such a parameter's gradient and second moment are exactly 0, the derivative
        of its step is 1/ε.
        """
        del params
        return frozenset()

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the settings as plain values; `rule_from_config` reads them back."""


class ElementwiseRule(Rule):
    """A rule that treats each tensor alone, with the same settings."""

    kind: ClassVar[str]
    lr: float

    @abstractmethod
    def step_one(self, w: Tensor, slots: Slots, g: Tensor) -> tuple[Tensor, Slots]:
        """Return one tensor and its slots after a step."""

    @abstractmethod
    def pull_one(
        self, w: Tensor, slots: Slots, g: Tensor, w_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Slots, Tensor]:
        """Return the adjoints of one tensor, its slots and its gradient."""

    @torch.no_grad()
    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""
        new_params: Params = {}
        new_state: State = {}
        for name, w in params.items():
            w = w.detach()
            new_params[name], new_state[name] = self.step_one(
                w, state.get(name, {}), grads[name].detach().to(w.dtype)
            )
        return new_params, new_state

    @torch.no_grad()
    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step."""
        out = Pullback({}, {}, {})
        for name, w in params.items():
            given = (
                w,
                state.get(name, {}),
                grads[name],
                params_bar[name],
                state_bar.get(name, {}),
            )
            w_bar, slots_bar, g_bar = self._pull_in_parts(*given)
            out.params[name] = w_bar
            out.state[name] = slots_bar  # stays wide until it is used up
            out.grads[name] = g_bar
        return out

    def _pull_in_parts(
        self, w: Tensor, slots: Slots, g: Tensor, w_bar: Tensor, slots_bar: Slots
    ) -> tuple[Tensor, Slots, Tensor]:
        """Pull one tensor back, in float64, a part of its entries at a time."""
        # 1/(sqrt(v) + eps)² spans more digits than float32 has. An adjoint makes some
        # twenty tensors on its way: of a part, they are little next to the tensor itself.

        def part(tensor: Tensor, start: int) -> Tensor:
            if tensor.numel() != w.numel():  # the step count
                return wide(tensor)
            return wide(tensor.reshape(-1)[start : start + _PART])

        pulled: list[tuple[Tensor, Slots, Tensor]] = []
        for start in range(0, max(1, w.numel()), _PART):
            w_part, slots_part, g_part = self.pull_one(
                part(w, start),
                {k: part(t, start) for k, t in slots.items()},
                part(g, start),
                part(w_bar, start),
                {k: part(t, start) for k, t in slots_bar.items()},
            )
            # Narrow again at once, but for the adjoint of the state.
            pulled.append((w_part.to(w.dtype), slots_part, g_part.to(w.dtype)))
        return (
            torch.cat([p[0] for p in pulled]).reshape(w.shape),
            {
                k: torch.cat([p[1][k] for p in pulled]).reshape(w.shape)
                for k in pulled[0][1]
            },
            torch.cat([p[2] for p in pulled]).reshape(w.shape),
        )

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter."""
        return dict.fromkeys(params, self.lr)

    def config(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"kind": self.kind, **asdict(self)}  # pyright: ignore[reportArgumentType]


def check_finite(pulled: Pullback) -> Pullback:
    """Return the adjoints of a step, where they are finite.

    Raises:
        NonFiniteError: naming the parameters.
    """
    if not all_finite(pulled.grads):
        bad = {n: t for n, t in pulled.grads.items() if not all_finite({n: t})}
        msg = (
            f"the derivative of an inner step is not finite in {some(bad)}: a NaN or "
            "infinity in the step's gradient or optimizer state, or Adam with eps=0 "
            "where a gradient is 0, is the usual cause. Look at the optimizer state; "
            "raise eps."
        )
        raise NonFiniteError(msg)
    return pulled


def check_rule(name: str, value: object) -> None:
    """Refuse what is not a rule.

    Raises:
        TypeError: with the value.
    """
    if not isinstance(value, Rule):
        msg = (
            f"{name}={value!r} must be a hypergrad.rules.Rule. Pass e.g. SGD(0.1), or "
            "rule_of(optimizer, params) for that of a torch optimizer."
        )
        raise TypeError(msg)


def check_settings(
    values: Mapping[str, float], below_one: tuple[str, ...] = ()
) -> None:
    """Refuse negative settings, and rates of decay that reach 1.

    Raises:
        TypeError: a setting that is not a number.
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        check_number(name, value)
        if not 0 <= value < float("inf"):
            msg = (
                f"{name}={value} must be finite and at least 0. Pass the value that the "
                "inner optimizer has."
            )
            raise ValueError(msg)
        if name in below_one and value >= 1:
            msg = (
                f"{name}={value} must be below 1: it is a rate of decay, and what is "
                "older would never be forgotten. Pass e.g. 0.9."
            )
            raise ValueError(msg)
