"""The simulated problem of benchmark_bilevel: its closed form, and where runs end.

Adapted from benchopt/benchmark_bilevel [DAVM22]: the quadratic bilevel problem of
`datasets/quadratic.py` and `benchmark_utils/gen_matrices.py`, at a smaller size, with its
measures (the squared norm of the value function's gradient; its tests in
`tests/test_oracles.py` compare oracles with numerical differences). The convergence of
runs is what its plots show; `benchmarks/convergence.py` draws ours.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _common, convergence
from benchmarks._simulated import Simulated, batches, simulated
from hypergrad import BilevelOptimizer, HypergradEstimator
from hypergrad.estimators import (
    ConjugateGradient,
    Darts,
    Forward,
    Implicit,
    Neumann,
    Nystrom,
    Penalty,
    Sama,
    Unrolled,
    ZerothOrder,
)
from hypergrad.rules import SGD
from tests.tolerances import error, tol

F64 = torch.float64
MU, N_INNER, N_OUTER, DIM, DIM_OUTER = 0.5, 2048, 1024, 8, 3
RATE = 1.3
"""Of gradient descent on g, whose eigenvalues reach from about MU to about 1."""


@cache
def made() -> Simulated:
    return simulated(N_INNER, N_OUTER, DIM, DIM_OUTER, mu=MU, cross=MU)


def spectrum(matrix: Tensor) -> tuple[float, float]:
    found = torch.linalg.eigvalsh(matrix)
    return float(found[0]), float(found[-1])


def condition() -> float:
    least, most = spectrum(made().inner.mean.inner)
    return most / least


# -- the problem -------------------------------------------------------------------------


def test_curvatures_are_those_that_were_asked_for() -> None:
    # Those of a mean over n samples of p entries scatter by about 2√(p/n) of themselves.
    scatter = 1 + 2.5 * (DIM / N_OUTER) ** 0.5
    for samples in (made().inner, made().outer):
        least, most = spectrum(samples.mean.inner)
        assert MU / scatter < least < MU * scatter
        assert 1.0 / scatter < most < scatter
        assert abs(spectrum(samples.mean.outer)[0]) < 1e-12  # the 0 of the source
        assert torch.linalg.matrix_norm(samples.mean.mixed, 2) < MU * scatter


def test_value_function() -> None:
    """Its closed form against autograd through the solution of a linear system."""
    here = made()
    lam = here.start[0]

    def f(lam: Tensor) -> Tensor:
        return here.outer.mean(here.minimum(lam), lam)

    truth = torch.func.grad(f)(lam)
    assert error(here.gradient(lam), truth) <= tol(F64, condition())
    assert error(here.curvature, torch.func.hessian(f)(lam)) <= tol(F64, condition())
    best = lam - torch.linalg.solve(here.curvature, here.gradient(lam))
    assert here.gap(lam) == pytest.approx(float(f(lam) - f(best)), rel=1e-10)
    least = torch.func.grad(here.inner.mean)(here.minimum(lam), lam)
    assert float(least.norm()) <= tol(F64, condition()) * DIM


def test_batches_of_an_epoch_have_the_mean_of_all() -> None:
    here = made()
    lam, w = here.start
    drawn = batches(N_INNER, 64, seed=3)
    epoch = [next(drawn) for _ in range(32)]
    assert sorted(b.start for b in epoch) == list(range(0, N_INNER, 64))
    losses = torch.stack([here.inner.loss(w, lam, b) for b in epoch])
    assert error(losses.mean(), here.inner.loss(w, lam, None)) <= tol(F64, 10)


# -- one hypergradient -------------------------------------------------------------------


def steps_for(rounding: float = 1e-16) -> int:
    """Return how many steps of descent shrink an error to rounding."""
    least, most = spectrum(made().inner.mean.inner)
    shrink = max(abs(1 - RATE * least), abs(1 - RATE * most))
    return int(torch.tensor(rounding).log() / torch.tensor(shrink).log()) + 1


def at_minimum() -> Any:
    here = made()
    problem = here.problem()
    with torch.no_grad():
        problem.inner_params["w"].copy_(here.minimum(here.start[0]))
    return problem


def exact() -> dict[str, HypergradEstimator]:
    steps = {"num_steps": steps_for(), "rule": SGD(RATE)}
    return {
        "dense": Implicit("dense"),
        "cg": ConjugateGradient(DIM, rtol=0.0, on_failure="return"),
        "neumann": Neumann(steps_for(), scale=RATE),
        "nystrom": Nystrom(DIM, damping=1e-15),
        "unrolled": Unrolled(**steps),
        "forward": Forward(**steps, num_directions="all"),
    }


@pytest.mark.parametrize("name", exact())
def test_hypergradient(name: str) -> None:
    found = exact()[name].estimate(at_minimum(), inner_batch=None, outer_batch=None)
    truth = made().gradient(made().start[0])
    assert error(found.outer_grads["lam"], truth) <= tol(F64, 10 * condition())


def test_hypergradient_by_values() -> None:
    # F is of second degree in λ, so a central difference is off by rounding alone: that
    # of F, over the radius.
    estimator = ZerothOrder(
        steps_for(), num_directions="all", radius=0.1, rule=SGD(RATE)
    )
    found = estimator.estimate(at_minimum(), inner_batch=None, outer_batch=None)
    truth = made().gradient(made().start[0])
    size = abs(found.outer_loss) / 0.1 / float(truth.norm())
    assert error(found.outer_grads["lam"], truth) <= tol(F64, condition() * size)


def test_hypergradient_by_a_penalty() -> None:
    """Its error is γ/2 times a curvature: it halves with γ, up to γ of itself."""
    truth = made().gradient(made().start[0])
    steps = {"num_steps": steps_for(1e-12), "rule": SGD(RATE)}
    off = []
    for gamma in (1e-3, 5e-4):
        found = Penalty(gamma, **steps).estimate(
            at_minimum(), inner_batch=None, outer_batch=None
        )
        off.append(error(found.outer_grads["lam"], truth))
    # g + γ f is minimised by (A + γ A')⁻¹: the next term is γ κ of the first.
    assert off[0] / off[1] == pytest.approx(2.0, rel=1e-3 * condition())


# -- runs --------------------------------------------------------------------------------


def run(estimator: Any, outer_steps: int, rate: float, every: int, lr: float) -> Any:
    """Return λ after outer steps of rate `rate`, each after `every` inner ones."""
    problem = at_minimum()
    opt = BilevelOptimizer(
        problem,
        estimator=estimator,
        inner_optimizer=partial(torch.optim.SGD, lr=lr),
        outer_optimizer=partial(torch.optim.SGD, lr=rate),
        outer_every=every,
        outer_warmup=0,
    )
    for _ in range(outer_steps * every):
        opt.step(None)
    return problem.outer_params["lam"].detach()


@pytest.mark.parametrize("name", ["cg", "dense"])
def test_a_run_falls_below_its_bound(name: str) -> None:
    """Gradient descent on F, with a gradient off by what inner steps leave.

    e_t = |w - w*| before an outer step is at most k (e + |J| η |d|), k what the inner steps
    shrink; the gradient's error is at most c e, c = |J| |A'| + |C'|; and |∇F| shrinks by
    ρ = max |1 - η q| for each eigenvalue q of F's curvature.
    """
    here, eta, steps, every = made(), 0.8, 12, 8
    shrink = max(abs(1 - RATE * q) for q in spectrum(here.inner.mean.inner)) ** every
    least, most = spectrum(here.curvature)
    rho = max(abs(1 - eta * least), abs(1 - eta * most))
    size = float(torch.linalg.matrix_norm(here.response, 2))
    f = here.outer.mean
    inner, mixed = (float(torch.linalg.matrix_norm(m, 2)) for m in (f.inner, f.mixed))
    c = size * inner + mixed
    grad, off = float(here.gradient(here.start[0]).norm()), 0.0
    first = grad
    for _ in range(steps):
        off *= shrink
        moved = eta * (grad + c * off)
        grad = rho * grad + eta * most * c * off
        off += size * moved
    lam = run(exact()[name], steps, eta, every, RATE)
    found = float(here.gradient(lam).norm())
    assert found <= grad
    assert grad < 0.1 * first  # a bound that says something


@pytest.mark.parametrize("terms", [1, 3])
def test_a_run_of_few_terms_stalls_where_they_say(terms: int) -> None:
    """λ stops where ∂f/∂λ - Cᵀ S v = 0, S the sum of the terms, in place of H⁻¹."""
    here, scale, eta, steps = made(), 0.5, 1.2, 40
    g, f = here.inner.mean, here.outer.mean
    left = torch.eye(DIM, dtype=F64) - scale * g.inner
    powers = [torch.linalg.matrix_power(left, j) for j in range(terms + 1)]
    response = -scale * torch.stack(powers).sum(0) @ g.mixed.T

    def biased(lam: Tensor) -> Tensor:
        w = here.minimum(lam)
        v = f.inner @ w + f.mixed.T @ lam + f.inner_linear
        return f.outer @ lam + f.mixed @ w + f.outer_linear + response.T @ v

    slope = torch.func.jacrev(biased)(torch.zeros(DIM_OUTER, dtype=F64))
    left_of_start = (1 - eta * torch.linalg.eigvals(slope)).abs().max() ** steps
    assert left_of_start < 1e-4
    stop = torch.linalg.solve(slope, -biased(torch.zeros(DIM_OUTER, dtype=F64)))
    floor = float(here.gradient(stop).norm())
    lam = run(Neumann(terms, scale=scale), steps, eta, 8, RATE)
    assert floor > 1e-3
    assert float(here.gradient(lam).norm()) == pytest.approx(floor, rel=1e-3)


def test_one_step_of_sgd_is_the_same_by_darts_and_sama() -> None:
    ends = [run(kind(), 5, 0.1, 5, 0.1) for kind in (Darts, Sama)]
    assert error(ends[0], ends[1]) <= tol(F64)


# -- the benchmark -----------------------------------------------------------------------


def test_the_benchmark_at_a_small_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "ROOT", tmp_path)
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    monkeypatch.setattr(_common, "PICTURES", tmp_path)
    small = "--seeds 2 --passes 30 --noiseless-passes 30 --inner-samples 512"
    monkeypatch.setattr(sys, "argv", ["convergence", *small.split()])
    convergence.main()
    assert (tmp_path / "convergence.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "convergence.json").read_text("utf-8"))
    assert set(written["results"]) == set(convergence.REGIMES)
    for regime, entries in written["results"].items():
        assert len(entries) == len(convergence.REGIMES[regime])
        for entry in entries:
            assert entry["label"] in convergence.STYLES
            assert len(entry["runs"]) == (2 if regime == "batches of 64" else 1)
            for run in entry["runs"]:
                assert run["passes"][0] == 0
                assert run["passes"] == sorted(set(run["passes"]))
                assert run["passes"][-1] >= 30


def test_passes_of_a_run_by_hand() -> None:
    """Ten inner gradients, one of f, a graph of g's, and a product for each term."""
    stocbio = replace(convergence.STOCBIO, settings={"num_terms": 3, "scale": 0.1})
    found = convergence.trace(stocbio, made(), 1, noisy=False, seed=0)
    graph, products, mixed = 2, 3, 1
    assert found["passes"] == [0, 10 * 2 + 2 + graph + products + mixed]
    assert found["outer_steps"] == 1
    assert found["grad"][0] == pytest.approx(
        float(made().gradient(made().start[0]).square().sum())
    )


def test_a_run_that_diverges_is_told() -> None:
    far = replace(convergence.STOCBIO, outer_lr=1e4)
    found = convergence.trace(far, made(), 10**6, noisy=False, seed=0)
    assert found["diverged"]
    assert found["outer_steps"] < 10
