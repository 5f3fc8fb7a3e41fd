"""Estimators by finite differences: their error, and what they say of it.

Errors are those of the indirect term, relative, to the derivative in float64 at the very
numbers that the run had before its last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import BilevelProblem, Hypergradient, make_estimator, tree
from hypergrad.batches import as_micro_batches
from hypergrad.estimators import Implicit
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.products import FiniteDifference, Tally, default_radius
from hypergrad.rules import SGD, AdamW
from hypergrad.solvers import IdentitySolver
from hypergrad.tree import Params
from tests.hypergrad.estimators.truths import (
    HANDS,
    Case,
    Start,
    classifier_case,
    estimate,
    hand_indirect,
    network_case,
    one_rounding,
    path_of,
    real_run,
    softmax_case,
    warm,
)
from tests.tolerances import error

F64, F32 = torch.float64, torch.float32

dtypes = pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
NETWORKS: dict[str, Callable[[int], Case]] = {
    "tanh": network_case,
    "softmax": classifier_case,
}
# What `darts` and `sama` are exact for.
STEPS = [
    ("darts", "sgd"),
    ("sama", "sgd"),
    ("sama", "momentum"),
    ("sama", "adamw"),
    ("sama", "adamw-clip"),
]


@cache
def begin(network: str, seed: int, name: str, dtype: torch.dtype) -> tuple[Case, Start]:
    case = NETWORKS[network](seed).to(dtype)
    # 100 steps where the derivative of the step depends on them.
    return case, warm(case, HANDS[name], 100 if "adamw" in name else 5)


def random_outer(case: Case, seed: int) -> Case:
    """Return the case with a linear outer loss, so that ∂f/∂w is a random direction."""
    make = torch.Generator().manual_seed(200 + seed)
    v = {
        n: torch.randn(t.shape, generator=make, dtype=F64).float()
        for n, t in case.inner.items()
    }

    def linear(inner: Params, outer: Params, batch: Any) -> Tensor:
        return torch.stack([(t * v[n].to(t)).sum() for n, t in inner.items()]).sum()

    return replace(case, outer_loss=linear)


def one_step(
    estimator: Any, case: Case, start: Start, name: str
) -> tuple[Hypergradient, float]:
    """Return the estimate after one step from `start`, and its error."""
    opt = real_run(case, HANDS[name], estimator, 1, start=start)
    result = estimate(opt, case)
    path = path_of(case, 1, False)
    truth = hand_indirect(case, HANDS[name], start, path, case.outer)
    return result, error(result.indirect, truth)


# -- bars -------------------------------------------------------------------------------

# The least sum of truncation and rounding, 10 times: eps^(2/3) central, eps^(1/2) one-
# sided, 3 eps^(4/5) Richardson. A random direction has less curvature along it: 5 times.
BARS = {
    ("central", F64): 4e-10,
    ("forward", F64): 1.5e-7,
    ("richardson", F64): 1e-11,
    ("central", F32): 2e-4,
    ("forward", F32): 3.5e-3,
    ("richardson", F32): 1e-4,
}


@dtypes
@pytest.mark.parametrize("along", ["outer gradient", "random"])
@pytest.mark.parametrize(("estimator", "name"), STEPS)
def test_central_differences(
    estimator: str, name: str, along: str, dtype: torch.dtype
) -> None:
    bar = BARS["central", dtype] * (5 if along == "random" else 1)
    for network in NETWORKS:
        for seed in range(4):
            case, start = begin(network, seed, name, dtype)
            case = random_outer(case, seed) if along == "random" else case
            result, off = one_step(make_estimator(estimator), case, start, name)
            assert off <= bar, (network, seed)
            assert result.info.fd_radius == pytest.approx(default_radius(dtype))
            assert result.info.fd_error is None


@pytest.mark.parametrize(("scheme", "dtype"), [k for k in BARS if k[0] != "central"])
@pytest.mark.parametrize(("estimator", "name"), STEPS)
def test_other_schemes(
    estimator: str, name: str, scheme: Any, dtype: torch.dtype
) -> None:
    for network in NETWORKS:
        case, start = begin(network, 0, name, dtype)
        made = make_estimator(estimator, product=FiniteDifference(scheme))
        assert one_step(made, case, start, name)[1] <= BARS[scheme, dtype]


@pytest.mark.parametrize("estimator", ["darts", "sama"])
def test_real_data(estimator: str) -> None:
    case = softmax_case()
    start = warm(case, HANDS["sgd"], 20)
    _, off = one_step(make_estimator(estimator), case, start, "sgd")
    assert off <= BARS["central", F64]


# -- error estimates --------------------------------------------------------------------

# From rounding alone to truncation alone; None is the default, where they are alike.
RADII: dict[torch.dtype, list[float | None]] = {
    F64: [1e-7, None, 1e-4, 1e-2, 0.2],
    F32: [1e-4, None, 2e-2, 0.2],
}


def within_ten_times(pairs: list[tuple[float, float]]) -> None:
    """Check estimates against errors: 95 % within 10 times, no bias beyond 3 times.

    Rounding is noise, and of noise only the typical size can be known. Where several
    entries of λ share it, no single estimate was seen to be off by more than 9 times.
    """
    ratios = [estimated / true for estimated, true in pairs]
    near = sum(0.1 <= ratio <= 10 for ratio in ratios)
    assert near >= 0.95 * len(ratios), sorted(ratios)
    bias = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    assert 1 / 3 <= bias <= 3


@dtypes
@pytest.mark.parametrize("scheme", ["central", "forward", "richardson"])
@pytest.mark.parametrize(("estimator", "name"), [STEPS[0], STEPS[3]])
def test_error_estimates_of_one_step(
    estimator: str, name: str, scheme: Any, dtype: torch.dtype
) -> None:
    pairs = []
    for radius in RADII[dtype]:
        made = make_estimator(estimator, product=FiniteDifference(scheme, radius, True))
        for network in NETWORKS:
            for seed in range(3):
                case, start = begin(network, seed, name, dtype)
                result, off = one_step(made, case, start, name)
                assert result.info.fd_error is not None
                pairs.append((result.info.fd_error, off))
    within_ten_times(pairs)


@dtypes
def test_error_estimates_of_implicit_estimators(dtype: torch.dtype) -> None:
    # With the identity in the place of the solve the indirect term is the mixed product.
    pairs = []
    for radius in RADII[dtype]:
        made = Implicit(
            IdentitySolver(),
            product=FiniteDifference(radius=radius, error_estimate=True),
        )
        for network in NETWORKS:
            for seed in range(4):
                case, start = begin(network, seed, "sgd", dtype)
                result = made.estimate(
                    replace(case, inner=start.w).problem(),
                    inner_batch=case.batch(0),
                    outer_batch=case.outer_batch,
                )
                off = error(result.indirect, minus_mixed(case.to(F64), start.w))
                assert result.info.fd_error is not None
                pairs.append((result.info.fd_error, off))
    within_ten_times(pairs)


def minus_mixed(case: Case, w: Params) -> Params:
    """Return -∂²g/∂λ∂w ∂f/∂w by autograd alone."""
    w = {n: t.double().clone().requires_grad_() for n, t in w.items()}
    lam = {n: t.clone().requires_grad_() for n, t in case.outer.items()}
    f = case.outer_loss(w, lam, case.outer_batch)
    v = torch.autograd.grad(f, list(w.values()))
    g = case.inner_loss(w, lam, case.batch(0))
    grads = torch.autograd.grad(g, list(w.values()), create_graph=True)
    mixed = torch.autograd.grad(grads, list(lam.values()), v)
    return {n: -t for n, t in zip(lam, mixed, strict=True)}


@pytest.mark.parametrize("name", ["cg", "neumann"])
def test_the_solve_takes_no_error_estimates(name: str) -> None:
    case, start = begin("tanh", 0, "sgd", F64)
    infos = [
        make_estimator(
            name,
            damping=3.0,
            product=FiniteDifference(error_estimate=on),
        )
        .estimate(
            replace(case, inner=start.w).problem(),
            inner_batch=case.batch(0),
            outer_batch=case.outer_batch,
        )
        .info
        for on in (False, True)
    ]
    assert infos[0].fd_error is None
    assert infos[1].fd_error is not None
    assert infos[1].n_forward - infos[0].n_forward == 2  # of the mixed product alone


# -- both sides -------------------------------------------------------------------------


class Watched(nn.Module):
    """Attention and dropout; notes all that decides what an evaluation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.q(x) * self.gain
        a = nn.functional.scaled_dot_product_attention(h, h, h, dropout_p=0.1)
        mask = nn.functional.dropout(torch.ones_like(a), 0.5)
        self.seen.append(
            (
                x.data_ptr(),
                mask.flatten().tolist(),
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
                torch.is_autocast_enabled("cpu"),
                self.training,
            )
        )
        return a * mask


@pytest.mark.parametrize("scheme", ["central", "forward", "richardson"])
@pytest.mark.parametrize("name", ["darts", "sama", "cg", "neumann", "nystrom"])
def test_both_sides_see_the_same(name: str, scheme: Any) -> None:
    torch.manual_seed(3)
    model = Watched().double()
    settings: dict[str, Any] = {
        "product": FiniteDifference(scheme, error_estimate=True),
    }
    if name not in ("darts", "sama"):
        settings["on_failure"] = "return"
    opt = BilevelOptimizer(
        model,
        lambda m, x: m(x).square().mean(),
        outer="gain",
        outer_loss_fn=lambda m, x: m.gain.sum() * m.q.weight.sum(),
        estimator=make_estimator(name, **settings),
        inner_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        outer_optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        outer_warmup=0,
    )
    x = torch.randn(2, 3, 4).double()
    for _ in range(2):
        model.seen.clear()
        torch.rand(7)
        report = opt.step(x, None)
        assert report.outer_step
        assert len(model.seen) >= 3  # the step itself, and both sides
        assert all(seen == model.seen[0] for seen in model.seen)


# -- radius and displacement ------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "radius"),
    [(1.0, None), (1.0, 1e-5), (1e2, None), (1e4, None), (1e6, None), (1e20, None)],
)
def test_divided_by_the_realised_displacement(
    size: float, radius: float | None
) -> None:
    # ∂g/∂λ = w exactly, so that the quotient is 1 in every digit for the displacement
    # that was realised, and off by what rounding took of it for any other.
    w = torch.tensor([1.2345678 * size], requires_grad=True)
    lam = torch.ones((), requires_grad=True)
    seen: list[float] = []

    def loss(i: Params, o: Params, b: Any) -> Tensor:
        seen.append(float(i["w"].detach().double()))
        return (i["w"] * o["l"]).sum()

    problem = BilevelProblem(loss, loss, {"w": w}, {"l": lam})
    settings = FiniteDifference(radius=radius)
    product: Any = settings.bind(problem, as_micro_batches(None), Tally())
    value = product.mixed_vjp({"w": torch.ones(1)})["l"].item()
    assert value == 1.0
    realised = abs(seen[0] - seen[1])
    assert realised > 0
    asked = 2 * product.info["fd_radius"]
    if radius is None:
        usual = torch.finfo(F32).eps ** (1 / 3)
        assert product.info["fd_radius"] == pytest.approx(
            usual * max(1, w.item()), rel=0.25
        )
        assert realised == pytest.approx(asked, rel=1e-4)
    else:
        assert abs(realised / asked - 1) > 1e-3  # 1e-4 would pass without the division


# -- Adam's first step from B = 0 -------------------------------------------------------


def low_rank(seed: int, dtype: torch.dtype, noise: Any = None) -> BilevelProblem:
    """tanh(x (W + BA)ᵀ m + c) at B = 0: A has no gradient, whatever m is."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=F64).float().double()

    inner = {"a": draw(3, 6), "b": torch.zeros(4, 3).double(), "c": draw(4) / 2}
    if noise is not None:
        inner = {n: noise(t) for n, t in inner.items()}
    gain = (1 + draw(4).abs() / 2).float()
    base = draw(4, 6)
    data = [(draw(9, 6), draw(9, 4)) for _ in range(2)]

    def loss(i: Params, o: Params, b: Any) -> Tensor:
        x, y = (t.to(i["a"].dtype) for t in data[b])
        weight = o["m"][:, None] * (base.to(x) + i["b"] @ i["a"])
        return (torch.tanh(x @ weight.T + i["c"]) - y).square().mean()

    return BilevelProblem(
        loss,
        loss,
        {n: t.to(dtype).requires_grad_() for n, t in inner.items()},
        {"m": gain.to(dtype).requires_grad_()},
    )


def first_step_truth(seed: int, noise: Any = None) -> tuple[Params, float]:
    """Return the indirect term of AdamW's first step, and the size of the direct one.

    By hand, with w̄ = w - lr g/(|g| + ε): its derivative is -lr ε/(|g| + ε)², and that of
    A, 1/ε times as large as its gradient is 0, meets ∂²g/∂A∂m = 0.
    """
    problem = low_rank(seed, F64, noise)
    w, lam = dict(problem.inner_params), dict(problem.outer_params)
    g = torch.autograd.grad(
        problem.inner_loss(w, lam, 0), list(w.values()), create_graph=True
    )
    lr, eps = 1e-3, 1e-8
    end = {
        n: (t - lr * x / (x.abs() + eps)).detach().requires_grad_()
        for (n, t), x in zip(w.items(), g, strict=True)
    }
    f = problem.outer_loss(end, lam, 1)
    v = torch.autograd.grad(f, list(end.values()), retain_graph=True)
    bar = [
        -lr * eps / (x.detach().abs() + eps) ** 2 * u if n != "a" else 0 * u
        for n, x, u in zip(w, g, v, strict=True)
    ]
    (indirect,) = torch.autograd.grad(g, lam["m"], bar)
    (direct,) = torch.autograd.grad(f, lam["m"])
    return {"m": indirect}, float(direct.norm())


@dtypes
@pytest.mark.parametrize("seed", range(5))
def test_the_first_step_from_zero_is_never_amplified_rounding(
    seed: int, dtype: torch.dtype
) -> None:
    rule = AdamW(1e-3, weight_decay=0.0)
    made = make_estimator(
        "sama", rule=rule, product=FiniteDifference(error_estimate=True)
    )
    result = made.estimate(low_rank(seed, dtype), inner_batch=0, outer_batch=1)
    assert result.info.dropped == 18  # every entry of A
    truth, direct = first_step_truth(seed)
    # What rounding does to 1/g², and what the difference says of itself.
    conditioning = max(
        error(first_step_truth(seed, one_rounding(dtype, k))[0], truth)
        for k in range(4)
    )
    assert result.info.fd_error is not None
    off = error(result.indirect, truth)
    assert off <= 10 * (conditioning + result.info.fd_error)
    assert off <= (1e-7 if dtype == F64 else 1e-2)
    # A difference along A's 1/ε would be of the order of the direct term.
    assert tree.norm(result.indirect) < 1e-6 * direct


def test_a_difference_lost_to_rounding_is_not_called_exact() -> None:
    # B = 1e-8 is not 0: A is kept, its 1/ε fills the direction, and what is divided by
    # it vanishes. The estimate must not take two equal gradients for a good difference.
    problem = low_rank(0, F32)
    with torch.no_grad():
        problem.inner_params["b"].fill_(1e-8)
    rule = AdamW(1e-3, weight_decay=0.0)
    results = [
        make_estimator("sama", rule=rule, **settings).estimate(
            problem, inner_batch=0, outer_batch=1
        )
        for settings in (
            {"product": FiniteDifference(error_estimate=True)},
            {"product": "exact"},
        )
    ]
    assert error(results[0].indirect, results[1].indirect) > 0.5
    assert results[0].info.fd_error is not None
    assert results[0].info.fd_error > 0.05


def test_plain_gradient_descent_drops_nothing() -> None:
    result = make_estimator("sama", rule=SGD(0.1)).estimate(
        low_rank(0, F64), inner_batch=0, outer_batch=1
    )
    assert result.info.dropped == 0
