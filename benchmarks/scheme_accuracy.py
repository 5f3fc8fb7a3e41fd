"""What accuracy does each way to take the mixed product buy, and at what cost?

    python -m benchmarks.scheme_accuracy

from the root of the repository; about ten minutes on one core. Writes
benchmarks/results/scheme_accuracy.json and docs/images/benchmarks/scheme_accuracy.png.

`darts` and `sama` end in one mixed product of the inner loss: by finite differences of
three schemes, exactly, or on part of the inner batch. Two models: the bundled encoder on
the docstrings of the standard library, with the settings of `bidora train`, and a random
one of RoBERTa-base's width. Both train with outer steps first; then the training goes on,
and at each of some inner steps every scheme answers for that step and those batches.

The truth is a float64 copy of the model at the same numbers, batches and dropout masks:
plain autograd through one step of gradient descent (`darts`) or of AdamW written out
(`sama`), on the whole inner batch. So an error is the scheme's own, the rounding of
float32 or bfloat16, and, for part of a batch, what the rest of the examples would say.

Times are those of whole iterations (an inner and an outer step), over a training step of
exact DoRA of the same round, in seconds of the processor: on one thread those of an idle
machine, whatever else runs. Memory is that of tensors in one iteration.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import _model
from benchmarks._common import (
    BLUE,
    GREY,
    INK,
    ORANGE,
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
from benchmarks._truth import adamw_step
from bidora import BiDoRAOptimizer, magnitudes, use_exact_dora
from bidora.dora.orthogonality import orthogonality
from bidora.methods import make_method
from bidora.models import find_model
from bidora.runs.examples import read_examples
from bidora.runs.prepared import prepare
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.trainer.data import OuterStream
from hypergrad import NumericalWarning, make_estimator, rng
from hypergrad.compare._measure import peak_bytes
from hypergrad.products import FiniteDifference
from hypergrad.tree import cosine, relative_error

QUESTION = (
    "What accuracy does each way to take the mixed product buy, and at what cost?"
)
BASELINE = "exact DoRA step"
ESTIMATORS = ("darts", "sama")
# On part of a batch nothing that the inner step computed can serve, so that a one-sided
# difference costs there what a central one does.
FORWARD = FiniteDifference(scheme="forward")
CENTRAL = FiniteDifference()
SCHEMES: dict[str, dict[str, Any]] = {
    "forward": {"product": FORWARD},
    "central": {"product": CENTRAL},
    "richardson": {"product": FiniteDifference(scheme="richardson")},
    "exact, kept": {"product": "exact"},
    "exact, recomputed": {"product": "exact"},
    "central, 1/2": {"product": CENTRAL, "product_fraction": 0.5},
    "central, 1/4": {"product": CENTRAL, "product_fraction": 0.25},
    "exact, 1/2": {"product": "exact", "product_fraction": 0.5},
    "exact, 1/4": {"product": "exact", "product_fraction": 0.25},
}
# What is measured in each. The rest of a batch says the same in all.
PRECISIONS: dict[str, list[str]] = {
    "float32": [label for label in SCHEMES if label != "exact, kept"],
    "bfloat16 autocast": ["forward", "central", "richardson", "exact, recomputed"],
}


@dataclass(frozen=True)
class Bench:
    """A model in the midst of a training, and its batches.

    Attributes:
        name: what it is called in the results.
        model: the model with an exact DoRA adapter.
        inner: draws an inner batch.
        outer: draws an outer batch.
        settings: of the optimizer.
    """

    name: str
    model: Any
    inner: Callable[[], Any]
    outer: Callable[[], Any]
    settings: dict[str, Any]

    def optimizer(self, estimator: Any, **more: Any) -> BiDoRAOptimizer:
        return BiDoRAOptimizer(
            self.model,
            estimator,
            **{
                "outer_every": 1,
                "outer_warmup": 0,
                "orthogonality": 0.0,
                "max_grad_norm": None,
                **self.settings,
                **more,
            },
        )

    def copied(self) -> Bench:
        """Return one with its own trained weights and the same frozen ones."""
        frozen = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        return replace(self, model=copy.deepcopy(self.model, frozen))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)
    results = []
    for make in (encoder, roberta):
        bench = make(arguments)
        with tqdm(total=arguments.steps, unit="step", desc=bench.name) as bar:
            train(bench, arguments.steps, bar)
        found: dict[Any, Any] = {}
        total = arguments.batches * len(PRECISIONS)
        with tqdm(total=total, unit="step", desc="accuracy") as bar:
            for precision in PRECISIONS:
                found |= accuracy(bench.copied(), precision, arguments.batches, bar)
        rows = cost(bench, arguments.rounds)
        for row in rows:
            # A graph that was kept is the one that would be built again.
            scheme = row["scheme"].replace("kept", "recomputed")
            row["accuracy"] = {
                p: found[p, row["estimator"], scheme]
                for p in PRECISIONS
                if (p, row["estimator"], scheme) in found
            }
        results.append(
            {
                "model": bench.name,
                "settings": bench.settings,
                "truth": found["truth"],
                "rows": rows,
            }
        )
    report(results)
    written = write_result(
        "scheme_accuracy",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        results,
        unit="relative L2 distance and cosine to the truth in float64, over batches; "
        "processor seconds of an iteration over those of an exact DoRA step of the same "
        "round; bytes of tensors in one iteration, beyond those before it",
    )
    done(written, picture(results, arguments))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--steps", type=int, default=50, help="iterations before")
    parser.add_argument("--batches", type=int, default=6, help="batches to measure on")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--layers", type=int, default=1, help="layers, random model")
    parser.add_argument("--batch", type=int, default=8, help="examples, random model")
    parser.add_argument("--tokens", type=int, default=64, help="tokens, random model")
    add_threads_argument(parser)
    return parser.parse_args()


# -- models in the midst of a training -------------------------------------------------


def encoder(arguments: argparse.Namespace) -> Bench:
    """Return the bundled encoder and its task, as `bidora train` sets them up."""
    del arguments
    settings, listener = TrainSettings(), Listener()
    examples = read_examples(settings, listener, searches=True)
    made = prepare(
        settings,
        make_method(settings.method),
        find_model(settings.model),
        examples,
        torch.device("cpu"),
        listener,
    )
    use_exact_dora(made.model.train())
    size = settings.per_device_train_batch_size
    inner = made.sets["train"].select(examples.inner)
    outer = made.sets["train"].select(examples.outer)
    return Bench(
        "MiniLM, docstrings",
        made.model,
        OuterStream(inner, made.collate, size, 0),
        OuterStream(outer, made.collate, size, 1),
        {
            "inner_lr": settings.rate,
            "outer_lr": settings.rate,
            "inner_weight_decay": settings.weight_decay,
            "outer_weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "orthogonality": settings.orthogonality,
        },
    )


def roberta(arguments: argparse.Namespace) -> Bench:
    """Return a random model of RoBERTa-base's width, and random batches."""
    base = _model.roberta(arguments.layers, arguments.tokens, "sdpa")
    model = _model.with_adapter(base, rank=4, dora=True)
    use_exact_dora(model)
    seed = iter(range(10**6))

    def draw() -> Any:
        return _model.draw_batch(arguments.batch, arguments.tokens, next(seed))

    settings = {"inner_lr": 1e-3, "outer_lr": 1e-3, "max_grad_norm": 1.0}
    return Bench("RoBERTa-base width, random", model, draw, draw, settings)


def train(bench: Bench, steps: int, bar: Any) -> None:
    torch.manual_seed(0)
    optimizer = bench.optimizer("darts", outer_every=4)
    for _ in range(steps):
        optimizer.step(bench.inner(), bench.outer())
        bar.update()


# -- accuracy --------------------------------------------------------------------------


def accuracy(bench: Bench, precision: str, batches: int, bar: Any) -> dict[Any, Any]:
    """Return every scheme's errors, at inner steps of one training."""
    torch.manual_seed(1)
    # Its inner step records the by-product that the forward scheme starts from.
    optimizer = bench.optimizer(make_estimator("sama", product=FORWARD))
    for _ in range(10):  # AdamW's moments
        optimizer.inner_step(bench.inner())
    measured: dict[Any, list[dict[str, float | None]]] = {}
    truths = []
    for _ in range(batches):
        outer = bench.outer()
        low = precision != "float32"
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            optimizer.inner_step(bench.inner())
            steps = optimizer.recorded_steps
            state = rng.capture()
            found = {
                (precision, name, label): make_estimator(name, **settings).estimate(
                    optimizer.problem, inner_batch=None, outer_batch=outer, steps=steps
                )
                for name in ESTIMATORS
                for label, settings in SCHEMES.items()
                if label in PRECISIONS[precision]
            }
        direct, truth = truth_of(bench, steps[-1], outer, state)
        for key, one in found.items():
            indirect = truth[key[1]]
            whole = {n: direct[n] + indirect[n] for n in direct}
            measured.setdefault(key, []).append(
                {
                    "indirect_error": relative_error(one.indirect, indirect),
                    "indirect_cosine": cosine(one.indirect, indirect),
                    "error": relative_error(one.outer_grads, whole),
                    "cosine": cosine(one.outer_grads, whole),
                }
            )
        truths.append(compared(direct, truth))
        bar.update()
    summary: dict[Any, Any] = {key: summed(values) for key, values in measured.items()}
    return {**summary, "truth": summed(truths)} if precision == "float32" else summary


def truth_of(bench: Bench, step: Any, outer: Any, state: Any) -> Any:
    """Return the direct term and each estimator's indirect one, by plain autograd."""
    model = copy.deepcopy(bench.model).double()
    lam = magnitudes(model)
    w = {n: p for n, p in model.named_parameters() if n in step.inner_params}
    (micro,) = step.micro_batches
    rng.restore(state)
    loss = model(**outer).loss
    grads = torch.autograd.grad(loss, [*w.values(), *lam.values()], allow_unused=True)
    parts = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip([*w.values(), *lam.values()], grads, strict=True)
    ]
    v, direct = parts[: len(w)], dict(zip(lam, parts[len(w) :], strict=True))
    with torch.no_grad():
        for name, p in w.items():
            p.copy_(step.inner_params[name])
    rng.restore(micro.rng_state)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(**micro.batch).loss
        loss = loss + bench.settings.get("orthogonality", 0.0) * orthogonality(model)
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        rate = bench.settings["inner_lr"]
        directions = {
            "darts": [-rate * t for t in v],
            "sama": through_adamw(bench.settings, w, step.state, grads, v),
        }
        terms = {
            name: torch.autograd.grad(grads, list(lam.values()), u, retain_graph=True)
            for name, u in directions.items()
        }
    rng.restore(state)
    return direct, {n: dict(zip(lam, t, strict=True)) for n, t in terms.items()}


def through_adamw(
    settings: dict[str, Any],
    w: dict[str, Tensor],
    state: dict[str, Any],
    grads: Any,
    v: list[Tensor],
) -> list[Tensor]:
    """Pull ∂f/∂w back through a clipped AdamW step, to the gradient that it took."""
    leaves = [g.detach().requires_grad_() for g in grads]
    norm = torch.stack([g.square().sum() for g in leaves]).sum().sqrt()
    factor = (settings["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
    stepped = []
    for (name, p), g in zip(w.items(), leaves, strict=True):
        slots = {key: value.double() for key, value in state[name].items()}
        new, _ = adamw_step(
            p.detach(),
            slots,
            factor * g,
            int(slots["step"]) + 1,
            lr=settings["inner_lr"],
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=settings.get("inner_weight_decay", 0.0),
        )
        stepped.append(new)
    return list(torch.autograd.grad(stepped, leaves, v))


def compared(direct: Any, truth: Any) -> dict[str, float | None]:
    """Say what the indirect term is worth, and how `darts` differs from AdamW's step."""
    whole = {n: direct[n] + truth["sama"][n] for n in direct}
    return {
        "cosine of the direct term to the whole of sama": cosine(direct, whole),
        "error of the direct term alone": relative_error(direct, whole),
        "darts to sama, error": relative_error(truth["darts"], truth["sama"]),
        "darts to sama, cosine": cosine(truth["darts"], truth["sama"]),
    }


def summed(values: list[dict[str, float | None]]) -> dict[str, Any]:
    """Return mean and worst over the batches, and each one."""
    out: dict[str, Any] = {}
    for key in values[0]:
        each = [float("nan") if one[key] is None else one[key] for one in values]
        worst = min if "cosine" in key else max
        out[key] = {
            "mean": statistics.fmean(x for x in each if x is not None),
            "worst": worst(x for x in each if x is not None),
            "by_batch": each,
        }
    return out


# -- cost ------------------------------------------------------------------------------


def cost(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """Return counts, time and memory of an iteration with each scheme."""
    batches = [(bench.inner(), bench.outer()) for _ in range(rounds + 1)]
    base = plain_step(bench.copied(), batches)
    rows = [
        scheme_row(bench.copied(), batches, name, label)
        for name in ESTIMATORS
        for label in SCHEMES
    ]
    rows.append(scheme_row(bench.copied(), batches, "first-order", "none"))
    contenders = [base, *(row["contender"] for row in rows)]
    seconds = [on_the_processor(contender) for contender in contenders]
    with tqdm(total=(rounds + 1) * len(contenders), unit="run", desc="time") as bar:
        time_in_rotation(contenders, rounds, bar)
    devices = [torch.device("cpu")]
    base_bytes = peak_bytes(lambda: base.run(0), devices) or 0
    for row, own in zip(rows, seconds[1:], strict=True):
        contender = row.pop("contender")
        row.update(contender.note)
        row["processor_seconds"] = own
        row["time"] = paired_ratios(own, seconds[0])
        row["peak_bytes"] = peak_bytes(lambda run=contender.run: run(0), devices) or 0
        row["peak_bytes_of_a_dora_step"] = base_bytes
    return rows


def on_the_processor(contender: Contender) -> list[float]:
    """Let a contender's timed runs write their seconds of the processor into a list."""
    seconds: list[float] = []
    run = contender.run

    def timed(turn: int) -> dict[str, Any]:
        start = time.process_time()
        note = run(turn)
        if turn:
            seconds.append(time.process_time() - start)
        return note

    contender.run = timed
    return seconds


def plain_step(bench: Bench, batches: list[Any]) -> Contender:
    own = [p for p in bench.model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(own, lr=bench.settings["inner_lr"])

    def step(turn: int) -> dict[str, Any]:
        adamw.zero_grad()
        bench.model(**batches[turn][0]).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, bench.settings["max_grad_norm"])
        adamw.step()
        return {}

    return Contender(BASELINE, step)


def scheme_row(
    bench: Bench, batches: list[Any], name: str, label: str
) -> dict[str, Any]:
    settings = SCHEMES.get(label, {})
    keep = label != "exact, recomputed"
    optimizer = bench.optimizer(
        make_estimator(name, **settings), reuse_graph="auto" if keep else False
    )

    def iterate(turn: int) -> dict[str, Any]:
        report = optimizer.step(*batches[turn])
        if report.info is None:
            raise RuntimeError(f"{name}, {label} took no outer step: {report.skipped}")
        counts = ("n_forward", "n_backward", "n_hvp")
        return {n: getattr(report.info, n) for n in counts}

    return {
        "estimator": name,
        "scheme": label,
        "settings": settings,
        "contender": Contender(f"{name}, {label}", iterate),
    }


# -- what is shown ---------------------------------------------------------------------


def report(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(result["model"])
        for text, value in result["truth"].items():
            print(f"  {text}: {value['mean']:.3g}, worst {value['worst']:.3g}")
        print(
            f"  {'':30} indirect: error, cosine   whole: error   F  B HVP  time  peak"
        )
        for row in result["rows"]:
            base = row["peak_bytes_of_a_dora_step"]
            costs = (
                f"{row['n_forward']:3d}{row['n_backward']:3d}{row['n_hvp']:3d}  "
                f"{row['time']['median']:5.2f} {row['peak_bytes'] / base:5.2f}"
            )
            for precision in row["accuracy"] or [""]:
                one = row["accuracy"].get(precision)
                text = f"{row['estimator']}, {row['scheme']}, {precision[:8]}"
                errors = 42 * " "
                if one:
                    errors = (
                        f"{one['indirect_error']['mean']:9.1e}"
                        f"{one['indirect_cosine']['mean']:10.6f}"
                        f"{one['error']['mean']:12.1e}   "
                    )
                print(f"  {text:38} {errors} {costs}")


# Of part of a batch, exact products and central differences lie on one another.
LABELS = {
    "exact, 1/2": "",
    "exact, 1/4": "",
    "central, 1/2": "half batch",
    "central, 1/4": "quarter",
}
MARKS = {"float32": "o", "bfloat16 autocast": "^"}


def picture(results: list[dict[str, Any]], arguments: argparse.Namespace) -> Any:
    colours = dict(zip(ESTIMATORS, (BLUE, ORANGE), strict=True))
    figure = new_figure(12, 4.6 * len(results))
    grid: Any = figure.subplots(len(results), 2, squeeze=False, sharey=True)
    for line, result in zip(grid, results, strict=True):
        for axes, name in zip(line, ESTIMATORS, strict=True):
            rows = [row for row in result["rows"] if row["estimator"] == name]
            for row in rows:
                x = row["time"]["median"]
                for precision, one in row["accuracy"].items():
                    y = one["indirect_error"]["mean"]
                    low = precision != "float32"
                    colour = GREY if low else colours[name]
                    worst = one["indirect_error"]["worst"]
                    axes.plot([x, x], [y, worst], color=colour, lw=2, alpha=0.35)
                    axes.plot(x, y, MARKS[precision], color=colour, ms=5 if low else 8)
                    text = LABELS.get(row["scheme"], row["scheme"])
                    if not low and text:
                        # The one of lower cost has its label at the left.
                        left = row["scheme"] == "exact, kept"
                        axes.annotate(
                            text,
                            (x, y),
                            (-8 if left else 8, -3),
                            textcoords="offset points",
                            ha="right" if left else "left",
                            color=INK,
                            fontsize=9,
                        )
            axes.set_yscale("log")
            low, high = axes.get_xlim()
            wide = high - low
            axes.set_xlim(low - 0.22 * wide, high + 0.22 * wide)
            axes.set_title(f"{name}: {result['model']}", color=INK)
            axes.set_xlabel("time of one iteration, in exact DoRA steps")
            plain_axes(axes, "both")
        line[0].set_ylabel("relative error of the indirect term")
    handles = [
        grid[0][0].plot([], [], MARKS[p], color=INK if p == "float32" else GREY)[0]
        for p in PRECISIONS
    ]
    figure.legend(
        handles,
        ["float32", "bfloat16 autocast (at float32's time)"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=INK,
    )
    figure.suptitle(
        f"Error against cost of the mixed product (mean of {arguments.batches} batches; "
        "bar: up to the worst)"
    )
    return save_picture(figure, "scheme_accuracy")


if __name__ == "__main__":
    main()
