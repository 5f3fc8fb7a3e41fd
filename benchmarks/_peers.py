"""Ways to a hypergradient that `against_peers` compares: libraries, methods, settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

from benchmarks._peer_calls import (
    Call,
    betty_darts,
    betty_engine,
    betty_minimum,
    higher_steps,
    our_minimum,
    our_steps,
    torchopt_minimum,
    torchopt_steps,
)
from benchmarks._peer_cases import Case

OURS = "hypergrad"
DISTRIBUTIONS = {"Betty": "betty-ml", "TorchOpt": "torchopt", "higher": "higher"}
PIP = {
    # Its metadata is refused by pip from 24.1 on; what it needs is torch.
    "Betty": 'pip install "pip<24.1" && pip install --no-deps betty-ml==0.1.1',
    "TorchOpt": "pip install torchopt",
    "higher": "pip install higher",
}
TERMS = 20  # of a well-set Neumann series, and iterations of a well-set CG


@dataclass(frozen=True)
class Entry:
    """One way to a hypergradient.

    Attributes:
        library: whose.
        label: its method and settings.
        prepare: makes a call that can be repeated, from a case.
        like: label of ours that its seconds are divided by.
        one_step: whether one step of SGD is all that it can differentiate.
        adam: whether it is a setting of Adam alone.
        dense: whether it makes the Hessian as a matrix, which a wide network forbids.
    """

    library: str
    label: str
    prepare: Callable[[Case], Call]
    like: str
    one_step: bool = False
    adam: bool = False
    dense: bool = False

    def takes(self, case: Case) -> bool:
        if self.adam and case.hand != "adam":
            return False
        return not self.one_step or (case.hand, case.steps) == ("sgd", 1)


def installed(library: str) -> str | None:
    """Return the version of a peer; None where it is not installed."""
    try:
        return metadata.version(DISTRIBUTIONS[library])
    except metadata.PackageNotFoundError:
        return None


# -- the entries ---------------------------------------------------------------------------


def well_set(case: Case) -> float:
    """Return the scale that Neumann's series should have."""
    return 1 / case.largest


def _ours(label: str, estimator: str, *, dense: bool = False, **settings: Any) -> Entry:
    return Entry(
        OURS, label, partial(our_minimum, estimator, settings), label, dense=dense
    )


def _betty_entry(label: str, like: str, **settings: Any) -> Entry:
    return Entry("Betty", label, partial(betty_minimum, settings), like)


def _torchopt_entry(
    label: str, like: str, solver: str | None, *, dense: bool = False, **settings: Any
) -> Entry:
    prepare = partial(torchopt_minimum, solver, settings)
    return Entry("TorchOpt", label, prepare, like, dense=dense)


CG, LONG_CG = "cg (20 iterations)", "cg, 100 iterations"
FEW, TERMED = "neumann (5 terms)", f"neumann, {TERMS} terms"
DENSE = "implicit, dense solver"
UNROLLED, DARTS = "unrolled", "darts (central)"

ENTRIES: dict[str, tuple[Entry, ...]] = {
    "minimum": (
        _ours(CG, "cg"),
        _ours(LONG_CG, "cg", max_iter=100, rtol=1e-12),
        _ours(FEW, "neumann"),
        _ours(TERMED, "neumann", num_terms=TERMS),
        _ours(DENSE, "implicit", solver="dense", dense=True),
        _betty_entry("cg (1 iteration)", CG, type="cg"),
        _betty_entry(f"cg, {TERMS} iterations", CG, type="cg", cg_iterations=TERMS),
        _betty_entry("neumann (1 term, α = 1)", FEW, type="neumann"),
        _betty_entry(
            f"neumann, {TERMS} terms, α = 1/λmax",
            TERMED,
            type="neumann",
            neumann_iterations=TERMS,
            neumann_alpha=well_set,
        ),
        _torchopt_entry("custom_root (normal CG)", CG, None),
        _torchopt_entry("solve_cg", CG, "solve_cg"),
        _torchopt_entry("solve_inv, ns (10 terms, α = 1)", FEW, "solve_inv", ns=True),
        _torchopt_entry(
            f"solve_inv, ns, {TERMS} terms, α = 1/λmax",
            TERMED,
            "solve_inv",
            ns=True,
            maxiter=TERMS,
            alpha=well_set,
        ),
        _torchopt_entry("solve_inv (dense)", DENSE, "solve_inv", dense=True),
    ),
    "steps": (
        Entry(OURS, UNROLLED, partial(our_steps, "unrolled", {}), UNROLLED),
        Entry(OURS, DARTS, partial(our_steps, "darts", {}), DARTS, one_step=True),
        Entry(
            OURS,
            "darts, exact product",
            partial(our_steps, "darts", {"product": "exact"}),
            "darts, exact product",
            one_step=True,
        ),
        Entry(
            "Betty", "darts, at w before the step", betty_darts, DARTS, one_step=True
        ),
        Entry("Betty", "darts, by its engine", betty_engine, DARTS, one_step=True),
        Entry("TorchOpt", "MetaSGD, MetaAdam", partial(torchopt_steps, {}), UNROLLED),
        Entry(
            "TorchOpt",
            "MetaAdam, eps_root = 1e-16",
            partial(torchopt_steps, {"eps_root": 1e-16}),
            UNROLLED,
            adam=True,
        ),
        Entry("higher", "innerloop_ctx", higher_steps, UNROLLED),
    ),
}
