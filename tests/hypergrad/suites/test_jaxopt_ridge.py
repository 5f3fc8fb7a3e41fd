"""The Jacobian of a ridge regression's solution, by every way to a minimum's derivative.

Adapted from google/jaxopt, `tests/implicit_diff_test.py` (`test_root_vjp`,
`test_root_jvp`, `test_custom_root`): scikit-learn's regression of 10 examples and 3
features, a penalty of 5, and the Jacobian of the minimiser in the penalty, row by row from
cotangents, against central differences at a distance of 1e-4.

Differs from the source: its tolerance of 1e-2 is that of float32; here float64, against
the closed form. Features and targets, which its `custom_root` differentiates too and its
tests do not look at, are outer parameters beside the penalty.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sklearn.datasets import make_regression
from torch import Tensor

from hypergrad import BilevelProblem, HypergradEstimator
from hypergrad.estimators import (
    F2SA,
    ConjugateGradient,
    Forward,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    Unrolled,
    ZerothOrder,
)
from hypergrad.rules import SGD
from tests.tolerances import error, tol

F64 = torch.float64
PENALTY, RADIUS = 5.0, 1e-4
Named = dict[str, Tensor]


def data() -> Named:
    found: Any = make_regression(n_samples=10, n_features=3, random_state=0)
    x, y = found
    return {
        "penalty": torch.tensor(PENALTY, dtype=F64),
        "x": torch.from_numpy(x),
        "y": torch.from_numpy(y),
    }


def hessian(lam: Named) -> Tensor:
    x = lam["x"]
    return x.T @ x / len(x) + lam["penalty"] * torch.eye(x.shape[1], dtype=F64)


def solution(lam: Named) -> Tensor:
    return torch.linalg.solve(hessian(lam), lam["x"].T @ lam["y"] / len(lam["y"]))


def ridge(inner: Named, outer: Named, batch: Any) -> Tensor:
    del batch
    fit = (outer["x"] @ inner["w"] - outer["y"]).square().mean() / 2
    return fit + outer["penalty"] * inner["w"].square().sum() / 2


def jacobian(
    estimator: HypergradEstimator, wanted: tuple[str, ...] = ("penalty", "x", "y")
) -> Named:
    """Return the rows of ∂w*/∂λ: hypergradients of the entries of w, at the minimum.

    Args:
        estimator: what estimates them.
        wanted: which of penalty, features and targets are outer parameters.
    """
    lam = data()
    fixed = {n: t for n, t in lam.items() if n not in wanted}
    rows: list[Named] = []
    for entry in range(3):
        problem = BilevelProblem(
            lambda i, o, b: ridge(i, {**o, **fixed}, b),
            lambda i, o, b, entry=entry: i["w"][entry],
            {"w": solution(lam).requires_grad_()},
            {n: lam[n].clone().requires_grad_() for n in wanted},
        )
        found = estimator.estimate(problem, inner_batch=None, outer_batch=None)
        assert not any(t.any() for t in found.direct.values())
        rows.append(found.outer_grads)
    return {n: torch.stack([row[n] for row in rows]) for n in wanted}


@cache
def truth() -> Named:
    return torch.func.jacrev(solution)(data())


# The Hessian's eigenvalues, between 5 and 7: condition and rates follow from them.
SPECTRUM = torch.linalg.eigvalsh(hessian(data()))
CONDITION = float(SPECTRUM[-1] / SPECTRUM[0])
RATE = 2 / float(SPECTRUM[0] + SPECTRUM[-1])
"""The best rate of gradient descent, which shrinks errors by (κ - 1)/(κ + 1) a step."""
STEPS = 13
SHRINKS = ((CONDITION - 1) / (CONDITION + 1)) ** STEPS
# Along an eigenvector w* goes as 1/h, h its eigenvalue: a change of d in h leaves (d/h)² of
# the slope, and w*/h; a rounding of w* is eps h/d of that, of which there are ten.
LEAST, MOST = float(SPECTRUM[0]), float(SPECTRUM[-1])
DIFFERENCE = (RADIUS / LEAST) ** 2 + tol(F64, MOST / RADIUS)


def test_the_truth_itself() -> None:
    lam, known = data(), truth()
    by_hand = -torch.linalg.solve(hessian(lam), solution(lam))
    assert error(known["penalty"], by_hand) <= tol(F64, CONDITION)
    weights = torch.linalg.solve(hessian(lam), lam["x"].T / 10)
    assert error(known["y"], weights) <= tol(F64, CONDITION)
    ends = [solution({**lam, "penalty": lam["penalty"] + d}) for d in (RADIUS, -RADIUS)]
    numeric = (ends[0] - ends[1]) / (2 * RADIUS)
    assert error(numeric, by_hand) <= DIFFERENCE


def test_steps_are_enough() -> None:
    assert 1 < CONDITION < 2
    assert SHRINKS < 1e-16


EXACT: dict[str, HypergradEstimator] = {
    "dense": Implicit("dense"),
    "cg": ConjugateGradient(3, rtol=0.0, on_failure="return"),
    "neumann": Neumann(STEPS, scale=RATE),
    "nystrom": Nystrom(3, damping=1e-15),
    "unrolled": Unrolled(STEPS, rule=SGD(RATE)),
}


@pytest.mark.parametrize("name", EXACT)
def test_jacobian(name: str) -> None:
    # As ill-conditioned as the solve. At the minimum, the residual of each example is
    # what is left of numbers some times larger: features and targets cancel in it.
    found, known = jacobian(EXACT[name]), truth()
    for part, value in known.items():
        assert error(found[part], value) <= tol(F64, 10 * CONDITION), part


@pytest.mark.parametrize("wanted", [("penalty",), ("penalty", "y")])
def test_jacobian_by_tangents(wanted: tuple[str, ...]) -> None:
    """`test_root_jvp`: a tangent of the penalty, with none of the data, or with y's."""
    found = jacobian(Forward(STEPS, rule=SGD(RATE), num_directions="all"), wanted)
    for part in wanted:
        assert error(found[part], truth()[part]) <= tol(F64, CONDITION), part


def test_jacobian_by_values_of_solutions() -> None:
    """The source's own truth, central differences, as an estimator."""
    estimator = ZerothOrder(STEPS, num_directions=1, radius=RADIUS, rule=SGD(RATE))
    found = jacobian(estimator, ("penalty",))["penalty"]
    assert error(found, truth()["penalty"]) <= DIFFERENCE


@pytest.mark.parametrize("gamma", [1e-1, 1e-2])
def test_a_penalty_is_off_by_what_it_should_be(gamma: float) -> None:
    r"""f = e·w leads to z = w* - γ H⁻¹e, and ½|z|² is of second degree in γ.

    Against the penalty λ, where ∂g/∂λ is ½|w|²: the error is γ/2 |H⁻¹e|², and a central
    difference has none.
    """
    rule = {"rule": SGD(RATE), "num_steps": STEPS}
    inverse = torch.linalg.inv(hessian(data()))
    known = truth()["penalty"]
    found = jacobian(Penalty(gamma, **rule))["penalty"]
    # ∂g/∂λ rounds with |w|²/2, and is divided by γ.
    size = float(solution(data()).square().sum()) / 2 / gamma
    slack = tol(F64) * size
    assert (found - known - gamma / 2 * inverse.square().sum(0)).abs().max() <= slack
    central = F2SA(1 / gamma, growth=0.0, num_points=2, **rule)
    assert (jacobian(central)["penalty"] - known).abs().max() <= slack


@pytest.mark.parametrize("terms", [0, 1, 4])
def test_few_terms_are_off_by_what_is_left_of_the_series(terms: int) -> None:
    scale = 0.7 / float(SPECTRUM[-1])
    left = torch.eye(3, dtype=F64) - scale * hessian(data())
    known = truth()["penalty"]
    found = jacobian(Neumann(terms, scale=scale))["penalty"]
    kept = torch.eye(3, dtype=F64) - torch.linalg.matrix_power(left, terms + 1)
    assert error(found, kept @ known) <= tol(F64, CONDITION)
