"""Known problems are at a minimum, and their truth is that of the map λ → f(w*(λ))."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hypergrad import SolveError
from hypergrad.testing import (
    PROBLEMS,
    KnownProblem,
    at_minimum,
    dora_block,
    quadratic,
    relative_error,
    reweighting,
    ridge,
    softmax_regression,
    two_layer_network,
)
from hypergrad.tree import Params
from tests.tolerances import error, tol

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
every = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())


def flat(params: Params) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in params.values()])


def shaped(vector: Tensor, like: Params) -> Params:
    parts = vector.split([t.numel() for t in like.values()])
    return {n: p.view_as(t) for (n, t), p in zip(like.items(), parts, strict=True)}


def functions(
    known: KnownProblem,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return both losses as functions of two vectors."""
    problem = known.problem
    like = problem.inner_params, problem.outer_params

    def g(w: Tensor, lam: Tensor) -> Tensor:
        return problem.inner_loss(shaped(w, like[0]), shaped(lam, like[1]), None)

    def f(w: Tensor, lam: Tensor) -> Tensor:
        return problem.outer_loss(shaped(w, like[0]), shaped(lam, like[1]), None)

    return g, f


def solved_again(g: Callable[..., Tensor], w: Tensor, lam: Tensor) -> Tensor:
    """Return the minimum for a λ nearby: six of Newton's steps, by torch.autograd."""
    for _ in range(6):
        hessian = torch.autograd.functional.hessian(lambda w: g(w, lam), w)
        grad = torch.autograd.functional.jacobian(lambda w: g(w, lam), w)
        assert isinstance(hessian, Tensor)
        assert isinstance(grad, Tensor)
        w = w - torch.linalg.solve(hessian, grad)
    return w


@every
@pytest.mark.parametrize("seed", [0, 3])
def test_truth_is_the_derivative_of_the_outer_loss_at_the_minimum(
    make: Callable[..., KnownProblem], seed: int
) -> None:
    known = make(seed=seed)
    g, f = functions(known)
    w, lam = flat(known.problem.inner_params), flat(known.problem.outer_params)
    # A central difference over h loses h² (1e-8) to curvature, ε/h (2e-12) to rounding.
    h = 1e-4
    slopes = []
    for unit in torch.eye(len(lam), dtype=F64):
        ends = [
            f(solved_again(g, w, there), there)
            for there in (lam + h * unit, lam - h * unit)
        ]
        slopes.append((ends[0] - ends[1]) / (2 * h))
    assert error(flat(known.outer_grads), torch.stack(slopes)) < 1e-6


@every
def test_the_point_is_a_strict_minimum(make: Callable[..., KnownProblem]) -> None:
    known = make()
    g, f = functions(known)
    w, lam = flat(known.problem.inner_params), flat(known.problem.outer_params)
    grad = torch.autograd.functional.jacobian(lambda w: g(w, lam), w)
    hessian = torch.autograd.functional.hessian(lambda w: g(w, lam), w)
    assert isinstance(grad, Tensor)
    # The gradient is a sum that cancels: what is left is its terms' rounding.
    assert float(grad.norm()) < tol(F64, float(known.hessian.norm() * w.norm()))
    assert error(known.hessian, torch.as_tensor(hessian)) < tol(F64)
    spectrum = torch.linalg.eigvalsh(known.hessian)
    assert spectrum[0] > 0
    assert known.condition == pytest.approx(float(spectrum[-1] / spectrum[0]))

    v, direct = torch.autograd.functional.jacobian(f, (w, lam))
    # v is what is left of a residual after fitting: a few digits less than its terms.
    assert error(known.v, v) < tol(F64, 10)
    assert torch.allclose(flat(known.direct), direct, rtol=1e-13, atol=1e-15)
    by_inverse = known.indirect_by(torch.linalg.inv(known.hessian))
    assert relative_error(by_inverse, known.indirect) < tol(F64, 10 * known.condition)


@every
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_dtypes(make: Callable[..., KnownProblem], dtype: torch.dtype) -> None:
    known = make(dtype=dtype)
    assert {t.dtype for t in known.problem.tensors} == {dtype}
    truths = [*known.direct.values(), *known.indirect.values()]
    truths += [known.hessian, known.mixed, known.v]
    assert {t.dtype for t in truths} == {F64}
    assert not any(t.requires_grad for t in truths)
    w, lam = known.problem.inner_params, known.problem.outer_params
    for loss in (known.problem.inner_loss, known.problem.outer_loss):
        assert loss(w, lam, None).dtype == dtype
    # The truth of other numbers: those of float64 as the dtype rounds them.
    same = relative_error(known.outer_grads, make().outer_grads)
    assert (same == 0) == (dtype == F64)
    assert same < tol(dtype, 10)


def test_truth_is_of_the_rounded_numbers() -> None:
    # g = (w - λa)²/2 and f = w²/2: w* = λa, df/dλ = λa². In bfloat16, .1 is .10009765625.
    a, lam = torch.tensor(0.1), torch.tensor(0.3)
    known = at_minimum(
        lambda i, o, data: (i["w"] - o["lam"] * data[0]) ** 2 / 2,
        lambda i, o, data: i["w"] ** 2 / 2,
        {"w": torch.zeros(())},
        {"lam": lam},
        inner_data=[a],
        dtype=BF16,
    )
    rounded = lam.to(BF16).double() * a.to(BF16).double() ** 2
    assert error(known.outer_grads["lam"], rounded) < tol(F64)
    assert error(known.outer_grads["lam"], torch.tensor(0.3 * 0.1**2)) > 1e-3
    hessian = quadratic(dtype=BF16).hessian
    assert torch.equal(hessian, hessian.to(BF16).double())


@every
def test_truth_does_not_follow_the_parameters(
    make: Callable[..., KnownProblem],
) -> None:
    known, again = make(), make()
    with torch.no_grad():
        for tensor in known.problem.tensors:
            tensor.mul_(2)
    assert relative_error(known.outer_grads, again.outer_grads) == 0
    assert torch.equal(known.mixed, again.mixed)
    assert torch.equal(known.v, again.v)


@every
def test_seeds(make: Callable[..., KnownProblem]) -> None:
    state = torch.get_rng_state()
    one, same, other = make(), make(seed=0), make(seed=3)
    assert relative_error(same.outer_grads, one.outer_grads) == 0
    assert relative_error(other.outer_grads, one.outer_grads) > 1e-2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("known", "inner", "outer"),
    [
        (ridge(5, 9), {"w": (5,)}, {"penalty": (5,)}),
        (quadratic([1.0, 7.0]), {"w": (2,)}, {"shift": (2,)}),
        (softmax_regression(2, 4, 9), {"weight": (2, 4)}, {"log_penalty": (2,)}),
        (reweighting(2, 9), {"weight": (2,)}, {"logits": (9,)}),
        (
            two_layer_network(2, 4, 30),
            {"first": (4, 2), "second": (4,)},
            {"log_decay": (2,), "scale": (2,)},
        ),
        (
            dora_block(3, 2, 1, 30),
            {"lora_A": (1, 3), "lora_B": (2, 1), "head": (2,)},
            {"magnitude": (2,)},
        ),
    ],
)
def test_sizes(
    known: KnownProblem,
    inner: dict[str, tuple[int, ...]],
    outer: dict[str, tuple[int, ...]],
) -> None:
    problem = known.problem
    assert {n: tuple(t.shape) for n, t in problem.inner_params.items()} == inner
    assert {n: tuple(t.shape) for n, t in problem.outer_params.items()} == outer
    n, p = flat(problem.inner_params).numel(), flat(problem.outer_params).numel()
    assert known.hessian.shape == (n, n)
    assert known.mixed.shape == (p, n)
    assert known.v.shape == (n,)


def test_the_dora_block_derives_its_norm() -> None:
    known = dora_block()
    w = known.problem.inner_params
    with torch.no_grad():
        assert float((w["lora_B"] @ w["lora_A"]).norm()) > 0.1  # it has moved
    # With the norm as a constant, autograd's slope is not that of the loss's values.
    _, f = functions(known)
    point, lam = flat(w), flat(known.problem.outer_params)
    toward = torch.ones_like(point)
    h = torch.finfo(F64).eps ** (1 / 3)
    slope = (f(point + h * toward, lam) - f(point - h * toward, lam)) / (2 * h)
    assert error(known.v @ toward, slope.detach()) < tol(F64, 10, "difference")


# -- Newton's method ----------------------------------------------------------------------


def test_newton_leaves_a_saddle() -> None:
    # g = (w² - λ)²: flat at 0, minima at ±√λ; f = w, so df/dλ = 1/(2√λ).
    known = at_minimum(
        lambda i, o, data: (i["w"] ** 2 - o["lam"]) ** 2,
        lambda i, o, data: i["w"],
        {"w": torch.tensor(0.1)},
        {"lam": torch.tensor(4.0)},
    )
    assert float(known.problem.inner_params["w"].detach()) == pytest.approx(
        2.0, rel=1e-15
    )
    assert float(known.outer_grads["lam"]) == pytest.approx(0.25, rel=1e-14)


@pytest.mark.parametrize(
    ("g", "text"),
    [
        (lambda i, o, data: i["w"][0] ** 2 * o["lam"], "flat|no strict minimum"),
        (lambda i, o, data: i["w"].sum() * o["lam"], "is not at a minimum|stuck"),
        (
            lambda i, o, data: -(i["w"] ** 2).sum() * o["lam"],
            "is not at a minimum|stuck",
        ),
    ],
    ids=["flat direction", "slope", "maximum"],
)
def test_no_strict_minimum(g: Callable[..., Tensor], text: str) -> None:
    with pytest.raises(SolveError, match=text):
        at_minimum(
            g,
            lambda i, o, data: i["w"].sum(),
            {"w": torch.tensor([0.3, 0.2])},
            {"lam": torch.tensor(1.0)},
        )
