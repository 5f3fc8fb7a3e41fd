"""What does one BiDoRA iteration cost over one PEFT LoRA step?

    python -m benchmarks.step_cost

from the root of the repository; about five minutes on one core. Writes
benchmarks/results/step_cost.json and docs/images/benchmarks/step_cost.png.

An iteration is an inner and an outer step on batches of equal size, with an outer step
after every inner one (`outer_every=1`, which is the dearest setting: k divides all but
the inner step by k). `unrolled` with K steps looks back at K of them and so takes an
outer step after every K: what is reported is a K-th of K inner steps and one outer step.

All contenders have the same frozen weights (RoBERTa-base's width, random), adapters on
query and value, a trained head and AdamW. They run in one process, one after the other
in every round, and each is divided by the LoRA step *of the same round*.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import warnings
from typing import Any

import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tqdm import tqdm

from benchmarks import _model
from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Contender,
    add_model_arguments,
    done,
    model_title,
    new_figure,
    paired_ratios,
    plain_axes,
    save_picture,
    time_in_rotation,
    write_result,
)
from bidora import BiDoRAOptimizer, use_exact_dora
from hypergrad import NumericalWarning, make_estimator

QUESTION = "What does one BiDoRA iteration cost over one PEFT LoRA step?"
BASELINE = "PEFT LoRA step"
PLAIN_STEPS = 3  # one training step alone is too short to time well


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)  # reasons go into the JSON
    base = _model.roberta(arguments.layers, arguments.tokens, arguments.attention)
    # Other data at every step, so that no contender trains itself into another regime.
    batches = [
        _model.draw_batch(arguments.batch, arguments.tokens, seed) for seed in range(16)
    ]
    rows = plain_rows(base, arguments.rank, batches)
    for label, name, settings in _model.estimator_variants():
        rows.append(bidora_row(base, arguments.rank, batches, label, name, settings))
    contenders = [row.pop("contender") for row in rows]
    with tqdm(total=(arguments.rounds + 1) * len(rows), unit="run") as bar:
        time_in_rotation(contenders, arguments.rounds, bar)
    lora = contenders[0]
    for row, contender in zip(rows, contenders, strict=True):
        row["ratio"] = paired_ratios(contender.seconds, lora.seconds)
        row["seconds"] = contender.seconds
        row.update(contender.note)
    rows.sort(key=lambda row: row["ratio"]["median"])
    report(rows)
    written = write_result(
        "step_cost",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        rows,
        unit="seconds of an iteration over those of the PEFT LoRA step of the same round",
    )
    done(written, picture(rows, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="attention implementation of the model; sdpa is transformers' default",
    )
    return parser.parse_args()


def plain_rows(
    base: torch.nn.Module, rank: int, batches: list[Any]
) -> list[dict[str, Any]]:
    """Return training without an outer level: LoRA, PEFT's DoRA, exact DoRA."""
    exact = _model.with_adapter(base, rank, dora=True)
    use_exact_dora(exact)
    models = {
        BASELINE: _model.with_adapter(base, rank, dora=False),
        "PEFT DoRA step": _model.with_adapter(base, rank, dora=True),
        "exact DoRA step": exact,
    }
    rows = []
    for name, model in models.items():
        own = [p for p in model.parameters() if p.requires_grad]
        run = functools.partial(
            train, model, torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0), batches
        )
        rows.append(
            {
                "name": name,
                "kind": "training step",
                "trainable": sum(p.numel() for p in own),
                "contender": Contender(name, run, PLAIN_STEPS),
            }
        )
    return rows


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    turn: int,
) -> dict[str, Any]:
    for k in range(PLAIN_STEPS):
        optimizer.zero_grad()
        model(**pick(batches, turn, k)).loss.backward()
        optimizer.step()
    return {}


def pick(batches: list[Any], turn: int, step: int) -> Any:
    """Return a batch; in the warm-up its first example, which makes all state too."""
    batch = batches[(turn + step) % len(batches)]
    return batch if turn else {name: tensor[:1] for name, tensor in batch.items()}


def bidora_row(
    base: torch.nn.Module,
    rank: int,
    batches: list[Any],
    label: str,
    name: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Return a BiDoRA iteration with one estimator."""
    estimator = make_estimator(name, **settings)
    every = max(1, estimator.lookback)
    model = _model.with_adapter(base, rank, dora=True)
    opt = BiDoRAOptimizer(model, estimator, outer_every=every, outer_warmup=0)

    def iterate(turn: int) -> dict[str, Any]:
        report = None
        for k in range(every):
            report = opt.step(pick(batches, turn, k), pick(batches, turn, k + 1))
        if report is None or report.info is None:
            why = report.skipped if report else None
            raise RuntimeError(f"{label} took no outer step: {why}")
        info = report.info
        counts = {n: getattr(info, n) for n in ("n_forward", "n_backward", "n_hvp")}
        # Its order too: `auto` has one where it has chosen.
        found = {"per_outer_step": counts, "reason": info.reason}
        return {**found, "order": opt.estimator.order}

    return {
        "name": label,
        "kind": "BiDoRA iteration",
        "estimator": name,
        "estimator_settings": settings,
        "outer_every": every,
        "trainable": sum(p.numel() for p in opt.problem.tensors),
        "contender": Contender(label, iterate, every),
    }


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'':24} ratio to LoRA [min, max]     seconds   F  B  HVP of an outer step")
    for row in rows:
        ratio, counts = row["ratio"], row.get("per_outer_step", {})
        seconds = statistics.median(row["seconds"])
        print(
            f"{row['name']:24} {ratio['median']:6.2f} [{ratio['min']:.2f}, "
            f"{ratio['max']:.2f}]".ljust(52),
            f"{seconds:8.3f} ",
            *(f"{n:3d}" for n in counts.values()),
        )


def picture(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    colours = {0: GREY, 1: BLUE, 2: ORANGE}
    figure = new_figure(10, 1.5 + 0.33 * len(rows))
    axes, table = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1.35])
    columns = {"n_forward": "forward", "n_backward": "backward", "n_hvp": "HVP"}
    for y, row in enumerate(rows):
        colour, ratio = colours[row.get("order", 0)], row["ratio"]
        axes.plot([ratio["min"], ratio["max"]], [y, y], color=colour, lw=3, alpha=0.35)
        axes.plot(ratio["median"], y, "o", color=colour, ms=7)
        axes.annotate(
            f"{ratio['median']:.2f}"
            if ratio["median"] < 10
            else f"{ratio['median']:.1f}",
            (ratio["max"], y),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
        for key, count in row.get("per_outer_step", {}).items():
            x = list(columns).index(key)
            table.text(x, y, str(count), ha="center", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [row_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    low = min(row["ratio"]["min"] for row in rows)
    top = max(row["ratio"]["max"] for row in rows)
    axes.set_xscale("log")
    axes.set_xlim(min(0.85, low * 0.95), top * 1.5)
    marks = [
        t for t in (0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50) if t < top * 1.5
    ]
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(
        "time of one iteration, in PEFT LoRA steps (log scale)\n"
        f"dot: median, bar: range over {arguments.rounds} rounds"
    )
    plain_axes(axes, "x")
    axes.axvline(1, color=GREY, lw=1)
    table.set_xlim(-0.5, len(columns) - 0.5)
    table.set_xticks(range(len(columns)), columns.values(), fontsize=9)
    table.set_title("in one outer step", fontsize=9, color=GREY)
    table.tick_params(length=0, top=True, labeltop=True, labelbottom=False)
    table.tick_params(axis="both", labelleft=False, labelcolor=GREY)
    table.spines[:].set_visible(False)
    kinds = ("training step, no outer level", "first derivatives", "second derivatives")
    axes.legend(
        handles=[
            Line2D([], [], ls="", marker="o", ms=7, color=c, label=kind)
            for c, kind in zip(colours.values(), kinds, strict=True)
        ],
        loc="upper right",
        facecolor="white",
        edgecolor="none",
        framealpha=1,
    )
    figure.suptitle(f"One BiDoRA iteration: {model_title(arguments)}")
    return save_picture(figure, "step_cost")


def row_label(row: dict[str, Any]) -> str:
    every = row.get("outer_every", 1)
    return row["name"] + (f" (outer step every {every})" if every > 1 else "")


if __name__ == "__main__":
    main()
