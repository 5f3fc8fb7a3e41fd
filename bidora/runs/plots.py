"""The picture of a run: loss, score and hypergradient over steps, one column a phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["TITLES", "draw_curves", "draw_evaluations", "draw_steps", "draw_test"]

# Colour, line and marker: each tells the curves apart without the others.
STYLES = {
    "train": {"color": "#4477aa", "linestyle": "-", "marker": "o"},
    "held_back": {"color": "#ee7733", "linestyle": "--", "marker": "s"},
    "validation": {"color": "#228833", "linestyle": ":", "marker": "^"},
}

LABELS = {
    ("search", "train"): "train (directions and head learn here)",
    ("search", "held_back"): "held back (magnitudes learn here)",
    ("retrain", "held_back"): "held back in the search, learnt from now",
    "validation": "validation (never learnt from)",
}

TITLES = {
    "search": "1. search: magnitudes and directions",
    "retrain": "2. retrain: magnitudes fixed, all examples",
    "train": "training",
}
"""What stands above a phase."""


def draw_curves(
    history: Sequence[dict[str, Any]], path: Path, title: str, metric: str
) -> None:
    """Draw the curves of a run.

    The last row, of runs with a search, has the hypergradient: its norm, and the part of
    the indirect term, ‖indirect‖ / (‖direct‖ + ‖indirect‖).

    Args:
        history: Records of steps and evaluations, as in `history.jsonl`.
        path: The png file to write.
        title: What stands above.
        metric: The score that is drawn below the loss.
    """
    probe = next((r.get("result") for r in history if r["phase"] == "probe"), None)
    history = [r for r in history if r["phase"] != "probe"]
    phases = list(dict.fromkeys(record["phase"] for record in history))
    if not phases:
        phases = ["probe"]
    searched = any(r.get("hypergrad_norm") is not None for r in history)
    rows = 3 if searched else 2
    figure = Figure(
        figsize=(2.2 + 4.4 * len(phases), 3.0 * rows + 0.6), layout="constrained"
    )
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's globals
    axes: Any = figure.subplots(
        rows, len(phases), sharex="col", sharey="row", squeeze=False
    )
    figure.suptitle(title)
    for column, phase in enumerate(phases):
        records = [record for record in history if record["phase"] == phase]
        loss, score = axes[0][column], axes[1][column]
        loss.set_title(TITLES.get(phase, phase), fontsize=11)
        loss.legend(handles=draw_steps(loss, records), loc="center right", fontsize=8)
        draw_evaluations(loss, records, phase, "loss")
        draw_evaluations(score, records, phase, metric)
        draw_test(score, records, probe, metric)
        if score.get_lines():
            score.legend(loc="best", fontsize=8)
        if searched:
            _draw_hypergradient(axes[2][column], records)
        bottom = axes[-1][column]
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].set_ylabel("loss")
    axes[0][0].set_ylim(bottom=0)
    axes[1][0].set_ylabel(metric.replace("_", " "))
    if searched:
        axes[2][0].set_ylabel("hypergradient")
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(path, format="png")


def draw_steps(ax: Any, records: Sequence[dict[str, Any]]) -> list[Any]:
    """Draw what every step minimised, faint: it is noisy and seen under dropout.

    Args:
        ax: Where.
        records: Of one phase.

    Returns:
        The line, for a legend.
    """
    steps = [r for r in records if r.get("inner_loss") is not None]
    return ax.plot(
        [r["step"] for r in steps],
        [r["inner_loss"] for r in steps],
        color=STYLES["train"]["color"],
        alpha=0.3,
        linewidth=0.8,
        label="loss of each batch",
    )


def draw_evaluations(
    ax: Any, records: Sequence[dict[str, Any]], phase: str, score: str
) -> None:
    """Draw the curves of each part that was evaluated on the way.

    Args:
        ax: Where.
        records: Of one phase.
        phase: Its name.
        score: `loss`, or a metric.
    """
    evaluations = [r for r in records if "evaluation" in r]
    names = dict.fromkeys(name for r in evaluations for name in r["evaluation"])
    for name in names:
        points = [r for r in evaluations if score in r["evaluation"].get(name, {})]
        if points:
            ax.plot(
                [r["step"] for r in points],
                [r["evaluation"][name][score] for r in points],
                markersize=3.5,
                label=LABELS.get(
                    (phase, name), LABELS.get(name, f"{name} (all of it)")
                ),
                **STYLES.get(name, {}),
            )


def draw_test(
    ax: Any, records: Sequence[dict[str, Any]], probe: Any, metric: str
) -> None:
    """Draw what is to be beaten, and what the phase came to: both on the test examples.

    Args:
        ax: Where.
        records: Of one phase.
        probe: The record of the probe's result; None where there is none.
        metric: The score.
    """
    reached = probe["scores"].get("test", {}).get(metric) if probe else None
    if reached is not None:
        ax.axhline(
            reached,
            color="#aa3377",
            linestyle="-.",
            linewidth=1.2,
            label=f"probe, test: {reached:.3f}",
        )
    for record in records:
        final = record.get("result", {}).get("scores", {}).get("test", {}).get(metric)
        if final is not None:
            ax.plot(
                [record["result"]["steps"]],
                [final],
                color="black",
                linestyle="none",
                marker="*",
                markersize=9,
                label=f"this phase, test: {final:.3f}",
            )


def _draw_hypergradient(ax: Any, records: Sequence[dict[str, Any]]) -> None:
    steps = [r for r in records if r.get("hypergrad_norm") is not None]
    if not steps:
        ax.text(0.5, 0.5, "magnitudes fixed", ha="center", transform=ax.transAxes)
        return
    xs = [r["step"] for r in steps]
    ax.plot(xs, [r["hypergrad_norm"] for r in steps], color="#4477aa", label="norm")
    both = [(r["direct_norm"] or 0.0) + (r["indirect_norm"] or 0.0) for r in steps]
    shares = [
        (r["indirect_norm"] or 0.0) / b if b else 0.0
        for r, b in zip(steps, both, strict=True)
    ]
    ax.plot(xs, shares, color="#ee7733", linestyle="--", label="share of indirect term")
    ax.legend(loc="upper right", fontsize=8)
