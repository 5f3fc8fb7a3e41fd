"""Any shape, dtype and scale: an estimate is right, or an error of ours; never NaN or 0.

The losses are functions of u = w/W and μ = λ/L, times G and F, so that scales and sizes
change the numbers but not the problem. Truth is dense, in float64, from the numbers that
the problem holds after rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad import BilevelProblem, HypergradError, HypergradEstimator, make_estimator
from hypergrad.rules import SGD
from hypergrad.solvers import DenseSolver
from hypergrad.tree import Params
from tests.tolerances import tol

pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")

F64 = torch.float64
# A scalar, an empty tensor of one and of two axes, one entry, and so on.
SHAPES = ((), (0,), (1,), (3,), (2, 2), (0, 2))
KAPPA = 15.0
"""Bound of the condition number of ∂²g/∂u²: 0.4 to 6, see `phi`."""


@dataclass(frozen=True)
class Scales:
    """Powers of ten: of w, of λ, of the inner and of the outer loss."""

    w: int = 0
    lam: int = 0
    g: int = 0
    f: int = 0


@dataclass
class Case:
    """A problem and the numbers that it holds, in float64."""

    problem: BilevelProblem
    scales: Scales
    u: Tensor
    mu: Tensor
    constants: tuple[Tensor, Tensor, Tensor]


def phi(u: Tensor, mu: Tensor, a: Tensor, k: Tensor) -> Tensor:
    """g/G. Of its Hessian in u, k is 1 to 3; 12 entries of μ and of u add -0.6 to 3."""
    near = (k * (u - a @ mu) ** 2).sum() / 2
    return near + mu.sum() * (u**2).sum() / 40 + u.sum() ** 2 / 10


def psi(u: Tensor, mu: Tensor, d: Tensor) -> Tensor:
    return ((u - d) ** 2).sum() / 2 + (mu**2).sum() / 2


def flat(params: Params) -> Tensor:
    return torch.cat([t.reshape(-1) for t in params.values()])


def make(inner: Any, outer: Any, dtype: torch.dtype, scales: Scales, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator, dtype=F64) * 2 - 1
        return drawn.to(dtype)

    unit_w, unit_lam, unit_g, unit_f = (
        10.0**power for power in (scales.w, scales.lam, scales.g, scales.f)
    )
    w = {f"w{i}": uniform(*s) * unit_w for i, s in enumerate(inner)}
    lam = {f"l{i}": uniform(*s) * unit_lam for i, s in enumerate(outer)}
    n, m = flat(w).numel(), flat(lam).numel()
    a, k, d = uniform(n, m), 2 + uniform(n), 2 + uniform(n)

    def inner_loss(i: Params, o: Params, b: Any) -> Tensor:
        return unit_g * phi(flat(i) / unit_w, flat(o) / unit_lam, a, k)

    def outer_loss(i: Params, o: Params, b: Any) -> Tensor:
        return unit_f * psi(flat(i) / unit_w, flat(o) / unit_lam, d)

    problem = BilevelProblem(
        inner_loss,
        outer_loss,
        {n: t.requires_grad_() for n, t in w.items()},
        {n: t.requires_grad_() for n, t in lam.items()},
    )
    u = flat(problem.inner_params).detach().double() / unit_w
    mu = flat(problem.outer_params).detach().double() / unit_lam
    return Case(problem, scales, u, mu, (a.double(), k.double(), d.double()))


# -- truths, for g = φ, f = ψ, in u and μ -----------------------------------------------

RATE = 0.2
"""Of the steps, the series and the damping, in units of u and φ."""


def estimator(name: str, product: str, scales: Scales) -> HypergradEstimator:
    rate = RATE * 10.0 ** (2 * scales.w - scales.g)
    chosen: dict[str, dict[str, Any]] = {
        "darts": {"inner_lr": rate},
        "sama": {"rule": SGD(rate)},
        "unrolled": {"rule": SGD(rate), "num_steps": 2},
        "cg": {"max_iter": 100, "rtol": 1e-12},
        "implicit": {"solver": DenseSolver()},
        "neumann": {"scale": rate, "num_terms": 3},
        "nystrom": {"rank": 100, "damping": RATE * 10.0 ** (scales.g - 2 * scales.w)},
    }
    more = {"product": product} if product else {}
    return make_estimator(name, **chosen.get(name, {}), **more)


def truth(case: Case, name: str) -> tuple[Tensor, Tensor, float]:
    """Return the direct and the indirect term, and the size of what the latter sums."""
    a, k, d = case.constants
    u, mu = case.u, case.mu

    def gradient(u: Tensor) -> Tensor:
        return k * (u - a @ mu) + mu.sum() / 20 * u + u.sum() / 5

    def mixed(u: Tensor) -> Tensor:  # ∂²φ/∂u∂μ
        return -k[:, None] * a + u[:, None] / 20

    eye = torch.eye(len(u), dtype=F64)
    hessian = torch.diag(k) + mu.sum() / 20 * eye + torch.ones_like(eye) / 5
    parts = []
    if name in ("darts", "sama", "unrolled"):
        path = [u]
        for _ in range(2 if name == "unrolled" else 1):
            path.append(path[-1] - RATE * gradient(path[-1]))
        adjoint = path[-1] - d
        for at in reversed(path[:-1]):
            parts.append((mixed(at), RATE * adjoint))
            adjoint = adjoint - RATE * hessian @ adjoint
    elif name != "first-order":
        v = u - d
        if name == "neumann":
            factor = eye - RATE * hessian
            powers = [torch.linalg.matrix_power(factor, j) for j in range(4)]
            x = RATE * torch.stack(powers).sum(0) @ v
        else:
            damping = RATE if name == "nystrom" else 0.0
            x = torch.linalg.solve(hessian + damping * eye, v)
        parts.append((mixed(u), x))
    indirect = torch.zeros_like(mu)
    size = torch.zeros_like(mu)
    for matrix, x in parts:
        indirect -= matrix.T @ x
        size += matrix.abs().T @ x.abs()
    return mu, indirect, float(size.norm())


# -- tests ------------------------------------------------------------------------------

EXACT = [
    ("first-order", ""),
    ("darts", "exact"),
    ("sama", "exact"),
    ("unrolled", ""),
    ("cg", "exact"),
    ("cg", "forward-over-reverse"),
    ("implicit", "exact"),
    ("neumann", "exact"),
    ("nystrom", "exact"),
]
DIFFERENCES = [
    (name, "finite-difference")
    for name in ("darts", "sama", "cg", "implicit", "neumann", "nystrom")
]
SOLVES = ("cg", "implicit", "neumann", "nystrom")


def powers(least: int = -20) -> st.SearchStrategy[int]:
    return st.integers(least, 20)


def all_scales(least_w: int = -20) -> st.SearchStrategy[Scales]:
    return st.builds(Scales, powers(least_w), powers(), powers(), powers())


def shapes() -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)


def fits(scales: Scales, dtype: torch.dtype) -> bool:
    """Whether the gradients, Hessian, products and settings are normal numbers of dtype.

    Torch's own gradients vanish or overflow elsewhere, and no estimator can tell.
    """
    w, lam, g, f = scales.w, scales.lam, scales.g, scales.f
    most = 290 if dtype == F64 else 30
    sizes = (g - w, g - 2 * w, g - w - lam, 2 * w - g, g - lam, f - w, f - lam)
    products = (w + f - g, f - g, f - 2 * w)
    return all(abs(power) <= most for power in (*sizes, *products))


def check(name: str, product: str, case: Case, tolerance: float) -> str:
    """Assert that an estimate is right or refused; return what it was."""
    try:
        result = estimator(name, product, case.scales).estimate(
            case.problem, inner_batch=None, outer_batch=None
        )
    except HypergradError:
        return "refused"
    direct, indirect, size = truth(case, name)
    unit = 10.0 ** (case.scales.f - case.scales.lam)
    got = flat(result.indirect).double() / unit
    assert float((got - indirect).norm()) <= tolerance * size
    got = flat(result.direct).double() / unit
    assert float((got - direct).norm()) <= tolerance * float(direct.norm())
    return "right"


def run(
    name: str,
    product: str,
    dtypes: Any,
    kind: Any,
    least_w: int = -20,
    examples: int = 40,
) -> None:
    outcomes: list[str] = []

    @settings(max_examples=examples)
    @given(
        shapes(),
        shapes(),
        st.sampled_from(dtypes).flatmap(
            lambda d: st.tuples(
                st.just(d), all_scales(least_w).filter(lambda s: fits(s, d))
            )
        ),
        st.integers(0, 100),
    )
    def example(inner: Any, outer: Any, numbers: Any, seed: int) -> None:
        dtype, scales = numbers
        case = make(inner, outer, dtype, scales, seed)
        # A solve multiplies the errors of its products by κ.
        cond = KAPPA if name in SOLVES else 1.0
        outcomes.append(check(name, product, case, tol(dtype, cond, kind)))

    example()
    assert outcomes.count("right") >= 0.9 * len(outcomes), outcomes


@pytest.mark.parametrize(("name", "product"), EXACT)
def test_exact_products_at_any_scale(name: str, product: str) -> None:
    run(name, product, [F64, torch.float32], "algebra")


@pytest.mark.parametrize(("name", "product"), DIFFERENCES)
def test_finite_differences_at_any_scale(name: str, product: str) -> None:
    """A radius is a distance: it must be short of what w varies on, so w is not tiny."""
    run(name, product, [F64, torch.float32], "difference", least_w=0)


@pytest.mark.parametrize(("name", "product"), EXACT[:4])
def test_bfloat16_at_any_scale(name: str, product: str) -> None:
    run(name, product, [torch.bfloat16], "algebra", examples=20)


@pytest.mark.parametrize(("name", "product"), EXACT + DIFFERENCES)
def test_beyond_the_range_of_a_dtype(name: str, product: str) -> None:
    """Losses and gradients that overflow are refused, and nothing is NaN."""

    @settings(max_examples=30)
    @given(shapes(), st.builds(Scales, *[st.integers(-60, 60)] * 4))
    def example(outer: Any, scales: Scales) -> None:
        case = make([(2,), ()], outer, torch.float32, scales, 0)
        rate = max(-30, min(30, 2 * scales.w - scales.g))  # torch itself takes no more
        chosen = estimator(name, product, Scales(g=-rate))
        try:
            result = chosen.estimate(case.problem, inner_batch=None, outer_batch=None)
        except HypergradError:
            return
        for part in (result.outer_grads, result.direct, result.indirect):
            assert bool(flat(part).isfinite().all())

    example()
