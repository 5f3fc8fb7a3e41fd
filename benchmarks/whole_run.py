"""What does a hypergradient through all steps of a training cost, and does it explode?

    python -m benchmarks.whole_run

from the root of the repository; some thirty minutes on one idle core, and 2 GiB of memory.
`--steps 5` tries it out; `--adapters small` measures that one alone, and what is known of
the other stays if the settings are the same. Writes benchmarks/results/whole_run.json and
docs/images/benchmarks/whole_run.png. Needs Linux with glibc: a process there can forget
its peak memory.

The job is that of `bidora train`: the bundled encoder with DoRA, the head from the probe, a
fifth of the training examples held back; with its own adapters, rank 32 in all linear
layers, and with small ones, rank 4 on query and value as in the paper. For each, in a new
process,

- *a step*: plain training steps of the same adapter, for their peak of memory;
- *the plain run*: T inner steps with torch's AdamW, a schedule and clipping;
- *the whole run*: the same T steps under a `BiDoRAOptimizer` that records them, then one
  outer step by `unrolled` through all of them, with exact products; without the
  orthogonality term, which neither the plain run nor `bidora train` has.

Seconds are those of the processor in this process, by which other programs on the machine
matter little; those of the clock are written down too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from benchmarks._common import (
    BLUE,
    ORANGE,
    RESULTS,
    ROOT,
    add_threads_argument,
    done,
    new_figure,
    plain_axes,
    save_picture,
    write_result,
)

QUESTION = "What does a hypergradient through all steps of a training cost?"
RATE = 6e-4
PLAIN_STEPS = 3
ADAPTERS: dict[str, tuple[int, tuple[str, ...] | None]] = {
    "usual": (32, None),
    "small": (4, ("query", "value")),
}
"""Rank and layers; None for all linear ones."""
TARGETS = {"seconds_over_the_plain_run": 5.0, "peak_over_a_step": 1.5}


# -- in the measured process -----------------------------------------------------------


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, peaks of memory and the norms of the adjoint."""
    import torch

    from benchmarks.held_back import BATCH, Job, _split
    from hypergrad.batches import Accumulated
    from hypergrad.estimators import Unrolled

    torch.set_num_threads(given.threads)
    steps = given.steps
    (adapter,) = given.adapters
    rank, targets = ADAPTERS[adapter]
    job = Job(0, RATE, targets, rank)
    inner, outer = _split(job)
    # As small as those of training, so that theirs is not the peak.
    parts = [outer[i : i + BATCH] for i in range(0, len(outer), BATCH)]
    held_back = Accumulated([job.batch(part) for part in parts])
    estimator = Unrolled(steps, product=given.product, snapshots=given.snapshots)
    at_rest = reset_peak()
    take_plain_steps(job, inner, PLAIN_STEPS)
    step_peak = peak_bytes()
    _, plain = timed(lambda: take_plain_steps(job, inner, steps))

    job.restart(inner, {})
    # Plain steps have no orthogonality term either.
    optimizer, schedule = job.optimizer(estimator, steps, orthogonality=0.0)
    stream = job.batches(inner)
    reset_peak()

    def run() -> None:
        for _ in tqdm(range(steps), desc="inner steps", file=sys.stderr):
            optimizer.inner_step(next(stream))
            schedule.step()

    _, recorded = timed(run)
    held = sum(step.is_snapshot for step in optimizer.recorded_steps)
    with tqdm(total=steps, desc="walk back", file=sys.stderr) as bar:
        report, back = timed(
            lambda: optimizer.outer_step(
                held_back, on_progress=lambda done, _: bar.update(done - bar.n)
            )
        )
    if report.info is None:
        raise RuntimeError(report.skipped)
    return {
        "adapter": adapter,
        "steps": steps,
        "inner_parameters": sum(
            t.numel() for t in optimizer.problem.inner_params.values()
        ),
        "snapshots": held,
        "plain_run": plain,
        "recorded_run": recorded,
        "walk_back": back,
        "bytes_at_rest": at_rest,
        "peak_bytes_of_a_step": step_peak,
        "peak_bytes_of_the_whole_run": peak_bytes(),
        "direct_norm": report.direct_norm,
        "indirect_norm": report.indirect_norm,
        "outer_loss": report.outer_loss,
        "n_forward": report.info.n_forward,
        "n_backward": report.info.n_backward,
        "reason": report.info.reason,
        "adjoint_norms": report.info.adjoint_norms,
    }


def take_plain_steps(job: Any, indices: list[int], steps: int) -> None:
    """Train the directions by torch alone, the magnitudes fixed."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    job.restart(indices, {})
    trained = [
        p
        for n, p in job.model.named_parameters()
        if p.requires_grad and n not in job.found
    ]
    for magnitude in job.found.values():
        magnitude.requires_grad_(False)
    adamw = torch.optim.AdamW(trained, lr=job.rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(adamw, int(0.06 * steps), steps)
    stream = job.batches(indices)
    for _ in tqdm(range(steps), desc="plain steps", file=sys.stderr):
        adamw.zero_grad()
        job.model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        schedule.step()
    adamw.zero_grad()
    for magnitude in job.found.values():
        magnitude.requires_grad_(True)


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a function returns, and its seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    found = run()
    return found, {
        "processor_seconds": time.process_time() - processor,
        "clock_seconds": time.perf_counter() - clock,
    }


def reset_peak() -> int:
    """Make the peak of this process what it uses now, and return that."""
    gc.collect()
    # What malloc keeps for later is no use.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident size since the last reset."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


# -- in the process that starts it -----------------------------------------------------


def main() -> None:
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measured(arguments)))
        return
    shown = {
        n: x for n, x in vars(arguments).items() if n not in ("measure", "adapters")
    }
    rows = known(shown)
    for adapter in arguments.adapters:
        rows[adapter] = result = in_a_process(arguments, adapter)
        result["ratios"] = ratios_of(result)
        report(result)
    results = [rows[name] for name in ADAPTERS if name in rows]
    written = write_result(
        "whole_run", QUESTION, shown, arguments.threads, results, targets=TARGETS
    )
    done(written, picture(results))


def in_a_process(arguments: argparse.Namespace, adapter: str) -> dict[str, Any]:
    """Return what a new process measures."""
    command = [sys.executable, "-m", "benchmarks.whole_run", "--measure"]
    command += ["--adapters", adapter]
    for name in ("steps", "threads", "snapshots", "product"):
        command += [f"--{name}", str(getattr(arguments, name))]
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def known(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return earlier results by adapter, if they were measured with these settings."""
    path = RESULTS / "whole_run.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    if found["settings"] != settings:
        return {}
    return {row["adapter"]: row for row in found["results"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--steps", type=int, default=240, help="T, steps of the run")
    parser.add_argument(
        "--snapshots",
        type=lambda given: int(given) if given.isdigit() else given,
        default="auto",
        help="of `unrolled`: a number, auto or all",
    )
    parser.add_argument("--product", default="exact", help="of `unrolled`, by name")
    parser.add_argument(
        "--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS), help="which"
    )
    add_threads_argument(parser)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def ratios_of(result: dict[str, Any]) -> dict[str, float]:
    """Return what the targets are about, and more."""
    kind = "processor_seconds"
    plain, back = result["plain_run"][kind], result["walk_back"][kind]
    rest, step = result["bytes_at_rest"], result["peak_bytes_of_a_step"]
    peak = result["peak_bytes_of_the_whole_run"]
    norms = result["adjoint_norms"]
    return {
        "seconds_over_the_plain_run": (result["recorded_run"][kind] + back) / plain,
        "recorded_run_over_the_plain_run": result["recorded_run"][kind] / plain,
        "walk_back_over_the_plain_run": back / plain,
        "peak_over_a_step": peak / step,
        "peak_over_a_step_beyond_rest": (peak - rest) / (step - rest),
        "growth_of_the_adjoint": max(norms) / norms[-1],
    }


def report(result: dict[str, Any]) -> None:
    print(f"\n{words(result)}")
    for name in ("plain_run", "recorded_run", "walk_back"):
        seconds = result[name]
        print(
            f"{name.replace('_', ' '):14}{seconds['processor_seconds']:8.1f} s of the "
            f"processor, {seconds['clock_seconds']:.1f} s of the clock"
        )
    for name in (
        "bytes_at_rest",
        "peak_bytes_of_a_step",
        "peak_bytes_of_the_whole_run",
    ):
        print(f"{name.replace('_', ' '):30}{result[name] / 2**20:8.0f} MiB")
    for name, ratio in result["ratios"].items():
        target = f"  (target: at most {TARGETS[name]})" if name in TARGETS else ""
        print(f"{name.replace('_', ' '):34}{ratio:8.2f}{target}")
    print(
        f"|direct| {result['direct_norm']:.3g}, |indirect| {result['indirect_norm']:.3g}"
    )
    if result["reason"]:
        print(result["reason"])


def words(result: dict[str, Any]) -> str:
    """Return what the adapters are, for people."""
    rank, targets = ADAPTERS[result["adapter"]]
    where = " and ".join(targets) if targets else "all linear layers"
    return f"rank {rank}, {where}: {result['inner_parameters']:,} weights"


def picture(results: list[dict[str, Any]]) -> Any:
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    for result, color, style in zip(results, (BLUE, ORANGE), ("-", "--"), strict=False):
        norms = result["adjoint_norms"]
        places = range(1, len(norms) + 1)
        axes.plot(places, norms, color=color, ls=style, lw=2, label=words(result))
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner step, after which the adjoint is that of w")
    axes.set_ylabel("norm of the adjoint ∂f/∂w")
    axes.legend(frameon=False)
    plain_axes(axes, "y")
    axes.set_title("The adjoint through a whole run: MiniLM, DoRA, AdamW", pad=12)
    return save_picture(figure, "whole_run")


if __name__ == "__main__":
    main()
