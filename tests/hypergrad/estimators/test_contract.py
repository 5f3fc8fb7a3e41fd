"""The contract of all estimators, and the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import (
    HypergradEstimator,
    Indirect,
    Point,
    estimator_names,
    make_estimator,
    register_estimator,
)
from hypergrad.estimators import registry
from hypergrad.products import FiniteDifference
from hypergrad.rules import SGD, AdamW, Clipped
from hypergrad.testing import PROBLEMS, check_estimator, quadratic

# A good estimator leaves a problem as it was: all rows may use the same ones.
SHARED = {name: cache(make) for name, make in PROBLEMS.items()}
FEW = {name: SHARED[name] for name in ("quadratic", "softmax regression")}
F64, F32 = torch.float64, torch.float32


def step(rate: float, times: int = 1) -> Callable[[Tensor], Tensor]:
    """Return rate · Σ_{j<times} (I - rate·H)^j: what descent puts for H⁻¹."""

    def inverse(h: Tensor) -> Tensor:
        one = torch.eye(len(h)).to(h)
        terms = (torch.linalg.matrix_power(one - rate * h, j) for j in range(times))
        return rate * torch.stack(list(terms)).sum(0)

    return inverse


def shifted(h: Tensor, by: float) -> Tensor:
    return h + by * torch.eye(len(h)).to(h)


def damped(damping: float) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.linalg.inv(shifted(h, damping))


@dataclass(frozen=True)
class Row:
    """An estimator, what it stands for, and how near it must come.

    Bars are those for exact products in float64, and 1e-7 for differences: 10·ε^(2/3) is
    4e-10 where the third derivatives are of order 1, as here only nearly.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    exact_to: float | None = None
    inverse: Callable[[Tensor], Tensor] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def make(self) -> HypergradEstimator:
        return make_estimator(self.name, **self.settings)


# Of rows that differ from another of the table in a number or a kind of product alone,
# two problems tell enough; the whole set of problems, each in eight forms and three
# dtypes, takes seconds.
VARIANT = {"problems": FEW}

TABLE = [
    Row("first-order", {}, 1e-12, lambda h: 0 * h),
    Row("darts", {"inner_lr": 0.1}, 1e-7, step(0.1)),
    Row("darts", {"inner_lr": 0.1, "product": "exact"}, 1e-12, step(0.1)),
    Row(
        "darts",
        {
            "inner_lr": 0.1,
            "product": FiniteDifference("richardson", error_estimate=True),
        },
        1e-7,
        step(0.1),
        VARIANT,
    ),
    # A one-sided difference is right to ε^(1/2): 1.5e-8 and 3e-4, times what it sees.
    Row(
        "darts",
        {"inner_lr": 0.1, "product": FiniteDifference("forward")},
        1e-6,
        step(0.1),
        {"dtypes": (F64,)},
    ),
    Row(
        "darts",
        {"inner_lr": 0.1, "product": FiniteDifference("forward")},
        3e-3,
        step(0.1),
        {"dtypes": (F32,), "problems": FEW},
    ),
    Row("sama", {"rule": SGD(0.1)}, 1e-7, step(0.1)),
    Row("sama", {"rule": SGD(0.1), "product": "exact"}, 1e-12, step(0.1)),
    # Adam at a minimum, where gradients are rounding, has no truth: laws alone.
    Row("sama", {"rule": AdamW(0.1)}),
    Row("sama", {"rule": AdamW(0.1), "product": "exact"}, more=VARIANT),
    Row("unrolled", {"num_steps": 1, "rule": SGD(0.1)}, 1e-12, step(0.1), VARIANT),
    Row("unrolled", {"num_steps": 4, "rule": SGD(0.2)}, 1e-12, step(0.2, 4)),
    Row(
        "unrolled",
        {"num_steps": 6, "rule": SGD(0.2), "snapshots": 3},
        1e-12,
        step(0.2, 6),
    ),
    Row(
        "unrolled",
        {"num_steps": 6, "rule": SGD(0.1, momentum=0.9), "snapshots": 4},
        more=VARIANT,
    ),
    Row("unrolled", {"num_steps": 2, "rule": SGD(0.1, momentum=0.9)}),
    Row(
        "unrolled",
        {"num_steps": 2, "rule": Clipped(AdamW(0.1), max_norm=0.1)},
        more={"problems": FEW},
    ),
    # Eigenvalues 1 to 5 at rate 1/3: errors shrink by 2/3 a step, to 1e-7 in 40.
    Row(
        "unrolled",
        {"num_steps": 40, "rule": SGD(1 / 3)},
        1e-6,
        more={"problems": {"quadratic": quadratic}, "dtypes": (F64,)},
    ),
    Row(
        "forward",
        {"num_steps": 1, "rule": SGD(0.1), "num_directions": "all"},
        1e-12,
        step(0.1),
    ),
    Row(
        "forward",
        {"num_steps": 4, "rule": SGD(0.2), "num_directions": "all", "snapshots": 3},
        1e-12,
        step(0.2, 4),
    ),
    Row(
        "forward",
        {"num_steps": 2, "rule": SGD(0.2), "product": "finite-difference"},
        more={"problems": FEW},
    ),
    # Random directions: laws alone.
    Row("forward", {"num_directions": 1, "rule": AdamW(0.1)}, more={"problems": FEW}),
    Row(
        "zeroth-order",
        {"num_steps": 1, "rule": SGD(0.1), "num_directions": "all"},
        1e-6,
        step(0.1),
        {"dtypes": (F64,), "problems": FEW},
    ),
    Row(
        "zeroth-order",
        {"num_steps": 3, "rule": SGD(0.1, momentum=0.9), "snapshots": 3},
        more={"problems": FEW},
    ),
    Row(
        "zeroth-order",
        {"num_steps": 1, "num_directions": 1, "rule": SGD(0.1)},
        more={"problems": FEW},
    ),
    Row("zeroth-order", {"num_steps": 0}, more={"problems": FEW}),
    Row("cg", {"max_iter": 40, "rtol": 1e-14}, 1e-12),
    # A relative residual of rtol is an error of at most rtol·κ, and κ is below 25.
    Row("cg", {"max_iter": 40}, 25e-6, more=VARIANT),
    Row("cg", {"max_iter": 40, "rtol": 1e-9, "product": "finite-difference"}, 1e-7),
    # Forward mode is many times as slow in torch.
    Row(
        "cg",
        {"max_iter": 40, "rtol": 1e-14, "product": "forward-over-reverse"},
        1e-12,
        more={"problems": FEW, "structures": ("plain", "scalar", "aliased")},
    ),
    Row(
        "cg",
        {"max_iter": 40, "rtol": 1e-14, "damping": 0.5},
        1e-12,
        damped(0.5),
        VARIANT,
    ),
    Row("neumann", {"num_terms": 9, "scale": 0.2}, 1e-12, step(0.2, 10)),
    Row("neumann", {"num_terms": 150}, 1e-2, more=VARIANT),
    Row("neumann", {"num_terms": 5, "product": "finite-difference"}, more=VARIANT),
    # At full rank the model is H.
    Row("nystrom", {"rank": 20, "damping": 0.5}, 1e-12, damped(0.5)),
    Row("nystrom", {"rank": 20, "kind": "columns", "every": 3}, 1e-12, damped(0.01)),
    Row("nystrom", {"rank": 2}, more=VARIANT),
    Row("implicit", {"solver": "dense"}, 1e-12),
    # On the quadratic f has the Hessian I: damping by γ. Rounding is divided by γ.
    Row(
        "penalty",
        {"gamma": 0.5, "num_steps": 4, "rule": SGD(0.2)},
        1e-12,
        lambda h: step(0.2, 4)(shifted(h, 0.5)),
        {"problems": {"quadratic": quadratic}, "dtypes": (F64,)},
    ),
    Row("penalty", {"num_steps": 3, "rule": SGD(0.1)}),
    Row("penalty", {"num_steps": 2, "rule": AdamW(0.1)}, more={"problems": FEW}),
    # Central: half of the damping by ν and by -ν.
    Row(
        "f2sa",
        {
            "sigma": 2.0,
            "num_points": 2,
            "num_steps": 4,
            "rule": SGD(0.2),
        },
        1e-12,
        lambda h: (step(0.2, 4)(shifted(h, 0.5)) + step(0.2, 4)(shifted(h, -0.5))) / 2,
        {"problems": {"quadratic": quadratic}, "dtypes": (F64,)},
    ),
    Row("f2sa", {"num_steps": 2, "rule": SGD(0.1)}),
    Row("f2sa", {"num_steps": 2, "num_points": 3, "rule": SGD(0.1)}),
    Row("f2sa", {"num_steps": 1, "rule": AdamW(0.1)}, more={"problems": FEW}),
    Row("pbgd-free", {}, 1e-12, lambda h: 0 * h),
    Row("auto", {}, 25e-6),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.name}-{row.settings}")
def test_contract(row: Row) -> None:
    settings = {"problems": SHARED, **row.more}
    check_estimator(row.make(), exact_to=row.exact_to, inverse=row.inverse, **settings)


def test_every_registered_estimator_is_in_the_table() -> None:
    assert set(estimator_names()) == {row.name for row in TABLE}


@dataclass(frozen=True)
class Doubled(HypergradEstimator):
    """An estimator that returns zeros, for the registry."""

    name = "doubled"

    def indirect(self, point: Point) -> Indirect:
        return Indirect({n: 0 * t for n, t in point.problem.outer_params.items()})


def test_unknown_names_list_the_known() -> None:
    known = ", ".join(estimator_names())
    with pytest.raises(ValueError, match=f"'newton' is unknown; choose one of {known}"):
        make_estimator("newton")


def test_unknown_setting_is_named() -> None:
    with pytest.raises(TypeError, match=r"'cg' refused its settings \['steps'\]"):
        make_estimator("cg", steps=3)


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    register_estimator("doubled", Doubled)
    assert isinstance(make_estimator("doubled"), Doubled)
    with pytest.raises(ValueError, match="'doubled' is registered already"):
        register_estimator("doubled", Doubled)
    with pytest.raises(ValueError, match="lower-case letters"):
        register_estimator("Not OK", Doubled)
    with pytest.raises(TypeError, match="must be callable"):
        register_estimator("other", 3)  # pyright: ignore[reportArgumentType]


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("third", f"{__name__}:Doubled", registry._ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Doubled)

    def found(group: str, name: str = "third") -> list[EntryPoint]:
        assert group == "hypergrad.estimators"
        return [point] if name == "third" else []

    monkeypatch.setattr(registry, "entry_points", found)
    assert "third" in estimator_names()
    assert isinstance(make_estimator("third"), Doubled)
