"""The picture of `step_cost`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    new_figure,
    plain_axes,
    save_picture,
)

COLOURS = {0: GREY, 1: BLUE, 2: ORANGE}
KINDS = ("training step, no outer level", "first derivatives", "second derivatives")
MARKS = (0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "over exact\nDoRA": lambda row: _number(
        row.get("ratio_to_exact_dora", {}).get("median")
    ),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "forward": lambda row: _count(row, "n_forward"),
    "backward": lambda row: _count(row, "n_backward"),
    "HVP": lambda row: _count(row, "n_hvp"),
}


def draw(results: list[dict[str, Any]], name: str, title: str) -> Path:
    """Draw time and memory of each row beside its counts, and return the path."""
    figure = new_figure(13.5, 1.8 + 0.34 * len(results))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[4, 2.8, 3.6])
    for y, row in enumerate(results):
        if "failure" in row:
            panels[0].annotate(
                row["failure"], (0.02, y), xycoords=("axes fraction", "data"),
                va="center", color=INK,
            )  # fmt: skip
            continue
        _times(panels[0], row, y)
        _memory(panels[1], row, y)
        for x, text in enumerate(COLUMNS.values()):
            panels[2].text(x, y, text(row), ha="center", va="center", color=INK)
    labels = [_label(row) for row in results]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    _log_axis(panels[0], "time, in PEFT LoRA steps\n")
    _log_axis(panels[1], "peak memory, in exact-DoRA steps\n")
    for panel in panels[:2]:
        panel.axvline(1, color=GREY, lw=1)
    panels[1].tick_params(axis="y", length=0)
    _table(panels[2])
    figure.legend(
        handles=[
            Line2D([], [], ls="", marker="o", ms=7, color=c, label=kind)
            for c, kind in zip(COLOURS.values(), KINDS, strict=True)
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
    )
    figure.suptitle(f"One BiDoRA iteration: {title}")
    return save_picture(figure, name)


def _times(axes: Any, row: dict[str, Any], y: int) -> None:
    ratio = row.get("ratio_to_lora")
    if ratio is None:
        return
    colour = COLOURS[row.get("order", 0)]
    axes.plot([ratio["min"], ratio["max"]], [y, y], color=colour, lw=3, alpha=0.35)
    axes.plot(ratio["median"], y, "o", color=colour, ms=7)
    _beside(axes, ratio["max"], y, _number(ratio["median"]))


def _memory(axes: Any, row: dict[str, Any], y: int) -> None:
    over = row.get("peak_bytes_over_exact_dora")
    if over is None:
        return
    axes.plot(over, y, "o", color=COLOURS[row.get("order", 0)], ms=7)
    _beside(axes, over, y, f"{_number(over)} ({row['peak_bytes'] / 2**20:,.0f} MiB)")


def _beside(axes: Any, x: float, y: int, text: str) -> None:
    axes.annotate(
        text, (x, y), (7, 0), textcoords="offset points", va="center", color=INK,
        fontsize=9,
    )  # fmt: skip


def _log_axis(axes: Any, text: str) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.85, low), high * 2)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([m for m in MARKS if low < m < high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(text + "(log scale)")
    plain_axes(axes, "x")


def _table(axes: Any) -> None:
    axes.set_xlim(-0.5, len(COLUMNS) - 0.5)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS, fontsize=9)
    axes.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    axes.tick_params(axis="both", labelleft=False, labelcolor=GREY)
    axes.spines[:].set_visible(False)


def _label(row: dict[str, Any]) -> str:
    every = row.get("outer_every", 1)
    return row["name"] + (f" (outer step every {every})" if every > 1 else "")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _count(row: dict[str, Any], name: str) -> str:
    counts = row.get("per_outer_step")
    return "" if counts is None else str(counts[name])
