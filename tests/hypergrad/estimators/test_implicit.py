"""Implicit estimators against closed forms and finite differences of w*(λ)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hypergrad import BilevelProblem, NumericalWarning, make_estimator
from hypergrad.estimators import Implicit
from hypergrad.solvers import CGSolver, DenseSolver, IdentitySolver
from hypergrad.testing import quadratic, relative_error, ridge
from tests.hypergrad.estimators.truths import softmax_case


def minimise(problem: BilevelProblem, batch: Any, tol: float = 1e-13) -> None:
    """Newton's method with a dense Hessian: an independent inner solver."""
    w = problem.inner_params
    shapes = {n: t.shape for n, t in w.items()}

    def unflat(x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = torch.split(x, [s.numel() for s in shapes.values()])
        return {
            n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)
        }

    lam = {n: t.detach() for n, t in problem.outer_params.items()}

    def g(x: torch.Tensor) -> torch.Tensor:
        return problem.inner_loss(unflat(x), lam, batch)

    x = torch.cat([t.detach().reshape(-1) for t in w.values()])
    for _ in range(50):
        grad: Any = torch.func.grad(g)(x)
        if float(grad.norm()) < tol:
            break
        hessian: Any = torch.func.hessian(g)(x)
        x = x - torch.linalg.solve(hessian, grad)
    with torch.no_grad():
        for n, value in unflat(x).items():
            w[n].copy_(value)


@pytest.mark.parametrize("product", ["exact", "forward-over-reverse"])
@pytest.mark.parametrize("name", ["cg", "neumann", "dense"])
def test_ridge_closed_form(name: str, product: Any) -> None:
    known = ridge(10)
    estimators = {
        "cg": make_estimator("cg", rtol=1e-14, product=product),
        # error (1 - 1/κ)^k with κ about 30 here
        "neumann": make_estimator("neumann", num_terms=1500, product=product),
        "dense": Implicit(DenseSolver(), product=product),
    }
    result = estimators[name].estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    assert relative_error(result.outer_grads, known.outer_grads) < 1e-12
    assert torch.equal(result.direct["penalty"], torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("spectrum", [[1.0, 3.0, 10.0], [0.01, 1.0, 100.0, 0.5]])
def test_quadratic_closed_form(spectrum: list[float]) -> None:
    known = quadratic(spectrum)
    estimator = make_estimator("cg", rtol=1e-15)
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    condition = max(spectrum) / min(spectrum)
    assert relative_error(result.outer_grads, known.outer_grads) < 1e-14 * condition
    assert result.info.n_hvp == len(spectrum) + 1  # one for each, and the mixed one
    assert result.info.converged


def test_float32_reaches_its_rounding() -> None:
    known = ridge(10, dtype=torch.float32)
    result = make_estimator("cg").estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    # 10 ε κ with κ about 30, plus w* itself rounded
    assert relative_error(result.outer_grads, known.outer_grads) < 1e-4


def test_finite_difference_products_through_cg() -> None:
    known = ridge(10)
    estimator = make_estimator("cg", product="finite-difference", rtol=1e-8)
    assert estimator.order == 1
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    # g is cubic in (w, λ) together: central differences of it are exact to rounding,
    # about ε^(2/3), times κ
    assert relative_error(result.outer_grads, known.outer_grads) < 1e-8
    assert result.info.fd_radius == pytest.approx(6e-6, rel=0.02)


@pytest.mark.parametrize("name", ["cg", "dense"])
def test_three_way_agreement_on_real_data(name: str) -> None:
    """Implicit, unrolled to convergence, differences of λ → f(w*(λ))."""
    case = softmax_case()
    problem = case.problem()
    minimise(problem, case.batch(0))
    estimator = (
        make_estimator("cg", max_iter=60, rtol=1e-14)
        if name == "cg"
        else Implicit(DenseSolver())
    )
    implicit = estimator.estimate(
        problem, inner_batch=case.batch(0), outer_batch=case.outer_batch
    )

    def solved(lam: torch.Tensor) -> float:
        moved = case.problem()
        with torch.no_grad():
            moved.outer_params["log_penalty"].copy_(lam)
        minimise(moved, case.batch(0))
        return float(
            moved.outer_loss(moved.inner_params, moved.outer_params, case.outer_batch)
        )

    start = case.outer["log_penalty"]
    h = 1e-5
    steps = h * torch.eye(len(start), dtype=torch.float64)
    differences = torch.tensor(
        [(solved(start + e) - solved(start - e)) / (2 * h) for e in steps]
    ).double()
    # truncation h² and rounding ε/h, relative to a derivative of about .01
    truth = {"log_penalty": differences}
    assert relative_error(implicit.outer_grads, truth) < 1e-6

    from hypergrad.rules import SGD

    unrolled = make_estimator("unrolled", num_steps=600, rule=SGD(0.5)).estimate(
        problem, inner_batch=case.batch(0), outer_batch=case.outer_batch
    )
    # contraction (1 - 0.5 · .05)^600, .05 the smallest curvature
    assert relative_error(unrolled.outer_grads, implicit.outer_grads) < 1e-5


def test_dense_hessian_matches_functorch() -> None:
    case = softmax_case()
    problem = case.problem()
    with torch.no_grad():
        for t in problem.inner_params.values():
            t.add_(0.1)
    w = torch.cat([t.detach().reshape(-1) for t in problem.inner_params.values()])
    lam = {n: t.detach() for n, t in problem.outer_params.items()}

    def g(x: torch.Tensor) -> torch.Tensor:
        inner = {"w": x[:39].reshape(13, 3), "b": x[39:]}
        return case.inner_loss(inner, lam, case.batch(0))

    hessian: Any = torch.func.hessian(g)(w)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    info = (
        Implicit(DenseSolver())
        .estimate(problem, inner_batch=case.batch(0), outer_batch=case.outer_batch)
        .info
    )
    assert info.curvature == pytest.approx(
        (float(eigenvalues[0]), float(eigenvalues[-1])), rel=1e-10
    )


@pytest.mark.parametrize("name", ["cg", "neumann"])
def test_negative_curvature_is_reported_and_damped(name: str) -> None:
    w = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    h = torch.tensor([-0.8, 2.0], dtype=torch.float64)
    problem = BilevelProblem(
        lambda i, o, b: (h * i["w"].square()).sum() / 2 - (i["w"] * o["lam"]).sum(),
        lambda i, o, b: i["w"].sum(),
        {"w": w},
        {"lam": lam},
    )
    settings = {"max_iter": 10} if name == "cg" else {"num_terms": 400}
    estimator = make_estimator(name, **settings)
    with pytest.warns(NumericalWarning, match=r"curvature of the inner loss is -0\.8"):
        result = estimator.estimate(problem, inner_batch=None, outer_batch=None)
    assert result.info.damping == pytest.approx(1.6)
    expected = {"lam": 1 / (h + 1.6)}
    assert relative_error(result.outer_grads, expected) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = make_estimator(name, **settings, on_failure="return")
        quiet.estimate(problem, inner_batch=None, outer_batch=None)
        enough = make_estimator(name, **settings, damping=1.0)
        enough.estimate(problem, inner_batch=None, outer_batch=None)


def test_warm_state_goes_in_and_out() -> None:
    known = ridge()
    estimator = make_estimator("neumann")
    first = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    largest = float(torch.linalg.eigvalsh(known.hessian)[-1])
    # a bound from above of the largest eigenvalue, and not a wild one
    assert largest * 0.999 < float(first.state["lambda_max"]) < 1.5 * largest
    again = estimator.estimate(
        known.problem, inner_batch=None, outer_batch=None, state=first.state
    )
    assert torch.equal(again.outer_grads["penalty"], first.outer_grads["penalty"])


def test_identity_solver_takes_no_product_with_the_hessian() -> None:
    known = quadratic([1.0, 1.0])
    result = Implicit(IdentitySolver()).estimate(
        known.problem, inner_batch=None, outer_batch=None
    )
    assert relative_error(result.outer_grads, known.outer_grads) < 1e-14
    assert result.info.n_hvp == 1


def test_cost_of_cg_is_a_product_for_each_iteration() -> None:
    known = ridge(12)
    for k in (1, 4):
        estimator = make_estimator("cg", max_iter=k, on_failure="return")
        info = estimator.estimate(
            known.problem, inner_batch=None, outer_batch=None
        ).info
        assert info.n_hvp == k + 1
        assert info.n_forward == 2
        assert info.n_backward == 3 + k  # f, the graph of g, k products, the mixed one


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("cg", {"max_iter": 0}, "max_iter=0 must be at least 1"),
        ("cg", {"rtol": 1.0}, r"rtol=1\.0 must be in"),
        ("cg", {"damping": -1.0}, r"damping=-1\.0 must be finite"),
        ("cg", {"on_failure": "ignore"}, "on_failure='ignore' must be"),
        ("neumann", {"num_terms": -1}, "num_terms=-1 must be at least 0"),
        ("neumann", {"scale": 0.0}, r"scale=0\.0 must be 'auto' or positive"),
        ("neumann", {"product": "hvp"}, "product='hvp' is unknown"),
    ],
)
def test_settings_out_of_range(name: str, settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_estimator(name, **settings)


def test_solver_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"solver must be a hypergrad\.solvers\.Solver"):
        Implicit("cg")  # pyright: ignore[reportArgumentType]
    assert isinstance(Implicit().solver, CGSolver)
