"""Which estimators reach the minimum of a bilevel problem, and where do the others stall?

    python -m benchmarks.convergence

from the root of the repository; about six minutes on one core. Writes
benchmarks/results/convergence.json and docs/images/benchmarks/convergence.png.

The problem is the simulated one of benchmark_bilevel [DAVM22], at its size (see
`_simulated.py`): quadratic at both levels, 100 inner and 10 outer parameters, means over
32,768 and 1,024 samples. The value function F is known in closed form, so that what is
shown is the squared norm of ∇F and the gap F - min F at the run's λ.

Each estimator takes the part of a published method, with the settings that repository has
for it: its `config/quadratics_021424_best_params.yml` where the method is in there, else
the defaults in its `solvers/`. Where it has no such method, the settings are stocBiO's.
Twice:

- with batches of 64 at both levels, as its stochastic methods are set;
- with all samples in every evaluation, on one problem, which leaves no noise: what remains
  is what the estimate itself is off by.

Differs from those methods: products of an estimate are taken on one inner batch, where
stocBiO and AmIGO draw a new one for each; λ moves by plain SGD; no variance reduction (so
that MRBO, VRBO, SABA and SRBA have no counterpart here); float64.

Cost is counted in passes, forward or backward, on a batch: inner steps, estimates, and the
estimator's own part of inner steps. Seconds are the processor's, evaluations of F left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from matplotlib.lines import Line2D
from tqdm import tqdm

from benchmarks._common import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    add_threads_argument,
    done,
    new_figure,
    plain_axes,
    save_picture,
    write_result,
)
from benchmarks._simulated import Simulated, batches, simulated
from hypergrad import BilevelOptimizer, NumericalWarning, make_estimator
from hypergrad.optimizer import StepReport

QUESTION = (
    "Which estimators reach the minimum of a bilevel problem, and where do the others "
    "stall?"
)
BATCH = 64
POINTS = 40
"""Places of a run that its progress is told at."""
AWAY = 1e6
"""A run ends where ∇F has grown this many times in square: it diverges."""


@dataclass(frozen=True)
class Entry:
    """An estimator in the part of a published method.

    Attributes:
        label: what tells it from the others.
        estimator: registered name.
        settings: of the estimator.
        method: whose part it takes.
        source: where its settings are from.
        inner_lr: rate of inner steps.
        outer_lr: rate of outer steps.
        every: inner steps to an outer one.
        decay: power of the number of outer steps that both rates fall with.
    """

    label: str
    estimator: str
    settings: dict[str, Any] = field(default_factory=dict)
    method: str = "none there"
    source: str = "those of stocBiO"
    inner_lr: float = 0.1
    outer_lr: float = 0.1
    every: int = 10
    decay: float = 0.0


BEST = "config/quadratics_021424_best_params.yml"
STOCBIO = Entry("neumann", "neumann", {"num_terms": 10, "scale": 0.1}, "stocBiO", BEST)
F2SA = Entry(
    "f2sa",
    "f2sa",
    # σ is 1, and 0.01 more at each of 1,000 outer steps of ten: 11, as 10,001^0.26 is.
    {"sigma": 1.0, "growth": 0.26},
    "F2SA",
    f"{BEST}; its multiplier grows by 0.01 an outer step, ours by a power",
    decay=0.5,
)
ONE_STEP = {"product": "exact"}
SHARED = (
    Entry("darts, sama", "darts", ONE_STEP, "T1−T2, DARTS, SAMA: one step"),
    Entry("first-order", "first-order", {}, "alternating descent"),
    Entry("pbgd-free", "pbgd-free", {}, "PBGD-Free"),
)
NOISY = (
    STOCBIO,
    Entry(
        "cg", "cg", {"max_iter": 10, "warm_start": True}, "AmIGO", BEST, inner_lr=0.01
    ),
    Entry(
        "cg, damped",
        "cg",
        {"max_iter": 10, "warm_start": True, "damping": 0.1},
        "AmIGO",
        f"{BEST}; damping is our own",
        inner_lr=0.01,
    ),
    Entry("nystrom", "nystrom", {"rank": 10, "damping": 0.1}, "Nyström"),
    Entry("unrolled", "unrolled", {"num_steps": 10}, "ITD-BiO, ten steps"),
    Entry(
        "forward",
        "forward",
        {"num_steps": 10, "num_directions": 1},
        "FG²U: one random direction",
    ),
    F2SA,
    Entry("penalty", "penalty", {"num_steps": 10}, "BOME", "solvers/bome.py"),
    Entry(
        "zeroth-order",
        "zeroth-order",
        {"num_steps": 10, "num_directions": 1, "radius": 0.1},
        "PZOBO",
        "solvers/pzobo.py",
    ),
    *SHARED,
)
HUNDRED = {"inner_lr": 1.0, "outer_lr": 1.0, "every": 100}
"""Rates of 1 stand for the line search of jaxopt's descent: the curvature is at most 1."""
NOISELESS = (
    STOCBIO,
    Entry(
        "cg",
        "cg",
        {"max_iter": 20},
        "jaxopt's implicit differentiation",
        "solvers/jaxopt_gd.py",
        **HUNDRED,
    ),
    Entry("nystrom", "nystrom", {"rank": 10, "damping": 0.1}, "Nyström"),
    Entry(
        "unrolled",
        "unrolled",
        {"num_steps": 100},
        "jaxopt's iterative differentiation",
        "solvers/jaxopt_itd.py",
        **HUNDRED,
    ),
    *(e for e in NOISY if e.label in ("forward", "f2sa", "penalty", "zeroth-order")),
    *SHARED,
)
REGIMES = {"batches of 64": NOISY, "all samples": NOISELESS}


# -- runs ----------------------------------------------------------------------------------


def make_run(entry: Entry, here: Simulated) -> BilevelOptimizer:
    def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
        return partial(torch.optim.SGD, lr=rate)

    return BilevelOptimizer(
        here.problem(),
        estimator=make_estimator(entry.estimator, **entry.settings),
        inner_optimizer=sgd(entry.inner_lr),
        outer_optimizer=sgd(entry.outer_lr),
        outer_every=entry.every,
        outer_warmup=0,
    )


def passes_of(report: StepReport) -> int:
    """Return the passes of a step: two of the inner gradient, and what else there is."""
    parts = [part for part in (report.info, report.own) if part is not None]
    return 2 + sum(part.n_forward + part.n_backward for part in parts)


def trace(
    entry: Entry, here: Simulated, budget: int, *, noisy: bool, seed: int
) -> dict[str, Any]:
    """Return what a run had reached after how many passes and seconds."""
    opt = make_run(entry, here)
    drawn = [batches(len(s.x), BATCH, seed) for s in (here.inner, here.outer)]
    of_all = [None, None]
    lam = opt.problem.outer_params["lam"]
    out: dict[str, list[float]] = {k: [] for k in ("passes", "seconds", "grad", "gap")}
    passes, seconds, steps, due = 0, 0.0, 0, 0.0
    first = float(here.gradient(lam.detach()).square().sum())
    while True:
        grad = float(here.gradient(lam.detach()).square().sum())
        if passes >= due or passes >= budget:
            gap = here.gap(lam.detach())
            told = passes, seconds, grad, gap
            for key, value in zip(out, told, strict=True):
                out[key].append(value)
            due += budget / POINTS
        diverged = not grad < AWAY * first
        if passes >= budget or diverged:
            break
        for group in opt.param_groups if entry.decay else ():
            rate = entry.inner_lr if group["level"] == "inner" else entry.outer_lr
            group["lr"] = rate / (1 + steps) ** entry.decay
        begin = time.thread_time()
        for _ in range(entry.every):
            inner, outer = [next(d) for d in drawn] if noisy else of_all
            passes += passes_of(opt.step(inner, outer))
        seconds += time.thread_time() - begin
        steps += 1
    return {**out, "outer_steps": steps, "diverged": diverged}


# -- results -------------------------------------------------------------------------------


def summary(entry: Entry, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an entry's runs, and what the last tenth of each had on median."""
    ends = [statistics.median(run["grad"][-POINTS // 10 :]) for run in runs]
    return {
        **asdict(entry),
        "diverged": sum(run["diverged"] for run in runs),
        "end_of_each": ends,
        "median_end": statistics.median(ends),
        "runs": runs,
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    # Batches of 64 samples of rank one are singular in 100 dimensions: solvers say so.
    warnings.simplefilter("ignore", NumericalWarning)
    results = measure(arguments)
    report(results)
    written = write_result(
        "convergence",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        results,
        unit="squared norm of the value function's gradient; passes on a batch",
    )
    done(written, picture(results))


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    problems = [
        simulated(arguments.inner_samples, arguments.outer_samples, seed=seed)
        for seed in range(arguments.seeds)
    ]
    total = sum(map(len, REGIMES.values()))
    results: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=total, desc="convergence", disable=None) as bar:
        for regime, entries in REGIMES.items():
            noisy = entries is NOISY
            results[regime] = []
            for entry in entries:
                bar.set_postfix_str(f"{regime}: {entry.label}")
                budget = arguments.passes if noisy else arguments.noiseless_passes
                runs = [
                    trace(entry, here, budget, noisy=noisy, seed=seed)
                    for seed, here in enumerate(problems if noisy else problems[:1])
                ]
                results[regime].append(summary(entry, runs))
                bar.update()
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seeds", type=int, default=3, help="problems")
    parser.add_argument("--passes", type=int, default=8000, help="passes of a run")
    parser.add_argument(
        "--noiseless-passes", type=int, default=12000, help="passes with all samples"
    )
    parser.add_argument(
        "--inner-samples", type=int, default=32768, help="samples of the inner loss"
    )
    parser.add_argument(
        "--outer-samples", type=int, default=1024, help="samples of the outer loss"
    )
    add_threads_argument(parser)
    return parser.parse_args()


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    for regime, entries in results.items():
        print(
            f"\n{regime:16} {'method':36} {'outer steps':>11} {'|∇F|² at the end':>17}"
        )
        for entry in entries:
            steps = statistics.median(run["outer_steps"] for run in entry["runs"])
            end = f"{entry['median_end']:.1e}" if not entry["diverged"] else "diverged"
            print(f"{entry['label']:16} {entry['method']:36} {steps:>11g} {end:>17}")


# -- picture -------------------------------------------------------------------------------

STYLES: dict[str, tuple[str, str, str]] = {
    # Colour, line, marker: the last two tell them apart without the first.
    "cg": (BLUE, "-", "o"),
    "cg, damped": (BLUE, "--", "o"),
    "neumann": (ORANGE, "-", "s"),
    "nystrom": (GREEN, "-", "^"),
    "unrolled": (PURPLE, "-", "D"),
    "forward": (PURPLE, "--", "d"),
    "f2sa": (INK, "-", "v"),
    "penalty": (INK, "--", "P"),
    "zeroth-order": (ORANGE, "--", "X"),
    "darts, sama": (GREEN, "--", "<"),
    "first-order": (GREY, ":", "*"),
    "pbgd-free": (GREY, "--", ">"),
}


def picture(results: dict[str, list[dict[str, Any]]]) -> Any:
    figure = new_figure(12, 8.6)
    grid = figure.subplots(len(results), 3, squeeze=False)
    columns = (
        ("passes", "grad", "passes on a batch, in thousands", "‖∇F‖²"),
        ("seconds", "grad", "seconds", "‖∇F‖²"),
        ("passes", "gap", "passes on a batch, in thousands", "F − min F"),
    )
    for row, (regime, entries) in zip(grid, results.items(), strict=True):
        for axes, (x, y, below, beside) in zip(row, columns, strict=True):
            for place, entry in enumerate(entries):
                draw(axes, entry, x, y, place)
            axes.set_yscale("log")
            axes.set_ylim(*limits(entries, y))
            axes.set_xlabel(below)
            axes.set_ylabel(beside)
            axes.set_title(regime, fontsize=10.5, color=INK)
            plain_axes(axes, "y")
    figure.legend(
        handles=[
            Line2D([], [], color=c, ls=ls, marker=m, lw=1.6, ms=6, mfc="white", label=n)
            for n, (c, ls, m) in STYLES.items()
        ],
        loc="outside lower center", ncols=6, frameon=False, labelcolor=INK,
    )  # fmt: skip
    figure.suptitle(
        "Where bilevel runs end, by estimator, at published settings (median and band)"
    )
    return save_picture(figure, "convergence")


def draw(axes: Any, entry: dict[str, Any], x: str, y: str, place: int) -> None:
    """Draw the median of the seeds over what they have in common, and their band."""
    colour, style, marker = STYLES[entry["label"]]
    runs = entry["runs"]
    length = min(len(run[x]) for run in runs)
    scale = 1000 if x == "passes" else 1
    at = [statistics.median(run[x][i] for run in runs) / scale for i in range(length)]
    values = [[run[y][i] for run in runs] for i in range(length)]
    axes.plot(
        at, [statistics.median(v) for v in values], color=colour, ls=style, lw=1.6,
        marker=marker, ms=5.5, mfc="white", markevery=(place % 6, 6), zorder=3,
    )  # fmt: skip
    if len(runs) > 1:
        low, high = zip(*((min(v), max(v)) for v in values), strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.07, lw=0)


def limits(entries: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Return what is shown: three times the start at most, and all that is below it."""
    runs = [run for entry in entries for run in entry["runs"]]
    least = min(value for run in runs for value in run[key])
    return max(least / 2, 1e-16), 3 * max(run[key][0] for run in runs)


if __name__ == "__main__":
    main()
