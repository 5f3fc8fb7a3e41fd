"""How close is each linear solver to the solution after a number of products?

    python -m benchmarks.solver_convergence

from the root of the repository; about two minutes on one core. Writes
benchmarks/results/solver_convergence.json and
docs/images/benchmarks/solver_convergence.png.

Two questions, both at equal products with H:

- *One solve*, cold: random symmetric matrices of 1,000 rows with a prescribed spectrum
  (log-uniform; a few large eigenvalues over a flat rest, as deep networks show) and
  damping; `nystrom`, which needs some, has 1e-4 where the system has none. For Neumann
  three choices of its scale: ours, learned from the series' own products; the inverse
  of an eigenvalue found by power iterations, which take their share of the products; and
  the true largest eigenvalue, which nobody has.
- *A sequence of solves*, as outer steps make them: what do a sketch that is shared as CG's
  preconditioner, a warm start, and both bring? On matrices that rotate and right-hand
  sides that change by a given amount, and on a real problem: softmax regression on
  scikit-learn's digits with one penalty for each feature, which an outer optimizer
  moves, with the whole validation set or a new batch of it at each outer step.

Errors are relative L2 distances to the solution by a dense float64 factorisation.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

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
from hypergrad.solvers import CGSolver, NeumannSolver, NystromSketch, NystromSolver

QUESTION = "How close is each linear solver to the solution after a number of products?"
F64 = torch.float64
RANK, SHARED = 20, 10
"""Rank of a sketch, and the number of solves that share it."""
PRODUCTS = 20
"""Products of each solve in a sequence, a sketch's share included."""


# -- matrices --------------------------------------------------------------------------


@dataclass
class Matrix:
    """A symmetric matrix that counts its products."""

    dense: Tensor
    damping: float
    calls: int = 0

    def __call__(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        return {"w": self.dense @ v["w"]}

    def solution(self, b: Tensor) -> Tensor:
        damped = self.dense + self.damping * torch.eye(len(b), dtype=F64)
        return torch.linalg.solve(damped, b)


def log_uniform(n: int) -> Tensor:
    return torch.logspace(-4, 0, n, dtype=F64)


def outliers(n: int) -> Tensor:
    rest = torch.logspace(-3, -2, n - RANK, dtype=F64)
    return torch.cat([rest, torch.logspace(-1, 1, RANK, dtype=F64)])


SPECTRA: dict[str, tuple[Callable[[int], Tensor], float]] = {
    "log-uniform, κ = 1e4": (log_uniform, 0.0),
    "log-uniform, damped to κ = 100": (log_uniform, 1e-2),
    "20 outliers over a flat rest": (outliers, 1e-2),
}


def draw(n: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=make, dtype=F64)


def basis(n: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=make, dtype=F64)).Q


# -- one solve -------------------------------------------------------------------------


def power_iterations(matrix: Matrix, n: int, count: int) -> float:
    """Return an estimate of the largest eigenvalue from that many products."""
    v = draw(n, seed=77)
    value = 1.0
    for _ in range(count):
        v = matrix({"w": v / v.norm()})["w"]
        value = float(v.norm())
    return value


def cold_solves(spectrum: Tensor, damping: float, counts: list[int], seed: int) -> Any:
    """Return the error of each solver after each number of products."""
    n = len(spectrum)
    vectors = basis(n, seed)
    matrix = Matrix((vectors * spectrum) @ vectors.T, damping)
    b = draw(n, seed + 1)
    truth = matrix.solution(b)
    top = float(spectrum.max())

    def neumann(k: int, scale: Any) -> NeumannSolver:
        return NeumannSolver(k, scale=scale, damping=damping, on_failure="return")

    def powered(k: int) -> NeumannSolver:
        # Five are what it takes to be within some per cent on these spectra.
        found = power_iterations(matrix, n, min(5, k - 1))
        return neumann(max(1, k - 5), 1 / (found + damping))

    makers: dict[str, Callable[[int], Any]] = {
        "cg": lambda k: CGSolver(k, rtol=0.0, damping=damping, on_failure="return"),
        "neumann": lambda k: neumann(k, "auto"),
        "neumann, scale by power iterations": powered,
        "neumann, true largest eigenvalue": lambda k: neumann(k, 1 / (top + damping)),
        **{
            f"nystrom ({kind})": lambda k, kind=kind: NystromSolver(
                k - 1, damping=damping or 1e-4, kind=kind, on_failure="return"
            )
            for kind in ("gaussian", "columns")
        },
    }
    errors: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():
        for k in counts:
            matrix.calls = 0
            x = make(k).solve(matrix, {"w": b}).x["w"]
            if matrix.calls > k:
                msg = f"{name} took {matrix.calls} products where {k} were allowed"
                raise RuntimeError(msg)
            errors[name].append(float((x - truth).norm() / truth.norm()))
    return errors


def chebyshev(spectrum: Tensor, damping: float, counts: list[int]) -> list[float]:
    """Return the bound of CG's error in the energy norm, relative."""
    root = math.sqrt(float((spectrum.max() + damping) / (spectrum.min() + damping)))
    return [min(1.0, 2 * ((root - 1) / (root + 1)) ** k) for k in counts]


# -- sequences of solves ---------------------------------------------------------------


def rotating(
    spectrum: Tensor, damping: float, drift: float, change: float, seed: int
) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield systems: H turns by `drift`, b changes by `change` of its size, each time."""
    n = len(spectrum)
    vectors, noise = (
        basis(n, seed),
        torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64),
    )
    turn = torch.linalg.matrix_exp(drift * (noise - noise.T) / math.sqrt(2 * n))
    b = draw(n, seed + 1)
    for step in range(SHARED + 1):
        yield Matrix((vectors * spectrum) @ vectors.T, damping), b
        vectors = turn @ vectors
        new = draw(n, 1000 * seed + step)
        b = math.sqrt(1 - change**2) * b + change * new * (b.norm() / new.norm())


def digits(batch: int | None, seed: int) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield the systems of outer steps on softmax regression of the digits.

    At each one w is brought to its minimum by Newton's method; then λ, the logarithm of
    one penalty for each of 64 pixels, takes a step of its exact hypergradient.
    """
    data: Any = load_digits()
    x = torch.tensor(data.data, dtype=F64) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, held = order[:600], order[600:1200]
    lam = torch.full((64,), -4.0, dtype=F64)
    w = torch.zeros(640, dtype=F64)
    make = torch.Generator().manual_seed(seed)

    def fit(w: Tensor, lam: Tensor) -> Tensor:
        weights = w.reshape(64, 10)
        loss = torch.nn.functional.cross_entropy(x[train] @ weights, y[train])
        return loss + (lam.exp()[:, None] * weights.square()).sum() / 2

    def score(w: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(x[rows] @ w.reshape(64, 10), y[rows])

    gradient: Any = torch.func.grad(fit)
    for _ in range(SHARED + 1):
        for _ in range(30):
            slope = gradient(w, lam)
            if float(slope.norm()) < 1e-12:
                break
            w = w - torch.linalg.solve(torch.func.hessian(fit)(w, lam), slope)
        rows = held
        if batch is not None:
            rows = held[torch.randint(len(held), (batch,), generator=make)]
        v: Any = torch.func.grad(score)(w, rows)
        matrix = Matrix(torch.func.hessian(fit)(w, lam), 0.0)  # pyright: ignore[reportArgumentType]
        yield matrix, v
        mixed: Any = torch.func.jacrev(gradient, argnums=1)(w, lam)
        step = -mixed.T @ matrix.solution(v)
        lam = lam - 0.3 * step / step.norm()


SEQUENCES: dict[str, Callable[[int], Iterator[tuple[Matrix, Tensor]]]] = {
    "outliers, H turns by 1 %, new b": lambda seed: rotating(
        outliers(400), 1e-2, 0.01, 1.0, seed
    ),
    "outliers, H turns by 10 %, new b": lambda seed: rotating(
        outliers(400), 1e-2, 0.1, 1.0, seed
    ),
    "outliers, H turns by 1 %, b changes by 5 %": lambda seed: rotating(
        outliers(400), 1e-2, 0.01, 0.05, seed
    ),
    "log-uniform, damped, H turns by 1 %, new b": lambda seed: rotating(
        log_uniform(400), 1e-2, 0.01, 1.0, seed
    ),
    "log-uniform, damped, H still, b changes by 5 %": lambda seed: rotating(
        log_uniform(400), 1e-2, 0.0, 0.05, seed
    ),
    "digits, whole validation set": lambda seed: digits(None, seed),
    "digits, a new batch of 32": lambda seed: digits(32, seed),
}


def contenders(damping: float) -> dict[str, CGSolver]:
    """Return solvers that take 20 products a solve, on average over a sketch's life."""
    sketch = NystromSketch(RANK, every=SHARED)
    share = PRODUCTS - RANK // SHARED

    def cg(k: int, **settings: Any) -> CGSolver:
        return CGSolver(k, rtol=0.0, damping=damping, on_failure="return", **settings)

    return {
        "cg": cg(PRODUCTS),
        "shared sketch": cg(share, preconditioner=sketch),
        "warm start": cg(PRODUCTS - 1, warm_start=True),
        "both": cg(share - 1, preconditioner=sketch, warm_start=True),
    }


def sequence(systems: list[tuple[Matrix, Tensor]]) -> dict[str, Any]:
    """Solve one after the other; return errors and products of all but the first."""
    found = {}
    for name, solver in contenders(systems[0][0].damping).items():
        state: dict[str, Tensor] = {}
        errors, products = [], 0
        for matrix, b in systems[:SHARED]:
            matrix.calls = 0
            result = solver.solve(matrix, {"w": b}, state)
            state = result.state
            products += matrix.calls
            truth = matrix.solution(b)
            errors.append(float((result.x["w"] - truth).norm() / truth.norm()))
        found[name] = {
            "median": statistics.median(errors[1:]),
            "errors": errors,
            "products": products,
        }
    return found


# -- the run ---------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    counts = [2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    seeds = range(arguments.seeds)
    bar = tqdm(total=len(seeds) * (len(SPECTRA) + len(SEQUENCES)), unit="problem")
    cold = []
    for label, (make, damping) in SPECTRA.items():
        spectrum = make(arguments.size)
        runs = []
        for seed in seeds:
            runs.append(cold_solves(spectrum, damping, counts, seed))
            bar.update()
        cold.append(
            {
                "spectrum": label,
                "damping": damping,
                "products": counts,
                "chebyshev_bound_energy_norm": chebyshev(spectrum, damping, counts),
                "median_error": {
                    name: [
                        statistics.median(values)
                        for values in zip(*(run[name] for run in runs), strict=True)
                    ]
                    for name in runs[0]
                },
                "by_seed": runs,
            }
        )
    sequences = []
    for label, make_systems in SEQUENCES.items():
        runs = []
        for seed in seeds:
            runs.append(sequence(list(make_systems(seed))))
            bar.update()
        sequences.append(
            {
                "sequence": label,
                "solves": SHARED,
                "median_error": {
                    name: statistics.median(run[name]["median"] for run in runs)
                    for name in runs[0]
                },
                "products": {name: runs[0][name]["products"] for name in runs[0]},
                "by_seed": runs,
            }
        )
    bar.close()
    report(cold, sequences)
    results = {"one_solve": cold, "sequences": sequences}
    written = write_result(
        "solver_convergence",
        QUESTION,
        vars(arguments),
        torch.get_num_threads(),
        results,
        unit="relative L2 distance from the dense float64 solution, median of the seeds",
    )
    done(written, picture(cold, sequences, arguments.seeds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--seeds", type=int, default=3, help="problems of each kind")
    parser.add_argument("--size", type=int, default=1000, help="rows of a cold system")
    add_threads_argument(parser)
    return parser.parse_args()


def report(cold: list[dict[str, Any]], sequences: list[dict[str, Any]]) -> None:
    shown = [4, 16, 64, 256]
    for part in cold:
        print(f"{part['spectrum']:36} {'  '.join(f'{k:>7}' for k in shown)} products")
        for name, errors in part["median_error"].items():
            row = [errors[part["products"].index(k)] for k in shown]
            print(f"  {name:34} {'  '.join(f'{e:7.1e}' for e in row)}")
    names = list(sequences[0]["median_error"])
    print(f"\n{'median error of a solve':48} {'  '.join(f'{n:>13}' for n in names)}")
    for part in sequences:
        row = "  ".join(f"{part['median_error'][n]:13.1e}" for n in names)
        print(f"  {part['sequence']:46} {row}")


COLOURS = {
    "cg": BLUE,
    "neumann": ORANGE,
    "neumann, scale by power iterations": ORANGE,
    "neumann, true largest eigenvalue": ORANGE,
    "nystrom (gaussian)": "#2e7d4f",
    "nystrom (columns)": "#2e7d4f",
}
STYLES = {
    "neumann, scale by power iterations": "--",
    "neumann, true largest eigenvalue": ":",
    "nystrom (columns)": "--",
}
SEQUENCE_COLOURS = {
    "cg": GREY,
    "shared sketch": "#2e7d4f",
    "warm start": ORANGE,
    "both": BLUE,
}


def picture(
    cold: list[dict[str, Any]], sequences: list[dict[str, Any]], seeds: int
) -> Any:
    figure = new_figure(12, 9.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    first: Any = None
    for column, part in enumerate(cold):
        axes: Any = top.add_subplot(1, len(cold), column + 1, sharey=first)
        first = first or axes
        for name, errors in part["median_error"].items():
            axes.plot(
                part["products"], [max(e, 1e-16) for e in errors],
                color=COLOURS[name], ls=STYLES.get(name, "-"), lw=1.8, label=name,
            )  # fmt: skip
        axes.plot(
            part["products"], part["chebyshev_bound_energy_norm"],
            color="#9aa0a6", lw=1.2, ls="-.", label="CG's Chebyshev bound (energy norm)",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(1e-13, 30)
        axes.set_title(part["spectrum"], fontsize=10.5, color=INK)
        axes.set_xlabel("products with H")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plain_axes(axes, "y")
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("relative error of one cold solve")
    handles, labels = first.get_legend_handles_labels()
    top.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False,
        labelcolor=INK, fontsize=9.5,
    )  # fmt: skip
    axes = bottom.add_subplot()
    names = list(SEQUENCE_COLOURS)
    for y, part in enumerate(sequences):
        for offset, name in enumerate(names):
            at = y + 0.14 * (offset - 1.5)
            values = [run[name]["median"] for run in part["by_seed"]]
            colour = SEQUENCE_COLOURS[name]
            axes.plot(
                [min(values), max(values)], [at, at], color=colour, lw=2.5, alpha=0.35
            )
            axes.plot(
                part["median_error"][name], at, "o", color=colour, ms=6.5,
                label=name if not y else None,
            )  # fmt: skip
    axes.set_yticks(range(len(sequences)), [part["sequence"] for part in sequences])
    axes.set_ylim(len(sequences) - 0.4, -0.6)
    axes.set_xscale("log")
    plain_axes(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        f"relative error of a solve in a sequence of {SHARED}, at {PRODUCTS} products "
        f"each (median; bar: {seeds} seeds)"
    )
    axes.legend(loc="lower left", ncols=4, frameon=False, labelcolor=INK,
                bbox_to_anchor=(0, 1))  # fmt: skip
    figure.suptitle("Error of the linear solvers at equal products")
    return save_picture(figure, "solver_convergence")


if __name__ == "__main__":
    main()
