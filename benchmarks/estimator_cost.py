"""What does one hypergradient cost, and how does that grow with the batch?

    python -m benchmarks.estimator_cost

from the root of the repository; about five minutes on one core. Writes
benchmarks/results/estimator_cost.json and docs/images/benchmarks/estimator_cost.png.

One transformer block of RoBERTa-base's width with exact DoRA on query and value, a head
that is trained, and AdamW; five inner steps are taken, and then every registered estimator
answers for the same steps and batches, in `hypergrad.compare_estimators`. Where
`step_cost` asks what a training iteration takes, with graphs that an inner step leaves
behind, this is the estimate alone, from nothing: in counted passes and products, in
seconds over those of one inner gradient of the same round, and in bytes of tensors that
are held at once beyond those that were there before.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from typing import Any

import torch
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tqdm import tqdm

from benchmarks import _model
from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    add_threads_argument,
    done,
    new_figure,
    plain_axes,
    save_picture,
    write_result,
)
from bidora import BiDoRAOptimizer
from hypergrad import NumericalWarning, compare_estimators, make_estimator

QUESTION = "What does one hypergradient cost, and how does that grow with the batch?"
STEPS = 5
COUNTS = {"n_forward": "forward", "n_backward": "backward", "n_hvp": "HVP"}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)  # reasons go into the JSON
    with tqdm(unit="run") as bar:
        sizes = [measure(size, arguments, bar) for size in arguments.sizes]
    report(sizes)
    written = write_result(
        "estimator_cost",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        sizes,
        unit="counts; seconds over those of one inner gradient; bytes of tensors",
    )
    done(written, picture(sizes, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["4x32", "8x64", "16x64"],
        help="examples × tokens of each batch",
    )
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapter")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    add_threads_argument(parser)
    return parser.parse_args()


def measure(size: str, arguments: argparse.Namespace, bar: Any) -> dict[str, Any]:
    """Return every estimator's cost on batches of one size."""
    examples, tokens = map(int, size.split("x"))
    base = _model.roberta(1, tokens, "sdpa")
    model = _model.with_adapter(base, arguments.rank, dora=True)
    batches = [_model.draw_batch(examples, tokens, seed) for seed in range(STEPS + 1)]
    optimizer = BiDoRAOptimizer(
        model,
        make_estimator("unrolled", num_steps=STEPS),
        orthogonality=0.0,
        max_grad_norm=None,
    )
    for batch in batches[:-1]:
        optimizer.inner_step(batch)

    def show(runs_done: int, runs: int, label: str) -> None:
        bar.n, bar.total = runs_done, runs
        bar.set_description(f"{size} tokens")
        bar.set_postfix_str(label)

    steps = optimizer.recorded_steps
    estimators = {
        # `auto` makes its choice here and not in the timed runs.
        label: make_estimator(name, **settings)
        .resolve(optimizer.problem, batches[-2], steps[-1].rule)
        .estimator
        for label, name, settings in _model.estimator_variants()
    }
    compared = compare_estimators(
        optimizer.problem,
        estimators,
        batches[-2],
        batches[-1],
        steps=steps,
        repeats=arguments.rounds,
        on_progress=show,
    )
    return {
        "examples": examples,
        "tokens": tokens,
        "inner_gradient_seconds": compared.inner_gradient_seconds,
        **{n: compared.settings[f"{n}_parameters"] for n in ("inner", "outer")},
        "rows": {
            row.label: {"order": estimators[row.label].needs.order, **asdict(row)}
            for row in compared.rows
        },
    }


def report(sizes: list[dict[str, Any]]) -> None:
    for size in sizes:
        seconds = size["inner_gradient_seconds"]
        print(f"{size['examples']} × {size['tokens']} tokens, gradient {seconds:.3f} s")
        print(f"    {'':24}   F   B  HVP  inner gradients     MiB")
        for label in by_cost(sizes):
            row = size["rows"][label]
            if row["failure"]:
                print(f"    {label:24} {row['failure'][:60]}")
                continue
            print(
                f"    {label:24}",
                *(f"{row[count]:3d}" for count in COUNTS),
                f"{row['inner_gradients']:16.2f} {row['peak_bytes'] / 2**20:7.0f}",
            )


def by_cost(sizes: list[dict[str, Any]]) -> list[str]:
    """Return the labels, the cheapest at the largest size first."""
    rows = sizes[-1]["rows"]
    return sorted(rows, key=lambda label: rows[label]["inner_gradients"] or 1e9)


def picture(sizes: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    labels = by_cost(sizes)
    figure = new_figure(12, 1.9 + 0.36 * len(labels))
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[3, 3, 1.3])
    shades = [0.3 + 0.7 * k / max(1, len(sizes) - 1) for k in range(len(sizes))]
    for y, label in enumerate(labels):
        colour = ORANGE if sizes[-1]["rows"][label]["order"] == 2 else BLUE
        for panel, key, unit in ((0, "inner_gradients", 1), (1, "peak_bytes", 2**20)):
            values = [size["rows"][label][key] for size in sizes]
            points = [v / unit for v in values if v is not None]
            axes[panel].plot(points, [y] * len(points), color=colour, lw=2, alpha=0.25)
            for value, shade in zip(values, shades, strict=True):
                if value is not None:
                    axes[panel].plot(
                        value / unit, y, "o", color=_paler(colour, shade), ms=7
                    )
            if points:
                text = f"{points[-1]:.0f}" if points[-1] >= 10 else f"{points[-1]:.1f}"
                axes[panel].annotate(
                    text,
                    (max(points), y),
                    (8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                    color=INK,
                )
        for x, count in enumerate(COUNTS):
            text = sizes[-1]["rows"][label][count]
            text = "–" if text is None else str(text)
            axes[2].text(x, y, text, ha="center", va="center", color=INK)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    for panel, marks, text in (
        (0, (1, 2, 3, 5, 10, 20, 40), "seconds, in those of one inner gradient"),
        (1, (20, 50, 100, 200, 500, 1000, 2000), "MiB of tensors beyond those before"),
    ):
        axes[panel].set_xscale("log")
        low, high = axes[panel].get_xlim()
        axes[panel].set_xlim(low * 0.9, high * 1.3)
        axes[panel].xaxis.set_major_locator(
            FixedLocator([m for m in marks if low * 0.9 < m < high * 1.3])
        )
        axes[panel].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes[panel].xaxis.set_minor_locator(NullLocator())
        axes[panel].set_xlabel(
            f"{text}\n(log scale; the number is that of the largest)"
        )
        plain_axes(axes[panel], "x")
    axes[1].tick_params(axis="y", length=0)
    axes[2].set_xlim(-0.5, len(COUNTS) - 0.5)
    axes[2].set_xticks(range(len(COUNTS)), COUNTS.values(), fontsize=9)
    axes[2].tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    axes[2].tick_params(axis="both", labelleft=False, labelcolor=GREY)
    axes[2].spines[:].set_visible(False)
    figure.legend(
        handles=[
            Line2D(
                [], [], ls="", marker="o", ms=7, color=_paler(GREY, shade),
                label=f"{size['examples']} × {size['tokens']} tokens",
            )
            for size, shade in zip(sizes, shades, strict=True)
        ]
        + [
            Line2D([], [], ls="", marker="o", ms=7, color=c, label=f"{n} derivatives")
            for c, n in ((BLUE, "first"), (ORANGE, "second"))
        ],
        loc="outside lower center",
        ncols=len(sizes) + 2,
        frameon=False,
        labelcolor=INK,
    )  # fmt: skip
    threads = f"{arguments.threads} thread" + "s" * (arguments.threads != 1)
    figure.suptitle(
        f"One hypergradient through a block of RoBERTa-base's width, {threads}"
    )
    return save_picture(figure, "estimator_cost")


def _paler(colour: str, strength: float) -> tuple[float, float, float]:
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


if __name__ == "__main__":
    main()
