"""λ in the inner optimizer and in the start of the inner run, as outer parameters.

A positive setting is learned by its logarithm, and a rate of decay by its logit
log(p / (1 - p)), so that a step of the outer optimizer leads to an allowed value, unless it
is so long that rounding gives a bound: then that is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad._checks import check_number, some
from hypergrad.errors import HypergradError
from hypergrad.tree import Params

if TYPE_CHECKING:
    from hypergrad.problem import BilevelProblem
    from hypergrad.rules import Rule, State

__all__ = [
    "LearnedSetting",
    "adjoint_of_settings",
    "check_learned",
    "learned_groups",
    "learned_rule",
    "make_settings",
    "make_start",
    "note_rates",
    "start_of",
    "tangents_of_settings",
    "values_at",
    "wanted_settings",
]

SCALES = {
    "lr": "log",
    "weight_decay": "log",
    "momentum": "logit",
    "betas": "logit",
    "schedule": "log",
}
"""Settings that can be learned, by the names of torch's parameter groups."""


@dataclass(frozen=True)
class LearnedSetting:
    """A setting of the inner optimizer that an outer parameter says.

    Attributes:
        setting: a key of torch's parameter groups, or `"schedule"` for a factor of the
            learning rate for each step of the inner run.
        param: name of the outer parameter, which holds it on its scale.
        groups: number of groups that have a value each; None for one value for all.
    """

    setting: str
    param: str
    groups: int | None = None

    def value(self, held: Tensor, group: int, number: int | None) -> Any:
        """Return what the outer parameter says, as a number or a pair.

        Args:
            held: the outer parameter.
            group: of the inner optimizer, from 0.
            number: of the step in its inner run, from 0.

        Raises:
            HypergradError: it is so far out that rounding gives a bound of the scale.
        """
        if self.setting == "schedule":
            held = held[_step_of(self, held, number)]
        elif self.groups is not None:
            held = held[group]
        wide, log = held.detach().cpu().double(), SCALES[self.setting] == "log"
        found = wide.exp() if log else wide.sigmoid()
        if not ((found > 0) & (found < (math.inf if log else 1.0))).all():
            msg = (
                f"{self.param!r} is {wide.tolist()}, which makes {self.setting} "
                f"{found.tolist()}: rounding gives a bound of the {SCALES[self.setting]} "
                "scale, where no step leads back from. The outer steps are too long: "
                "lower the outer learning rate, or clip what goes into it, and start "
                "from the values before."
            )
            raise HypergradError(msg)
        return found.tolist()


# -- making them --------------------------------------------------------------------------


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
    if isinstance(start, Tensor):
        start = start.tolist()
    if isinstance(start, Sequence) and not isinstance(start, str):
        return [_numbers(name, each) for each in start]
    check_number(f"inner_settings[{name!r}]", start)
    start = float(start)
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
    given: bool | str | Sequence[str], inner: Mapping[str, Tensor]
) -> tuple[dict[str, str], Params]:
    """Return which outer parameter each inner one starts from, and the parameters.

    Args:
        given: whether all inner parameters have a learned start, or names or shell-style
            patterns of those that have.
        inner: the inner parameters, whose present values are the first start.

    Raises:
        TypeError: neither a flag nor names.
        ValueError: a pattern that fits no inner parameter.
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
        found = [n for n in inner if fnmatchcase(n, pattern)]
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


# -- using them ---------------------------------------------------------------------------


def start_of(problem: BilevelProblem) -> Params:
    """Return copies of w where an inner run begins: at what is learned, else here."""
    start = problem.inner_start
    return {
        n: (problem.outer_params[start[n]] if n in start else t).detach().clone()
        for n, t in problem.inner_params.items()
    }


def values_at(
    problem: BilevelProblem, group: int, number: int | None
) -> dict[str, Any]:
    """Return the learned settings of one group at one step, by setting.

    Args:
        problem: the problem.
        group: which of the rule's groups.
        number: of the step in its inner run.
    """
    held = problem.outer_params
    return {
        s.setting: s.value(held[name], group, number)
        for name, s in problem.inner_settings.items()
    }


def learned_rule(rule: Rule, problem: BilevelProblem, number: int) -> Rule:
    """Return a rule with the learned settings in the place of its own.

    Args:
        rule: what a step does.
        problem: the problem.
        number: of the step in its inner run, from 0.
    """
    if not problem.inner_settings:
        return rule
    check_learned(rule, problem)

    def replaced(part: Any, group: int) -> Any:
        values = values_at(problem, group, number)
        factor = values.pop("schedule", None)
        if factor is not None:
            values["lr"] = values.get("lr", part.lr) * factor
        if not part.weight_decay:  # what is off stays off
            values.pop("weight_decay", None)
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        return replace(part, **values)

    return _with_parts(rule, replaced)


@contextmanager
def learned_groups(
    optimizer: torch.optim.Optimizer, problem: BilevelProblem, number: int
) -> Iterator[None]:
    """Let an optimizer's groups have the learned settings for the block.

    What a scheduler or a hand made of a group's learning rate, relative to where it began,
    stays a factor.

    Args:
        optimizer: the inner optimizer, whose rates `note_rates` noted.
        problem: the problem.
        number: of the step in its inner run, from 0.
    """
    if not problem.inner_settings:
        yield
        return
    groups = [g for g in optimizer.param_groups if g["params"]]
    held = [dict(g) for g in groups]
    try:
        for i, group in enumerate(groups):
            values = values_at(problem, i, number)
            factor = values.pop("schedule", 1.0)
            rate = float(group["lr"])
            if "lr" in values:
                rate = values["lr"] * rate / float(group["initial_lr"])
            values["lr"] = rate * factor
            if not group["weight_decay"]:  # what is off stays off
                values.pop("weight_decay", None)
            group.update(values)
        yield
    finally:
        for group, before in zip(groups, held, strict=True):
            group.update(before)


def note_rates(optimizer: torch.optim.Optimizer, problem: BilevelProblem) -> None:
    """Note where learning rates begin, so that what becomes of them shows as a factor.

    As schedulers of torch do when they are made. Not all are of that kind
    (`ReduceLROnPlateau`), and a rate may be set by hand.

    Args:
        optimizer: the inner optimizer.
        problem: the problem; one that learns no rate leaves the optimizer alone.

    Raises:
        ValueError: a group's rate is 0.
    """
    if not any(s.setting == "lr" for s in problem.inner_settings.values()):
        return
    for group in optimizer.param_groups:
        if not group.setdefault("initial_lr", float(group["lr"])):
            msg = (
                "inner_settings learns 'lr', and the inner optimizer's own learning rate "
                "begins at 0: what a scheduler makes of it is a factor of the learned "
                "rate, and none of 0 can be told. Give the inner optimizer any positive "
                "lr, such as that of inner_settings."
            )
            raise ValueError(msg)


def _with_parts(rule: Any, fn: Any) -> Any:
    from hypergrad.rules import Clipped, Grouped

    if isinstance(rule, Clipped):
        return replace(rule, rule=_with_parts(rule.rule, fn))
    if isinstance(rule, Grouped):
        parts = tuple((names, fn(p, i)) for i, (names, p) in enumerate(rule.groups))
        return replace(rule, groups=parts)
    return fn(rule, 0)


def _parts(rule: Any, params: Mapping[str, Any]) -> Iterator[tuple[list[str], Any]]:
    from hypergrad.rules import Clipped, Grouped

    if isinstance(rule, Clipped):
        yield from _parts(rule.rule, params)
    elif isinstance(rule, Grouped):
        yield from ((list(names), part) for names, part in rule.groups)
    else:
        yield list(params), rule


def check_learned(rule: Rule, problem: BilevelProblem) -> None:
    """Refuse settings that the inner optimizer's steps have no derivative in.

    Raises:
        ValueError: naming the setting, and what there is.
    """
    parts = list(_parts(rule, problem.inner_params))
    for s in problem.inner_settings.values():
        key = "lr" if s.setting == "schedule" else s.setting
        for _, part in parts:
            known = set(next(iter(part.differentiable({"": torch.zeros(())}).values())))
            if key not in known:
                msg = (
                    f"inner_settings learns {s.setting!r}, and {type(part).__name__} has "
                    f"no such setting that can be learned "
                    f"(it has: {', '.join(sorted(known)) or 'none'}). Leave it out, or "
                    "take another inner optimizer."
                )
                raise ValueError(msg)
        if s.groups is not None and s.groups != len(parts):
            msg = (
                f"inner_settings[{s.setting!r}] has {s.groups} values, and the inner "
                f"optimizer has {len(parts)} parameter groups. Pass one for each, or a "
                "single number for all."
            )
            raise ValueError(msg)
        if key == "weight_decay" and not any(part.weight_decay for _, part in parts):
            msg = (
                "inner_settings learns 'weight_decay', and it is 0 in every parameter "
                "group: a group without decay stays without. Give the inner optimizer "
                "any positive weight_decay where there is to be one."
            )
            raise ValueError(msg)


def wanted_settings(problem: BilevelProblem) -> set[str]:
    """Return the settings of a rule that adjoints are needed of."""
    names = {s.setting for s in problem.inner_settings.values()}
    return {"lr" if name == "schedule" else name for name in names}


def adjoint_of_settings(
    problem: BilevelProblem, rule: Rule, number: int | None, pulled: State
) -> Params:
    """Return the adjoint of each outer parameter that says a setting, from one step.

    On a log scale the derivative of a setting is the setting, on a logit scale p (1 - p):
    whatever else was a factor of it, such as a scheduler's, is in it.

    Args:
        problem: the problem.
        rule: of the step.
        number: of the step in its inner run.
        pulled: adjoints by parameter, then setting.
    """
    found: Params = {}
    parts = list(_parts(rule, problem.inner_params))
    for name, s in problem.inner_settings.items():
        held = problem.outer_params[name]
        total = torch.zeros_like(held, requires_grad=False)
        key = "lr" if s.setting == "schedule" else s.setting
        for group, (names, part) in enumerate(parts):
            bars = [pulled[n][key] for n in names if n in pulled]
            if not bars:
                continue
            bar = torch.stack([b.to(bars[0].device) for b in bars]).sum(0)
            at = torch.tensor(getattr(part, key), dtype=bar.dtype, device=bar.device)
            slope = at if SCALES[s.setting] == "log" else at * (1 - at)
            added = (bar * slope).to(held)
            if s.setting == "schedule":
                total[_step_of(s, held, number)] += added
            elif s.groups is not None:
                total[group] += added
            else:
                total += added
        found[name] = total
    return found


def tangents_of_settings(
    problem: BilevelProblem, rule: Rule, number: int | None, outer: Mapping[str, Tensor]
) -> State:
    """Return how the settings of one step change along a direction of λ.

    The transpose of `adjoint_of_settings`.

    Args:
        problem: the problem.
        rule: of the step.
        number: of the step in its inner run.
        outer: the direction; a name that is left out stays where it is.

    Returns:
        Tangents by parameter, then setting, as `Rule.pushforward` takes them.
    """
    found: State = {}
    parts = list(_parts(rule, problem.inner_params))
    for name, s in problem.inner_settings.items():
        if name not in outer:
            continue
        held = outer[name].detach()
        key = "lr" if s.setting == "schedule" else s.setting
        for group, (names, part) in enumerate(parts):
            moved = held
            if s.setting == "schedule":
                moved = held[_step_of(s, held, number)]
            elif s.groups is not None:
                moved = held[group]
            at = torch.tensor(
                getattr(part, key), dtype=moved.dtype, device=moved.device
            )
            dot = moved * (at if SCALES[s.setting] == "log" else at * (1 - at))
            for n in names:
                before = found.setdefault(n, {}).get(key)
                found[n][key] = dot if before is None else before + dot
    return found


def _step_of(s: LearnedSetting, held: Tensor, number: int | None) -> int:
    if number is None:
        msg = (
            f"{s.param!r} has a factor for each step of an inner run, and the record of "
            "this step does not say which it was. Pass records of take_steps or of a "
            "BilevelOptimizer."
        )
        raise HypergradError(msg)
    if number >= len(held):
        msg = (
            f"{s.param!r} has {len(held)} factors, and this is step {number + 1} of the "
            "inner run. Pass a longer schedule, or begin another run (`begin_run`)."
        )
        raise HypergradError(msg)
    return number
