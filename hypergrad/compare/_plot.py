"""Accuracy against cost, as a picture with its Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hypergrad.compare._result import Comparison, Cost

__all__ = ["plot"]

COLOURS = {"steps": "#1f5fa8", "minimum": "#d1660a", "neither": "#5f6368"}
MEANINGS = {
    "steps": "looks at the inner steps",
    "minimum": "looks at the minimum of the inner loss",
    "neither": "has no indirect term",
}
SPARE = ("#2e7d32", "#7b1fa2", "#00838f", "#ad1457")
"""For estimators that say in words of their own what they answer."""
INK, GREY, FRONT = "#222222", "#5f6368", "#9aa0a6"

AXES = {
    "forwards": "cost of an estimate, in forward passes of the model (log scale)",
    "inner_gradients": "time of an estimate, in inner gradients (log scale)",
    "seconds": "time of an estimate, in seconds (log scale)",
    "peak_bytes": "peak of memory of an estimate, in MiB (log scale)",
}

PLACED_BESIDE = 9
"""Points from a dot to its label; one further away is tied to it by a line."""

# Where a label may stand, from its point: direction in x and y, and alignment.
PLACES = (
    (1, 0, "left", "center"),
    (1, 1, "left", "bottom"),
    (1, -1, "left", "top"),
    (-1, 0, "right", "center"),
    (-1, 1, "right", "bottom"),
    (-1, -1, "right", "top"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
)


def plot(comparison: Comparison, path: str | Path | None, cost: Cost) -> Figure:
    """Draw the figure, and write it where a path is given.

    Returns:
        The figure.

    Raises:
        ValueError: an unknown cost, or no row with a cost and an error.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = 2**20 if cost == "peak_bytes" else 1
    points = [(label, x / unit, y) for label, x, y in comparison.points(cost)]
    if not points:
        msg = (
            f"there is nothing to draw: no row has both {cost} and a finite indirect "
            f"error ({len(comparison.rows)} rows, {len(_failed(comparison))} failed). "
            "Look at the failures in the table."
        )
        raise ValueError(msg)
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's globals
    axes: Any = figure.subplots()
    floor = _scales(axes, points)
    places = {label: (x, max(y, floor)) for label, x, y in points}
    front = comparison.pareto(cost)
    corners = _draw_front(axes, [places[label] for label in front])
    for label, (x, y) in places.items():
        colour = _kinds(comparison)[comparison[label].answers][0]
        filled = colour if label in front else "white"
        axes.plot(
            x, y, "o", ms=9, color=filled, mec=colour, mew=1.8, zorder=3, clip_on=False
        )
    _dress(axes, comparison, cost)
    figure.canvas.draw()  # the layout is settled: labels can be placed
    _place_labels(axes, places, front, corners)
    if path is not None:
        with matplotlib.rc_context({"savefig.dpi": 150}):
            # Without matplotlib's version in it, equal pictures are equal files.
            ending = Path(path).suffix.lower()
            figure.savefig(
                path, metadata={"Software": None} if ending == ".png" else {}
            )
    return figure


def _scales(axes: Any, points: Sequence[tuple[str, float, float]]) -> float:
    """Set both axes and return where an error of exactly 0 is drawn."""
    costs = [x for _, x, _ in points]
    errors = [y for _, _, y in points if y > 0]
    high = max([1.0, *errors])
    low = min([0.1 * high, *errors])
    has_zero = len(errors) < len(points)
    floor = 10.0 ** (math.floor(math.log10(low)) - 1) if has_zero else 0.0
    axes.set_xscale("log")
    axes.set_yscale("log")
    least, most = max(min(costs), 1e-9), max(costs)
    margin = max(1.25, (most / least) ** 0.07)
    axes.set_xlim(least / margin, most * margin**2.5)
    span = math.log10(high / (floor or low))
    axes.set_ylim((floor or low) / 10 ** (0.07 * span), high * 10 ** (0.1 * span))
    if has_zero:
        powers = range(round(math.log10(floor)) + 1, math.floor(math.log10(high)) + 1)
        step = max(1, len(powers) // 8)
        kept = [k for k in powers if k % step == 0]
        axes.set_yticks(
            [floor, *(10.0**k for k in kept)], ["0", *(f"$10^{{{k}}}$" for k in kept)]
        )
        axes.minorticks_off()
    return floor


def _kinds(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Return colour and meaning of each question that some row answers."""
    found: dict[str, tuple[str, str]] = {}
    asked = {row.answers for row in comparison.rows}
    spare = iter(SPARE)
    for kind in [*COLOURS, *sorted(asked - COLOURS.keys())]:
        if kind in asked:
            colour = COLOURS.get(kind) or next(spare, GREY)
            found[kind] = colour, MEANINGS.get(kind, kind)
    return found


def _draw_front(
    axes: Any, front: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Draw the front and what it beats; return the corners of its line."""
    xs, ys = [x for x, _ in front], [y for _, y in front]
    # On to the right edge: whoever pays more has at least the last one's accuracy.
    xs.append(axes.get_xlim()[1])
    ys.append(ys[-1])
    axes.step(xs, ys, where="post", color=FRONT, lw=1.4, ls=(0, (4, 3)), zorder=1)
    axes.fill_between(
        xs, ys, axes.get_ylim()[1], step="post", color="#eef1f5", lw=0, zorder=0
    )
    corners = [(xs[0], ys[0])]
    for i in range(1, len(xs)):
        corners += [(xs[i], ys[i - 1]), (xs[i], ys[i])]
    return corners


def _dress(axes: Any, comparison: Comparison, cost: Cost) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    axes.tick_params(which="both", color="#b0b0b0", labelcolor=INK)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    low, high = axes.get_xlim()
    # Powers of ten alone would leave one or two ticks.
    digits = (1, 2, 5) if high / low < 2000 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlabel(AXES[cost], color=INK)
    axes.set_ylabel("relative error of the indirect term (log scale)", color=INK)
    handles = [
        Line2D([], [], ls="", marker="o", ms=8, color=colour, label=meaning)
        for colour, meaning in _kinds(comparison).values()
    ]
    handles.append(
        Line2D(
            [], [], color=FRONT, lw=1.4, ls=(0, (4, 3)), label="Pareto front (filled)"
        )
    )
    axes.figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        handletextpad=0.4,
        columnspacing=1.6,
    )
    title = f"reference: {comparison.reference.estimator}"
    failed = _failed(comparison)
    if failed:
        title += f"; failed: {', '.join(failed)}"
    axes.figure.suptitle("Accuracy against cost of each estimator", color=INK)
    axes.set_title(title, fontsize=9, color=GREY)


def _failed(comparison: Comparison) -> list[str]:
    return [row.label for row in comparison.rows if row.failure]


def _place_labels(
    axes: Any,
    places: dict[str, tuple[float, float]],
    front: Sequence[str],
    corners: Sequence[tuple[float, float]],
) -> None:
    """Write each label beside its point, where it covers as little as can be."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    size = axes.figure.dpi / 72
    bounds = axes.get_window_extent(renderer)
    spots = axes.transData.transform(list(places.values()))
    taken = [Bbox([[x, y], [x, y]]).padded(6 * size) for x, y in spots]
    bends = axes.transData.transform(corners)
    lines = [Bbox([a, b]).padded(size) for a, b in itertools.pairwise(bends)]
    # Those on the front first: they have the first choice of place.
    for label in sorted(places, key=lambda name: name not in front):
        tried: list[tuple[float, Any, Any, bool]] = []
        for far in (PLACED_BESIDE, 18, 30):
            for rank, (dx, dy, ha, va) in enumerate(PLACES):
                reach = far if 0 in (dx, dy) else 0.7 * far
                text = axes.annotate(
                    label,
                    places[label],
                    (dx * reach, dy * reach),
                    textcoords="offset points",
                    ha=ha,
                    va=va,
                    fontsize=9,
                    color=INK,
                    zorder=4,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                )
                box = text.get_window_extent(renderer).padded(1.5 * size)
                badness = sum(_overlap(box, other) for other in taken)
                badness += 0.5 * sum(_overlap(box, line) for line in lines)
                badness += 5 * (box.width * box.height - _overlap(box, bounds))
                # Where several places are free, the nearest.
                badness += size**2 * (far + rank)
                tried.append((badness, text, box, far > PLACED_BESIDE))
        tried.sort(key=lambda one: one[0])
        for _, text, _, _ in tried[1:]:
            text.remove()
        _, text, box, is_far = tried[0]
        taken.append(box)
        if is_far:
            x, y = axes.transData.transform(places[label])
            ends = [min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)]
            to = axes.transData.inverted().transform(ends)
            axes.plot(
                *zip(places[label], to, strict=True), color=GREY, lw=0.7, zorder=2
            )


def _overlap(a: Any, b: Any) -> float:
    wide = min(a.x1, b.x1) - max(a.x0, b.x0)
    high = min(a.y1, b.y1) - max(a.y0, b.y0)
    return wide * high if wide > 0 and high > 0 else 0.0
