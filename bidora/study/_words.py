"""What a comparison's numbers say, in sentences; and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from statistics import fmean

from bidora.study.results import (
    Average,
    Difference,
    Estimate,
    Overall,
    Summary,
    Table,
)

__all__ = [
    "NOTHING",
    "NOT_INDEPENDENT",
    "PURPOSES",
    "advice",
    "against",
    "cells",
    "count",
    "estimate",
    "joined",
    "over_sizes",
    "p_value",
    "pairs",
    "plural",
    "printable",
    "ratio",
    "score",
    "seconds",
    "signed",
    "size_name",
    "span",
    "standing",
    "statements",
]

PURPOSES = {"steps": "equal steps", "time": "equal time", "sweep": "sweep"}
NOTHING = "–"
TOO_FEW = "too few pairs to tell"

NOT_INDEPENDENT = (
    "Runs that share a test set and a seed are not independent of each other, whatever "
    "their size. Intervals and p take them for independent, so the true ones may be wider "
    "and larger."
)


# --- numbers ------------------------------------------------------------------------


def score(value: float | None) -> str:
    """Return a score in points.

    Example:
        >>> score(84.449), score(None)
        ('84.4', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:.1f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def signed(value: float | None) -> str:
    """Return a difference in points with its sign.

    Example:
        >>> signed(2.14), signed(-50.0), signed(-1e-9)
        ('+2.1', '−50.0', '0.0')
    """
    text = score(value)
    return f"+{text}" if text[0].isdigit() and float(text) else text


def span(low: float | None, high: float | None) -> str:
    """Return an interval of differences; nothing where there is none.

    Example:
        >>> span(-0.4, 3.8)
        '[−0.4, +3.8]'
    """
    return "" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def estimate(value: Estimate | None) -> str:
    """Return a mean with half of its interval.

    Example:
        >>> (
        ...     estimate(Estimate(80.0, 70.0, 90.0, 3)),
        ...     estimate(Estimate(8.0, None, None, 1)),
        ... )
        ('80.0 ± 10.0', '8.0')
    """
    if value is None:
        return NOTHING
    if value.low is None or value.high is None:
        return score(value.mean)
    return f"{score(value.mean)} ± {score((value.high - value.low) / 2)}"


def pairs(difference: Difference) -> str:
    """Return how many pairs a difference is of, and how many a failure spoils.

    Args:
        difference: Of one method to another.

    Example:
        >>> gap = Difference(9.0, 5.0, 13.0, 4, 0.1, 0.1, 4, 0, 0, "better", failed=1)
        >>> pairs(gap)
        '4 pairs, 1 failed'
    """
    failed = f", {difference.failed} failed" if difference.failed else ""
    return plural(difference.n, "pair") + failed


def p_value(value: float | None) -> str:
    """Return a p-value, never as zero.

    Example:
        >>> p_value(0.0123), p_value(1e-9), p_value(None)
        ('0.012', '< 0.001', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value > 0.9995:
        return "1"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def seconds(value: float | None) -> str:
    """Return a duration.

    Example:
        >>> seconds(4.23), seconds(250.0), seconds(5400.0)
        ('4.2 s', '250 s', '1.5 h')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 3600 else f"{value / 3600:.1f} h"


def ratio(value: float | None) -> str:
    """Return how many times as long something takes.

    Example:
        >>> ratio(2.345)
        '2.3×'
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.2f}×" if value < 1 else f"{value:.1f}×"


def count(value: float | None) -> str:
    """Return a number of things.

    Example:
        >>> count(24576)
        '24,576'
    """
    return NOTHING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def plural(number: int, one: str, many: str = "") -> str:
    """Return a number and what it counts.

    Example:
        >>> plural(1, "seed"), plural(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def size_name(size: int) -> str:
    """Return a size in words.

    Example:
        >>> size_name(1), size_name(1000), size_name(0)
        ('1 example', '1,000 examples', 'all examples')
    """
    if not size:
        return "all examples"
    return f"{size:,} {'example' if size == 1 else 'examples'}"


def printable(text: str) -> str:
    r"""Return text without what XML or UTF-8 cannot hold.

    Args:
        text: Any.

    Example:
        >>> printable("a\x00b")
        'a�b'
    """
    whole = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]", "�", whole)


# --- sentences ----------------------------------------------------------------------


def against(difference: Difference | None, other: str) -> str:
    """Return a difference with its interval, and what it is from.

    Example:
        >>> gap = Difference(10.0, None, None, 1, None, None, 1, 0, 0, "better")
        >>> against(gap, "the probe")
        '+10.0 against the probe (1 pair)'
    """
    if difference is None:
        return ""
    if difference.low is None:
        return f"{signed(difference.mean)} against {other} (1 pair)"
    interval = span(difference.low, difference.high)
    return f"{signed(difference.mean)} {interval} against {other}"


def standing(difference: Difference) -> str:
    """Return the verdict, or that so few pairs allow none.

    Args:
        difference: Of one method to another.
    """
    return difference.verdict if difference.decidable else TOO_FEW


def advice(summary: Summary) -> list[str]:
    """Say which method to take, one sentence or two for each table.

    Args:
        summary: The numbers.

    Returns:
        Sentences; one that says what is missing where nothing can be advised.
    """
    if not summary.tables:
        if summary.sweep:
            return [
                "Only runs of the sweep are here. They choose settings on validation "
                "examples and see no test examples, so no method can be advised yet."
            ]
        return ["There are no runs yet, so there is nothing to compare."]
    return [_take(summary, table) for table in summary.tables]


def _take(summary: Summary, table: Table) -> str:
    at = f"With {size_name(table.size)}, at {PURPOSES[table.purpose]}: "
    scored = [a for a in table.averages if a.score is not None]
    if not scored:
        return (
            f"{at}no method has a score on every task with the same seed, so none can "
            "be advised."
        )
    if len(table.methods) == 1 and not table.probe:
        only = scored[0]
        return f"{at}{only.method} alone was run and scores {score(_mean(only))}."
    reference = summary.reference
    probed = [a for a in scored if a.over_probe is not None]
    tested = [d for a in scored for d in (a.over_probe, a.over_reference) if d]
    to_probe = [d for a in probed if (d := a.over_probe)]
    reason = ""
    if not tested:
        reason = "there is nothing to test against"
    elif not any(d.decidable for d in tested):
        reason = _too_few(tested)
    elif to_probe and not any(d.decidable for d in to_probe):
        reason = f"{_too_few(to_probe)} to the probe"
    if reason:
        return f"{at}{reason}; {_highest(scored, table, reference)}"
    over_probe = [a for a in probed if _verdict(a.over_probe) == "better"]
    if probed and not over_probe:
        text = (
            f"{at}take the probe, a linear head on the frozen model: no method is shown "
            "to beat it."
        )
        if not (ranked := _ranked(probed)):
            return text
        shown = against(ranked[0].over_probe, "it")
        where = f"{_over(probed)}the highest mean is {ranked[0].method}'s, {shown}."
        return f"{text} {where[0].upper()}{where[1:]}"
    candidates = over_probe or scored
    winners = [a for a in candidates if _verdict(a.over_reference) == "better"]
    if winners:  # any of them is one to take, also where they cannot be ranked
        return at + _taken((_ranked(winners) or winners)[0], table, reference, "take ")
    base = next((a for a in candidates if a.method == reference), None)
    if base is not None and len(scored) > 1:
        return (
            at
            + _taken(base, table, reference, "take ")
            + f" No other method is shown to beat it{_runner_up(scored, reference)}."
        )
    if len(candidates) == 1:
        return at + _taken(candidates[0], table, reference, "take ")
    of = f"of {len(over_probe)} methods shown to beat the probe, " if over_probe else ""
    return f"{at}{of}{_highest(candidates, table, reference)}"


def _shared(those: Sequence[Average]) -> set[int]:
    """Return the seeds that all methods have: what means can be ranked over."""
    return set.intersection(*(set(a.by_seed) for a in those))


def _ranked(those: Sequence[Average]) -> list[Average]:
    """Order methods by their means over the seeds that all have; none without one."""
    seeds = _shared(those)
    if not seeds:
        return []
    return sorted(
        those,
        key=lambda a: (-_mean(a, seeds), a.time_ratio or 0.0, a.method),
    )


def _over(those: Sequence[Average]) -> str:
    """Say over which seeds methods are ranked, where it is not over all."""
    seeds = _shared(those)
    if all(set(a.by_seed) == seeds for a in those):
        return ""
    return f"over the {plural(len(seeds), 'seed')} that methods share, "


def _highest(those: Sequence[Average], table: Table, reference: str) -> str:
    """Say which method has the highest mean, if they can be ranked."""
    ranked = _ranked(those)
    if not ranked:
        return "none can be said to have the highest mean, since methods share no seed."
    lead = f"{_over(those)}the highest mean is that of "
    return _taken(ranked[0], table, reference, lead, _shared(those))


def _too_few(tested: Sequence[Difference]) -> str:
    most = max(tested, key=lambda d: (d.n - d.ties, d.n))
    ties = f", {plural(most.ties, 'tie')} among them," if most.ties else ""
    return f"{plural(most.n, 'pair')} of runs{ties} cannot show a difference"


def _taken(
    one: Average,
    table: Table,
    reference: str,
    lead: str,
    seeds: Collection[int] = (),
) -> str:
    tasks = len(table.tasks)
    on = f" on average over {tasks} tasks" if tasks > 1 else ""
    text = f"{lead}{one.method}, which scores {score(_mean(one, seeds))}{on}"
    gaps = [
        against(one.over_reference, reference),
        against(one.over_probe, "the probe"),
    ]
    if any(gaps):
        text += f": {joined([gap for gap in gaps if gap])}"
    timed = table.purpose == "steps" and one.method != reference
    if timed and one.time_ratio is not None:
        text += f", in {ratio(one.time_ratio)} the training time of {reference}"
    gap = one.over_reference
    if gap is not None and gap.decidable and gap.verdict == "no difference shown":
        text += f"; no difference to {reference} is shown"
    return text + "."


def _runner_up(scored: Sequence[Average], reference: str) -> str:
    others = [a for a in scored if a.method != reference]
    ranked = _ranked(others)
    if not ranked:
        return ""
    gap = against(ranked[0].over_reference, "it")
    name = ranked[0].method
    return f"; {_over(others)}the nearest is {name}{', ' + gap if gap else ''}"


def statements(summary: Summary) -> list[tuple[str, str]]:
    """Say where the bidora family, or every method without one, wins, ties or loses.

    Args:
        summary: The numbers.

    Returns:
        For each method, opponent and purpose: what is compared, and how it stands.
    """
    family = [m for m in summary.outer if m != summary.reference]
    focus = family or [m for m in summary.methods if m != summary.reference]
    found: list[tuple[str, str]] = []
    for method in focus:
        for purpose in ("steps", "time"):
            tables = [
                t
                for t in summary.tables
                if t.purpose == purpose and method in t.methods
            ]
            for other, attribute in (
                (summary.reference, "over_reference"),
                ("the probe", "over_probe"),
            ):
                parts = [
                    part for t in tables if (part := _standing(t, method, attribute))
                ]
                for overall in summary.overall:
                    if overall.purpose == purpose:
                        gap = over_sizes(summary, overall).get(other, {}).get(method)
                        parts += [] if gap is None else [_stands(gap, "over all sizes")]
                if parts and other:
                    head = f"{method} against {other}, at {PURPOSES[purpose]}"
                    found.append((head, f"{'; '.join(parts)}."))
    return found


def _stands(gap: Difference, where: str) -> str:
    shown = f"{signed(gap.mean)} {span(gap.low, gap.high) or '(1 pair)'}"
    tested = "" if gap.adjusted is None else f", p {p_value(gap.adjusted)}"
    return f"{standing(gap)} {where} ({shown}{tested})"


def _standing(table: Table, method: str, attribute: str) -> str:
    """Say how a method stands at one size, on average and by task."""
    rows = [r for r in table.results if r.method == method]
    by_task = [d for r in rows if (d := getattr(r, attribute)) is not None]
    average: Difference | None = getattr(table.average(method), attribute)
    if not by_task:
        return ""
    where = f"with {size_name(table.size)}"
    verdicts = [standing(d) for d in by_task]
    if average is None:
        text = f"{where} no average, as no seed has a score on every task"
    else:
        text = _stands(average, where)
        if len(verdicts) == 1:
            return text
    counts = {v: verdicts.count(v) for v in dict.fromkeys(sorted(verdicts))}
    parts = [f"{name} on {number}" for name, number in counts.items()]
    return f"{text}, and {joined(parts)} of {plural(len(verdicts), 'task')}"


def over_sizes(summary: Summary, overall: Overall) -> dict[str, dict[str, Difference]]:
    """Return the differences over all sizes, by what they are to and by method.

    Args:
        summary: All numbers.
        overall: Those of a purpose.
    """
    found: dict[str, dict[str, Difference]] = {}
    for other, attribute in (
        ("the probe", "over_probe"),
        (summary.reference, "over_reference"),
    ):
        for one in overall.averages:
            if (gap := getattr(one, attribute)) is not None:
                found.setdefault(other, {})[one.method] = gap
    return found


def cells(summary: Summary, overall: Overall) -> str:
    """Return what a comparison over all sizes is over, and whom it leaves out.

    Args:
        summary: All numbers.
        overall: Those of a purpose.
    """
    sizes: dict[str, list[int]] = {}
    for task, size in overall.cells:
        sizes.setdefault(task, []).append(size)
    parts = [
        f"{task} with {joined([str(size or 'all') for size in those])} examples"
        for task, those in sizes.items()
    ]
    shown = {m for gaps in over_sizes(summary, overall).values() for m in gaps}
    anchors = {summary.reference, *(m for t in summary.tables for m in t.probes)}
    out = [m for m in summary.methods if m not in shown | anchors]
    text = f"Each pair counts once, over {'; '.join(parts)}."
    if out:
        text += f" Not compared on all of these, and so not here: {joined(out)}."
    return text


def _mean(one: Average, seeds: Collection[int] = ()) -> float:
    """Return the mean of a method's scores, over all of its seeds or some."""
    return fmean(one.by_seed[seed] for seed in seeds or one.by_seed)


def _verdict(difference: Difference | None) -> str:
    return "" if difference is None else difference.verdict


def joined(parts: Sequence[str]) -> str:
    """Return parts as one list.

    Example:
        >>> joined(["a", "b", "c"])
        'a, b and c'
    """
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
