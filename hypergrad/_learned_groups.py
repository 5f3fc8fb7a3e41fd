"""Learned settings in the parameter groups of a torch optimizer, for a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hypergrad.learned import values_at
from hypergrad.reporting import once_for, report

if TYPE_CHECKING:
    from hypergrad.problem import BilevelProblem

__all__ = ["check_written", "learned_groups", "note_rates", "own_settings"]

Settings = dict[str, Any]
"""Settings of one parameter group."""


@contextmanager
def learned_groups(
    optimizer: torch.optim.Optimizer,
    problem: BilevelProblem,
    number: int,
    *,
    own: Sequence[Settings] = (),
    held: bool = False,
) -> Iterator[list[Settings]]:
    """Let an optimizer's groups have the learned settings for the block.

    What a scheduler or a hand made of a group's learning rate, relative to where it began,
    stays a factor. What it made of another learned setting has no effect, and is warned
    of. Settings that are not learned are left alone, also where the block changes them.

    Args:
        optimizer: the inner optimizer, whose rates `note_rates` noted.
        problem: the problem.
        number: of the step in its inner run, from 0.
        own: `own_settings` at the beginning; without them nothing is warned of.
        held: whether a learned schedule stays at its last factor past its end.

    Yields:
        What was written into each group that holds any parameter.

    Raises:
        HypergradError: a learned schedule has ended, or a setting left its scale.

    Example:
        >>> import torch
        >>> from hypergrad import BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     lambda i, o, b: i["w"] ** 2 / 2,
        ...     {"w": torch.tensor(4.0, requires_grad=True)},
        ...     {},
        ...     inner_settings={"lr": 1.0},
        ... )
        >>> opt = torch.optim.SGD(problem.inner_params.values(), lr=9.0)
        >>> note_rates(opt, problem)
        >>> opt.param_groups[0]["lr"] = 4.5  # by a scheduler, say
        >>> with learned_groups(opt, problem, 0):
        ...     opt.param_groups[0]["lr"]
        0.5
        >>> opt.param_groups[0]["lr"]
        4.5
    """
    if not problem.inner_settings:
        yield []
        return
    if held:
        ends = (
            len(problem.outer_params[name]) - 1
            for name, s in problem.inner_settings.items()
            if s.setting == "schedule"
        )
        number = min([number, *ends])
    groups = _used(optimizer)
    written = [_values(problem, i, g, number) for i, g in enumerate(groups)]
    for i, (noted, values) in enumerate(zip(own, written, strict=False)):
        _tell_if_moved(
            problem, i, groups[i], {n: noted[n] for n in values if n in noted}
        )
    before = [
        {name: group[name] for name in values}
        for group, values in zip(groups, written, strict=True)
    ]
    try:
        for group, values in zip(groups, written, strict=True):
            group.update(values)
        yield written
    finally:
        for group, values in zip(groups, before, strict=True):
            group.update(values)


def check_written(
    optimizer: torch.optim.Optimizer, written: Sequence[Settings]
) -> None:
    """Refuse a step in which a group no longer has what is learned.

    Args:
        optimizer: the inner optimizer, about to step.
        written: what `learned_groups` yielded.

    Raises:
        ValueError: naming the setting and both values.
    """
    for i, (group, values) in enumerate(
        zip(_used(optimizer), written, strict=False),
    ):
        for name, value in values.items():
            if _plain(group[name]) == _plain(value):
                continue
            msg = (
                f"{name} of parameter group {i} is {_plain(group[name])} where the step is "
                f"taken, and {_plain(value)} is learned: a step hook of the inner "
                "optimizer set it, and the hypergradient would be that of another "
                "setting. Scale learned rates by a scheduler, such as LambdaLR, whose "
                f"factor multiplies them; or leave what says {name!r} out of "
                "inner_settings."
            )
            raise ValueError(msg)


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


def own_settings(
    optimizer: torch.optim.Optimizer, problem: BilevelProblem
) -> list[Settings]:
    """Return the optimizer's own values of what is learned, but for the rate.

    Args:
        optimizer: the inner optimizer.
        problem: the problem.
    """
    names = {s.setting for s in problem.inner_settings.values()} - {"lr", "schedule"}
    return [
        {name: _plain(group[name]) for name in names if name in group}
        for group in _used(optimizer)
    ]


def _used(optimizer: torch.optim.Optimizer) -> list[Settings]:
    return [group for group in optimizer.param_groups if group["params"]]


def _values(
    problem: BilevelProblem, group: int, own: Mapping[str, Any], number: int
) -> Settings:
    rate = float(own["lr"])
    begun = float(own.get("initial_lr", rate))
    factor, decay = rate / begun if begun else 1.0, float(own["weight_decay"])
    return values_at(problem, group, number, rate=rate, factor=factor, decay=decay)


def _tell_if_moved(
    problem: BilevelProblem, i: int, group: Settings, noted: Settings
) -> None:
    for name, then in noted.items():
        now = _plain(group[name])
        if now == then:
            continue
        with once_for(problem.reported):
            report(
                f"{name} of parameter group {i} of the inner optimizer went from {then} "
                f"to {now}, which has no effect: inner_settings learns {name!r}, and the "
                "learned value takes its place. Schedules act on a learned rate alone. "
                f"Leave {name!r} out of inner_settings, or its schedule off "
                "(cycle_momentum=False of OneCycleLR)."
            )


def _plain(value: Any) -> Any:
    """Return a setting as a number or a pair of numbers."""
    if isinstance(value, (tuple, list)):
        return tuple(map(float, value))
    return float(value)
