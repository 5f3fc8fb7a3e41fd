"""What does exact DoRA cost over PEFT LoRA, forward and backward?

    python -m benchmarks.dora_forward

from the root of the repository; three minutes on one core, one of them to compile.
Writes benchmarks/results/dora_forward.json and docs/images/benchmarks/dora_forward.png.
Peak memory needs a system that tells it (Linux, macOS), compiling a C++ compiler;
`--no-compile` leaves the latter out.

One training step (forward, backward, AdamW) of a model of RoBERTa-base's width with
adapters on query and value, in four settings: as it is, with adapter dropout, under
bfloat16 autocast, and compiled by inductor. Each is divided by the PEFT LoRA of its
setting *in the same round*. Then inference, over the model without an adapter: merged,
one must cost nothing. All share their frozen weights and run in one process, one after
the other in every round.

Peak memory is taken in a new process for each, because it never goes down again in one:
how far one step on a batch goes beyond the peak of a step on one example.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.lines import Line2D
from torch import nn
from tqdm import tqdm

from benchmarks import _model
from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    ROOT,
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
from bidora import use_exact_dora

QUESTION = "What does exact DoRA cost over PEFT LoRA, forward and backward?"
DROPOUT = 0.05
SETTINGS = {
    "step": "training step",
    "dropout": f"step, adapter dropout {DROPOUT}",
    "autocast": "step, bfloat16 autocast",
    "compiled": "step, compiled",
    "inference": "inference",
}
# glibc's malloc gives large blocks back at once: the peak is then what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One contender: an adapter in a setting.

    Attributes:
        setting: key of `SETTINGS`.
        adapter: what the model has; the first case of a setting is its base.
    """

    setting: str
    adapter: str


DORA = ("PEFT DoRA", "exact DoRA")
CASES = [
    *(Case("step", adapter) for adapter in ("LoRA", *DORA)),
    *(Case("dropout", a) for a in ("LoRA", *DORA, "exact DoRA, PEFT's dropout")),
    *(Case("autocast", adapter) for adapter in ("LoRA", *DORA)),
    *(Case("compiled", adapter) for adapter in ("LoRA", *DORA)),
    *(
        Case("inference", a)
        for a in ("no adapter", "LoRA", *DORA, "exact DoRA, merged")
    ),
]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print(json.dumps(measured_memory(CASES[arguments.memory_of], arguments)))
        return
    cases = [c for c in CASES if arguments.compile or c.setting != "compiled"]
    # First, because a process starts with the peak of the one that started it.
    memory = {
        case: memory_in_new_process(case, arguments)
        for case in tqdm([c for c in cases if c.setting == "step"], unit="process")
    }
    rows = timed(cases, arguments)
    for case, row in zip(cases, rows, strict=True):
        row["step_bytes"] = memory.get(case)
    report(rows)
    shown = {n: x for n, x in vars(arguments).items() if n != "memory_of"}
    written = write_result(
        "dora_forward",
        QUESTION,
        shown,
        torch.get_num_threads(),
        rows,
        unit="seconds over those of the first row of the same setting, round by round; "
        "bytes of peak memory beyond the peak of a step on one example",
    )
    done(written, picture(rows, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.set_defaults(layers=1, batch=16, tokens=128)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure compiled models too",
    )
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(cases: list[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return, for each case, seconds and ratios of all of it and of its forward pass."""
    base = _model.roberta(arguments.layers, arguments.tokens, "sdpa")
    batches = [
        _model.draw_batch(arguments.batch, arguments.tokens, seed) for seed in range(8)
    ]
    forward: list[list[float]] = [[] for _ in cases]
    contenders = [
        Contender(f"{case.adapter}, {case.setting}", run)
        for case, seconds in zip(cases, forward, strict=True)
        for run in [runner(case, base, arguments.rank, batches, seconds)]
    ]
    with tqdm(total=(arguments.rounds + 1) * len(cases), unit="run") as bar:
        time_in_rotation(contenders, arguments.rounds, bar)
    rows = []
    for case, own, own_forward in zip(cases, contenders, forward, strict=True):
        first = next(i for i, c in enumerate(cases) if c.setting == case.setting)
        rows.append(
            {
                "setting": case.setting,
                "adapter": case.adapter,
                "over": cases[first].adapter,
                "ratio": paired_ratios(own.seconds, contenders[first].seconds),
                "forward_ratio": paired_ratios(own_forward[1:], forward[first][1:]),
                "seconds": own.seconds,
                "forward_seconds": own_forward[1:],
            }
        )
    return rows


def runner(
    case: Case, base: nn.Module, rank: int, batches: list[Any], seconds: list[float]
) -> Any:
    """Return what runs one step, or one forward pass, and notes the latter's seconds."""
    model = make_model(case, base, rank)
    if case.setting == "compiled":
        # PEFT's DoRA breaks the graph: it looks for torchao's class by its module's name.
        model = torch.compile(model, fullgraph=case.adapter != "PEFT DoRA")
    training = case.setting != "inference"
    own = [p for p in model.parameters() if p.requires_grad] if training else []
    adamw = torch.optim.AdamW(own, lr=1e-3) if own else None
    cast = torch.autocast("cpu", torch.bfloat16, enabled=case.setting == "autocast")

    def run(turn: int) -> dict[str, Any]:
        with torch.set_grad_enabled(training):
            start = time.perf_counter()
            with cast:
                loss = model(**batches[turn % len(batches)]).loss
            seconds.append(time.perf_counter() - start)
            if adamw is not None:
                loss.backward()
                adamw.step()
                adamw.zero_grad()
        return {}

    return run


def make_model(case: Case, base: nn.Module, rank: int) -> Any:
    if case.adapter == "no adapter":
        return base.eval()
    model = _model.with_adapter(base, rank, dora=case.adapter != "LoRA")
    for name, module in model.named_modules():
        if case.setting == "dropout" and name.endswith("lora_dropout"):
            module["default"] = nn.Dropout(DROPOUT)
    if case.adapter.startswith("exact"):
        theirs = case.adapter.endswith("PEFT's dropout")
        use_exact_dora(model, dropout="peft" if theirs else "lora")
    if case.adapter.endswith("merged"):
        model = copy.deepcopy(model).merge_and_unload()  # the weights are shared
    return model.train(case.setting != "inference")


# -- memory ------------------------------------------------------------------------------


def measured_memory(case: Case, arguments: argparse.Namespace) -> int:
    base = _model.roberta(arguments.layers, arguments.tokens, "sdpa")
    whole = _model.draw_batch(arguments.batch, arguments.tokens, 0)
    batches = [{name: tensor[:1] for name, tensor in whole.items()}, whole]
    run = runner(case, base, arguments.rank, batches, [])
    run(0)
    before = peak_bytes()
    run(1)
    return peak_bytes() - before


def memory_in_new_process(case: Case, arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.dora_forward"]
    for name in ("layers", "batch", "tokens", "rank", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--memory-of", str(CASES.index(case))]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **MALLOC},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Return the largest resident size that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -- what is shown -----------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> None:
    print(f"{'':58}  ratio [min, max]    forward  seconds   MiB")
    for row in rows:
        ratio = row["ratio"]
        label = f"{SETTINGS[row['setting']]}: {row['adapter']}"
        print(
            f"{label:58} {ratio['median']:6.3f} [{ratio['min']:.2f}, {ratio['max']:.2f}]",
            f"{row['forward_ratio']['median']:10.3f}",
            f"{statistics.median(row['seconds']):8.3f}",
            f"{row['step_bytes'] / 2**20:6.0f}" if row["step_bytes"] else "",
        )


def picture(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    shown = [row for row in rows if row["adapter"] != row["over"]]
    figure = new_figure(9, 1.7 + 0.36 * len(shown))
    axes = figure.subplots()
    y, ticks, labels = 0.0, [], []
    for setting, title in SETTINGS.items():
        group = [row for row in shown if row["setting"] == setting]
        if group:
            axes.text(
                0,
                y,
                title,
                transform=axes.get_yaxis_transform(),
                color=GREY,
                ha="left",
                va="center",
                fontsize=9,
            )
            y += 0.8
        for row in group:
            draw(axes, row, y)
            ticks.append(y)
            labels.append(row["adapter"])
            y += 1
        y += 0.4
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y - 0.6, -0.7)
    top = max(row["ratio"]["max"] for row in shown)
    axes.set_xlim(min(0.8, *(row["ratio"]["min"] for row in shown)) - 0.02, top + 0.12)
    axes.set_xlabel(
        "time over PEFT LoRA's in the same setting; inference: over no adapter's\n"
        f"dot: median, bar: range over {arguments.rounds} rounds"
    )
    plain_axes(axes, "x")
    axes.axvline(1, color=GREY, lw=1)
    colours = {"this library": BLUE, "PEFT DoRA": ORANGE, "PEFT LoRA": GREY}
    axes.legend(
        handles=[
            Line2D([], [], ls="", marker="o", ms=7, color=c, label=name)
            for name, c in colours.items()
        ],
        loc="lower right",
        facecolor="white",
        edgecolor="none",
        framealpha=1,
    )
    figure.suptitle(f"DoRA over LoRA: {model_title(arguments)}")
    return save_picture(figure, "dora_forward")


def draw(axes: Any, row: dict[str, Any], y: float) -> None:
    ratio = row["ratio"]
    ours = row["adapter"].startswith("exact")
    colour = BLUE if ours else ORANGE if row["adapter"] == "PEFT DoRA" else GREY
    axes.plot([ratio["min"], ratio["max"]], [y, y], color=colour, lw=3, alpha=0.35)
    axes.plot(ratio["median"], y, "o", color=colour, ms=7)
    axes.annotate(
        f"{ratio['median']:.2f}",
        (ratio["max"], y),
        (7, 0),
        textcoords="offset points",
        va="center",
        color=INK,
    )


if __name__ == "__main__":
    main()
