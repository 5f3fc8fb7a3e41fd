"""What does a hypergradient through all steps of a training cost, and does it explode?

    python -m benchmarks.whole_run

from the root of the repository; some twenty minutes on one idle core, and 2 GiB of memory.
`--steps 5` tries it out. Writes benchmarks/results/whole_run.json and
docs/images/benchmarks/whole_run.png. Needs Linux with glibc: a process there can forget
its peak memory.

The job is that of `bidora train`: the bundled encoder, DoRA on all linear layers, the head
from the probe, a fifth of the training examples held back. In a new process,

- *a step*: plain training steps of the same adapter, for their peak of memory;
- *the plain run*: T inner steps with torch's AdamW, a schedule and clipping;
- *the whole run*: the same T steps under a `BiDoRAOptimizer` that records them, then one
  outer step by `unrolled` through all of them, with exact products.

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
    GREY,
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
    job = Job(0, RATE, None)
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
    optimizer, schedule = job.optimizer(estimator, steps)
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
    command = [sys.executable, "-m", "benchmarks.whole_run", "--measure"]
    for name in ("steps", "threads", "snapshots", "product"):
        command += [f"--{name}", str(getattr(arguments, name))]
    run = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout.splitlines()[-1])
    ratios = ratios_of(result)
    report(result, ratios)
    shown = {n: x for n, x in vars(arguments).items() if n != "measure"}
    written = write_result(
        "whole_run",
        QUESTION,
        shown,
        arguments.threads,
        [result],
        targets=TARGETS,
        ratios=ratios,
    )
    done(written, picture(result))


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


def report(result: dict[str, Any], ratios: dict[str, float]) -> None:
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
    for name, ratio in ratios.items():
        target = f"  (target: at most {TARGETS[name]})" if name in TARGETS else ""
        print(f"{name.replace('_', ' '):34}{ratio:8.2f}{target}")
    print(
        f"|direct| {result['direct_norm']:.3g}, |indirect| {result['indirect_norm']:.3g}"
    )
    if result["reason"]:
        print(result["reason"])


def picture(result: dict[str, Any]) -> Any:
    norms, steps = result["adjoint_norms"], result["steps"]
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    axes.plot(range(1, steps + 1), norms, color=BLUE, lw=2)
    axes.set_yscale("log")
    axes.axhline(norms[-1], color=GREY, lw=1, ls=":")
    axes.annotate(
        "|∂f/∂w| at the end of the run",
        (1, norms[-1]),
        (0, 4),
        textcoords="offset points",
        color=GREY,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner step, after which the adjoint is that of w")
    axes.set_ylabel("norm of the adjoint ∂f/∂w")
    plain_axes(axes, "y")
    axes.set_title(
        f"The adjoint through a whole run: MiniLM, DoRA, AdamW, {steps} steps", pad=12
    )
    return save_picture(figure, "whole_run")


if __name__ == "__main__":
    main()
