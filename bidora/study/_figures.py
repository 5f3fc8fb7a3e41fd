"""Figures of a comparison's report, as SVG that stands in a page.

Text stays text, ink takes the page's colour, and nothing of a figure depends on when or
where it is drawn. Methods differ in colour, line and marker, for black and white too:
once every marker is used, they come again hollow.
"""

from __future__ import annotations

import hashlib
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bidora.study._words import printable
from bidora.study.records import Record
from bidora.study.results import Estimate, Table
from bidora.study.statistics import POINTS

__all__ = [
    "draw_cost",
    "draw_curves",
    "draw_dots",
    "draw_swatches",
    "mean_curve",
    "styles",
]

Style = dict[str, Any]

# Each has a contrast of 3 or more to white and to the page's dark ground.
COLOURS = ("#4477aa", "#d9601a", "#228833", "#bb4488", "#8a7000", "#0e8c9c", "#7a7a7a")
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")

INK = "#010203"
"""Stands for the colour of the page's text."""

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bidora",
    "text.parse_math": False,  # a name may hold dollars
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so widths are the same
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Return how each method is drawn, the same in every figure.

    Args:
        methods: All of them, in the order of the page.
    """
    return {
        method: {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": LINES[i % len(LINES)],
            "marker": MARKERS[i % len(MARKERS)],
            "fillstyle": "none" if i // len(MARKERS) % 2 else "full",
            "markersize": 4.5,
            "linewidth": 1.4,
        }
        for i, method in enumerate(methods)
    }


def mean_curve(records: Iterable[Record]) -> list[tuple[float, float]]:
    """Average curves over seeds, at the points that all of them have.

    Args:
        records: Runs of one method on one task; those without a curve don't count.

    Returns:
        Seconds of training and validation score in points, in the order of time.
    """
    curves = [
        {
            (p.phase, p.step): p
            for p in r.curve
            if math.isfinite(p.validation) and math.isfinite(p.seconds)
        }
        for r in records
        if r.curve and not r.failed
    ]
    if not curves:
        return []
    shared = [key for key in curves[0] if all(key in curve for curve in curves)]
    return [
        (
            fmean(curve[key].seconds for curve in curves),
            POINTS * fmean(curve[key].validation for curve in curves),
        )
        for key in shared
    ]


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    looks: Mapping[str, Style],
    title: str,
) -> str:
    """Draw validation scores over seconds of training.

    Args:
        curves: Points by method.
        looks: As `styles` returns them.
        title: What the figure shows, for those who do not see it.

    Returns:
        An svg element.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, ax = _axes(3.6, 2.7)
        for method, points in curves.items():
            every = max(1, len(points) // 6)  # room between markers, to see the line
            ax.plot(*zip(*points, strict=True), markevery=every, **looks[method])
        ax.set_xlabel("seconds of training")
        ax.set_ylabel("validation score, points")
        return _svg(figure, title)


def draw_cost(table: Table, task: str, looks: Mapping[str, Style], title: str) -> str:
    """Draw test scores over seconds of training; the probe is a line across.

    Args:
        table: The numbers.
        task: Whose.
        looks: As `styles` returns them.
        title: What the figure shows, for those who do not see it.

    Returns:
        An svg element.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, ax = _axes(3.6, 2.7)
        for method in table.methods:
            one = table.result(task, method)
            if one is None or one.score is None or one.seconds is None:
                continue
            look = {**looks[method], "linestyle": "none", "markersize": 6}
            error = _reach(one.score)
            ax.errorbar([one.seconds], [one.score.mean], yerr=error, capsize=2, **look)
        if task in table.probe:
            ax.axhline(table.probe[task].mean, color=INK, linewidth=1, linestyle="--")
        ax.margins(x=0.1)
        ax.set_xlabel("seconds of training, median")
        ax.set_ylabel("test score, points")
        return _svg(figure, title)


def draw_dots(table: Table, task: str, looks: Mapping[str, Style], title: str) -> str:
    """Draw test scores with their intervals, a row a method.

    The probe is on top where no method is the probe, and a line across everywhere.

    Args:
        table: The numbers.
        task: Whose.
        looks: As `styles` returns them.
        title: What the figure shows, for those who do not see it.

    Returns:
        An svg element.
    """
    rows: list[tuple[str, Estimate, Style]] = []
    probe = table.anchors.get("probe", {}).get(task)
    if probe is not None:
        look = {"color": INK, "marker": "|", "markersize": 9, "linewidth": 1.4}
        rows.append(("probe", probe, look))
    for method in table.methods:
        one = table.result(task, method)
        if one is not None and one.score is not None:
            rows.append((method, one.score, {**looks[method], "linestyle": "none"}))
    with matplotlib.rc_context(SETTINGS):
        longest = max(len(_short(name)) for name, _, _ in rows)
        figure, ax = _axes(3.6, 0.75 + 0.22 * len(rows), 0.25 + 0.072 * longest)
        for i, (_, value, look) in enumerate(rows):
            ax.errorbar([value.mean], [i], xerr=_reach(value), capsize=2, **look)
        if task in table.probe:
            ax.axvline(table.probe[task].mean, color=INK, linewidth=1, linestyle="--")
        ax.set_yticks(range(len(rows)), [_short(name) for name, _, _ in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.set_xlabel("test score, points")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, title)


def draw_swatches(looks: Mapping[str, Style]) -> str:
    """Draw a piece of each method's line, to be shown wherever the method is named.

    Args:
        looks: As `styles` returns them.

    Returns:
        Symbols `swatch-0`, `swatch-1`, … in the order of the methods.
    """
    symbols: list[str] = []
    for i, look in enumerate(looks.values()):
        with matplotlib.rc_context(SETTINGS):
            figure = Figure(figsize=(0.55, 0.2))
            ax = figure.add_axes((0, 0, 1, 1))
            ax.set_axis_off()
            ax.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], clip_on=False, **look)
            ax.set_xlim(0, 1)
            root = _drawn(figure, f"swatch-{i}")
        root.tag = "symbol"
        root.set("id", f"swatch-{i}")
        symbols.append(ET.tostring(root, encoding="unicode"))
    return "".join(symbols)


def _axes(width: float, height: float, left: float = 0.78) -> tuple[Figure, Any]:
    """Return axes with margins in inches: to fit them to the text takes twice as long."""
    figure = Figure(figsize=(width, height))
    bottom = 0.45 / height
    box = (left / width, bottom, 1 - (left + 0.1) / width, 1 - bottom - 0.08 / height)
    ax = figure.add_axes(box)
    ax.set_axisbelow(True)
    return figure, ax


def _reach(value: Estimate) -> Any:
    if value.low is None or value.high is None:
        return None
    return [[value.mean - value.low], [value.high - value.mean]]


def _short(name: str, most: int = 24) -> str:
    text = printable(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an element of a page."""
    title = printable(title)
    root = _drawn(figure, title)
    root.set("role", "img")
    root.set("aria-label", title)
    head = ET.Element("title")
    head.text = title
    root.insert(0, head)
    return ET.tostring(root, encoding="unicode")


def _drawn(figure: Figure, title: str) -> ET.Element:
    """Draw a figure whose inner names are those of no figure with another title."""
    figure.patch.set_visible(False)
    for ax in figure.axes:
        ax.patch.set_visible(False)
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    _tidy(root, "f" + hashlib.sha256(title.encode()).hexdigest()[:10])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    return root


def _tidy(element: ET.Element, key: str) -> None:
    """Drop what would reach the page outside, and make the names that are used its own."""
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        if child.tag.rpartition("}")[2] in {"metadata", "style"}:
            element.remove(child)
        else:
            _tidy(child, key)
    attributes = {n.rpartition("}")[2]: v for n, v in element.attrib.items()}
    if element.tag == "g":
        attributes.pop("id", None)  # a label that nothing refers to
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            value = f"{key}-{value}"
        elif name == "href":
            value = value.replace("#", f"#{key}-", 1)
        value = value.replace("url(#", f"url(#{key}-")
        element.set(name, value.replace(INK, "currentColor"))
