"""A problem whose data ranks share out, every estimator on it, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hypergrad import Accumulated, BilevelOptimizer, BilevelProblem, make_estimator
from hypergrad.products import FiniteDifference, exact
from hypergrad.rules import SGD
from hypergrad.solvers import DenseSolver, IdentitySolver, NeumannSolver
from tests.faults import content

__all__ = [
    "FAULT",
    "INNER",
    "LAYOUTS",
    "OUTER",
    "STEPS",
    "TABLE",
    "Fault",
    "Row",
    "bits",
    "drawn",
    "functional",
    "joined",
    "look",
    "of_module",
    "optimizer",
    "own",
    "plain",
    "train",
    "values",
]

F64 = torch.float64
Params = dict[str, Tensor]
Batch = dict[str, Any]
INNER = {"first": (4, 5), "shift": (5,), "second": (5, 3), "rare": (5,)}
OUTER = {"scale": (4,), "log_decay": (2,), "bonus": (3,)}

# -- a network whose tensors are not all used by each batch ----------------------------


def start() -> Params:
    make = torch.Generator().manual_seed(0)
    shapes = {**INNER, **OUTER}
    drawn = {n: torch.randn(s, generator=make, dtype=F64) for n, s in shapes.items()}
    return {n: (t / 2).requires_grad_() for n, t in drawn.items()}


def predict(p: Params, batch: Batch) -> Tensor:
    hidden = torch.tanh((batch["x"] * p["scale"]) @ p["first"] + p["shift"])
    if batch["rare"]:
        hidden = hidden * (1 + p["rare"])
    logits = hidden @ p["second"]
    return logits * (1 + p["bonus"]) if batch["bonus"] else logits


def outputs(p: Params, batch: Batch) -> tuple[Tensor, ...]:
    """Return all that the inner loss scores: predictions, and weights to keep small."""
    root = (p["log_decay"] / 2).exp()
    rare = (p["rare"],) if batch["rare"] else ()
    return (
        predict(p, batch),
        root[0] * p["first"],
        root[1] * p["second"],
        p["shift"],
        *rare,
    )


def criterion(scored: Sequence[Tensor], batch: Batch) -> Tensor:
    logits, *rest = scored
    sizes = torch.stack([t.square().sum() for t in rest]).sum()
    return poisoned(cross_entropy(logits, batch["y"]) + sizes / 2, rest[0], batch)


def inner_loss(p: Params, batch: Batch) -> Tensor:
    return criterion(outputs(p, batch), batch)


def outer_loss(p: Params, batch: Batch) -> Tensor:
    loss = cross_entropy(predict(p, batch), batch["y"])
    return poisoned(loss, p["first"], batch)


class Fault(Exception):
    """What nobody but this test raises."""


FAULT: dict[str, Any] = {"calls": 0, "at": 0, "kind": Fault}
"""Evaluations of batches that count them, and the one that raises."""


def poisoned(loss: Tensor, w: Tensor, batch: Batch) -> Tensor:
    poison = batch["poison"]
    if poison == "nan":
        return loss * math.nan
    if poison == "infinity":
        return loss + math.inf
    if poison == "gradient":  # the loss is what it was, its derivative 0/0
        return loss + (0 * w).square().sum().sqrt()
    if poison == "curvature":  # and here its second derivative
        return loss + (0 * w).abs().pow(1.5).sum()
    if poison == "count":
        FAULT["calls"] += 1
        if FAULT["calls"] == FAULT["at"]:
            msg = "on purpose"
            raise FAULT["kind"](msg)
    return loss


def functional() -> BilevelProblem:
    p = start()
    return BilevelProblem(
        lambda i, o, batch: inner_loss({**i, **o}, batch),
        lambda i, o, batch: outer_loss({**i, **o}, batch),
        {n: p[n] for n in INNER},
        {n: p[n] for n in OUTER},
        inner_outputs=lambda i, o, batch: outputs({**i, **o}, batch),
        inner_criterion=criterion,
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in start().items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))


def of_module() -> BilevelProblem:
    def call(fn: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        return lambda model, batch: fn(dict(model.named_parameters()), batch)

    return BilevelProblem.from_module(
        Net(),
        call(inner_loss),
        outer=list(OUTER),
        outer_loss_fn=call(outer_loss),
        inner_outputs=call(outputs),
        inner_criterion=criterion,
    )


# -- data: in equal parts, or in parts that differ in everything -----------------------


def drawn(seed: int, size: int, *, rare: bool = True, bonus: bool = True) -> Batch:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=make, dtype=F64)
    y = torch.randint(0, 3, (size,), generator=make)
    return {"x": x, "y": y, "rare": rare, "bonus": bonus, "poison": ""}


def even(seed: int, rank: int) -> Any:
    return drawn(seed * 10 + rank, 6)


def uneven(seed: int, rank: int) -> Any:
    """Return one batch on even ranks and two on odd ones, each with a tensor of its own.

    `rare` is used on even ranks alone, `bonus` by the second batch of odd ones alone.
    """
    seed = 1000 * seed + 10 * rank
    if rank % 2 == 0:
        return drawn(seed, 5, rare=True, bonus=False)
    first = drawn(seed, 3, rare=False, bonus=False)
    second = drawn(seed + 1, 8, rare=False, bonus=True)
    return Accumulated([first, second], [0.3, 0.7])


LAYOUTS: dict[str, Callable[[int, int], Any]] = {"even": even, "uneven": uneven}


def joined(layout: str, seed: int, ranks: int, *, whole: bool = True) -> Any:
    """Return the data of all ranks as one process is given it."""
    parts = [LAYOUTS[layout](seed, rank) for rank in range(ranks)]
    if layout == "even" and whole:
        together = {n: torch.cat([part[n] for part in parts]) for n in ("x", "y")}
        return {**parts[0], **together}
    micro = [p if isinstance(p, Accumulated) else Accumulated([p]) for p in parts]
    return Accumulated(
        [m for part in micro for m in part], [1 / ranks] * sum(map(len, micro))
    )


# -- every estimator, product and curvature --------------------------------------------


@dataclass(frozen=True)
class Row:
    """An estimator, and what it sends.

    Attributes:
        name: of the estimator.
        settings: its settings.
        virtual: those that it needs besides where no steps are given.
        sends: what `estimate` sends: W and L for a value for each entry of the inner and
            the outer parameters, with the number of them that are stacked; V for a loss.
            "…" stands for as many W as `info.n_hvp` leaves open, ' for a single number
            more.
        scheme: of its finite differences; empty for an exact product.
        whole: whether one process may be given the data of all as one batch.
        trains: what a training step with an outer one sends, where it is not the inner
            step and then `sends` but for virtual steps.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    virtual: dict[str, Any] = field(default_factory=dict)
    sends: str = ""
    scheme: str = ""
    whole: bool = True
    trains: str = ""


def one_step(name: str, virtual: dict[str, Any]) -> dict[str, Row]:
    def row(sends: str, scheme: Any = "", **settings: Any) -> Row:
        return Row(
            name,
            settings,
            virtual,
            sends,
            scheme,
            whole="product_fraction" not in settings,
        )

    schemes = {
        scheme: row("W WL L", scheme, product=FiniteDifference(scheme))
        for scheme in ("central", "richardson")
    }
    judged = FiniteDifference(error_estimate=True)
    return {
        "exact": row("W WL L", product="exact"),
        "forward-over-reverse": row("W WL L", product="forward-over-reverse"),
        "auto": row("W WL L", "central", product="auto"),
        **schemes,
        # The inner step's own ∂g/∂λ comes with its gradient.
        "forward": row("WL WL L", "forward", product=FiniteDifference("forward")),
        "judged": row("W WL LL'", "central", product=judged),
        "part": row("W WL L", product="exact", product_fraction=0.5),
    }


def implicit(name: str, **settings: Any) -> dict[str, Row]:
    def row(sends: str, scheme: Any = "", **more: Any) -> Row:
        return Row(name, {**settings, **more}, {}, sends, scheme)

    schemes = {
        scheme: row("WL … L", scheme, product=FiniteDifference(scheme))
        for scheme in ("central", "forward", "richardson")
    }
    gauss_newton = {"curvature": "gauss-newton"}
    return {
        "exact": row("WL … L", product="exact"),
        "forward-over-reverse": row("WL … L", product="forward-over-reverse"),
        **schemes,
        "gauss-newton": row("WL … L", **gauss_newton),
        "gauss-newton by differences": row(
            "WL … L", "central", **gauss_newton, product="finite-difference"
        ),
    }


def unrolled(steps: int) -> dict[str, Row]:
    walk = " WL" * (steps - 1) + " L"
    return {
        product: Row(
            "unrolled",
            {"num_steps": steps, "product": product},
            {"rule": RULE},
            "W " * steps + "WL" + walk,
            "central" if product == "finite-difference" else "",
        )
        for product in ("exact", "forward-over-reverse", "finite-difference")
    }


def forward(steps: int, directions: int | str) -> Row:
    entries = sum(math.prod(shape) for shape in OUTER.values())
    count = directions if isinstance(directions, int) else entries
    return Row(
        "forward",
        {"num_steps": steps, "num_directions": directions},
        {"rule": RULE},
        "W " * steps + "WL" + " W" * (count * steps),
    )


def zeroth_order(steps: int, directions: int) -> Row:
    side = " W" * steps + " V V" if steps else " V"
    return Row(
        "zeroth-order",
        # Far, so that sums in another order lose little.
        {"num_steps": steps, "num_directions": directions, "radius": 0.5},
        {"rule": RULE} if steps else {},
        "W " * steps + "V" + 2 * directions * side,
    )


RULE = SGD(0.2, momentum=0.8, weight_decay=0.1)
N_INNER = sum(math.prod(shape) for shape in INNER.values())
QUIET: dict[str, Any] = {"on_failure": "return"}


def chunks(count: int) -> str:
    """Return the messages of that many products, some at a time."""
    most = exact._VMAPPED
    return " ".join(f"{min(most, count - i)}W" for i in range(0, count, most))


FAMILIES: dict[str, dict[str, Row]] = {
    "first-order": {"": Row("first-order", sends="L")},
    "darts": one_step("darts", {"inner_lr": 0.2}),
    "sama": one_step("sama", {"rule": RULE}),
    "cg": {
        **implicit("cg", max_iter=4, rtol=1e-30, **QUIET),
        "preconditioned": Row(
            "cg",
            {
                "max_iter": 4,
                "rtol": 1e-30,
                "preconditioner_rank": 5,
                "preconditioner_every": 1,
                **QUIET,
            },
            sends="WL 5W … L",
        ),
        "warm": Row(
            "cg",
            {"max_iter": 2, "rtol": 1e-30, "warm_start": True, **QUIET},
            sends="WL … L",
        ),
    },
    "neumann": implicit("neumann", num_terms=3, **QUIET),
    "nystrom": {
        "exact": Row(
            "nystrom",
            {"rank": 10, "damping": 0.1, **QUIET},
            sends=f"WL {chunks(10)} W L",
        ),
        "columns by differences": Row(
            "nystrom",
            {
                "rank": 3,
                "damping": 0.1,
                "kind": "columns",
                "product": "finite-difference",
                **QUIET,
            },
            sends="WL … L",
            scheme="central",
        ),
    },
    "implicit": {
        "dense": Row(
            "implicit",
            {"solver": DenseSolver(damping=0.1)},
            sends=f"WL {chunks(N_INNER)} L",
        ),
        "identity": Row("implicit", {"solver": IdentitySolver(0.3)}, sends="WL L"),
        "gauss-newton": Row(
            "implicit",
            {"solver": NeumannSolver(3, **QUIET), "curvature": "gauss-newton"},
            sends="WL … L",
        ),
    },
    "one step unrolled": unrolled(1),
    "three steps unrolled": unrolled(3),
    "penalty": {
        "": Row(
            "penalty",
            {"num_steps": 2},
            {"rule": RULE},
            # v; the first step of both; the others; ∂g/∂λ at both ends, ∂f/∂λ at one.
            sends="WL W W W W L L L",
            trains="W WL W W W W L L L",
        ),
    },
    "f2sa": {
        "": Row(
            "f2sa",
            {"num_steps": 1},
            {"rule": RULE},
            sends="W WL W L L L",
            # Its own sequence takes the step along ∂g/∂w and ∂f/∂w.
            trains="W W W WL L L L",
        ),
        "four points": Row(
            "f2sa",
            {"num_steps": 1, "num_points": 4},
            {"rule": RULE},
            sends="W WL W L L L L L L L L",
            trains="W W W W W W W W W WL L L L L L L L L",
        ),
    },
    "pbgd-free": {"": Row("pbgd-free", sends="L", trains="W W L")},
    "zeroth-order": {"": zeroth_order(0, 2), "two steps": zeroth_order(2, 3)},
    "two steps forward": {"all": forward(2, "all"), "random": forward(2, 3)},
    "auto": {"": Row("auto", sends="WL WL WL … L")},
}
TABLE = {
    f"{family} {kind}".strip(): row
    for family, rows in FAMILIES.items()
    for kind, row in rows.items()
}


# -- training --------------------------------------------------------------------------

STEPS = 6


def optimizer(problem: BilevelProblem, row: Row, **more: Any) -> BilevelOptimizer:
    return BilevelOptimizer(
        problem,
        estimator=make_estimator(row.name, **row.settings),
        **{
            "inner_optimizer": partial(torch.optim.AdamW, lr=0.05),
            "outer_optimizer": partial(torch.optim.SGD, lr=0.1),
            "outer_warmup": 2,
            "max_grad_norm": 0.5,
            **more,
        },
    )


def values(opt: BilevelOptimizer) -> Params:
    problem = opt.problem
    both = {**problem.inner_params, **problem.outer_params}
    return {n: t.detach().clone() for n, t in both.items()}


def train(
    opt: BilevelOptimizer, data: Callable[[int], Any], steps: Sequence[int]
) -> list[dict[str, Any]]:
    return [plain(opt.step(data(2 * k), data(2 * k + 1))) for k in steps]


def own(layout: str) -> Callable[[int], Any]:
    rank = dist.get_rank()
    return lambda seed: LAYOUTS[layout](seed, rank)


# -- results ---------------------------------------------------------------------------


def plain(result: Any) -> dict[str, Any]:
    """Return a `Hypergradient` or `StepReport` as dictionaries."""
    return asdict(result)


def look(problem: BilevelProblem, opt: BilevelOptimizer | None = None) -> Any:
    """Return all that a caller could see changed; what torch warns of is its own."""
    return {k: v for k, v in content(problem, opt).items() if k != "filters"}


def bits(value: Any) -> Any:
    """Return a nested value with its tensors as bytes, for `differences`."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, tuple(value.shape), flat.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value
