"""λ in the inner optimizer and in the start of the inner run, as outer parameters.

A positive setting is learned by its logarithm, and a rate of decay by its logit
log(p / (1 - p)), so that a step of the outer optimizer leads to an allowed value, unless it
is so long that rounding gives a bound: then that is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad.errors import HypergradError
from hypergrad.tree import Params

if TYPE_CHECKING:
    from hypergrad.problem import BilevelProblem
    from hypergrad.rules import Rule, State

__all__ = [
    "LearnedSetting",
    "adjoint_of_settings",
    "check_learned",
    "learned_rule",
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

    Example:
        >>> LearnedSetting("momentum", "logit_momentum").value(torch.zeros(()), 0, 0)
        0.5
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


def start_of(problem: BilevelProblem) -> Params:
    """Return copies of w where an inner run begins: at what is learned, else here.

    Args:
        problem: the problem.

    Example:
        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> half = lambda i, o, b: i["w"] ** 2 / 2
        >>> w = torch.tensor(4.0, requires_grad=True)
        >>> problem = BilevelProblem(half, half, {"w": w}, {}, learn_start=True)
        >>> with problem.at({"w": torch.tensor(1.0)}):
        ...     start_of(problem)
        {'w': tensor(4.)}
    """
    start = problem.inner_start
    return {
        n: (problem.outer_params[start[n]] if n in start else t).detach().clone()
        for n, t in problem.inner_params.items()
    }


def values_at(
    problem: BilevelProblem,
    group: int,
    number: int | None,
    *,
    rate: float,
    factor: float,
    decay: float,
) -> dict[str, Any]:
    """Return what is learned of the settings of one group at one step.

    Args:
        problem: the problem.
        group: which of the rule's groups.
        number: of the step in its inner run.
        rate: the group's own learning rate.
        factor: what a scheduler made of that since it began.
        decay: the group's own weight decay; what is off stays off.

    Example:
        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": torch.tensor(4.0, requires_grad=True)},
        ...     {},
        ...     inner_settings={"schedule": [1.0, 0.5]},
        ... )
        >>> round(values_at(problem, 0, 1, rate=0.2, factor=1.0, decay=0.0)["lr"], 6)
        0.1
    """
    held = problem.outer_params
    values = {
        s.setting: s.value(held[name], group, number)
        for name, s in problem.inner_settings.items()
    }
    if "lr" in values:
        values["lr"] *= factor
    if "schedule" in values:
        values["lr"] = values.get("lr", rate) * values.pop("schedule")
    if not decay:
        values.pop("weight_decay", None)
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return values


def learned_rule(rule: Rule, problem: BilevelProblem, number: int) -> Rule:
    """Return a rule with the learned settings in the place of its own.

    Args:
        rule: what a step does.
        problem: the problem.
        number: of the step in its inner run, from 0.

    Raises:
        HypergradError: a learned schedule has ended, or a setting left its scale.
        ValueError: the rule does not have what is learned.

    Example:
        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.rules import SGD
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": torch.tensor(4.0, requires_grad=True)},
        ...     {},
        ...     inner_settings={"lr": 1.0},
        ... )
        >>> rule = learned_rule(SGD(9.0, momentum=0.9), problem, 0)
        >>> rule.lr, rule.momentum
        (1.0, 0.9)
    """
    if not problem.inner_settings:
        return rule
    check_learned(rule, problem)

    def replaced(part: Any, group: int) -> Any:
        own = {"rate": part.lr, "factor": 1.0, "decay": part.weight_decay}
        return replace(part, **values_at(problem, group, number, **own))

    return _with_parts(rule, replaced)


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
                f"optimizer has {len(parts)} parameter groups that hold any. Pass one for "
                "each, or a single number for all."
            )
            raise ValueError(msg)
        if key != "weight_decay":
            continue
        off = [i for i, (_, part) in enumerate(parts) if not part.weight_decay]
        if off and s.groups is not None:
            msg = (
                "inner_settings['weight_decay'] has a value for each parameter group, and "
                f"that of group {off[0]} would never act: its own weight_decay is 0, and a "
                "group without decay stays without. Give it any positive weight_decay, or "
                "pass a single number for all groups that have one."
            )
            raise ValueError(msg)
        if len(off) == len(parts):
            msg = (
                "inner_settings learns 'weight_decay', and it is 0 in every parameter "
                "group: a group without decay stays without. Give the inner optimizer "
                "any positive weight_decay where there is to be one."
            )
            raise ValueError(msg)


def wanted_settings(problem: BilevelProblem) -> set[str]:
    """Return the settings of a rule that adjoints are needed of.

    Args:
        problem: the problem.

    Example:
        A factor of the rate acts as the rate does.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": torch.tensor(4.0, requires_grad=True)},
        ...     {},
        ...     inner_settings={"schedule": [1.0, 0.5]},
        ... )
        >>> wanted_settings(problem)
        {'lr'}
    """
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

    Raises:
        HypergradError: a schedule is learned, and the record does not say which step it
            was, or the schedule is shorter.

    Example:
        df/dlog lr = lr · df/dlr, of 1/2 and -4.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.rules import SGD
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": torch.tensor(4.0, requires_grad=True)},
        ...     {},
        ...     inner_settings={"lr": 0.5},
        ... )
        >>> bar = {"w": {"lr": torch.tensor(-4.0)}}
        >>> adjoint_of_settings(problem, SGD(0.5), 0, bar)
        {'log_lr': tensor(-2.)}
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

    Raises:
        HypergradError: as for `adjoint_of_settings`.

    Example:
        Where log lr moves by 1, lr moves by itself.

        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> from hypergrad.rules import SGD
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": torch.tensor(4.0, requires_grad=True)},
        ...     {},
        ...     inner_settings={"lr": 0.5},
        ... )
        >>> tangents_of_settings(problem, SGD(0.5), 0, {"log_lr": torch.ones(())})
        {'w': {'lr': tensor(0.5000)}}
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
            "inner run. Pass a longer schedule, begin another run (`begin_run`), or end "
            "the search (`freeze_outer`), after which the last factor stays."
        )
        raise HypergradError(msg)
    return number
