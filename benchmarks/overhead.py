"""What does the library cost over the same written by hand, and over other libraries?

    python -m benchmarks.overhead

from the root of the repository; about six minutes on one core. Writes
benchmarks/results/overhead.json and docs/images/benchmarks/overhead.png. `--quick` tries it
in a minute and writes nothing. `--device cuda` runs on a GPU, and writes
overhead_cuda.json and .png.

*Times.* A hypergradient of least squares with 30 weights, where everything but arithmetic
counts, and of a network with 33,280 weights. Each method is compared with the shortest
code for it that is right (`_by_hand.py`), and with TorchOpt, Betty and torch.optim's
`differentiable=True` at as many products with second derivatives (`_overhead_calls.py`).
That ours equals what is written by hand is checked before anything is timed; how far the
peers are from ours is reported. All is in float64. All take turns, in rotated order, and
each time is divided by that of the code by hand, or by ours, of the same round. On one
thread of a CPU the clock is the processor's.

*Operations.* What an inner and an outer step of BiDoRA dispatch on a BERT of twelve small
layers, in those of one forward and backward pass, and how often they read a number from the
device. On a GPU, where a small operation costs its launch, these are the overhead.

A peer that is not installed is left out, and reported.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tqdm import tqdm

from benchmarks import _by_hand
from benchmarks._by_hand import Task
from benchmarks._common import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Contender,
    add_threads_argument,
    done,
    new_figure,
    paired_ratios,
    plain_axes,
    save_picture,
    time_in_rotation,
    write_result,
)
from benchmarks._overhead_calls import HAND, OURS, PIP, Call, Method, methods, versions
from benchmarks._overhead_counts import LAYERS, count_steps
from benchmarks._truth import Params
from hypergrad.testing import relative_error

QUESTION = (
    "What does the library cost over the same written by hand, and over other "
    "libraries?"
)
ROUNDS, RUN_SECONDS = 15, 0.2  # of each contender
QUICK_ROUNDS, QUICK_RUN_SECONDS, QUICK_LAYERS = 3, 0.02, 2
COLOURS = {OURS: BLUE, "TorchOpt": ORANGE, "Betty": GREEN, "torch.optim": PURPLE}


# -- measuring -------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    # Of solves that are cut short, and of what peers call that is deprecated.
    warnings.simplefilter("ignore")
    device = torch.device(arguments.device)
    found = versions()
    for name, version in found.items():
        if version is None:
            print(f"{name} is missing, and left out: {PIP[name]}")
    times = [
        row
        for task in (_by_hand.least_squares(), _by_hand.small_network())
        for row in time_task(task.to(device), found, arguments)
    ]
    operations = count_steps(arguments.layers, device)
    report(times, operations)
    if arguments.quick:
        print("--quick writes nothing")
        return
    name = "overhead" if device.type == "cpu" else f"overhead_{device.type}"
    written = write_result(
        name,
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        {"times": times, "operations": operations},
        command=shlex.join(["python", "-m", "benchmarks.overhead", *sys.argv[1:]]),
        device=device_name(device),
        peers={
            peer: {"version": version or "missing", "pip": PIP[peer]}
            for peer, version in found.items()
        },
        unit="seconds of a hypergradient, and ratios to those by hand, or of ours, in the "
        "same round; dispatched operations, also in those of a forward and a backward "
        "pass; reads of the device",
    )
    done(written, picture(times, operations, name, title(arguments, device)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, help=f"timed rounds; {ROUNDS}")
    parser.add_argument("--layers", type=int, help=f"layers of the BERT; {LAYERS}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="try it, write nothing")
    add_threads_argument(parser)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    arguments.layers = arguments.layers or (QUICK_LAYERS if quick else LAYERS)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch finds no CUDA device.")
    return arguments


def time_task(
    task: Task, found: dict[str, str | None], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return what each method takes on one problem, by everyone who has it."""
    each = list(methods())
    makers = sum(len(method.calls) for method in each)
    rows = []
    with tqdm(total=makers * (arguments.rounds + 1), desc=task.name, unit="run") as bar:
        for method in each:
            calls = {
                who: make(task)
                for who, make in method.calls.items()
                if found.get(who, who) is not None
            }
            distances = check(method, calls)
            timed = time_calls(method, calls, task, arguments, bar)
            rows += [
                {
                    "problem": task.name,
                    "method": method.name,
                    "by": who,
                    "products": method.products,
                    "distance_from_ours": distances[who],
                    **seconds,
                }
                for who, seconds in timed.items()
            ]
    return rows


def check(method: Method, calls: dict[str, Call]) -> dict[str, float | str]:
    """Return how far each is from ours; what is by hand must be equal."""
    answers = {who: detached(call()) for who, call in calls.items()}
    distances = {who: relative_error(a, answers[OURS]) for who, a in answers.items()}
    assert distances[HAND] <= method.within, (method.name, distances)
    return {who: d if d < math.inf else "not finite" for who, d in distances.items()}


def detached(params: Params) -> Params:
    return {name: tensor.detach().clone() for name, tensor in params.items()}


def time_calls(
    method: Method,
    calls: dict[str, Call],
    task: Task,
    arguments: argparse.Namespace,
    bar: Any,
) -> dict[str, dict[str, Any]]:
    """Return seconds of one call and its ratios, by who makes it."""
    device = next(iter(task.inner.values())).device
    wanted = QUICK_RUN_SECONDS if arguments.quick else RUN_SECONDS
    contenders = {}
    for who, call in calls.items():
        once = repeated(call, 1, device)
        once(0)
        start = time.perf_counter()
        once(0)
        taken = time.perf_counter() - start
        repeats = max(1, math.ceil(wanted / taken))
        label = f"{method.name}, {who}"
        contenders[who] = Contender(label, repeated(call, repeats, device), repeats)
    # The processor's own does not count what other programs take of the core.
    alone = device.type == "cpu" and arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    time_in_rotation(list(contenders.values()), arguments.rounds, bar, clock)
    by_hand, ours = contenders[HAND].seconds, contenders[OURS].seconds
    return {
        who: {
            "seconds": min(contender.seconds),
            "repeats": contender.iterations,
            "over_hand": paired_ratios(contender.seconds, by_hand),
            "over_ours": paired_ratios(contender.seconds, ours),
        }
        for who, contender in contenders.items()
    }


def repeated(
    call: Call, repeats: int, device: torch.device
) -> Callable[[int], dict[str, Any]]:
    """Return a run of several calls that ends when the device has done its work."""

    def run(turn: int) -> dict[str, Any]:
        del turn
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {}

    return run


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def title(arguments: argparse.Namespace, device: torch.device) -> str:
    threads = f"{arguments.threads} thread" + "s" * (arguments.threads != 1)
    where = device_name(device) if device.type == "cuda" else threads
    return f"Cost beyond what the method itself needs, {where}"


# -- showing ---------------------------------------------------------------------------


def told(distance: float | str) -> str:
    return distance if isinstance(distance, str) else f"{distance:.0e}"


def report(times: list[dict[str, Any]], operations: dict[str, Any]) -> None:
    heads = "ms", "over hand", "over ours", "distance"
    print(f"{'':54}" + "".join(f"{head:>11}" for head in heads))
    for row in times:
        print(
            f"{row['problem']:16}{row['method']:24}{row['by']:14}"
            f"{1e3 * row['seconds']:11.2f}{row['over_hand']['median']:11.2f}"
            f"{row['over_ours']['median']:11.2f}{told(row['distance_from_ours']):>11}"
        )
    base = operations["forward_and_backward"]["operations"]
    print(f"\noperations, those of a forward and backward pass ({base}) as unit; reads")
    for label, steps in operations["steps"].items():
        for step, counts in steps.items():
            reads = ", ".join(f"{n} in {p}" for p, n in counts["reads_in"].items())
            print(
                f"{label:24}{step:6}{counts['operations']:8}"
                f"{counts['in_forward_and_backward']:8.2f}  {reads}"
            )


def picture(
    times: list[dict[str, Any]], operations: dict[str, Any], name: str, heading: str
) -> Any:
    problems = list(dict.fromkeys(row["problem"] for row in times))
    names = list(dict.fromkeys(row["method"] for row in times))
    figure = new_figure(13.5, 1.9 + 0.42 * max(len(names), len(operations["steps"])))
    axes = figure.subplots(1, len(problems) + 1, width_ratios=[*[3] * len(problems), 3])
    highest = max(row["over_hand"]["median"] for row in times)
    for panel, problem in zip(axes, problems, strict=False):
        draw_times(
            panel, [row for row in times if row["problem"] == problem], names, highest
        )
        panel.set_title(problem, loc="left", fontsize=11, color=INK)
    for panel in axes[1 : len(problems)]:
        panel.tick_params(axis="y", length=0, labelleft=False)
    draw_operations(axes[-1], operations)
    figure.legend(
        handles=[
            Line2D([], [], ls="", marker="o", ms=7, color=colour, label=who)
            for who, colour in COLOURS.items()
            if any(row["by"] == who for row in times)
        ],
        loc="outside lower center",
        ncols=len(COLOURS),
        frameon=False,
        labelcolor=INK,
    )
    figure.suptitle(heading)
    return save_picture(figure, name)


def draw_times(
    panel: Any, rows: list[dict[str, Any]], names: list[str], highest: float
) -> None:
    for row in rows:
        if row["by"] == HAND:
            continue
        y, ratio = names.index(row["method"]), row["over_hand"]
        colour = COLOURS[row["by"]]
        ends = [ratio["min"], ratio["max"]]
        panel.plot(ends, [y, y], color=colour, lw=2, alpha=0.25)
        panel.plot(ratio["median"], y, "o", color=colour, ms=7)
        if row["by"] == OURS:
            panel.annotate(
                f"{ratio['median']:.2g}", (ratio["median"], y), (0, 7),
                textcoords="offset points", ha="center", fontsize=9, color=INK,
            )  # fmt: skip
    panel.axvline(1.0, color=GREY, lw=1)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.6)
    panel.set_xscale("log")
    panel.set_xlim(0.4, max(3.0, 1.5 * highest))
    panel.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("time over that by hand (log scale)")
    plain_axes(panel, "x")


def draw_operations(panel: Any, operations: dict[str, Any]) -> None:
    labels = list(operations["steps"])
    for y, label in enumerate(labels):
        for offset, step, colour in ((-0.18, "inner", GREY), (0.18, "outer", BLUE)):
            counts = operations["steps"][label][step]
            size = counts["in_forward_and_backward"]
            own = counts["reads_in"].get("hypergrad", 0)
            panel.barh(y + offset, size, height=0.32, color=colour)
            panel.annotate(
                f"{size:.1f}, {own} reads", (size, y + offset), (4, 0),
                textcoords="offset points", va="center", fontsize=8, color=INK,
            )  # fmt: skip
    largest = max(
        steps["outer"]["in_forward_and_backward"]
        for steps in operations["steps"].values()
    )
    panel.set_xlim(0, 1.45 * largest)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.6)
    panel.set_xlabel("operations, in forward + backward passes")
    panel.set_title(
        f"{operations['layers']}-layer BERT: inner (grey), outer",
        loc="left",
        fontsize=11,
        color=INK,
    )
    plain_axes(panel, "x")


if __name__ == "__main__":
    main()
