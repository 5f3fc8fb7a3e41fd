"""The accuracy of implicit estimators: three truths, convergence, geometric bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import BilevelProblem, make_estimator
from hypergrad.estimators import Implicit
from hypergrad.rules import SGD
from hypergrad.solvers import DenseSolver
from hypergrad.testing import quadratic
from hypergrad.tree import Params
from tests.hypergrad.estimators.truths import (
    Case,
    minimise,
    network_case,
    reweighting_case,
    softmax_case,
)
from tests.tolerances import error, tol

F64, F32 = torch.float64, torch.float32


def curved_network() -> Case:
    """The two-layer network with so much decay that its minimum is a strict one."""
    case = network_case()
    case.outer["log_decay"].fill_(-1.5)
    return case


CASES = {
    "softmax": softmax_case,
    "reweighting": reweighting_case,
    "network": curved_network,
}


# -- three ways -------------------------------------------------------------------------


def differences(case: Case, at: BilevelProblem) -> Params:
    """Return central differences of λ → f(w*(λ)), each w* a minimum found anew."""

    def solved(name: str, entry: int, h: float) -> float:
        problem = case.problem()
        with torch.no_grad():
            for n, t in problem.inner_params.items():
                t.copy_(at.inner_params[n])
            problem.outer_params[name].view(-1)[entry] += h
            minimise(problem, case.batch(0))
            return problem.outer_loss(
                problem.inner_params, problem.outer_params, case.outer_batch
            ).item()

    h = 1e-5
    out: Params = {}
    for name, t in case.outer.items():
        parts = [
            (solved(name, i, h) - solved(name, i, -h)) / (2 * h)
            for i in range(t.numel())
        ]
        out[name] = torch.tensor(parts, dtype=F64).reshape(t.shape)
    return out


@pytest.mark.parametrize("name", CASES)
def test_three_ways_agree(name: str) -> None:
    """Implicit, unrolled to convergence, differences of λ → f(w*(λ))."""
    case = CASES[name]()
    problem = case.problem()
    hessian = minimise(problem, case.batch(0))
    data = {"inner_batch": case.batch(0), "outer_batch": case.outer_batch}
    dense, cg = (
        estimator.estimate(problem, **data)
        for estimator in (
            Implicit(DenseSolver()),
            make_estimator("cg", max_iter=60, rtol=1e-14),
        )
    )
    eigenvalues = torch.linalg.eigvalsh(hessian)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    cond = largest / smallest
    assert error(cg.indirect, dense.indirect) <= max(1e-12, tol(F64, cond))
    assert float(torch.cat([t.flatten() for t in dense.indirect.values()]).norm()) > 0
    # Truncation h² and rounding ε/h, of a derivative of .01 and more.
    assert error(dense.outer_grads, differences(case, problem)) <= 1e-6
    # Heavy-ball steps at a minimum contract by (√κ - 1)/(√κ + 1) each.
    rate = (math.sqrt(cond) - 1) / (math.sqrt(cond) + 1)
    num_steps = math.ceil(math.log(1e-10) / math.log(rate))
    rule = SGD(4 / (math.sqrt(largest) + math.sqrt(smallest)) ** 2, momentum=rate**2)
    unrolled = make_estimator("unrolled", num_steps=num_steps, rule=rule)
    long = unrolled.estimate(problem, **data)
    # k rate^k in place of rate^k: the slowest modes are defective.
    assert error(long.indirect, dense.indirect) <= num_steps * 1e-10


# -- conjugate gradients ----------------------------------------------------------------


def logspaced(n: int, cond: float) -> list[float]:
    return torch.logspace(0, 1, n, base=1 / cond, dtype=F64).tolist()


@pytest.mark.parametrize("n", [5, 30, 100])
def test_cg_at_a_condition_of_a_million(n: int) -> None:
    known = quadratic(logspaced(n, 1e6))
    estimator = make_estimator("cg", max_iter=100, rtol=0.0, on_failure="return")
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    truth = {n: t - result.direct[n] for n, t in known.outer_grads.items()}
    assert result.info.n_hvp <= 101  # the mixed product is one of them
    assert error(result.indirect, truth) <= 1e-10


@pytest.mark.parametrize("cond", [1.0, 10.0, 100.0])
def test_cg_where_it_has_converged(cond: float) -> None:
    known = quadratic(logspaced(20, cond))
    estimator = make_estimator("cg", max_iter=20, rtol=1e-14, on_failure="raise")
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    assert result.info.converged
    truth = {n: t - result.direct[n] for n, t in known.outer_grads.items()}
    assert error(result.indirect, truth) <= 1e-12


@pytest.mark.parametrize("product", ["exact", "finite-difference"])
@pytest.mark.parametrize("cond", [10.0, 1e4, 1e8])
def test_cg_in_float32_is_finite_however_long_it_runs(
    cond: float, product: Any
) -> None:
    known = quadratic(logspaced(12, cond), dtype=F32)
    estimator = make_estimator(
        "cg", max_iter=100_000, rtol=0.0, product=product, on_failure="return"
    )
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    assert all(bool(t.isfinite().all()) for t in result.outer_grads.values())
    assert result.info.n_hvp <= 13
    truth = {n: t - result.direct[n].double() for n, t in known.outer_grads.items()}
    if cond <= 1e4 and product == "exact":
        assert error(result.indirect, truth) <= tol(F32, cond)


# -- the Neumann series -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "reweighting"])
def test_neumann_stays_within_its_geometric_bound(name: str) -> None:
    # Error of the solve at most ‖I - αH‖^(k+1); the mixed product passes it on by its
    # largest singular value.
    case = CASES[name]()
    problem = case.problem()
    hessian = minimise(problem, case.batch(0))
    data = {"inner_batch": case.batch(0), "outer_batch": case.outer_batch}
    exact = Implicit(DenseSolver()).estimate(problem, **data).indirect
    mixed = mixed_derivative(case, problem)
    w, lam = list(problem.inner_params.values()), list(problem.outer_params.values())
    f = case.outer_loss(problem.inner_params, problem.outer_params, case.outer_batch)
    parts = torch.autograd.grad(f, [*w, *lam], allow_unused=True)[: len(w)]
    v = torch.cat([t.reshape(-1) for t in parts if t is not None])
    x = torch.linalg.solve(hessian, v)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    size = float(torch.cat([t.reshape(-1) for t in exact.values()]).norm())
    rounding = tol(F64, float(eigenvalues[-1] / eigenvalues[0])) * size
    for scale in (0.5 / float(eigenvalues[-1]), 1.9 / float(eigenvalues[-1])):
        rate = float((1 - scale * eigenvalues).abs().max())
        for k in (1, 4, 16, 64, 256):
            estimator = make_estimator("neumann", num_terms=k, scale=scale)
            result = estimator.estimate(problem, **data)
            off = torch.cat(
                [(result.indirect[n] - exact[n]).reshape(-1) for n in exact]
            )
            bound = float(torch.linalg.matrix_norm(mixed, 2)) * rate ** (k + 1)
            assert float(off.norm()) <= bound * float(x.norm()) + rounding
            # Sharp: the series itself, in the eigenvectors of H.
            shrunk = torch.linalg.matrix_power(
                torch.eye(len(v)).double() - scale * hessian, k + 1
            )
            assert float((off - mixed.T @ (shrunk @ x)).norm()) <= rounding


def mixed_derivative(case: Case, problem: BilevelProblem) -> Tensor:
    """Return ∂²g/∂w∂λ, `(n, m)`, by a loop over its rows."""
    w, lam = list(problem.inner_params.values()), list(problem.outer_params.values())
    g = case.inner_loss(problem.inner_params, problem.outer_params, case.batch(0))
    grads = torch.autograd.grad(g, w, create_graph=True)
    flat = torch.cat([t.reshape(-1) for t in grads])
    rows = [
        torch.autograd.grad(
            entry, lam, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for entry in flat
    ]
    return torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
