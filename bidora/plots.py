"""The picture of a run: loss and accuracy over steps, one column a phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

__all__ = ["draw_curves"]

COLOURS = {"train": "#4477aa", "validation": "#ee7733", "test": "#228833"}

LABELS = {
    ("search", "train"): "train (directions and head learn here)",
    ("search", "validation"): "validation (magnitudes learn here)",
    ("retrain", "train"): "train (everything, validation included)",
    ("train", "train"): "train (everything)",
}

TITLES = {
    "search": "1. search: magnitudes and directions",
    "retrain": "2. retrain: magnitudes fixed, all examples",
    "train": "training",
}


def draw_curves(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the curves of a run.

    Args:
        history: Records of steps and evaluations, as in `history.jsonl`.
        path: The png file to write.
        title: What stands above.
    """
    phases = list(dict.fromkeys(record["phase"] for record in history))
    figure = Figure(figsize=(2.2 + 4.4 * len(phases), 6.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's globals
    axes: Any = figure.subplots(
        2, len(phases), sharex="col", sharey="row", squeeze=False
    )
    figure.suptitle(title)
    for column, phase in enumerate(phases):
        records = [record for record in history if record["phase"] == phase]
        loss, accuracy = axes[0][column], axes[1][column]
        loss.set_title(TITLES.get(phase, phase), fontsize=11)
        loss.legend(handles=_draw_steps(loss, records), loc="upper right", fontsize=8)
        _draw_evaluations(loss, records, phase, "loss")
        _draw_evaluations(accuracy, records, phase, "accuracy")
        accuracy.set_xlabel("step")
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
        accuracy.legend(loc="lower right", fontsize=8)
    axes[0][0].set_ylabel("cross-entropy loss")
    axes[0][0].set_ylim(bottom=0)
    axes[1][0].set_ylabel("accuracy")
    axes[1][0].set_ylim(0, 1.03)
    axes[1][0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"savefig.dpi": 130}):
        figure.savefig(path, format="png")


def _draw_steps(ax: Any, records: Sequence[dict[str, Any]]) -> list[Any]:
    """Draw what every step minimised, faint: it is noisy and seen under dropout."""
    steps = [r for r in records if r.get("inner_loss") is not None]
    return ax.plot(
        [r["step"] for r in steps],
        [r["inner_loss"] for r in steps],
        color=COLOURS["train"],
        alpha=0.3,
        linewidth=0.8,
        label="inner loss of each batch",
    )


def _draw_evaluations(
    ax: Any, records: Sequence[dict[str, Any]], phase: str, score: str
) -> None:
    evaluations = [r for r in records if "evaluation" in r]
    names = dict.fromkeys(name for r in evaluations for name in r["evaluation"])
    for name in names:
        points = [r for r in evaluations if name in r["evaluation"]]
        ax.plot(
            [r["step"] for r in points],
            [r["evaluation"][name][score] for r in points],
            color=COLOURS.get(name),
            marker="o",
            markersize=3.5,
            label=LABELS.get((phase, name), name),
        )
