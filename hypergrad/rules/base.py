"""What an inner optimizer's step did, as a function that can be pulled back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hypergrad._checks import check_number
from hypergrad.errors import HypergradError
from hypergrad.products.tally import Tally
from hypergrad.tree import Params

__all__ = ["Pullback", "Pushforward", "Rule", "State"]

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
        settings: adjoints of the settings that were asked for: by parameter name, then
            setting name. Of a setting that several parameters share, each has its part.

    Example:
        w₊ = w - g/2: of an adjoint of 1, w has 1 and g has -1/2.

        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> one = {"w": torch.tensor(1.0)}
        >>> pulled = SGD(0.5).pullback(one, {}, one, one, {})
        >>> pulled.params["w"].item(), pulled.grads["w"].item()
        (1.0, -0.5)
    """

    params: Params
    state: State
    grads: Params
    settings: State = field(default_factory=dict)


@dataclass(frozen=True)
class Pushforward:
    """Tangents of what came out of one step.

    Attributes:
        params: tangent of w, same keys as w.
        state: tangents of the floating point slots of the state.

    Example:
        w₊ = w - g/2: where w moves by 1 and g by 1, w₊ moves by 1/2.

        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> one = {"w": torch.tensor(1.0)}
        >>> SGD(0.5).pushforward(one, {}, one, one, {}, one).params["w"].item()
        0.5
    """

    params: Params
    state: State


class Rule(ABC):
    r"""One step $(w_+, s_+) = U(w, s, g; \theta)$, with settings θ, and its derivative.

    Laws: `apply` equals the optimizer's own step to rounding; `pushforward` multiplies by
    the Jacobian of `apply` in (w, s, g, θ) together, and `pullback` by its transpose. None
    changes its arguments.

    Example:
        A step of rate 1/2 from 4 along a gradient of 2.

        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> w, state = SGD(0.5).apply(
        ...     {"w": torch.tensor(4.0)}, {}, {"w": torch.tensor(2.0)}
        ... )
        >>> w["w"].item()
        3.0
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
        settings: Collection[str] = (),
    ) -> Pullback:
        """Return the adjoints of what went into a step, from those of what came out.

        Args:
            params: w before the step.
            state: s before the step.
            grads: g, before clipping.
            params_bar: adjoint of w after the step.
            state_bar: adjoint of s after the step; absent slots are zeros.
            settings: names of settings to return the adjoints of, such as `"lr"`.

        Returns:
            Adjoints of w, s and g before the step.
        """

    def pushforward(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_dot: Params,
        state_dot: State,
        grads_dot: Params,
        settings_dot: Mapping[str, Slots] | None = None,
    ) -> Pushforward:
        """Return the tangents of what comes out of a step, from those of what goes in.

        Args:
            params: w before the step.
            state: s before the step.
            grads: g, before clipping.
            params_dot: tangent of w.
            state_dot: tangent of s; absent slots are zeros.
            grads_dot: tangent of g, before clipping.
            settings_dot: tangents of settings, by parameter name, then setting name.

        Raises:
            HypergradError: the rule has no forward direction.
        """
        del params, state, grads, params_dot, state_dot, grads_dot, settings_dot
        raise HypergradError(NO_FORWARD.format(type(self).__name__, "pushforward"))

    def differentiable(self, params: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
        """Return the settings of each parameter that it has derivatives in."""
        return dict.fromkeys(params, frozenset())

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


NO_FORWARD = (
    "{0} has no forward direction: it implements no `{1}`. Write it, or take a rule that "
    "has one: SGD, Adam, AdamW, or a TorchOptRule."
)


def watch_finite(tally: Tally, derivative: Params) -> None:
    """Have the derivative of a step looked at: it must be finite.

    Args:
        tally: says so where it is read.
        derivative: adjoints of the gradient, or tangents of w, by parameter.
    """
    tally.watch_finite(
        list(derivative),
        list(derivative.values()),
        lambda bad: (
            f"the derivative of an inner step is not finite in {bad}: a NaN or infinity "
            "in the step's gradient or optimizer state, or Adam with eps=0 where a "
            "gradient is 0, is the usual cause. Look at the optimizer state; raise eps."
        ),
    )


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
