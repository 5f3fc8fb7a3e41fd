"""What a reader of a comparison must know besides its numbers, a sentence each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bidora.study._words import joined
from bidora.study.grid import Grid, Group
from bidora.study.records import Cell

if TYPE_CHECKING:  # a plan makes notes of itself
    from bidora.study.plan import Plan

__all__ = ["all_failed", "run_notes", "settings_notes", "sweep_notes"]


def settings_notes(grid: Grid) -> Iterable[str]:
    """Say what grid and tasks give, and a method has no use for.

    Args:
        grid: What is compared.

    Yields:
        Sentences.
    """
    seen: dict[tuple[str, ...], list[str]] = {}
    for task, method, _ in grid.groups():
        unused = tuple(sorted(grid.unused(task, method)))
        if unused and method not in seen.setdefault(unused, []):
            seen[unused].append(method)
    for names, methods in seen.items():
        yield (
            f"{joined(methods)} {'have' if len(methods) > 1 else 'has'} no use for "
            f"{joined(names)}, and ran without."
        )


def sweep_notes(grid: Grid) -> Iterable[str]:
    """Say where methods were not tried equally often, or not in all combinations.

    Args:
        grid: What is compared.

    Yields:
        Sentences.
    """
    swept = [method for method in grid.methods if method.sweep]
    tried = {method.name: len(grid.trials_of(method.name)) for method in swept}
    budget = grid.trials or max(tried.values(), default=1)
    for method in swept:
        if tried[method.name] < method.combinations:
            yield (
                f"{method.name}: {tried[method.name]} of the {method.combinations} "
                "combinations of its swept settings were tried, drawn by a fixed seed."
            )
        if tried[method.name] < budget:
            yield (
                f"{method.name} has {tried[method.name]} combination"
                f"{'s' if tried[method.name] > 1 else ''} of its swept settings, fewer "
                f"than the {budget} trials that a method may have."
            )
    yield from _narrow(grid)
    plain = [method.name for method in grid.methods if not method.sweep]
    if swept and plain:
        yield f"Nothing was swept for {joined(plain)}."


def _tried(grid: Grid, method: str) -> dict[str, list[float]]:
    """Return the numbers above 0 that a sweep tries of each setting, in order."""
    found: dict[str, set[float]] = {}
    for trial in grid.trials_of(method):
        for name, value in trial:
            if isinstance(value, int | float) and value > 0:
                found.setdefault(name, set()).add(float(value))
    return {name: sorted(v) for name, v in found.items() if len(v) > 1}


def _narrow(grid: Grid) -> Iterable[str]:
    """Say of which methods a setting was tried over a narrower range than of another."""
    widths: dict[str, dict[str, float]] = {}
    for method in grid.methods:
        for name, values in _tried(grid, method.name).items():
            widths.setdefault(name, {})[method.name] = values[-1] / values[0]
    for name, own in widths.items():
        widest = max(own, key=lambda method: own[method])
        less: dict[str, list[str]] = {}
        for method, width in own.items():
            if width < own[widest] * (1 - 1e-9):
                less.setdefault(f"{width:.3g}", []).append(method)
        for width, methods in less.items():
            yield (
                f"{name} was tried over a factor of {width} of {joined(methods)}, and of "
                f"{own[widest]:.3g} of {widest}: what lies beyond was not open to "
                f"{'them' if len(methods) > 1 else 'it'}."
            )


def run_notes(plan: Plan) -> Iterable[str]:
    """Say what failed, what is not compared, and what is still to do.

    Args:
        plan: With the records so far.

    Yields:
        Sentences.
    """
    for group, trial in plan.outcomes.items():
        if trial is None:
            yield f"{_of(group)}: {all_failed(plan, group)}."
    yield from _at_the_edge(plan)
    failed = [record for record in plan.own if record.failed]
    if failed:
        first = failed[0]
        yield (
            f"{len(failed)} of {len(plan.own)} runs failed, such as "
            f"{_of(first.cell)}: {first.error}"
        )
    yield from _time_notes(plan)
    if plan.remaining:
        yield f"{plan.remaining} of {plan.total} runs are still to do."


def _at_the_edge(plan: Plan) -> Iterable[str]:
    """Say which choices are the largest or smallest of what was tried."""
    found: dict[tuple[str, str], list[str]] = {}
    for group, trial in plan.chosen.items():
        tried = _tried(plan.grid, group[1])
        for name, value in trial:
            values = tried.get(name, [])
            if len(values) > 2 and value in (values[0], values[-1]):
                end = "largest" if value == values[-1] else "smallest"
                found.setdefault((name, end), []).append(_of(group))
    for (name, end), groups in found.items():
        yield (
            f"The {end} {name} that was tried was chosen for {joined(groups)}: one "
            "beyond it may do better."
        )


def _time_notes(plan: Plan) -> Iterable[str]:
    """Say where nothing is of equal time, or cannot be though it stands there."""
    grid = plan.grid
    timed = [task.name for task in grid.tasks if "time" in grid.equal_on(task.name)]
    without = [name for name in timed if not grid.has(name, grid.reference)]
    if without:
        yield (
            f"{grid.reference} is not run on {joined(without)}, so that nothing is "
            "compared there at its time."
        )
    for group in grid.groups():
        if group[0] not in timed:
            continue
        end = plan.early_end(group)
        well = plan.ended_well(group)
        if group[1] == grid.reference:
            if well and not any(record.seconds > 0 for record in well):
                yield (
                    f"{_of(group)}: no time of training was measured, so that nothing is "
                    "compared there at its time."
                )
        elif end is not None and plan.steps_in_time.get(group, 0) is None:
            yield (
                f"{_of(group)}: early stopping ended its runs after {end:g} steps "
                "(median), so that more steps would take no more time. Its runs at equal "
                "steps stand at equal time as well."
            )


def all_failed(plan: Plan, group: Group) -> str:
    """Return why nothing was chosen for a group.

    Args:
        plan: With the records of its sweep, all of which failed.
        group: Task, method and size.
    """
    records = [plan.by_cell[cell] for cell in plan.sweep(group)]
    why = next((record.error for record in records if record.failed), "")
    return "no trial of the sweep ended with a finite score on validation examples" + (
        f", the first failing with {why}" if why else ""
    )


def _of(group: Group | Cell) -> str:
    if isinstance(group, Cell):
        return f"{_of((group.task, group.method, group.size))}, seed {group.seed}"
    task, method, size = group
    return f"{method} on {task}" + (f" with {size} examples" if size else "")
