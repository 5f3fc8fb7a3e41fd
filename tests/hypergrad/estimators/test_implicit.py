"""Implicit estimators against closed forms; `test_bars_implicit` goes further."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hypergrad import BilevelProblem, NumericalWarning, make_estimator
from hypergrad.estimators import Implicit
from hypergrad.solvers import DenseSolver, IdentitySolver
from hypergrad.testing import quadratic, relative_error, ridge
from tests.hypergrad.estimators.truths import softmax_case


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
    assert estimator.needs.order == 1
    result = estimator.estimate(known.problem, inner_batch=None, outer_batch=None)
    # g is cubic in (w, λ) together: central differences of it are exact to rounding,
    # about ε^(2/3), times κ
    assert relative_error(result.outer_grads, known.outer_grads) < 1e-8
    assert result.info.fd_radius == pytest.approx(6e-6, rel=0.02)


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


def test_solver_by_name_or_itself() -> None:
    known = quadratic([1.0, 3.0])
    results = [
        Implicit(solver).estimate(known.problem, inner_batch=None, outer_batch=None)
        for solver in ("dense", DenseSolver())
    ]
    assert torch.equal(*(result.indirect["shift"] for result in results))
    with pytest.raises(ValueError, match="solver='newton' is unknown"):
        Implicit("newton")
    with pytest.raises(TypeError, match=r"solver must be .*Solver or a name, got 3"):
        Implicit(3)  # pyright: ignore[reportArgumentType]
