"""Tables of a comparison for a page of documentation, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bidora.study import _words as words
from bidora.study.results import Difference, Overall, Summary, Table

__all__ = ["escape", "markdown_tables"]


def escape(text: str) -> str:
    r"""Return text as a cell of a table shows it.

    Args:
        text: Of one line or more, which become one.

    Example:
        >>> escape("f1_macro | <b>")
        'f1\\_macro \\| &lt;b&gt;'
    """
    line = " ".join(words.printable(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", line)


def markdown_tables(summary: Summary) -> str:
    """Return scores and differences of every size and purpose, and the whole sweep.

    Args:
        summary: The numbers.
    """
    parts: list[str] = []
    parts += [_overall(summary, one) for one in summary.overall]
    parts += [_scores(summary, table) for table in summary.tables]
    if summary.sweep:
        parts.append(_sweep(summary))
    return "\n\n".join(parts or ["No run on test examples has been done."]) + "\n"


def _scores(summary: Summary, table: Table) -> str:
    over = [
        (name, attribute)
        for name, attribute in (
            ("over the probe", "over_probe"),
            (f"over {escape(summary.reference)}", "over_reference"),
        )
        if any(getattr(r, attribute) for r in table.results)
    ]
    head = ["task", "method", "score", *(name for name, _ in over), "seconds", "failed"]
    rows: list[list[str]] = []
    for task in table.tasks:
        shown = f"{escape(task)} ({escape(summary.metrics.get(task, ''))})"
        for name, scores in table.anchors.items():
            if task in scores:
                rows.append([shown, f"*{name}*", words.estimate(scores[task])])
        for method in table.methods:
            result = table.result(task, method)
            if result is None:
                continue
            mark = f" ({result.collapsed} constant)" if result.collapsed else ""
            rows.append(
                [
                    shown,
                    escape(method),
                    words.estimate(result.score) + mark,
                    *(_difference(getattr(result, a)) for _, a in over),
                    words.seconds(result.seconds),
                    str(result.failed or ""),
                ]
            )
    title = f"**At {words.PURPOSES[table.purpose]}, {words.size_name(table.size)}**"
    return f"{title}\n\n{_table(head, rows)}"


def _overall(summary: Summary, overall: Overall) -> str:
    rows = [
        [
            escape(method),
            escape(other),
            f"{words.signed(gap.mean)} {words.span(gap.low, gap.high)}".strip(),
            words.pairs(gap),
            escape(words.p_value(gap.p)),
            escape(words.p_value(gap.adjusted)),
            words.standing(gap),
        ]
        for other, gaps in words.over_sizes(summary, overall).items()
        for method, gap in gaps.items()
    ]
    head = ["method", "against", "difference", "pairs", "p", "adjusted p", "verdict"]
    title = f"**At {words.PURPOSES[overall.purpose]}, over all sizes**"
    text = f"{escape(words.cells(summary, overall))} {words.NOT_INDEPENDENT}"
    return f"{title}\n\n{text}\n\n{_table(head, rows)}"


def _sweep(summary: Summary) -> str:
    rows = [
        [
            escape(tried.task),
            escape(words.size_name(tried.size)),
            escape(tried.method),
            escape(", ".join(f"{n}={v}" for n, v in tried.settings)),
            words.estimate(tried.validation) + (" ←" if tried.chosen else ""),
        ]
        for tried in summary.sweep
    ]
    head = ["task", "examples", "method", "settings", "on validation examples"]
    return f"**The sweep** (← is what was taken)\n\n{_table(head, rows)}"


def _difference(value: Difference | None) -> str:
    if value is None:
        return ""
    interval = words.span(value.low, value.high)
    gap = f"{words.signed(value.mean)} {interval}".strip()
    return f"{gap}, {words.pairs(value)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    width = len(head)
    lines = [head, ["---"] * width]
    lines += [[*row, *[""] * (width - len(row))] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
