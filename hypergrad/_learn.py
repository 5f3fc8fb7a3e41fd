"""What is learned of an inner run, read and checked, as outer parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad._checks import check_number, some
from hypergrad.learned import SCALES, LearnedSetting
from hypergrad.tree import Params

__all__ = ["make_settings", "make_start"]


def make_settings(
    given: Mapping[str, Any] | None, like: Sequence[Tensor]
) -> tuple[dict[str, LearnedSetting], Params]:
    """Return learned settings by the name of their outer parameter, and the parameters.

    Args:
        given: start values by setting: a number, or one for each parameter group (a pair,
            or a pair for each group, of betas); a factor for each step of a schedule.
        like: inner parameters, which say dtype and device.

    Raises:
        TypeError: something else.
        ValueError: a setting that cannot be learned, or a value that is not on its scale.

    Example:
        >>> settings, params = make_settings({"lr": 1.0, "momentum": 0.5}, [])
        >>> list(settings), [t.item() for t in params.values()]
        (['log_lr', 'logit_momentum'], [0.0, 0.0])
    """
    if given is not None and not isinstance(given, Mapping):
        msg = (
            f"inner_settings={given!r} must be a dictionary of start values by setting. "
            "Pass e.g. {'lr': 1e-3}."
        )
        raise TypeError(msg)
    settings: dict[str, LearnedSetting] = {}
    params: Params = {}
    for name, start in (given or {}).items():
        if name not in SCALES:
            known = ", ".join(map(repr, SCALES))
            msg = (
                f"inner_settings has {name!r}, which cannot be learned; choose from "
                f"{known}. Other settings stay what the inner optimizer was given."
            )
            raise ValueError(msg)
        values, groups = _checked(name, start)
        param = f"{SCALES[name]}_{name}"
        settings[param] = LearnedSetting(name, param, groups)
        wide = torch.tensor(values, dtype=torch.float64)
        held = wide.log() if SCALES[name] == "log" else wide.logit()
        kind = torch.float32
        for t in like:
            kind = torch.promote_types(kind, t.dtype)
        where = like[0].device if like else torch.device("cpu")
        params[param] = held.to(where, kind).requires_grad_()
    return settings, params


def _checked(name: str, start: Any) -> tuple[Any, int | None]:
    """Return start values as nested lists of numbers, and how many groups they are for.

    Raises:
        ValueError: another form than the setting has, or a value that is not on its scale.
    """
    values = _numbers(name, start)
    shape = _shape(values)
    if name == "schedule":
        allowed, groups = len(shape) == 1, None
    elif name == "betas":
        allowed = shape[-1:] == (2,) and len(shape) <= 2
        groups = shape[0] if len(shape) == 2 else None
    else:
        allowed, groups = len(shape) <= 1, shape[0] if shape else None
    if not allowed or 0 in shape:
        msg = (
            f"inner_settings[{name!r}]={start!r} is of another form: pass "
            f"{_EXPECTED.get(name, _EXPECTED['lr'])}."
        )
        raise ValueError(msg)
    return values, groups


def _shape(values: Any) -> tuple[int, ...]:
    """Return the lengths of nested lists; -1 where they differ."""
    if not isinstance(values, list):
        return ()
    inside = {_shape(each) for each in values}
    return (len(values), *(inside.pop() if len(inside) == 1 else (-1,) * bool(inside)))


def _numbers(name: str, start: Any) -> Any:
    if isinstance(start, Tensor | np.ndarray):
        start = start.tolist()
    if isinstance(start, Sequence) and not isinstance(start, str):
        return [_numbers(name, each) for each in start]
    check_number(f"inner_settings[{name!r}]", start)
    number: Any = start
    try:
        start = float(number)
    except OverflowError:  # a whole number beyond all floats
        start = math.inf if number > 0 else -math.inf
    most = 1.0 if SCALES[name] == "logit" else math.inf
    if not 0.0 < start < most:
        bound = "between 0 and 1" if most == 1.0 else "positive and finite"
        msg = (
            f"inner_settings[{name!r}] has {start}, which must be {bound}: it is learned "
            f"on a {SCALES[name]} scale, which never reaches the bounds. Start a little "
            "inside, or leave the setting out."
        )
        raise ValueError(msg)
    return start


_EXPECTED = {
    "betas": "a pair, or a list of pairs, one for each parameter group",
    "schedule": "a list of factors, one for each step",
    "lr": "a number, or a list of them, one for each parameter group",
}


def make_start(
    given: bool | str | Sequence[str],
    inner: Mapping[str, Tensor],
    aliases: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], Params]:
    """Return which outer parameter each inner one starts from, and the parameters.

    Args:
        given: whether all inner parameters have a learned start, or names or shell-style
            patterns of those that have.
        inner: the inner parameters, whose present values are the first start.
        aliases: other names of them, each with that under which the tensor is kept.

    Raises:
        TypeError: neither a flag nor names.
        ValueError: a pattern that fits no inner parameter.

    Example:
        >>> make_start("head.*", {"head.w": torch.zeros(1), "body.w": torch.zeros(1)})[
        ...     0
        ... ]
        {'head.w': 'start of head.w'}
    """
    if isinstance(given, bool):
        given = "*" if given else ()
    if not isinstance(given, (str, Sequence)):
        msg = (
            f"learn_start={given!r} must be True, False, or names or patterns of names of "
            f"inner parameters, got {type(given).__name__}. Pass e.g. 'head.*'."
        )
        raise TypeError(msg)
    patterns = [given] if isinstance(given, str) else list(given)
    start: dict[str, str] = {}
    params: Params = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            msg = (
                f"learn_start holds {pattern!r}: pass True for all inner parameters, or "
                "their names or patterns of names, such as 'head.*'."
            )
            raise TypeError(msg)
        known = {n: n for n in inner}
        known |= {a: n for a, n in (aliases or {}).items() if n in inner}
        found = [n for a, n in known.items() if fnmatchcase(a, pattern)]
        if not found:
            msg = (
                f"learn_start={pattern!r} fits no inner parameter ({some(inner)}). Pass "
                "their names or patterns of names."
            )
            raise ValueError(msg)
        for name in found:
            start[name] = f"start of {name}"
            params[start[name]] = inner[name].detach().clone().requires_grad_()
    return start, params
