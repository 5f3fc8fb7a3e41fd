"""The picture of `bidora analyze`: ΔM against ΔD, loss and score, a column a phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bidora.runs.plots import TITLES, draw_evaluations, draw_steps, draw_test

if TYPE_CHECKING:
    from bidora.runs.analyze import AnalyzedRun, Fit

__all__ = ["draw_analysis"]

# Colour, marker and line of a kind of layer: each tells kinds apart without the others.
COLORS = ("#4477aa", "#cc5500", "#228833", "#aa3377", "#777777", "#998800", "#009988")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))

PALEST = 0.2
"""How much of its colour the first step has."""


def draw_analysis(runs: Sequence[AnalyzedRun], path: Path) -> None:
    """Draw the runs beside each other, one column a phase.

    Above, each point is a layer after a step, pale for early steps, with the line through
    each kind of layer. Below, loss and score as in the run's own `curves.png`, with one
    legend for both.

    Args:
        runs: What was analysed, one of them with points at least.
        path: The png file to write.
    """
    columns = [(run, phase) for run in runs for phase in run.phases]
    kinds = list(dict.fromkeys(fit.kind for run in runs for fit in run.fits))
    alike = len({(run.settings.task, run.metric) for run in runs}) == 1
    count = len(columns)
    # A legend line a kind stands below each panel.
    high = 4.2 + 0.2 * len(kinds)
    figure = Figure(figsize=(1.0 + 4.6 * count, high + 7.0), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's globals
    axes: Any = figure.subplots(3, count, squeeze=False, height_ratios=(high, 3.0, 4.0))
    figure.suptitle(
        "change of norms (ΔM) against change of directions (ΔD)\n"
        "a point is a layer after a step, pale: early, dark: late; scales differ"
    )
    for column, (run, phase) in enumerate(columns):
        change, loss, score = axes[:, column]
        change.set_title(f"{_name(run, runs)}\n{TITLES.get(phase, phase)}", fontsize=10)
        _draw_change(change, run, phase, kinds)
        # Joined before anything is drawn: axes that are joined later keep their limits.
        score.sharex(loss)
        if alike and column:
            loss.sharey(axes[1][0])
            score.sharey(axes[2][0])
        _draw_curves(loss, score, run, phase)
    for loss in axes[1]:
        loss.set_ylim(bottom=0)  # which also fixes the top: all curves are drawn by now
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(path, format="png")


def _draw_curves(loss: Any, score: Any, run: AnalyzedRun, phase: str) -> None:
    """Draw loss and score of a phase, and below them what their lines are."""
    own = [r for r in run.history if r["phase"] == phase]
    probe = next((r["result"] for r in run.history if r["phase"] == "probe"), None)
    draw_steps(loss, own)
    draw_evaluations(loss, own, phase, "loss")
    draw_evaluations(score, own, phase, run.metric)
    draw_test(score, own, probe, run.metric)
    # A part looks alike in both panels, so that it is told once.
    lines = {line.get_label(): line for ax in (loss, score) for line in ax.get_lines()}
    _legend_below(score, handles=list(lines.values()), fontsize=7)
    loss.set_ylabel("loss")
    score.set_ylabel(run.metric.replace("_", " "))
    score.set_xlabel("step")
    score.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name(run: AnalyzedRun, runs: Sequence[AnalyzedRun]) -> str:
    """Return what tells a run from the others: its method, and its folder if need be."""
    settings = run.settings
    like = [r for r in runs if r.settings.method == settings.method]
    told = f"{settings.method} on {Path(settings.task).name}, seed {settings.seed}"
    return told if len(like) == 1 else f"{told} ({run.folder.name})"


def _draw_change(ax: Any, run: AnalyzedRun, phase: str, kinds: Sequence[str]) -> None:
    points = [p for p in run.points if p.phase == phase]
    order = {step: i for i, step in enumerate(sorted({p.step for p in points}))}
    last = max(1, len(order) - 1)
    handles = []
    for fit in (f for f in run.fits if f.phase == phase):
        number = kinds.index(fit.kind)
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        own = [p for p in points if p.kind == fit.kind]
        shares = [PALEST + (1 - PALEST) * (order[p.step] / last) for p in own]
        ax.scatter(
            [p.delta_d for p in own],
            [p.delta_m for p in own],
            s=22,
            marker=marker,
            c=[(*to_rgb(color), share) for share in shares],
            edgecolors="none",
        )
        style: dict[str, Any] = {
            "color": color,
            "linestyle": DASHES[number % len(DASHES)],
        }
        if fit.line.slope is not None and fit.line.intercept is not None:
            ends = [min(p.delta_d for p in own), max(p.delta_d for p in own)]
            heights = [fit.line.intercept + fit.line.slope * x for x in ends]
            ax.plot(ends, heights, linewidth=1.4, **style)
        handles.append(
            Line2D([], [], marker=marker, markersize=5, label=_told(fit), **style)
        )
    _legend_below(ax, handles=handles, fontsize=8)
    ax.ticklabel_format(style="sci", scilimits=(-2, 3))
    ax.set_xlabel("ΔD")
    ax.set_ylabel("ΔM")


def _legend_below(ax: Any, **given: Any) -> None:
    """Put the legend where it hides nothing, its dashes long enough to be seen."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), handlelength=5, **given)


def _told(fit: Fit) -> str:
    line = fit.line
    slope = "n/a" if line.slope is None else f"{line.slope:.3g}"
    correlation = "n/a" if line.correlation is None else f"{line.correlation:.2f}"
    return f"{fit.kind}: slope {slope}, r = {correlation}"
