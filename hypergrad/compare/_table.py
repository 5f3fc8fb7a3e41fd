"""A comparison as plain text for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypergrad.compare._result import Comparison, Row

__all__ = ["table"]

QUESTIONS = {
    "steps": "what the inner steps do",
    "minimum": "where the minimum of the inner loss goes",
    "neither": "how the outer loss changes at fixed w",
    "given": "whatever was passed",
}

# Heading, least width, and what a row shows there.
COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("error", 9, lambda row: _power(row.indirect_error)),
    ("cosine", 8, lambda row: _cosine(row.indirect_cosine)),
    ("error", 9, lambda row: _power(row.error)),
    ("cosine", 8, lambda row: _cosine(row.cosine)),
    ("F", 6, lambda row: _short(row.forwards)),
    ("HVP", 5, lambda row: _short(row.n_hvp)),
    ("grads", 7, lambda row: _short(row.inner_gradients, 3)),
    ("seconds", 9, lambda row: _short(row.seconds, 3)),
    ("MiB", 8, lambda row: _mebibytes(row.peak_bytes)),
)
GROUPS = (("indirect", 2), ("total", 2), ("cost", 5))
"""Titles over several columns each."""


def table(comparison: Comparison, width: int) -> str:
    """Return the table, what its marks mean, and what to know of single rows."""
    rows, reference = comparison.rows, comparison.reference
    cells = [
        [show(row) if not row.failure else "" for _, _, show in COLUMNS] for row in rows
    ]
    # A space at least before each cell, however long its number is.
    widths = [
        max(least, *(1 + len(row[i]) for row in cells))
        for i, (_, least, _) in enumerate(COLUMNS)
    ]
    room = max(12, width - sum(widths))
    shown = [f"{_mark(row, reference.answers)} {row.label}" for row in rows]
    room = min(room, max([12, *(len(label) for label in shown)]))
    lines = [
        " " * room + "".join(_titles(widths)),
        " " * room + _line([title for title, _, _ in COLUMNS], widths),
    ]
    for label, row, own in zip(shown, rows, cells, strict=True):
        if not row.failure:
            lines.append(f"{_cut(label, room):<{room}}{_line(own, widths)}")
    lines += ["", *_legend(comparison, width)]
    for row in rows:
        if row.failure:
            lines += _note(f"{row.label} failed: {row.failure}", width)
        elif row.reason:
            first, *more = re.split(r"(?<=\.) ", row.reason, maxsplit=1)
            lines += _note(f"{row.label}: {first}{' [...]' if more else ''}", width)
    return "\n".join(lines)


def _legend(comparison: Comparison, width: int) -> list[str]:
    reference = comparison.reference
    text = (
        f"Reference: {reference.estimator}, {reference.why}. It answers "
        f"{_question(reference.answers)}; its indirect term has "
        f"{reference.indirect_share:.2g} times the norm of the total."
    )
    if reference.reason:
        text += f" Its note: {reference.reason}"
    lines = textwrap.wrap(text, width)
    others = [row for row in comparison.rows if _mark(row, reference.answers) == "*"]
    for answers in dict.fromkeys(row.answers for row in others):
        of = [row.label for row in others if row.answers == answers]
        named = f" ({', '.join(of)})" if len(of) < len(others) else ""
        text = f"* answers another question, {_question(answers)}{named}: its distance "
        lines += textwrap.wrap(f"{text}is no error of its own.", width)
    lines += textwrap.wrap(
        "F: cost in forward passes, by count. grads: in inner gradients, by the clock "
        f"(one took {comparison.inner_gradient_seconds:.3g} s). MiB: peak beyond what "
        "lived before.",
        width,
    )
    return lines


def _mark(row: Row, answers: str) -> str:
    other = row.answers != answers and not {row.answers, answers} & {"neither", "given"}
    return "*" if other else " "


def _question(answers: str) -> str:
    return QUESTIONS.get(answers, answers)


def _note(text: str, width: int) -> list[str]:
    return textwrap.wrap(f"- {text}", width, subsequent_indent="  ")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True))


def _titles(widths: Sequence[int]) -> Iterator[str]:
    left = iter(widths)
    for title, count in GROUPS:
        yield _over(title, sum(islice(left, count)))


def _over(title: str, span: int) -> str:
    return f"{f' {title} ':-^{span - 2}}".rjust(span)


def _cut(label: str, room: int) -> str:
    return label if len(label) <= room else label[: room - 1] + "…"


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value else "0"


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.3g}"
