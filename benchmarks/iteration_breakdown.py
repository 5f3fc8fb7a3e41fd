"""Where does a BiDoRA iteration spend its time and memory?

    python -m benchmarks.iteration_breakdown

from the root of the repository; about ten minutes on one core. Writes
benchmarks/results/iteration_breakdown.json and
docs/images/benchmarks/iteration_breakdown.png.

Iterations of five estimators on a random model of RoBERTa-base's width, with exact DoRA on
query and value, a trained head, AdamW and the orthogonality term. The packages' functions
are wrapped at their seams, from outside: forward and backward passes of both losses, the
product, the rule and the optimizers, copies, random states, checks. What passes outside of
all is "the rest". The floor is what an estimator's passes would take if each gradient took
what it takes in a plain training step of exact DoRA, in the same round.

Times are seconds of the processor: on one thread those of an idle machine, whatever else
runs. Memory is that of tensors beyond those before the iteration, from torch's profiler in
a run of its own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from typing import Any

import torch
from matplotlib.ticker import FuncFormatter
from tqdm import tqdm

from benchmarks import _model, _scopes
from benchmarks._common import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Contender,
    add_model_arguments,
    done,
    model_title,
    new_figure,
    plain_axes,
    save_picture,
    time_in_rotation,
    write_result,
)
from benchmarks._scopes import Clock, at_the_seams
from bidora import BiDoRAOptimizer, use_exact_dora
from bidora.dora.orthogonality import orthogonality
from hypergrad import NumericalWarning, make_estimator
from hypergrad.compare._run import forwards_of
from hypergrad.products import FiniteDifference

QUESTION = "Where does a BiDoRA iteration spend its time and memory?"
STEP = "exact DoRA step"
# Inner steps, on one example each, before anything is measured: at B = 0 the directions A
# have gradients so small that a finite difference moves them apart from the rest.
BEFORE = 10
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "darts, forward": ("darts", {"product": FiniteDifference(scheme="forward")}),
    "darts, central": ("darts", {"product": FiniteDifference()}),
    "darts, exact (graph kept)": ("darts", {"product": "exact"}),
    "unrolled, K = 2": ("unrolled", {"num_steps": 2}),
    "neumann, 5 terms": ("neumann", {"num_terms": 5}),
}
# What is drawn together; what is in none of them is a pass of the product.
GROUPS = {
    "gradient of g": ("forward of g", "backward of g"),
    "gradient of f": ("forward of f", "backward of f"),
    "product's passes": (
        "product: forward",
        "product: backward",
        "product: through the gradient's graph",
    ),
    "optimizers and rule": (_scopes.OPTIMIZERS, _scopes.RULE),
    "arithmetic of product and solver": (_scopes.PRODUCT, _scopes.SOLVER),
    "orthogonality, forward": (_scopes.ORTHOGONALITY,),
    "bookkeeping": (
        _scopes.COPIES,
        _scopes.MOVES,
        _scopes.STATES,
        _scopes.CHECKS,
        _scopes.REST,
    ),
}
COLOURS = dict(
    zip(
        GROUPS,
        (BLUE, GREEN, ORANGE, PURPLE, "#c9a227", "#4aa3a2", GREY),
        strict=True,
    )
)
PASSES = ("gradient of g", "gradient of f", "product's passes")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)
    base = _model.roberta(arguments.layers, arguments.tokens, "sdpa")
    batches = [
        _model.draw_batch(arguments.batch, arguments.tokens, seed) for seed in range(16)
    ]
    clock = Clock()
    rows = [plain_row(base, arguments.rank, batches, clock)]
    rows += [
        bidora_row(base, arguments, batches, clock, label, name, settings)
        for label, (name, settings) in METHODS.items()
    ]
    with at_the_seams(clock):
        contenders = [row.pop("contender") for row in rows]
        with tqdm(total=(arguments.rounds + 1) * len(rows), unit="run") as bar:
            time_in_rotation(contenders, arguments.rounds, bar)
        for row, contender in zip(rows, contenders, strict=True):
            row.update(contender.note)
            row["memory"] = _scopes.memory_of(clock, lambda run=contender.run: run(1))
    complete(rows)
    term = orthogonality_seconds(base, arguments)
    report(rows)
    written = write_result(
        "iteration_breakdown",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        rows,
        unit="processor seconds of one iteration (of `unrolled`, a K-th of K), medians "
        "of rounds; bytes of tensors beyond those before the run",
        orthogonality_value_and_gradient_seconds=term,
        scope_seconds=_scopes.cost_of_a_scope(),
    )
    done(written, picture(rows, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    add_model_arguments(parser)
    parser.set_defaults(batch=16, tokens=128)
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds")
    parser.add_argument(
        "--orthogonality", type=float, default=1e-5, help="weight of the term"
    )
    return parser.parse_args()


def plain_row(base: Any, rank: int, batches: list[Any], clock: Clock) -> dict[str, Any]:
    """Return a training step of exact DoRA, in three parts."""
    model = _model.with_adapter(base, rank, dora=True)
    use_exact_dora(model)
    own = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0)
    rounds: list[dict[str, float]] = []

    def step(turn: int) -> dict[str, Any]:
        adamw.zero_grad()
        times = [time.process_time()]
        loss = model(**batches[turn]).loss
        times.append(time.process_time())
        loss.backward()
        times.append(time.process_time())
        adamw.step()
        times.append(time.process_time())
        names = ("forward", "backward", "AdamW")
        parts = [b - a for a, b in itertools.pairwise(times)]
        if turn and not clock.profiled:
            rounds.append(dict(zip(names, parts, strict=True)))
        return {"by_round": list(rounds)}

    return {
        "name": STEP,
        "trainable_bytes": sum(p.numel() * p.element_size() for p in own),
        "contender": Contender(STEP, step),
    }


def bidora_row(
    base: Any,
    arguments: argparse.Namespace,
    batches: list[Any],
    clock: Clock,
    label: str,
    name: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    estimator = make_estimator(name, **settings)
    every = max(1, estimator.needs.lookback)
    opt = BiDoRAOptimizer(
        _model.with_adapter(base, arguments.rank, dora=True),
        estimator,
        outer_every=every,
        outer_warmup=0,
        orthogonality=arguments.orthogonality,
        max_grad_norm=None,
    )
    rounds: list[dict[str, float]] = []

    def iterate(turn: int) -> dict[str, Any]:
        report: Any = None
        for k in range(0 if turn else BEFORE):
            opt.inner_step({name: t[:1] for name, t in batches[k].items()})
        with clock:
            for k in range(every):
                report = opt.step(batches[turn + k], batches[turn + k + 1])
        if report.info is None:
            raise RuntimeError(f"{label} took no outer step: {report.skipped}")
        if turn and not clock.profiled:
            rounds.append({n: s / every for n, s in clock.seconds.items()})
        info = report.info
        return {
            "by_round": list(rounds),
            "scopes": clock.entered / every,
            "per_outer_step": {
                n: getattr(info, n) for n in ("n_forward", "n_backward", "n_hvp")
            },
            # A gradient is a forward and a backward pass; inner steps take one each.
            "floor_in_gradients": 1 + forwards_of(info) / 2 / every,
        }

    w, lam = opt.problem.inner_params, opt.problem.outer_params
    return {
        "name": label,
        "estimator": name,
        "estimator_settings": settings,
        "outer_every": every,
        "inner_bytes": _scopes.bytes_of(w),
        "outer_bytes": _scopes.bytes_of(lam),
        "contender": Contender(label, iterate, every),
    }


def complete(rows: list[dict[str, Any]]) -> None:
    """Add medians, ratios to the plain step, and what is above the floor."""
    steps = rows[0]["by_round"]
    for row in rows:
        rounds = row["by_round"]
        labels = dict.fromkeys(label for one in rounds for label in one)
        row["seconds"] = {
            label: statistics.median(one.get(label, 0.0) for one in rounds)
            for label in labels
        }
        row["whole"] = statistics.median(sum(one.values()) for one in rounds)
        row["over_a_step"] = statistics.median(
            sum(one.values()) / sum(step.values())
            for one, step in zip(rounds, steps, strict=True)
        )
        if row["name"] == STEP:
            continue
        row["groups"] = {
            group: sum(row["seconds"].get(label, 0.0) for label in own)
            for group, own in GROUPS.items()
        }
        gradient = [step["forward"] + step["backward"] for step in steps]
        row["floor_seconds"] = row["floor_in_gradients"] * statistics.median(gradient)
        passes = sum(row["groups"][group] for group in PASSES)
        row["passes_above_floor"] = passes - row["floor_seconds"]
        row["beside_passes"] = sum(row["groups"].values()) - passes


def orthogonality_seconds(base: Any, arguments: argparse.Namespace) -> float:
    """Return the seconds of the term's value and gradient, alone."""
    model = _model.with_adapter(base, arguments.rank, dora=True)
    use_exact_dora(model)
    own = [p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n]

    def both() -> None:
        torch.autograd.grad(arguments.orthogonality * orthogonality(model), own)

    both()  # which makes the cached Gram matrices
    return _scopes.seconds_of(both)


def report(rows: list[dict[str, Any]]) -> None:
    step = rows[0]["whole"]
    for row in rows:
        print(f"{row['name']}: {row['whole']:.2f} s, {row['over_a_step']:.2f} steps")
        for label, seconds in sorted(row["seconds"].items(), key=lambda one: -one[1]):
            share = 100 * seconds / row["whole"]
            print(f"    {label:40} {seconds:8.3f} s {share:6.2f} %")
        if "floor_seconds" in row:
            for name in ("floor_seconds", "passes_above_floor", "beside_passes"):
                print(f"    {name:40} {row[name]:8.3f} s {row[name] / step:6.2f} steps")
        memory = row["memory"]
        print(f"    peak {memory['peak'] / 2**20:.0f} MiB")
        for label, size in memory["peaks"].items():
            kept = memory["kept"].get(label, 0) / 2**20
            print(f"      {label:40} {size / 2**20:7.0f} MiB, adds {kept:7.1f}")


def picture(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    step, rows = rows[0], rows[1:]
    unit = step["whole"]
    figure = new_figure(12.5, 4.6)
    axes, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3.4, 1.6])
    for y, row in enumerate(rows):
        left = 0.0
        for group, seconds in row["groups"].items():
            width = seconds / unit
            label = group if not y else None
            axes.barh(y, width, 0.56, left, color=COLOURS[group], label=label)
            if width > 0.3:
                axes.text(
                    left + width / 2, y, f"{width:.2f}",
                    ha="center", va="center", color="white", fontsize=9,
                )  # fmt: skip
            left += width
        axes.text(left + 0.08, y, f"{left:.2f}", va="center", color=INK)
        floor = row["floor_seconds"] / unit
        axes.plot(
            [floor, floor], [y - 0.4, y + 0.4], color=INK, lw=2,
            label=None if y else "floor",
        )  # fmt: skip
        peaks = row["memory"]["peaks"]
        for shift, group in zip((-0.2, 0.0, 0.2), PASSES, strict=True):
            size = max(peaks.get(label, 0) for label in GROUPS[group]) / 2**20
            memory.barh(y + shift, size, 0.18, color=COLOURS[group])
        peak = row["memory"]["peak"] / 2**20
        memory.plot([peak, peak], [y - 0.3, y + 0.3], color=GREY, lw=2)
        memory.text(peak, y, f"  {peak:,.0f}", va="center", color=INK)
    plain = step["memory"]["peak"] / 2**20
    memory.axvline(plain, color=INK, lw=1, ls=":")
    memory.annotate(
        f"{STEP}: {plain:,.0f}", (plain, -0.62), (4, 0), textcoords="offset points",
        va="center", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_xlabel(f"time of one iteration, in {STEP}s")
    axes.set_xlim(0, 1.08 * max(row["whole"] for row in rows) / unit)
    memory.set_xlabel("most MiB of tensors held\nduring each; line: in all")
    memory.set_xlim(0, 1.25 * max(row["memory"]["peak"] for row in rows) / 2**20)
    memory.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for one in (axes, memory):
        plain_axes(one, "x")
        one.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    figure.suptitle(f"One BiDoRA iteration: {model_title(arguments)}")
    return save_picture(figure, "iteration_breakdown")


if __name__ == "__main__":
    main()
