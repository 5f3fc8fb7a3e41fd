"""What weakens the numbers of a comparison, in sentences."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mode

from bidora.study._words import joined, plural, ratio
from bidora.study.plan import CLOSE_ENOUGH
from bidora.study.results import Result, Summary, Table

__all__ = ["cautions"]

FEW_SEEDS = 5


def cautions(summary: Summary) -> list[str]:
    """Return what weakens the numbers: few seeds, failures, budgets that are not equal.

    Args:
        summary: The numbers.
    """
    results = [r for t in summary.tables for r in t.results]
    return [
        *_few_pairs(results),
        *_lost(results),
        *_missing(summary, results),
        *_unequal(summary),
        *_unlike(summary),
    ]


def _few_pairs(results: list[Result]) -> Iterable[str]:
    undecided = sum(
        d is not None and not d.decidable
        for r in results
        for d in (r.over_probe, r.over_reference)
    )
    if undecided:
        yield (
            f"{plural(undecided, 'comparison')} on a single task can show nothing: with n "
            "pairs that differ, the test gives no p below 2^(1−n), and Holm’s correction "
            "raises it with the number of methods. More seeds, or fewer methods, would "
            "show more."
        )
    seeds = [r.score.n for r in results if r.score is not None]
    if seeds and min(seeds) == 1:
        yield (
            "Some results rest on one seed, which allows neither an interval nor a test: "
            "“no difference shown” says nothing there."
        )
    elif seeds and min(seeds) < FEW_SEEDS:
        yield (
            f"Some results rest on {min(seeds)} seeds, so intervals are wide: “no "
            "difference shown” does not mean that methods are equal."
        )


def _lost(results: list[Result]) -> Iterable[str]:
    failed = sum(r.failed for r in results)
    collapsed = sum(r.collapsed for r in results)
    if failed:
        yield (
            f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} in no "
            "mean; means of such methods may flatter them."
        )
    if collapsed:
        yield (
            f"{plural(collapsed, 'run')} collapsed to a constant answer and "
            f"{'counts' if collapsed == 1 else 'count'} in the means."
        )


def _missing(summary: Summary, results: list[Result]) -> Iterable[str]:
    if not summary.missing:
        return
    text = (
        f"{plural(summary.missing, 'planned run')} "
        f"{'is' if summary.missing == 1 else 'are'} not done yet"
    )
    unseen = summary.missing - sum(r.missing for r in results)
    if unseen:
        part = "all" if unseen == summary.missing else str(unseen)
        text += (
            f", {part} of them of methods, tasks or sizes that have no run at all and are "
            "in no table"
        )
    yield f"{text}."


def _unequal(summary: Summary) -> Iterable[str]:
    """Say where equal steps are not the same steps, or equal time not the same time."""
    steps: dict[tuple[str, str], list[str]] = {}
    times: dict[tuple[str, str], list[str]] = {}
    for table in summary.tables:
        for result in table.results:
            if not result.steps:  # a probe takes none
                continue
            if table.purpose == "steps":
                usual = _usual_steps(table, result.task, summary.reference)
                if result.steps != usual:
                    took = f"{result.steps:g} steps where {usual:g} are usual"
                    steps.setdefault((result.method, took), []).append(result.task)
            elif (
                result.time_ratio is not None
                and abs(result.time_ratio - 1) > CLOSE_ENOUGH
            ):
                took = f"{ratio(result.time_ratio)} the seconds of {summary.reference}"
                times.setdefault((result.method, took), []).append(result.task)
    if steps:
        yield (
            f"Equal steps are not the same for all: {_parts(steps)}. A method of two "
            "phases counts the steps of both."
        )
    if times:
        yield f"Equal time is not the same for all: {_parts(times)}."


def _unlike(summary: Summary) -> Iterable[str]:
    unlike = {task for table in summary.tables for task in table.unlike_probes}
    if unlike:
        tasks = [task for task in summary.tasks if task in unlike]
        yield (
            f"Methods have probes that differ ({joined(tasks)}), as with another model: "
            "each is compared with its own, and none is shown for all of them."
        )


def _usual_steps(table: Table, task: str, reference: str) -> float:
    """Return the reference's steps, or those of most methods where it took none."""
    there = [r for r in table.results if r.task == task and r.steps]
    first = next((r.steps for r in there if r.method == reference), None)
    return first or mode(r.steps for r in there if r.steps)


def _parts(found: dict[tuple[str, str], list[str]]) -> str:
    return "; ".join(
        f"{method} took {took} ({joined(list(dict.fromkeys(tasks)))})"
        for (method, took), tasks in found.items()
    )
