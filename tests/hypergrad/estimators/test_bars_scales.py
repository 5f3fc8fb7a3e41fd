"""Estimators that are linear in ∂f/∂w, at sizes whose squares no float32 holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hypergrad import estimator_names, make_estimator
from hypergrad.rules import AdamW, Clipped
from tests.hypergrad.estimators.truths import HANDS, Case, network_case, warm
from tests.tolerances import error, tol

F64, F32 = torch.float64, torch.float32
# AdamW from nothing: along its first step rounding is amplified (see the bars of `sama`).
RULE = Clipped(AdamW(0.05, eps=1e-2), 1.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "darts": {"inner_lr": 0.05},
    "sama": {"rule": RULE},
    "unrolled": {"rule": RULE, "num_steps": 3},
    "forward": {"rule": RULE, "num_steps": 3, "num_directions": 3},
    "zeroth-order": {"rule": RULE, "num_steps": 3},
    # Not at a minimum: H is indefinite.
    "cg": {"damping": 3.0},
    "neumann": {"damping": 3.0},
    "nystrom": {"damping": 3.0},
    "implicit": {"solver": "dense"},
}
TABLE: list[tuple[str, dict[str, Any]]] = [
    (name, SETTINGS.get(name, {}))
    for name in estimator_names()
    if "scale" not in make_estimator(name).without_laws
] + [
    (name, {**SETTINGS[name], "product": product})
    for name, product in (
        ("darts", "exact"),
        ("sama", "exact"),
        ("cg", "finite-difference"),
        ("neumann", "forward-over-reverse"),
    )
]


def times(case: Case, size: float) -> Case:
    def outer_loss(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return case.outer_loss(inner, outer, batch) * size

    return replace(case, outer_loss=outer_loss)


# `auto` takes undamped CG, and says that it had to damp.
@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "settings"), TABLE)
def test_outer_losses_of_all_sizes(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    case = network_case().to(dtype)
    case = replace(case, inner=warm(case, HANDS["sgd"], 20).w)
    estimator = make_estimator(name, **settings)
    results = [
        estimator.estimate(
            times(case, size).problem(),
            inner_batch=case.batch(0),
            outer_batch=case.outer_batch,
        )
        for size in (1.0, 1e20, 1e-20)
    ]
    # A difference takes its step from the direction's length, and rounds anew.
    differences = settings.get("product", "") == "finite-difference" or (
        name in ("darts", "sama", "zeroth-order") and "product" not in settings
    )
    bound = tol(dtype, 10, "difference") if differences else tol(dtype, 10)
    for size, result in zip((1e20, 1e-20), results[1:], strict=True):
        one = results[0]
        for part in ("direct", "indirect", "outer_grads"):
            scaled = {n: t.double() / size for n, t in getattr(result, part).items()}
            assert error(scaled, getattr(one, part)) <= bound, part
        assert result.info.n_hvp == one.info.n_hvp
        assert result.info.fd_radius == pytest.approx(one.info.fd_radius)
        if one.info.residual_norm is not None:
            assert result.info.residual_norm == pytest.approx(
                one.info.residual_norm, rel=1e-2, abs=tol(dtype)
            )
