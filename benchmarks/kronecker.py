"""Does a Kronecker-factored inverse beat conjugate gradients at equal products?

    python -m benchmarks.kronecker

from the root of the repository; some ten minutes on one core. Writes
benchmarks/results/kronecker.json and docs/images/benchmarks/kronecker.png.

The problem is a real one: the bundled encoder on the docstrings of the standard library,
exact DoRA on query and value of its last layer, and a trained head, after a training of
them by AdamW at fixed magnitudes. Below that layer nothing is trained, so its inputs are
computed once. The system is (H + δ) z = ∂f/∂w in float64, without dropout, H the
Gauss-Newton matrix of the training examples, which is what Kronecker factors model, and
∂f/∂w on all that are held back. H is written out as the gradients of all examples and
classes, and checked against a product of the package.

Contenders are the package's own solvers; K-FAC and E-KFAC as inverses; and both as
preconditioners of `cg`, which then runs on P^(-1/2) (H + δ) P^(-1/2). So does the exact
block diagonal, which the factors approximate: where it brings nothing, they cannot.

The unit is a product, which costs about as much as a gradient, a forward and a backward
pass (both are timed here); a backward pass counts for two forwards. Factors by sampled
labels take one forward and one backward pass, so one product; E-KFAC's moments another;
those of all C classes one forward and C backwards, so (1 + 2C)/3. Eigenvectors count for
nothing. Errors are relative L2 distances to the solution by Woodbury's formula.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
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
from benchmarks._kronecker import (
    Layer,
    Model,
    block_diagonal,
    corrected,
    factored,
    flattened,
    measured,
    unflattened,
)
from bidora import magnitudes, use_exact_dora
from bidora.methods import make_method
from bidora.models import find_model
from bidora.runs.examples import read_examples
from bidora.runs.prepared import prepare
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from hypergrad import BilevelProblem, NumericalWarning, tree
from hypergrad.batches import as_micro_batches
from hypergrad.products import Tally, bind_product, gradients
from hypergrad.solvers import CGSolver, NeumannSolver, NystromSolver
from hypergrad.tree import cosine, relative_error

QUESTION = "Does a Kronecker-factored inverse beat cg at equal products?"
COUNTS = [1, 2, 4, 8, 12, 16, 24, 32]
"""Products that a contender may take."""
DAMPINGS = [1e-3, 1e-2, 1e-1]
JUDGED = 1e-2, 16
"""Damping, and iterations, at which the hypergradient is looked at too."""
Params = dict[str, Tensor]


@dataclass
class System:
    """A linear system at one point of a training, and what its solution is for.

    Attributes:
        product: products of the inner loss, with Gauss-Newton curvature.
        v: ∂f/∂w.
        direct: ∂f/∂λ.
        layers: the gradients of all examples and classes.
        known: products by their vectors: more iterations of a solver begin with the
            same ones.
        calls: products that were taken.
    """

    product: Any
    v: Params
    direct: Params
    layers: list[Layer]
    known: dict[bytes, Tensor] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        self.rows = torch.cat([layer.grads.flatten(1) for layer in self.layers], 1)

    def __call__(self, vector: Params) -> Params:
        self.calls += 1
        flat = flattened(self.layers, vector)
        key = flat.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.rows.T @ (self.rows @ flat)
        return unflattened(self.layers, self.known[key], vector)

    def solution(self, damping: float) -> Params:
        core = self.rows @ self.rows.T
        core.diagonal().add_(damping)
        flat = flattened(self.layers, self.v)
        x = flat - self.rows.T @ torch.linalg.solve(core, self.rows @ flat)
        return unflattened(self.layers, x / damping, self.v)

    def indirect(self, z: Params) -> Params:
        return tree.scale(self.product.mixed_vjp(z), -1.0)


# -- the problem -----------------------------------------------------------------------


class Passed(nn.Module):
    """Stands for embeddings, and for layers below the adapters: what they computed."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def trained(seed: int, arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the last layer and head after a training, and both data sets."""
    layers = [f"encoder.layer.5.attention.self.{n}" for n in ("query", "value")]
    settings = TrainSettings(
        method="bidora",
        seed=seed,
        lora_r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=tuple(layers),
        max_length=16,
    )
    torch.manual_seed(seed)
    listener = Listener()
    examples = read_examples(settings, listener, searches=True)
    made = prepare(
        settings,
        make_method(settings.method),
        find_model(settings.model),
        examples,
        torch.device("cpu"),
        listener,
    )
    model = made.model.eval()
    use_exact_dora(model)
    body = model.base_model.model.body
    sets = []
    for rows in (examples.inner[: arguments.examples], examples.outer):
        part = made.sets["train"].select(rows)
        batch = dict(made.collate([part[i] for i in range(len(part))]))
        labels = batch.pop("labels")
        with torch.no_grad():
            states = body(**batch, output_hidden_states=True).hidden_states[5]
        kept = batch["attention_mask"]
        sets.append({"inputs_embeds": states, "attention_mask": kept, "labels": labels})
    inner = sets[0]
    body.embeddings, body.encoder.layer = Passed(), body.encoder.layer[5:]
    fixed = set(magnitudes(model))
    w = [p for n, p in model.named_parameters() if p.requires_grad and n not in fixed]
    optimizer = torch.optim.AdamW(w, settings.rate, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(arguments.steps), unit="step", desc=f"training {seed}"):
        some = torch.randperm(len(inner["labels"]), generator=order)[:16]
        loss = model(**{name: t[some] for name, t in inner.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    wide = [{**s, "inputs_embeds": s["inputs_embeds"].double()} for s in sets]
    return model.double(), *wide


def system_of(model: Any, inner: Any, outer: Any, layers: list[Layer]) -> System:
    problem = BilevelProblem.from_module(
        model,
        lambda m, batch: m(**batch).loss,
        outer=list(magnitudes(model)),
        inner_outputs=lambda m, batch: m(**batch).logits,
        inner_criterion=lambda z, batch: torch.nn.functional.cross_entropy(
            z, batch["labels"]
        ),
    )
    tally = Tally()
    g = gradients(problem, "outer", as_micro_batches(outer), tally)
    batches = as_micro_batches(inner)
    product = bind_product("exact", problem, batches, tally, "gauss-newton")
    return System(product, g.inner or {}, g.outer or {}, layers)


# -- contenders ------------------------------------------------------------------------


def preconditioned(system: System, model: Model, damping: float, k: int) -> Params:
    """Return k steps of `cg` on P^(-1/2) (H + δ) P^(-1/2)."""

    def matvec(y: Params) -> Params:
        x = model.to(-0.5, y)
        return model.to(-0.5, tree.add(system(x), x, alpha=damping))

    b = model.to(-0.5, system.v)
    y = CGSolver(k, rtol=0.0, on_failure="return").solve(matvec, b).x
    return model.to(-0.5, y)


def own_solvers(damping: float) -> dict[str, Callable[[int], Any]]:
    quiet: Any = {"damping": damping, "on_failure": "return"}
    return {
        "cg": lambda k: CGSolver(k, rtol=0.0, **quiet),
        "neumann": lambda k: NeumannSolver(k, **quiet),
        "nystrom": lambda k: NystromSolver(k - 1, **quiet) if k > 1 else None,
    }


def models(
    layers: dict[str, Any], damping: float, classes: int
) -> dict[str, tuple[int, Model]]:
    """Return what each factored model costs in products, and the model."""
    sampled, every = layers["sampled"], layers["all"]
    dear = math.ceil((1 + 2 * classes) / 3)
    return {
        "K-FAC": (1, factored(sampled, damping, split=True)),
        "E-KFAC": (2, corrected(sampled, damping)),
        "K-FAC, all classes": (dear, factored(every, damping, split=True)),
        "E-KFAC, all classes": (dear, corrected(every, damping)),
        "exact blocks": (dear, block_diagonal(every, damping)),
    }


def compared(
    system: System,
    truth: Params,
    damping: float,
    made: dict[str, tuple[int, Model]],
    bar: Any,
) -> dict[str, Any]:
    """Return the errors of every contender at every number of its own iterations."""
    right = system.indirect(truth) if damping == JUDGED[0] else None
    found: dict[str, Any] = {}

    def judge(name: str, cost: int, k: int, z: Params) -> None:
        row: dict[str, Any] = {
            "iterations": k,
            "products": cost + k,
            "error": relative_error(z, truth),
            "cosine": cosine(z, truth),
        }
        if right is not None and k in (0, JUDGED[1]):
            indirect = system.indirect(z)
            row["indirect_error"] = relative_error(indirect, right)
            row["hypergradient_error"] = relative_error(
                tree.add(system.direct, indirect), tree.add(system.direct, right)
            )
        found.setdefault(name, []).append(row)
        bar.update()

    for name, make in own_solvers(damping).items():
        for k in COUNTS:
            solver = make(k)
            if solver is None:
                continue
            system.calls = 0
            z = solver.solve(system, system.v).x
            if system.calls > k:
                msg = f"{name} took {system.calls} products where {k} were allowed"
                raise RuntimeError(msg)
            judge(name, 0, k, z)
    for name, (cost, model) in made.items():
        judge(name, cost, 0, model.to(-1.0, system.v))
        for k in COUNTS:
            z = preconditioned(system, model, damping, k)
            judge(f"cg with {name}", cost, k, z)
    return found


# -- the run ---------------------------------------------------------------------------


def run(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    model, inner, outer = trained(seed, arguments)
    layers = {kind: measured(model, inner, labels=kind) for kind in ("sampled", "all")}
    system = system_of(model, inner, outer, layers["all"])
    loss = model(**inner).loss
    own = dict(model.named_parameters())
    parts = torch.autograd.grad(loss, [own[n] for n in system.v])
    plain = dict(zip(system.v, parts, strict=True))
    check(model, inner, system, plain)
    classes = model(**inner).logits.shape[1]
    contenders = 3 * len(COUNTS) - 1 + 5 * (len(COUNTS) + 1)
    bar = tqdm(total=contenders * len(DAMPINGS), unit="solve", desc=f"seed {seed}")
    found = []
    for damping in DAMPINGS:
        truth = system.solution(damping)
        made = models(layers, damping, classes)
        found.append(
            {
                "damping": damping,
                "contenders": compared(system, truth, damping, made, bar),
            }
        )
    bar.close()
    eigenvalues = torch.linalg.eigvalsh(system.rows @ system.rows.T).flip(0)
    return {
        "seed": seed,
        "parameters": system.rows.shape[1],
        "examples": len(inner["labels"]),
        "classes": classes,
        "inner_loss": loss.item(),
        "inner_gradient_norm": tree.norm(plain),
        "eigenvalues": eigenvalues[:256].tolist(),
        "seconds": timed(model, inner, system),
        "systems": found,
    }


def check(model: Any, inner: Any, system: System, plain: Params) -> None:
    """Refuse gradients of examples that are not those of the loss and of a product."""
    found: Params = {}
    for layer in measured(model, inner, labels="given"):
        found |= layer.split(layer.grads.sum(0) / len(inner["labels"]) ** 0.5)
    off = {
        "gradient": relative_error({n: found[n] for n in plain}, plain),
        "product": relative_error(system(system.v), system.product.hvp(system.v)),
    }
    for name, error in off.items():
        if error > 1e-9:
            msg = f"the {name} from the examples' gradients is off by {error:.2g}"
            raise RuntimeError(msg)


def timed(model: Any, inner: Any, system: System) -> dict[str, float]:
    """Return seconds of a gradient, a product and each pass for factors; the least of 3."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    own = {**system.v}
    jobs: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(model(**inner).loss, leaves),
        "product": lambda: system.product.hvp(own),
        "factors, sampled labels": lambda: measured(model, inner, labels="sampled"),
        "factors, all classes": lambda: measured(model, inner, labels="all"),
    }
    found = {}
    for name, job in jobs.items():
        took = []
        for _ in range(3):
            start = time.perf_counter()
            job()
            took.append(time.perf_counter() - start)
        found[name] = min(took)
    return found


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", NumericalWarning)
    runs = [run(seed, arguments) for seed in range(arguments.seeds)]
    summary = summed(runs)
    report(summary)
    written = write_result(
        "kronecker",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        {"median_of_seeds": summary, "by_seed": runs},
        unit="relative L2 distance and cosine to the solution; of the indirect term and of "
        "the whole hypergradient of the magnitudes too",
    )
    done(written, picture(summary))


def summed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over the seeds, and the worst error, for each damping."""
    out = []
    for i, damping in enumerate(DAMPINGS):
        each = [run["systems"][i]["contenders"] for run in runs]
        rows = {
            name: [
                {
                    **{
                        key: statistics.median(found[name][j][key] for found in each)
                        for key in first
                    },
                    "worst_error": max(found[name][j]["error"] for found in each),
                    "least_error": min(found[name][j]["error"] for found in each),
                }
                for j, first in enumerate(each[0][name])
            ]
            for name in each[0]
        }
        out.append({"damping": damping, "contenders": rows})
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seeds", type=int, default=3, help="trainings")
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--examples", type=int, default=128, help="of the inner loss")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    add_threads_argument(parser)
    return parser.parse_args()


def within(rows: list[dict[str, Any]], products: int) -> dict[str, Any] | None:
    """Return the last row that takes at most so many products."""
    allowed = [row for row in rows if row["products"] <= products]
    return allowed[-1] if allowed else None


def report(summary: list[dict[str, Any]]) -> None:
    shown = [2, 4, 8, 16, 32]
    for part in summary:
        told = f"damping {part['damping']:g}"
        print(f"\n{told:28} {'  '.join(f'{k:>7}' for k in shown)} products")
        for name, rows in part["contenders"].items():
            cells = [within(rows, k) for k in shown]
            row = "  ".join(f"{c['error']:7.1e}" if c else " " * 7 for c in cells)
            told = [r for r in rows if "hypergradient_error" in r]
            end = (
                f"  hypergradient {told[0]['hypergradient_error']:.1e}" if told else ""
            )
            print(f"  {name:26} {row}{end}")


COLOURS = {
    "cg": BLUE,
    "neumann": GREY,
    "nystrom": PURPLE,
    "K-FAC": ORANGE,
    "E-KFAC": GREEN,
    "exact blocks": INK,
}


def picture(summary: list[dict[str, Any]]) -> Any:
    figure = new_figure(12, 5.4)
    first: Any = None
    for column, part in enumerate(summary):
        axes: Any = figure.add_subplot(1, 3, column + 1, sharey=first)
        first = first or axes
        for name, rows in part["contenders"].items():
            kind = name.removeprefix("cg with ").removesuffix(", all classes")
            dashed = kind != name.removeprefix("cg with ") or kind == "exact blocks"
            axes.plot(
                [r["products"] for r in rows], [r["error"] for r in rows],
                color=COLOURS[kind], lw=2 if name == "cg" else 1.4,
                ls="--" if dashed else "-", marker="o" if len(rows) == 1 else None,
                mfc="white" if dashed else None, ms=5.5, label=name,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 30)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"δ = {part['damping']:g}", fontsize=10.5, color=INK)
        axes.set_xlabel("products, factors included")
        plain_axes(axes, "y")
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("relative error of z")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, frameon=False,
        labelcolor=INK, fontsize=9,
    )  # fmt: skip
    figure.suptitle(
        "(H + δ) z = ∂f/∂w of a DoRA adapter and a head: error at equal products"
    )
    return save_picture(figure, "kronecker")


if __name__ == "__main__":
    main()
