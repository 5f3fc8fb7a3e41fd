"""Rules made of rules: clipping before a step, one rule for each parameter group."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hypergrad import _foreach as foreach
from hypergrad import tree
from hypergrad._checks import check_number
from hypergrad.rules._many import Many
from hypergrad.rules.base import (
    Pullback,
    Pushforward,
    Rule,
    Slots,
    State,
    check_rule,
)
from hypergrad.tree import Params

__all__ = ["Clipped", "Grouped"]


@dataclass(frozen=True)
class Clipped(Rule):
    r"""Clip the gradient's norm, then apply another rule.

    $$\hat g = c\,g,\quad c = \min\Big(1, \frac{C}{N + 10^{-6}}\Big),\quad N = \|g\|$$

    as torch.nn.utils.clip_grad_norm_ does. Where c < 1 its adjoint is rank one off the
    identity: $\bar g = c\,\bar{\hat g} - \frac{C}{(N + 10^{-6})^2 N}
    \langle g, \bar{\hat g}\rangle g$.

    Args:
        rule: what is applied to the clipped gradient.
        max_norm: C.

    Raises:
        TypeError: `rule` is not a rule, or `max_norm` not a number.
        ValueError: `max_norm` is not positive.

    Example:
        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> w, g = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
        >>> Clipped(SGD(1.0), max_norm=1.0).apply(w, {}, g)[0]["w"]
        tensor([-0.6000, -0.8000])
    """

    rule: Rule
    max_norm: float

    def __post_init__(self) -> None:
        check_rule("rule", self.rule)
        check_number("max_norm", self.max_norm)
        if not self.max_norm > 0:
            msg = (
                f"max_norm={self.max_norm} must be positive: it is the largest norm that "
                "a gradient keeps. Leave clipping out to keep all."
            )
            raise ValueError(msg)

    def _factor(self, grads: Params) -> tuple[Tensor, Tensor]:
        """Return N and c, on the device."""
        n = tree.size(grads)
        return n, (self.max_norm / (n + 1e-6)).clamp(max=1.0)

    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""
        _, c = self._factor(grads)
        return self.rule.apply(params, state, tree.scale(grads, c))

    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
        settings: Collection[str] = (),
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step, and of settings."""
        clipped = tree.scale(grads, self._factor(grads)[1])
        pulled = self.rule.pullback(
            params, state, clipped, params_bar, state_bar, settings
        )
        return replace(pulled, grads=self._derived(grads, pulled.grads))

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
        """Return the tangents of w and s after the step."""
        clipped = tree.scale(grads, self._factor(grads)[1])
        moved = self._derived(grads, grads_dot)
        return self.rule.pushforward(
            params, state, clipped, params_dot, state_dot, moved, settings_dot
        )

    def differentiable(self, params: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
        """Return those of the rule."""
        return self.rule.differentiable(params)

    @torch.no_grad()
    def _derived(self, grads: Params, direction: Params) -> Params:
        """Return the derivative of clipping along a direction, which is symmetric."""
        if not grads:
            return direction
        n, c = self._factor(grads)
        g = Many(grads.values())
        bar = Many(direction[n] for n in grads)  # a rule may group its answer
        wide = bar.widened()
        # By the unit vector g / N: powers of N itself leave the range of float32.
        unit = Many(foreach.div(g.widened().tensors, n + (n == 0)))
        parts = (unit * wide).tensors
        along = torch.stack([p.sum().to(n.device) for p in parts]).sum()
        along = torch.where(c < 1, c * n / (n + 1e-6) * along, torch.zeros_like(along))
        found = Many(foreach.mul(wide.tensors, c)) - Many(
            foreach.mul(unit.tensors, along)
        )
        return dict(zip(grads, found.like(bar).tensors, strict=True))

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter."""
        return self.rule.learning_rates(params)

    def adaptive(self, params: Mapping[str, Tensor]) -> frozenset[str]:
        """Return those of the rule."""
        return self.rule.adaptive(params)

    def config(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {
            "kind": "clipped",
            "max_norm": self.max_norm,
            "rule": self.rule.config(),
        }


@dataclass(frozen=True)
class Grouped(Rule):
    """Apply one rule to each group of parameters.

    Args:
        groups: pairs of parameter names and the rule for them; each parameter is in one.

    Raises:
        TypeError: what a group is stepped by is not a rule.
        ValueError: a parameter is in two groups.

    Example:
        >>> import torch
        >>> from hypergrad.rules import SGD
        >>> rule = Grouped(((("a",), SGD(1.0)), (("b",), SGD(2.0))))
        >>> one = {"a": torch.ones(1), "b": torch.ones(1)}
        >>> {n: t.item() for n, t in rule.apply(one, {}, one)[0].items()}
        {'a': 0.0, 'b': -1.0}
    """

    groups: tuple[tuple[tuple[str, ...], Rule], ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for names, rule in self.groups:
            check_rule(f"the rule of group {', '.join(names)}", rule)
            for name in names:
                if name in seen:
                    msg = (
                        f"parameter {name!r} is in two groups, so that two rules would "
                        "step it. Leave it in one."
                    )
                    raise ValueError(msg)
                seen.add(name)

    def _check_complete(self, params: Params) -> None:
        """Refuse parameters that no rule steps.

        Raises:
            ValueError: naming the first of them.
        """
        held = {name for names, _ in self.groups for name in names}
        for name in params:
            if name not in held:
                msg = (
                    f"parameter {name!r} is in none of the {len(self.groups)} groups, so "
                    "no rule says how it steps. Add it to a group."
                )
                raise ValueError(msg)

    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""
        self._check_complete(params)
        new_params: Params = {}
        new_state: State = {}
        for names, rule in self.groups:
            p, s = rule.apply(_part(params, names), state, _part(grads, names))
            new_params |= p
            new_state |= s
        return {n: new_params[n] for n in params}, new_state

    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
        settings: Collection[str] = (),
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step, and of settings."""
        self._check_complete(params)
        out = Pullback({}, {}, {})
        for names, rule in self.groups:
            part = rule.pullback(
                _part(params, names),
                state,
                _part(grads, names),
                _part(params_bar, names),
                state_bar,
                settings,
            )
            out.params.update(part.params)
            out.state.update(part.state)
            out.grads.update(part.grads)
            out.settings.update(part.settings)
        return out

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
        """Return the tangents of w and s after the step."""
        self._check_complete(params)
        out = Pushforward({}, {})
        for names, rule in self.groups:
            theta = {n: t for n, t in (settings_dot or {}).items() if n in names}
            part = rule.pushforward(
                _part(params, names),
                state,
                _part(grads, names),
                _part(params_dot, names),
                state_dot,
                _part(grads_dot, names),
                theta,
            )
            out.params.update(part.params)
            out.state.update(part.state)
        return out

    def differentiable(self, params: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
        """Return those of each group's rule."""
        return {
            name: known
            for names, rule in self.groups
            for name, known in rule.differentiable(_part(params, names)).items()
        }

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter."""
        return {
            name: rate
            for names, rule in self.groups
            for name, rate in rule.learning_rates(_part(params, names)).items()
        }

    def adaptive(self, params: Mapping[str, Tensor]) -> frozenset[str]:
        """Return those of all groups."""
        return frozenset().union(
            *(rule.adaptive(_part(params, names)) for names, rule in self.groups)
        )

    def config(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {
            "kind": "grouped",
            "groups": [
                {"names": list(names), "rule": rule.config()}
                for names, rule in self.groups
            ],
        }


def _part(params: Mapping[str, Tensor], names: tuple[str, ...]) -> Params:
    return {name: params[name] for name in names if name in params}
