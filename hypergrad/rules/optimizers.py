"""Read the rule and the state of a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hypergrad.rules.adam import Adam, AdamW
from hypergrad.rules.base import Rule, State
from hypergrad.rules.compose import Clipped, Grouped
from hypergrad.rules.sgd import SGD

__all__ = [
    "SUPPORTED",
    "check_supported",
    "rule_from_config",
    "rule_of",
    "state_of",
]


def _sgd(group: Mapping[str, Any]) -> Rule:
    return SGD(
        float(group["lr"]),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
    )


def _adam(kind: type[Adam], group: Mapping[str, Any]) -> Rule:
    return kind(
        float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),
    )


SUPPORTED: dict[type[torch.optim.Optimizer], Callable[[Mapping[str, Any]], Rule]] = {
    torch.optim.SGD: _sgd,
    # Adam(decoupled_weight_decay=True) is AdamW under another name.
    torch.optim.Adam: lambda g: _adam(
        AdamW if g.get("decoupled_weight_decay") else Adam, g
    ),
    torch.optim.AdamW: lambda g: _adam(AdamW, g),
}


def check_supported(
    optimizer: torch.optim.Optimizer, learned: Collection[str] = ()
) -> None:
    """Refuse an optimizer whose step has no rule.

    Args:
        optimizer: the inner optimizer.
        learned: outer parameters that act in its steps alone, so that no estimator can do
            without the steps' derivative.

    Raises:
        TypeError: naming the optimizer and those that work. A subclass may step in
            another way than its parent, so it is refused too.
    """
    if type(optimizer) not in SUPPORTED:
        known = ", ".join(f"torch.optim.{kind.__name__}" for kind in SUPPORTED)
        remedy = (
            f"Inner optimizers that work with every estimator: {known}. "
            "Estimators with lookback 0 ('first-order', 'cg', 'neumann') take any."
        )
        if learned:
            remedy = (
                f"What is learned of the inner run ({', '.join(sorted(learned)[:4])}) "
                f"acts in its steps alone: take one of {known}, or leave it out."
            )
        msg = (
            f"{type(optimizer).__name__} has no rule here, so its step cannot be "
            f"differentiated. {remedy}"
        )
        raise TypeError(msg)


def rule_of(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    max_norm: float | None = None,
) -> Rule:
    """Return the rule of the optimizer's next step, at its present learning rates.

    Args:
        optimizer: one of `SUPPORTED`.
        params: the parameters by name.
        max_norm: gradient norm that is clipped to before the step; None for none.

    Returns:
        A `Grouped` rule, within a `Clipped` one where `max_norm` is given.

    Raises:
        TypeError: the optimizer is not supported.
        ValueError: the optimizer does not hold one of the parameters.

    Example:
        >>> import torch
        >>> w = torch.zeros(1, requires_grad=True)
        >>> rule_of(torch.optim.SGD([w], lr=0.5), {"w": w}).learning_rates({"w": w})
        {'w': 0.5}
    """
    check_supported(optimizer)
    names = {id(tensor): name for name, tensor in params.items()}
    make = SUPPORTED[type(optimizer)]
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        held = tuple(names[id(p)] for p in group["params"] if id(p) in names)
        if held:
            try:
                groups.append((held, make(group)))
            except ValueError as error:
                msg = (
                    f"parameter group {i} of the {type(optimizer).__name__} has a setting "
                    f"that torch would not have taken: {error} A scheduler, or a line that "
                    "sets param_groups, is the usual cause."
                )
                raise ValueError(msg) from error
    missing = set(params) - {name for held, _ in groups for name in held}
    if missing:
        msg = (
            f"the optimizer does not hold parameter {min(missing)!r} (and "
            f"{len(missing) - 1} others), so its step does not move it. Make it over all "
            "of them, or pass those that it holds."
        )
        raise ValueError(msg)
    rule: Rule = Grouped(tuple(groups))
    return rule if max_norm is None else Clipped(rule, max_norm)


def state_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> State:
    """Return a copy of the optimizer's state, by parameter name."""
    out: State = {}
    for name, tensor in params.items():
        slots = optimizer.state.get(tensor, {})
        out[name] = {
            key: value.detach().clone()
            for key, value in slots.items()
            if isinstance(value, Tensor)
        }
    return out


def rule_from_config(config: Mapping[str, Any]) -> Rule:
    """Make a rule from what `Rule.config` returned.

    Args:
        config: plain values, as they come out of a checkpoint.

    Returns:
        A rule equal to the one that was asked for its config.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> from hypergrad.rules import SGD
        >>> rule_from_config(SGD(0.5).config()) == SGD(0.5)
        True
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind == "clipped":
        return Clipped(rule_from_config(settings["rule"]), settings["max_norm"])
    if kind == "grouped":
        return Grouped(
            tuple(
                (tuple(g["names"]), rule_from_config(g["rule"]))
                for g in settings["groups"]
            )
        )
    kinds: dict[str, type[SGD | Adam]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    if kind not in kinds:
        known = ", ".join(["clipped", "grouped", *kinds])
        msg = (
            f"unknown rule {kind!r} (known: {known}): the checkpoint comes from another "
            "version, or is no rule's config. Load it with the version that saved it."
        )
        raise ValueError(msg)
    return kinds[kind](**settings)
