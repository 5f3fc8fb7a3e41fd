"""Checks of what an estimator returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hypergrad.tree import Params

__all__ = ["check_like", "check_state"]


def check_state(given: Any, who: str) -> None:
    """Refuse a state that cannot be carried on, saved and put back.

    Args:
        given: what an estimator returned.
        who: names it.

    Raises:
        TypeError: it is not made of dictionaries, by strings, and of tensors.
    """
    if not isinstance(given, Mapping) or not all(isinstance(n, str) for n in given):
        msg = (
            f"{who} returned a {type(given).__name__} as state. Return a dictionary of "
            "tensors by name, or of such dictionaries."
        )
        raise TypeError(msg)
    for name, value in given.items():
        if isinstance(value, Mapping):
            check_state(value, who)
        elif not isinstance(value, Tensor) or value.requires_grad:
            what = "a tensor with a graph" if isinstance(value, Tensor) else repr(value)
            msg = (
                f"{who} returned {what} as state {name!r}: it goes into checkpoints, "
                "which hold tensors alone. Return a detached tensor, e.g. "
                "torch.tensor(number)."
            )
            raise TypeError(msg)


def check_like(
    what: str, given: Any, like: Params, who: str, level: str = "outer"
) -> None:
    """Refuse a result that is not a dictionary of tensors like a level's parameters.

    Args:
        what: names the result.
        given: the result.
        like: the parameters.
        who: names who returned it.
        level: names the parameters.

    Raises:
        TypeError: another kind, or a value that is not a tensor.
        ValueError: other names or shapes.
    """
    if not isinstance(given, Mapping):
        msg = (
            f"{who} returned {what} of type {type(given).__name__}. Return a dictionary "
            f"of tensors with the names of the {level} parameters."
        )
        raise TypeError(msg)
    if given.keys() != like.keys():
        msg = (
            f"{who} returned {what} for {sorted(given)}; the {level} parameters are "
            f"{sorted(like)}. Return a tensor for each of them, zeros where it has none."
        )
        raise ValueError(msg)
    for name, t in like.items():
        value = given[name]
        if not isinstance(value, Tensor):
            msg = f"{who} returned a {type(value).__name__} for {name!r}, not a tensor."
            raise TypeError(msg)
        if value.shape != t.shape:
            msg = (
                f"{who} returned shape {tuple(value.shape)} for {name!r}, whose shape "
                f"is {tuple(t.shape)}."
            )
            raise ValueError(msg)
