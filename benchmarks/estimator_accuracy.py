"""How far is each estimator from a truth in float64?

    python -m benchmarks.estimator_accuracy

from the root of the repository; under a minute on one core. Writes
benchmarks/results/estimator_accuracy.json and
docs/images/benchmarks/estimator_accuracy.png.

Three kinds of problem, each with several seeds, in float64 and float32:

- *ridge*: regression with a penalty for each feature, at its minimum; the truth is the
  closed form. For what differentiates the minimum: cg, neumann, nystrom,
  penalty, f2sa.
- *quadratic*: likewise, with a Hessian of 100 rows whose eigenvalues are prescribed, in a
  random basis: spread evenly over four decades, or ten large ones over a flat rest.
- *network*: two layers, some steps of a real torch optimizer; the truth is plain
  autograd in float64 through the optimizers written out in `_truth.py`. For what
  differentiates steps: darts, sama, unrolled, forward, and zeroth-order by values. The
  truth starts from the numbers that the real run had before the window, so that the error
  is the estimator's, not that of the steps before.

The error is the relative L2 distance of the indirect term, the one that is hard. (That
of `first-order` and `pbgd-free` is 1 by definition.) The worst seed counts.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from matplotlib.lines import Line2D
from torch import Tensor

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
from benchmarks._truth import (
    HANDS,
    Network,
    Params,
    inner_loss,
    network,
    outer_loss,
    unrolled_truth,
)
from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    NumericalWarning,
    make_estimator,
    testing,
)
from hypergrad.products import FiniteDifference
from hypergrad.rules import SGD as SGDRule

QUESTION = "How far is each estimator from a truth in float64?"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
STEPS_BEFORE = 10  # Adam's first steps have degenerate derivatives
ZERO = 1e-17  # where the picture puts an error of exactly 0


@dataclass(frozen=True)
class Row:
    """One estimator with its settings, on one problem.

    Attributes:
        group: heading in the picture: what is differentiated.
        label: what tells the row from the others.
        estimator: registered name.
        settings: of the estimator.
        steps: the inner optimizer's steps in the window; None at a minimum.
        hand: which optimizer takes them.
        spectrum: eigenvalues of the inner Hessian at that minimum; None for ridge.
    """

    group: str
    label: str
    estimator: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    hand: str = ""
    spectrum: tuple[float, ...] | None = None


MINIMUM = "the minimum of a ridge regression"
SPREAD = "eigenvalues spread over 1e-2 … 1e2"
PEAKS = "10 eigenvalues of 1 … 1e3, 90 of 0.1"
SPECTRA = {
    SPREAD: tuple(torch.logspace(-2, 2, 100, dtype=torch.float64).tolist()),
    PEAKS: (*torch.logspace(0, 3, 10, dtype=torch.float64).tolist(), *[0.1] * 90),
}
SGD = "one step of SGD on a network"
ADAMW = "steps of AdamW on a network"
MOMENTUM = "steps of SGD with momentum"
LONG = {"max_iter": 40, "rtol": 1e-14}
DIFFERENCE = {"product": "finite-difference"}
FORWARD = {"product": FiniteDifference(scheme="forward")}
RICHARDSON = {"product": FiniteDifference(scheme="richardson")}
EXACT = {"product": "exact"}
DESCENT = {"rule": SGDRule(0.3), "num_steps": 300}
FULL = {"rank": 30, "damping": 1e-6}
ROWS = (
    Row(MINIMUM, "cg (20 iterations)", "cg"),
    Row(MINIMUM, "cg, 40 iterations", "cg", LONG),
    Row(MINIMUM, "cg, 40 iterations, differences", "cg", {**LONG, **DIFFERENCE}),
    *(
        Row(MINIMUM, f"neumann, {k} terms", "neumann", {"num_terms": k})
        for k in (5, 20, 100)
    ),
    Row(MINIMUM, "nystrom (rank 10, δ = 0.01)", "nystrom"),
    Row(MINIMUM, "nystrom, rank 30, δ = 1e-6", "nystrom", FULL),
    *(
        Row(
            MINIMUM,
            f"penalty, γ = {gamma:g}, 300 steps",
            "penalty",
            {**DESCENT, "gamma": gamma},
        )
        for gamma in (0.1, 0.01)
    ),
    *(
        Row(
            MINIMUM,
            f"f2sa, p = {p}, ν = 0.1, 300 steps",
            "f2sa",
            {**DESCENT, "sigma": 10.0, "growth": 0.0, "num_points": p},
        )
        for p in (1, 2, 4)
    ),
    *(
        Row(group, label, name, settings, spectrum=spectrum)
        for group, spectrum in SPECTRA.items()
        for label, name, settings in (
            ("cg (20 iterations)", "cg", {}),
            ("cg, 100 iterations", "cg", {**LONG, "max_iter": 100}),
            ("neumann, 100 terms", "neumann", {"num_terms": 100}),
            ("nystrom, rank 20, δ = 0.1", "nystrom", {"rank": 20, "damping": 0.1}),
            ("nystrom, rank 100, δ = 1e-6", "nystrom", {**FULL, "rank": 100}),
        )
    ),
    Row(SGD, "darts (central)", "darts", DIFFERENCE, 1, "sgd"),
    Row(SGD, "darts, forward", "darts", FORWARD, 1, "sgd"),
    Row(SGD, "darts, richardson", "darts", RICHARDSON, 1, "sgd"),
    Row(SGD, "darts, exact product", "darts", EXACT, 1, "sgd"),
    Row(ADAMW, "sama (central)", "sama", DIFFERENCE, 1, "adamw"),
    Row(ADAMW, "sama, exact product", "sama", EXACT, 1, "adamw"),
    *(
        Row(ADAMW, f"unrolled, K = {k}", "unrolled", {"num_steps": k}, k, "adamw")
        for k in (1, 5, 20)
    ),
    *(
        Row(
            ADAMW,
            f"forward, K = {k}",
            "forward",
            {"num_steps": k, "num_directions": "all"},
            k,
            "adamw",
        )
        for k in (5, 20)
    ),
    Row(
        ADAMW,
        "zeroth-order, K = 5",
        "zeroth-order",
        {"num_steps": 5, "num_directions": "all"},
        5,
        "adamw",
    ),
    Row(ADAMW, "darts, exact product (assumes SGD)", "darts", EXACT, 1, "adamw"),
    Row(MOMENTUM, "unrolled, K = 5", "unrolled", {"num_steps": 5}, 5, "momentum"),
)


@dataclass(frozen=True)
class Measured:
    """The error of one estimate, and what it says about itself."""

    error: float
    reason: str


def measure(row: Row, dtype: torch.dtype, seed: int) -> Measured:
    estimator = make_estimator(row.estimator, **row.settings)
    if row.steps is None:
        if row.spectrum is None:
            known = testing.ridge(30, 60, dtype=dtype, seed=seed)
        else:
            known = testing.quadratic(row.spectrum, dtype=dtype, seed=seed)
        result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
        truth = known.indirect
    else:
        result, truth = on_network(row, estimator, network(seed).to(dtype))
    return Measured(testing.relative_error(result.indirect, truth), result.info.reason)


def on_network(row: Row, estimator: Any, net: Network) -> tuple[Any, Params]:
    """Take real steps, estimate from them; return that and the truth for them."""
    through, steps = HANDS[row.hand], row.steps or 0
    w = {n: t.clone().requires_grad_() for n, t in net.inner.items()}
    lam = {n: t.clone().requires_grad_() for n, t in net.outer.items()}
    opt = BilevelOptimizer(
        BilevelProblem(inner_loss, outer_loss, w, lam),
        estimator=estimator,
        inner_optimizer=through.make,
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),  # never steps
    )
    start: Params = {}
    slots: dict[str, Params] = {}
    for t in range(STEPS_BEFORE + steps):
        if t == STEPS_BEFORE:
            start = {n: p.detach().double().clone() for n, p in w.items()}
            slots = {
                n: {
                    slot: value.detach().double().clone()
                    for slot, value in opt.inner.state[p].items()
                    if isinstance(value, Tensor)
                }
                for n, p in w.items()
            }
        opt.inner_step(net.batches[t % len(net.batches)])
    result = estimator.estimate(
        opt.problem,
        inner_batch=None,
        outer_batch=net.held_out,
        steps=opt.recorded_steps,
    )
    # The truth for the numbers that this dtype holds, not for those before rounding.
    truth = unrolled_truth(
        net.to(torch.float64), start, slots, through, STEPS_BEFORE, steps
    )
    return result, truth


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)  # reasons go into the JSON
    results = []
    for row in ROWS:
        entry: dict[str, Any] = {
            "differentiates": row.group,
            "name": row.label,
            "estimator": row.estimator,
            "estimator_settings": row.settings,
        }
        for name, dtype in DTYPES.items():
            seeds = [measure(row, dtype, seed) for seed in range(arguments.seeds)]
            errors = [one.error for one in seeds]
            entry[name] = {
                "worst": max(errors),
                "best": min(errors),
                "by_seed": errors,
                "reasons": sorted({one.reason for one in seeds} - {""}),
            }
        results.append(entry)
    report(results)
    written = write_result(
        "estimator_accuracy",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        results,
        unit="relative L2 distance of the indirect term from the truth in float64",
    )
    done(written, picture(results, arguments.seeds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seeds", type=int, default=10, help="problems of each kind")
    add_threads_argument(parser)
    return parser.parse_args()


def report(results: list[dict[str, Any]]) -> None:
    group = ""
    for entry in results:
        if entry["differentiates"] != group:
            group = entry["differentiates"]
            print(f"{group:44} {'  '.join(DTYPES)}")
        worst = "  ".join(f"{entry[name]['worst']:7.1e}" for name in DTYPES)
        print(f"    {entry['name']:40} {worst}")


def picture(results: list[dict[str, Any]], seeds: int) -> Any:
    colours = dict(zip(DTYPES, (BLUE, ORANGE), strict=True))
    groups = list(dict.fromkeys(entry["differentiates"] for entry in results))
    figure = new_figure(9, 1.6 + 0.3 * (len(results) + len(groups)))
    axes = figure.subplots()
    ticks, labels, y = [], [], 0
    for group in groups:
        axes.text(
            -0.01, y, group, transform=axes.get_yaxis_transform(),
            ha="right", va="center", color=GREY, fontweight="bold",
        )  # fmt: skip
        y += 1
        for entry in (e for e in results if e["differentiates"] == group):
            for name, colour in colours.items():
                span = [max(entry[name][end], ZERO) for end in ("best", "worst")]
                # A little apart, so that equal errors do not hide each other.
                at = y + (0.13 if colour == ORANGE else -0.13)
                axes.plot(span, [at, at], color=colour, lw=3, alpha=0.35)
                axes.plot(span[1], at, "o", color=colour, ms=6)
            ticks.append(y)
            labels.append(entry["name"])
            y += 1
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(ZERO / 2, 500)
    powers = range(-16, 3, 2)
    axes.set_xticks(
        [ZERO, *(10.0**k for k in powers)], ["0", *(f"$10^{{{k}}}$" for k in powers)]
    )
    axes.minorticks_off()
    plain_axes(axes, "x")
    axes.tick_params(axis="y", length=0)
    for (name, dtype), colour in zip(DTYPES.items(), colours.values(), strict=True):
        spacing = torch.finfo(dtype).eps
        axes.axvline(spacing, color=colour, lw=1, ls=":")
        axes.annotate(
            f"spacing of {name}",
            (spacing, 1),
            (3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=colour,
        )
    axes.set_xlabel(
        "relative error of the indirect term against float64 truth (log scale)\n"
        f"dot: worst of {seeds} seeds, bar: down to the best"
    )
    axes.legend(
        handles=[
            Line2D([], [], ls="", marker="o", ms=7, color=c, label=f"computed in {n}")
            for n, c in colours.items()
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        labelcolor=INK,
    )
    figure.suptitle("Error of each estimator, by what it differentiates")
    return save_picture(figure, "estimator_accuracy")


if __name__ == "__main__":
    main()
