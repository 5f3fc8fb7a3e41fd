"""What quality does each method reach, in how much time?

    python -m benchmarks.time_to_quality --data DATA

from the root of the repository; about two hours on one core. DATA is a folder with
`glue/SST-2/`, `glue/CoLA/` and `glue/MRPC/` in GLUE's own layout; without it the
docstrings of the standard library, which need nothing, are the only task. Writes
benchmarks/results/time_to_quality.json and docs/images/benchmarks/time_to_quality.png.

Methods: LoRA, DoRA (exact, magnitudes and directions together on all data), and BiDoRA by
its two budgets, `full` (the paper's) and `economical`. Each is the job of `bidora train`
on the bundled encoder, from the same seeds, splits and first weights, one after the other
within a seed, so that times are compared in pairs. The number of steps is LoRA's own: of
those offered, the one that it scores best with on a seed that is not used again. All
other settings are the command's defaults, for every method the same.

A run whose folder under --runs is complete is not run again, so that a stopped benchmark
goes on where it was; its seconds are those of the machine that it ran on.

At full size: --train 0 --test 0 --steps 1000 3000 --seeds 5 --max-length 128, on a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    done,
    new_figure,
    paired_ratios,
    plain_axes,
    save_picture,
    write_result,
)

QUESTION = "What quality does each method reach, in how much time?"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "DoRA": {"method": "dora"},
    "BiDoRA, full": {"budget": "full"},
    "BiDoRA, economical": {"budget": "economical"},
}
COLOURS = dict(zip(METHODS, (GREY, "#2e7d4f", ORANGE, BLUE), strict=True))
TUNING_SEED = 1000


# -- tasks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A task of GLUE as files of two columns or three.

    Attributes:
        folder: below the data folder.
        train: its training file.
        test: what it is scored on, the development file.
        columns: of text, of a second text or None, and of the label.
        header: names of the columns, where the files do not begin with them.
        score: what counts; macro-F1 where one class is much larger, so that to answer
            with it always would be accurate.
    """

    folder: str
    train: str
    test: str
    columns: tuple[str, str | None, str]
    header: tuple[str, ...] | None = None
    score: str = "accuracy"


SOURCES = {
    "SST-2": Source(
        "glue/SST-2", "train.tsv.gz", "dev.tsv", ("sentence", None, "label")
    ),
    "CoLA": Source(
        "glue/CoLA",
        "train.tsv",
        "dev.tsv",
        ("sentence", None, "label"),
        header=("source", "label", "mark", "sentence"),
        score="macro_f1",
    ),
    "MRPC": Source(
        "glue/MRPC",
        "train.tsv",
        "msr_paraphrase_test.txt",
        ("#1 String", "#2 String", "Quality"),
        score="macro_f1",
    ),
}


def rows_of(
    path: Path, header: tuple[str, ...] | None
) -> tuple[list[str], list[list[str]]]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    names = list(header) if header else lines.pop(0)
    return names, [line for line in lines if len(line) == len(names)]


def sample(rows: list[list[str]], label: int, count: int, seed: int) -> list[list[str]]:
    """Return as many rows, as even over the labels as they are; all where count is 0."""
    draw = random.Random(seed)
    if not count or count >= len(rows):
        return rows
    by_label: dict[str, list[list[str]]] = {}
    for row in rows:
        by_label.setdefault(row[label], []).append(row)
    chosen: list[list[str]] = []
    for group in by_label.values():
        chosen += draw.sample(group, round(count * len(group) / len(rows)))
    draw.shuffle(chosen)
    return chosen


def task_settings(
    name: str, data: Path, work: Path, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what `bidora train` has to be told of a task; writes its files."""
    if name == "docstrings":
        return {"task": "docstrings"}
    source = SOURCES[name]
    folder = work / "data" / f"{name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, file, count, at in (
        ("train", source.train, arguments.train, seed),
        ("test", source.test, arguments.test, 0),
    ):
        header, rows = rows_of(data / source.folder / file, source.header)
        rows = sample(rows, header.index(source.columns[2]), count, at)
        text = "\n".join("\t".join(row) for row in [header, *rows]) + "\n"
        (folder / f"{kind}.tsv").write_text(text, "utf-8")
    text_column, pair, label = source.columns
    given = {
        "task": str(folder / "train.tsv"),
        "test_file": str(folder / "test.tsv"),
        "text_column": text_column,
        "label_column": label,
        "max_length": arguments.max_length,
    }
    return {**given, "text_pair_column": pair} if pair else given


# -- runs ------------------------------------------------------------------------------


def run(folder: Path, **options: Any) -> dict[str, Any]:
    """Train once, or read what an earlier run of the benchmark left."""
    from bidora.settings import TrainSettings
    from bidora.training import train

    done_file = folder / "metrics.json"
    if not done_file.exists():
        settings = TrainSettings.from_options(
            output_dir=str(folder), overwrite=True, device="auto", **options
        )
        # Nothing but the ends is looked at.
        train(settings_without_curves(settings))
    metrics = json.loads(done_file.read_text("utf-8"))
    phases = metrics["phases"]
    return {
        "accuracy": phases[-1]["test"]["accuracy"],
        "macro_f1": phases[-1]["test"]["macro_f1"],
        "seconds": sum(phase["seconds"] for phase in phases),
        "phases": [
            {k: phase[k] for k in ("name", "steps", "seconds", "outer_steps")}
            | {"accuracy": phase["test"]["accuracy"]}
            for phase in phases
        ],
    }


def settings_without_curves(settings: Any) -> Any:
    from dataclasses import replace

    return replace(settings, eval_every=max(settings.steps, settings.retrain_steps))


def interval(differences: list[float]) -> dict[str, float]:
    """Return mean and half width of the 95 % interval of a paired difference."""
    n = len(differences)
    mean = statistics.fmean(differences)
    half = math.inf
    if n > 1:
        point = float(student.ppf(0.975, n - 1))
        half = point * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "half_width_95": half}


def measure_task(
    name: str, arguments: argparse.Namespace, step: Callable[[str], None]
) -> dict[str, Any]:
    work = Path(arguments.runs)
    place = work / name
    score = SOURCES[name].score if name in SOURCES else "accuracy"
    tuned = {}
    task = task_settings(name, arguments.data, work, TUNING_SEED, arguments)
    for steps in arguments.steps:
        step(f"{name}: LoRA's steps")
        tuned[steps] = run(
            place / f"tune-{steps}",
            method="lora",
            steps=steps,
            seed=TUNING_SEED,
            **task,
        )[score]
    steps = max(tuned, key=lambda k: (tuned[k], -k))
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in range(arguments.seeds):
        task = task_settings(name, arguments.data, work, seed, arguments)
        # Rotated, so that no method always runs on a machine in the same state.
        order = list(METHODS)
        order = order[seed % len(order) :] + order[: seed % len(order)]
        for method in order:
            step(f"{name}: {method}")
            folder = place / f"{method.replace(', ', '-')}-seed{seed}"
            runs[method].append(
                run(folder, steps=steps, seed=seed, **METHODS[method], **task)
            )
    base = [one["seconds"] for one in runs["LoRA"]]
    full = [one[score] for one in runs["BiDoRA, full"]]
    return {
        "task": name,
        "steps": steps,
        "score": score,
        "lora_score_by_steps": tuned,
        "methods": {
            method: {
                "score": statistics.fmean(one[score] for one in seeds),
                "seconds": statistics.median(one["seconds"] for one in seeds),
                "time_over_lora": paired_ratios([o["seconds"] for o in seeds], base),
                "score_less_full": interval(
                    [o[score] - f for o, f in zip(seeds, full, strict=True)]
                ),
                "by_seed": seeds,
            }
            for method, seeds in runs.items()
        },
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = ["docstrings"] if "docstrings" in arguments.tasks else []
    missing: list[str] = []
    for name, source in SOURCES.items():
        if name not in arguments.tasks:
            continue
        there = arguments.data and (arguments.data / source.folder).is_dir()
        (names if there else missing).append(name)
    if missing:
        print(f"without {', '.join(missing)}: pass --data with GLUE's folders in it")
    total = len(names) * (len(arguments.steps) + arguments.seeds * len(METHODS))
    with tqdm(total=total, unit="run") as bar:

        def step(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        results = [measure_task(name, arguments, step) for name in names]
    report(results)
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()
    }
    settings["data"] = "GLUE's files" if arguments.data else None
    del settings["runs"]
    written = write_result(
        "time_to_quality",
        QUESTION,
        settings,
        torch.get_num_threads(),
        results,
        unit="test scores; seconds of training, evaluation left out",
    )
    done(written, picture(results, arguments.seeds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--data", type=Path, help="folder with glue/MRPC, glue/SST-2")
    parser.add_argument(
        "--tasks", nargs="+", default=["docstrings", *SOURCES],
        choices=["docstrings", *SOURCES], help="the tasks to try",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[60, 120], help="LoRA's, to choose from"
    )
    parser.add_argument("--train", type=int, default=400, help="examples; 0 for all")
    parser.add_argument("--test", type=int, default=600, help="examples; 0 for all")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--runs", default="runs/time_to_quality", help="for the runs")
    parser.add_argument("--remark", help="a sentence on the runs, for the record")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    return parser.parse_args()


def report(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(f"{result['task']}, {result['steps']} steps, {result['score']}")
        for method, found in result["methods"].items():
            gap = found["score_less_full"]
            print(
                f"  {method:20} {found['score']:.3f}, less full "
                f"{gap['mean']:+.3f} ± {gap['half_width_95']:.3f}, time over LoRA "
                f"{found['time_over_lora']['median']:.2f}"
            )


def picture(results: list[dict[str, Any]], seeds: int) -> Any:
    figure = new_figure(4.3 * len(results) + 0.6, 4.6)
    for column, result in enumerate(results):
        axes: Any = figure.add_subplot(1, len(results), column + 1)
        for method, found in result["methods"].items():
            ratios = found["time_over_lora"]["by_round"]
            scores = [one[result["score"]] for one in found["by_seed"]]
            colour = COLOURS[method]
            axes.plot(ratios, scores, "o", color=colour, ms=4, alpha=0.35)
            axes.plot(
                found["time_over_lora"]["median"], found["score"], "o",
                color=colour, ms=10, label=method if not column else None,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("training time over LoRA's (log scale)")
        axes.set_title(f"{result['task']}, {result['steps']} steps", color=INK)
        plain_axes(axes, "y")
        axes.set_ylabel(f"test {result['score'].replace('_', '-')}")
    figure.legend(
        loc="outside lower center", ncols=len(METHODS), frameon=False, labelcolor=INK
    )
    figure.suptitle(
        f"Quality and time of each method ({seeds} seeds; large: their mean)"
    )
    return save_picture(figure, "time_to_quality")


if __name__ == "__main__":
    main()
