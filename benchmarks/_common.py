"""What the benchmarks share: environment, clocks, files, the look of pictures."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "images" / "benchmarks"
"""Under docs/, because the documentation cannot show a picture from elsewhere."""

BLUE, ORANGE, GREY = "#1f5fa8", "#d1660a", "#5f6368"
GREEN, PURPLE = "#3b8752", "#8a4f9e"
INK = "#222222"


@dataclass
class Contender:
    """Something to be timed.

    Attributes:
        name: what it is called in the results.
        run: takes the number of this run and returns what the results say about it.
        iterations: iterations that one run takes; seconds are reported for one of them.
        seconds: seconds of one iteration, one entry for each round.
        note: what the last run returned.
    """

    name: str
    run: Callable[[int], dict[str, Any]]
    iterations: int = 1
    seconds: list[float] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)


def time_in_rotation(
    contenders: Sequence[Contender],
    rounds: int,
    bar: Any,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Warm each contender up with one run, then time one run of each in every round.

    The order is rotated from round to round, so that a slow phase of the machine, or
    what a contender leaves in the caches, does not always hit the same neighbour. The
    garbage collector runs between the runs and not in them.

    Args:
        contenders: what to time; `seconds` and `note` are filled in.
        rounds: number of timed rounds.
        bar: a tqdm bar of `(rounds + 1) * len(contenders)` runs.
        clock: what tells the seconds.
    """
    for turn in range(rounds + 1):
        shift = turn * len(contenders) // (rounds + 1)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            bar.set_postfix_str(contender.name)
            gc.collect()
            gc.disable()
            try:
                start = clock()
                contender.note = contender.run(turn)
                taken = clock() - start
            finally:
                gc.enable()
            if turn:  # the first one is the warm-up
                contender.seconds.append(taken / contender.iterations)
            bar.update()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what sets the size of the model and its batches."""
    parser.add_argument("--layers", type=int, default=2, help="transformer layers")
    parser.add_argument("--batch", type=int, default=8, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in an example")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapter")
    add_threads_argument(parser)


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add how many threads torch computes with."""
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")


def model_title(arguments: argparse.Namespace) -> str:
    """Return what `add_model_arguments` set, as a part of a picture's title."""
    layers = f"{arguments.layers} layer" + "s" * (arguments.layers != 1)
    threads = f"{arguments.threads} thread" + "s" * (arguments.threads != 1)
    return (
        f"RoBERTa-base width, {layers}, {arguments.batch} × {arguments.tokens} tokens, "
        f"{threads}"
    )


def paired_ratios(own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum and maximum of the ratios taken round by round."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "by_round": ratios,
    }


def environment(threads: int) -> dict[str, Any]:
    """Return what a result depends on besides the settings."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        # None where git cannot tell, e.g. in an unpacked source distribution.
        "uncommitted_changes": _uncommitted(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def write_result(
    module: str,
    question: str,
    settings: dict[str, Any],
    threads: int,
    results: Any,
    **more: Any,
) -> Path:
    """Write one benchmark's JSON, all of it or nothing, and return its path.

    Args:
        module: name of the benchmark; that of its JSON and its picture.
        question: what it answers.
        settings: what the command line set.
        threads: number of threads that torch computed with.
        results: what was measured.
        **more: further entries, put before the results.
    """
    content = {
        "benchmark": module,
        "question": question,
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "picture": picture_path(module).relative_to(ROOT).as_posix(),
        "settings": settings,
        "environment": environment(threads),
        **more,
        "results": results,
    }
    path = RESULTS / f"{module}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        content, indent=1, ensure_ascii=False, allow_nan=False, default=_written_out
    )
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as part:
        part.write(f"{text}\n")
    Path(part.name).chmod(0o644)
    os.replace(part.name, path)
    return path


def _written_out(value: Any) -> str:
    """Return a setting that is an object, such as a product, as it is made in code."""
    if is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    msg = f"a {type(value).__name__} does not fit into JSON"
    raise TypeError(msg)


def picture_path(module: str) -> Path:
    """Return where the picture of a benchmark lies."""
    return PICTURES / f"{module}.png"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Any, grid: str) -> None:
    """Take away what carries no information, and rule one direction lightly."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    axes.tick_params(color="#b0b0b0", labelcolor=INK)
    axes.grid(axis=grid, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def save_picture(figure: Figure, module: str) -> Path:
    """Write the picture, and return its path."""
    path = picture_path(module)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.dpi": 150}):
        # Without matplotlib's version in it, equal pictures are equal files.
        figure.savefig(path, metadata={"Software": None})
    return path


def done(*paths: Path) -> None:
    """Say where the files are."""
    for path in paths:
        print(path.relative_to(ROOT))


def _git(*arguments: str) -> str | None:
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() if run.returncode == 0 else None


def _uncommitted() -> bool | None:
    code = ("hypergrad", "bidora", "benchmarks/*.py")
    changes = _git("status", "--porcelain", "--", *code)
    return None if changes is None else bool(changes)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
