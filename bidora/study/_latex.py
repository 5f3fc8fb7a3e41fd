"""Tables of a comparison for a paper, in LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bidora.study import _words as words
from bidora.study.results import Difference, Estimate, Overall, Result, Summary, Table

__all__ = ["escape", "latex_tables"]

SPECIALS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: f"\\{sign}" for sign in "_%&#${}"},
    # At the start of a row, \\ would take these for its argument and its star.
    "[": "{[}",
    "*": "{*}",
}

_COLLAPSED, _FAILED = r"\dag{}", r"\ddag{}"


def escape(text: str) -> str:
    r"""Return text as LaTeX prints it.

    Args:
        text: Of one line or more, which become one.

    Example:
        >>> escape("F1_macro & 5 %")
        'F1\\_macro \\& 5 \\%'
    """
    line = " ".join(words.printable(text).split())
    return "".join(SPECIALS.get(sign, sign) for sign in line)


def latex_tables(summary: Summary) -> str:
    r"""Return all tables, to be read with `\input`; the preamble needs booktabs.

    Args:
        summary: The numbers.
    """
    parts = [r"% Tables of a comparison. The preamble needs \usepackage{booktabs}."]
    parts += [_overall(summary, one) for one in summary.overall]
    for table in summary.tables:
        parts.append(_scores(summary, table))
        if any(a.over_probe for a in (*table.results, *table.averages)):
            parts.append(_differences(summary, table, "over_probe", "the probe"))
        if any(a.over_reference for a in (*table.results, *table.averages)):
            parts.append(
                _differences(summary, table, "over_reference", summary.reference)
            )
    if not summary.tables:
        parts.append("% No run on test examples has been done, so there is no table.")
    return "\n\n".join(parts) + "\n"


def _at(table: Table) -> str:
    return f"{words.PURPOSES[table.purpose]}, {words.size_name(table.size)}"


def _level(summary: Summary) -> str:
    return rf"{summary.level * 100:g}\,\%"


def _scores(summary: Summary, table: Table) -> str:
    anchors = [
        [name.capitalize(), *(_estimate(scores.get(task)) for task in table.tasks)]
        for name, scores in table.anchors.items()
    ]
    rows: list[list[str]] = []
    for method in table.methods:
        results = [table.result(task, method) for task in table.tasks]
        rows.append([escape(method), *map(_result, results)])
    if len(table.tasks) > 1:
        for row in anchors:
            row.append("")
        for row, method in zip(rows, table.methods, strict=True):
            row.append(_estimate(table.average(method).score))
    caption = (
        f"Test scores at {_at(table)}: mean over seeds and {_level(summary)} interval."
    )
    if any(r.collapsed for r in table.results):
        caption += f" {_COLLAPSED}: runs that score what a constant answer scores."
    if any(r.failed for r in table.results):
        caption += f" {_FAILED}: runs that failed, which are in no mean."
    label = f"scores-{table.purpose}-{table.size or 'all'}"
    return _tabular(_heads(summary, table), [anchors, rows], caption, label)


def _differences(summary: Summary, table: Table, attribute: str, other: str) -> str:
    rows: list[list[str]] = []
    for method in table.methods:
        found = [table.result(task, method) for task in table.tasks]
        cells = [_difference(getattr(r, attribute) if r else None) for r in found]
        if len(table.tasks) > 1:
            cells.append(_difference(getattr(table.average(method), attribute)))
        if any(cells):
            rows.append([escape(method), *cells])
    caption = (
        f"Difference to {escape(other)} at {_at(table)}: mean over paired seeds and "
        f"{_level(summary)} interval, and the number of pairs. A star marks what is "
        "shown after Holm's correction over methods."
    )
    label = f"{attribute.replace('_', '-')}-{table.purpose}-{table.size or 'all'}"
    return _tabular(_heads(summary, table), [rows], caption, label)


def _overall(summary: Summary, overall: Overall) -> str:
    groups = [
        [
            [
                escape(method),
                escape(other),
                _difference(gap),
                _math(words.p_value(gap.p)),
                _math(words.p_value(gap.adjusted)),
                words.standing(gap),
            ]
            for method, gap in gaps.items()
        ]
        for other, gaps in words.over_sizes(summary, overall).items()
    ]
    caption = (
        f"Difference over all sizes at {words.PURPOSES[overall.purpose]}: mean, "
        f"{_level(summary)} interval and number of pairs, $p$ of flipping signs, and $p$ "
        f"after Holm's correction over methods. {escape(words.cells(summary, overall))} "
        f"{words.NOT_INDEPENDENT}"
    )
    heads = ["Against", "Difference", "$p$", "Adjusted $p$", "Verdict"]
    label = f"over-sizes-{overall.purpose}"
    return _tabular(heads, groups, caption, label)


def _heads(summary: Summary, table: Table) -> list[str]:
    heads = [
        f"{escape(task)} ({escape(summary.metrics[task])})"
        if task in summary.metrics
        else escape(task)
        for task in table.tasks
    ]
    if len(heads) > 1:
        heads.append("Average")
    return heads


def _tabular(
    heads: Sequence[str],
    groups: Sequence[Sequence[Sequence[str]]],
    caption: str,
    label: str,
) -> str:
    bodies = ["\n".join(" & ".join(row) + r" \\" for row in g) for g in groups if g]
    body = "\n\\midrule\n".join(bodies)
    return rf"""\begin{{table}}[tbp]
\centering
\small
\caption{{{caption}}}
\label{{tab:{label}}}
\begin{{tabular}}{{l{"c" * len(heads)}}}
\toprule
Method & {" & ".join(heads)} \\
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table}}"""


def _estimate(value: Estimate | None) -> str:
    return "--" if value is None else _math(words.estimate(value))


def _result(found: Result | None) -> str:
    """Return a score, with how many runs collapsed or failed."""
    if found is None:
        return _estimate(None)
    marks = [
        rf"\textsuperscript{{{mark}{count}}}"
        for mark, count in ((_COLLAPSED, found.collapsed), (_FAILED, found.failed))
        if count
    ]
    return "".join([_estimate(found.score), *marks])


def _difference(value: Difference | None) -> str:
    if value is None:
        return ""
    star = "" if value.verdict == "no difference shown" else r"\textsuperscript{*}"
    interval = words.span(value.low, value.high)
    text = f"{_math(words.signed(value.mean))}{star}"
    small = f"{_math(interval)}, " if interval else ""
    return f"{text} {{\\scriptsize {small}{words.pairs(value)}}}"


def _math(text: str) -> str:
    inside = text.replace("−", "-").replace("±", r"\pm")
    return f"${inside}$" if re.search(r"\d", text) else "--"
