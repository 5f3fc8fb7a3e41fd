"""Differences of values: their bias and noise by formula; losses without a graph."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    NumericalWarning,
    make_estimator,
)
from hypergrad.estimators import ZerothOrder
from hypergrad.rules import SGD, AdamW
from hypergrad.testing import quadratic
from tests.hypergrad.estimators.truths import (
    HANDS,
    estimate,
    network_case,
    real_run,
    warm,
)
from tests.tolerances import error, tol

F64 = torch.float64
HALF = SGD(0.5)


def leaf(value: Any, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def half(outer_loss: Any, lam: float = 0.0, dtype: torch.dtype = F64) -> BilevelProblem:
    """g = (w - λ)²/2 from w = 4: a step of SGD at rate 1/2 leads to 2 + λ/2."""
    return BilevelProblem(
        lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        outer_loss,
        {"w": leaf(4.0, dtype)},
        {"lam": leaf(lam, dtype)},
    )


def run(problem: BilevelProblem, steps: int = 1, **settings: Any) -> Any:
    made = make_estimator("zeroth-order", num_steps=steps, **{"rule": HALF, **settings})
    return made.estimate(problem, inner_batch=None, outer_batch=None)


# -- closed forms -----------------------------------------------------------------------


@pytest.mark.parametrize("radius", [2.0, 0.5, None])
@pytest.mark.parametrize("steps", [1, 4])
def test_second_degree_has_no_bias(steps: int, radius: float | None) -> None:
    problem = quadratic().problem
    found = run(problem, steps, radius=radius, rule=SGD(0.2, momentum=0.5))
    truth = make_estimator(
        "unrolled", num_steps=steps, rule=SGD(0.2, momentum=0.5)
    ).estimate(problem, inner_batch=None, outer_batch=None)
    # f is of size 1 to 10, and rounded by half a spacing on either side.
    bar = 1e-13 if radius else tol(F64, 10, "difference")
    assert error(found.direct, truth.direct) <= bar
    assert error(found.indirect, truth.indirect) <= bar


def test_third_degree_has_that_of_the_formula() -> None:
    """F = w³ with w = 2 + λ/2: the slope at 0 is 3·w²/2 = 6, and μ²/8 too much."""
    for radius in (1.0, 0.5, 0.25):
        found = run(half(lambda i, o, b: i["w"] ** 3), radius=radius)
        assert abs(found.outer_grads["lam"].item() - 6 - radius**2 / 8) <= 1e-13
        assert found.info.fd_radius == radius


def test_the_terms_by_hand() -> None:
    """F = w·λ² at λ = 3, w = 3.5: direct 2λw; indirect (λ² + μ²)/2."""
    found = run(half(lambda i, o, b: i["w"] * o["lam"] ** 2, 3.0), radius=0.5)
    assert abs(found.direct["lam"].item() - 21) <= 1e-12
    assert abs(found.indirect["lam"].item() - (9 + 0.25) / 2) <= 1e-12


def test_a_loss_that_is_a_parameter_itself() -> None:
    # F = 2 + λ/2. The value is not the tensor, which is moved on and put back.
    assert (
        run(half(lambda i, o, b: i["w"]), radius=0.5).outer_grads["lam"].item() == 0.5
    )


def test_a_term_that_is_not_there_is_exactly_zero() -> None:
    by_inner = run(half(lambda i, o, b: i["w"].sin(), 0.3))
    assert by_inner.direct["lam"] == 0.0
    assert by_inner.indirect["lam"] != 0.0
    by_outer = run(half(lambda i, o, b: o["lam"].sin(), 0.3))
    assert by_outer.indirect["lam"] == 0.0
    assert by_outer.direct["lam"] != 0.0


@pytest.mark.parametrize("hand", ["momentum", "adamw"])
def test_the_steps_that_were_taken(hand: str) -> None:
    case = network_case()
    start = warm(case, HANDS[hand], 20)
    opt = real_run(
        case, HANDS[hand], make_estimator("zeroth-order", num_steps=3), 3, start=start
    )
    found = estimate(opt, case)
    truth = make_estimator("unrolled", num_steps=3).estimate(
        opt.problem,
        inner_batch=None,
        outer_batch=case.outer_batch,
        steps=opt.recorded_steps,
    )
    assert error(found.direct, truth.direct) <= tol(F64, 10, "difference")
    assert error(found.indirect, truth.indirect) <= tol(F64, 100, "difference")
    assert found.info.reason == ""


def test_without_steps_it_is_the_direct_term() -> None:
    found = run(half(lambda i, o, b: i["w"] * o["lam"] ** 2, 3.0), 0, rule=None)
    assert abs(found.direct["lam"].item() - 24) <= 1e-8  # w = 4 stays
    assert found.indirect["lam"] == 0.0
    assert (found.info.n_forward, found.info.n_backward) == (3, 0)
    assert ZerothOrder(0).answers == "neither"


def test_unbiased_with_the_noise_of_the_formula() -> None:
    """Of second degree: E ĝ = ∇ and E‖ĝ - ∇‖² = (n-1)/m ‖∇‖²."""
    n, m, seeds = 12, 3, 60
    make = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, generator=make, dtype=F64)
    centre = torch.randn(n, generator=make, dtype=F64)
    problem = BilevelProblem(
        lambda i, o, b: (i["w"] - mix @ o["lam"]).square().sum() / 2,
        lambda i, o, b: (i["w"] - centre).square().sum() / 2,
        {"w": leaf([1.0] * n)},
        {"lam": leaf([0.5] * n)},
    )
    w = 0.5 + mix @ problem.outer_params["lam"].detach() / 2
    truth = mix.T @ (w - centre) / 2
    exact = run(problem, radius=1.0, num_directions="all").indirect["lam"]
    assert error(exact, truth) <= 1e-12
    settings = {"radius": 1.0, "num_directions": m}
    off = torch.stack(
        [run(problem, seed=s, **settings).indirect["lam"] - truth for s in range(seeds)]
    )
    one = (n - 1) / m * float(truth.square().sum())
    squares = off.square().sum(1)
    spread = float(squares.std()) / seeds**0.5
    assert abs(float(squares.mean()) - one) <= 4 * spread
    assert spread < one / 5  # or the line above says nothing
    assert 0.2 * one / seeds <= float(off.mean(0).square().sum()) <= 3 * one / seeds


def test_the_noise_does_not_know_of_scales() -> None:
    """Entries of 1000 beside some of 0 are moved alike; F is linear, n = 4 and m = 2."""
    one, two = torch.tensor([[3.0, -1.0], [2.0, 0.5]], dtype=F64)
    problem = BilevelProblem(
        lambda i, o, b: i["w"] ** 2,
        lambda i, o, b: one @ o["large"] + two @ o["small"],
        {"w": leaf(0.0)},
        {"large": leaf([1000.0, 1000.0]), "small": leaf([0.0, 0.0])},
    )
    every = [run(problem, 0, num_directions=2, seed=s, rule=None) for s in range(60)]
    off = [
        torch.cat([r.outer_grads["large"] - one, r.outer_grads["small"] - two])
        for r in every
    ]
    squares = torch.stack(off).square().sum(1)
    expected = 1.5 * float(torch.cat([one, two]).square().sum())
    spread = float(squares.std()) / 60**0.5
    assert abs(float(squares.mean()) - expected) <= 4 * spread
    assert spread < expected / 5
    base = 2.0 ** (-52 / 3)
    length = max(base, base * base * 1000)
    assert every[0].info.fd_radius == pytest.approx(length, rel=1e-6)
    exact = run(problem, 0, num_directions="all", rule=None)
    assert exact.info.fd_radius == pytest.approx(1000 * base, rel=1e-6)


# -- losses that are values alone -------------------------------------------------------

POINTS = torch.linspace(0, 10, 101, dtype=F64)


def share_below(inner: Any, outer: Any, batch: Any) -> Tensor:
    """The share of points below w: a metric that counts, without any graph."""
    return (inner["w"].item() > POINTS).double().mean()


def test_a_metric_that_counts() -> None:
    # w is 2.05 ± 1/2: ten of 101 points lie between, and λ moved by ±1.
    found = run(half(share_below, 0.1), radius=1.0)
    assert abs(found.outer_grads["lam"].item() - 10 / 101 / 2) <= 1e-15
    assert abs(found.outer_loss - 21 / 101) <= 1e-15
    assert found.info.reason == ""


def f1(inner: Any, outer: Any, batch: Any) -> Any:
    """Minus F1, where of 0, 1, ..., 9 the positive are 3 and more, and w and more said."""
    points = np.arange(10)
    said, true = points > inner["w"].item(), points >= 3
    return -2 * (said & true).sum() / (said.sum() + true.sum())


def test_a_score_that_is_a_number_of_numpy() -> None:
    """w is 2.05 ± 1/2: of 2, ..., 9 seven are positive, F1 = 14/15; of 3, ..., 9 all."""
    problem = half(f1, 0.1)
    assert isinstance(f1(problem.inner_params, {}, None), np.floating)
    found = run(problem, radius=1.0)
    assert abs(found.outer_grads["lam"].item() + (1 - 14 / 15) / 2) <= 1e-15
    assert found.outer_loss == -1.0


def test_a_quantised_parameter_as_a_plain_number() -> None:
    """In quarters, w = 2.05 ± 1/2 is 5/2 and 3/2, for λ moved by ±1."""
    found = run(half(lambda i, o, b: round(4 * i["w"].item()) / 4, 0.1), radius=1.0)
    assert (found.outer_grads["lam"].item(), found.outer_loss) == (0.5, 2.0)
    coarse = run(
        half(
            lambda i, o, b: torch.fake_quantize_per_tensor_affine(
                i["w"], 0.25, 0, -128, 127
            ),
            0.1,
            torch.float32,
        ),
        radius=1.0,
    )
    assert (coarse.outer_grads["lam"].item(), coarse.outer_loss) == (0.5, 2.0)


def test_a_compiled_loss() -> None:
    """As for w³ above: 6 and μ²/8 too much."""
    cube = torch.compile(lambda w: w**3, backend="aot_eager")
    found = run(half(lambda i, o, b: cube(i["w"])), radius=0.5)
    assert abs(found.outer_grads["lam"].item() - 6 - 0.5**2 / 8) <= 1e-13


@pytest.mark.parametrize(("steps", "places"), [(0, 2), (1, 4)])
def test_a_constant_is_zeros_and_says_so(steps: int, places: int) -> None:
    says = f"the same value at all {places} places"
    with pytest.warns(NumericalWarning, match=f"{says}.*raise `radius`"):
        found = run(half(share_below, 0.1), steps)
    assert found.outer_grads["lam"] == 0.0
    assert says in found.info.reason


def test_no_entry_at_all_is_no_constant() -> None:
    problem = BilevelProblem(
        lambda i, o, b: (i["w"] ** 2) / 2 + o["lam"].sum(),
        lambda i, o, b: i["w"] ** 2,
        {"w": leaf(1.0)},
        {"lam": leaf([])},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        result = run(problem)
    assert result.outer_grads["lam"].shape == (0,)
    assert result.info.reason == ""


def test_an_optimizer_climbs_a_metric() -> None:
    """λ moves until all points are below w, by the metric alone."""
    problem = half(lambda i, o, b: -share_below(i, o, b))
    opt = BilevelOptimizer(
        problem,
        estimator=make_estimator("zeroth-order", num_steps=2, radius=1.0),
        inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        outer_optimizer=lambda p: torch.optim.SGD(p, lr=20.0),
        outer_warmup=0,
    )
    reports = [opt.step(None, None) for _ in range(40)]
    assert reports[-1].outer_loss is not None
    assert reports[-1].outer_loss < -0.95


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.linspace(0.5, 1, 6, dtype=F64))
        self.weight = nn.Parameter(torch.linspace(1, 2, 6, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.drop(x * self.scale) * self.weight).sum().sin()


def test_both_sides_see_the_same_dropout() -> None:
    torch.manual_seed(0)
    problem = BilevelProblem.from_module(Noisy(), lambda m, x: m(x), outer="scale")
    x = torch.ones(6, dtype=F64)
    found, truth = (
        make_estimator(name, num_steps=2, rule=SGD(0.1)).estimate(
            problem, inner_batch=x, outer_batch=x
        )
        for name in ("zeroth-order", "unrolled")
    )
    assert error(found.direct, truth.direct) <= 1e-8
    assert error(found.indirect, truth.indirect) <= 1e-8


# -- how far ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "lam", "length"),
    [
        (F64, 0.5, 2.0 ** (-52 / 3)),
        (torch.float32, 0.5, 2.0 ** (-23 / 3)),
        (torch.float32, -40.0, 40 * 2.0 ** (-23 / 3)),  # relative to what is large
        (torch.bfloat16, 0.5, 2.0 ** (-7 / 3)),
    ],
)
def test_the_radius_follows_the_dtype(
    dtype: torch.dtype, lam: float, length: float
) -> None:
    found = run(half(lambda i, o, b: i["w"] ** 2 + o["lam"], lam, dtype))
    assert found.info.fd_radius == pytest.approx(length, rel=1e-6)


def test_a_coarse_inner_loss_is_seen() -> None:
    def inner_loss(i: Any, o: Any, b: Any) -> Tensor:
        return ((i["w"].bfloat16() - o["lam"].bfloat16()) ** 2).float()

    problem = BilevelProblem(
        inner_loss,
        lambda i, o, b: i["w"] ** 2,
        {"w": leaf(4.0, torch.float32)},
        {"lam": leaf(0.5, torch.float32)},
    )
    assert run(problem).info.fd_radius == pytest.approx(2.0 ** (-7 / 3))


def test_what_rounding_leaves_of_a_step_is_divided_by() -> None:
    """In float32 3000 moves by a multiple of 2⁻¹²: F is linear, and its slope right."""
    problem = half(
        lambda i, o, b: 0 * i["w"] + (o["lam"] - 3000), 3000.0, torch.float32
    )
    assert run(problem, radius=4e-4).direct["lam"] == 1.0


def test_an_entry_that_rounding_holds_is_named() -> None:
    problem = half(lambda i, o, b: o["lam"] * i["w"], 1e6, torch.float32)
    with pytest.raises(HypergradError, match="1 of the 1 entries of 'lam' stay where"):
        run(problem, radius=1e-3)


# -- cost and records -------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "m"), [(1, 2), (3, 5)])
def test_four_values_a_direction_and_two_gradients_a_step(steps: int, m: int) -> None:
    case = network_case()
    made = make_estimator("zeroth-order", num_steps=steps, num_directions=m)
    opt = real_run(case, HANDS["sgd"], made, steps)
    info = estimate(opt, case).info
    assert info.n_forward == 1 + 4 * m + 2 * m * steps
    assert info.n_backward == 2 * m * steps
    assert info.n_hvp == 0
    assert made.needs.order == 0


@pytest.mark.parametrize("steps", [0, 3])
def test_progress_is_told_after_every_step(steps: int) -> None:
    """One entry, to both sides."""
    told: list[tuple[int, int]] = []
    make_estimator("zeroth-order", num_steps=steps, rule=HALF).estimate(
        half(lambda i, o, b: i["w"] + o["lam"]),
        inner_batch=None,
        outer_batch=None,
        on_progress=lambda *now: told.append(now),
    )
    assert told == [(done, 2 * steps) for done in range(1, 2 * steps + 1)]


def test_records_with_few_copies_give_the_same_bits() -> None:
    case = network_case()
    few, every = (
        make_estimator(
            "zeroth-order", num_steps=7, snapshots=n, rule=AdamW(0.05)
        ).estimate(
            case.problem(), inner_batch=case.batch(0), outer_batch=case.outer_batch
        )
        for n in (3, "all")
    )
    assert all(torch.equal(few.indirect[n], t) for n, t in every.indirect.items())


def test_moved_outer_parameters_are_told_of() -> None:
    case = network_case()
    made = make_estimator("zeroth-order", num_steps=3)
    opt = real_run(case, HANDS["sgd"], made, 3, moving=True)
    found = estimate(opt, case)
    truth = make_estimator("unrolled", num_steps=3).estimate(
        opt.problem,
        inner_batch=None,
        outer_batch=case.outer_batch,
        steps=opt.recorded_steps,
    )
    assert error(found.indirect, truth.indirect) <= 1e-7
    assert found.info.reason == truth.info.reason != ""


def test_each_estimate_draws_other_directions() -> None:
    problem = BilevelProblem(
        lambda i, o, b: (i["w"] - o["lam"]).square().sum(),
        lambda i, o, b: i["w"].sum(),
        {"w": leaf([0.0] * 20)},
        {"lam": leaf([0.0] * 20)},
    )
    made = make_estimator("zeroth-order", num_steps=1, num_directions=2, rule=HALF)
    first = made.estimate(problem, inner_batch=None, outer_batch=None)
    torch.manual_seed(5)
    again = made.estimate(problem, inner_batch=None, outer_batch=None)
    following = made.estimate(
        problem, inner_batch=None, outer_batch=None, state=first.state
    )
    values = [each.indirect["lam"] for each in (first, again, following)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


# -- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": -1}, "num_steps=-1"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"num_directions": 0}, "num_directions=0"),
        ({"num_directions": "few"}, "num_directions='few'"),
        ({"radius": 0.0}, r"radius=0\.0 must be positive"),
        ({"radius": -1.0}, r"radius=-1\.0"),
        ({"radius": float("inf")}, "radius=inf"),
        ({"radius": "far"}, "radius='far' must be a number"),
        ({"seed": -1}, "seed=-1"),
        ({"snapshots": 1}, "snapshots=1"),
        ({"rule": 3}, "rule=3"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make_estimator("zeroth-order", **settings)


def test_a_run_shorter_than_the_window() -> None:
    case = network_case()
    opt = real_run(case, HANDS["sgd"], make_estimator("zeroth-order", num_steps=2), 1)
    with pytest.raises(ValueError, match=r"looks back at 2 inner steps.*holds 1"):
        estimate(opt, case)


def test_without_steps_or_rule() -> None:
    with pytest.raises(ValueError, match="set rule="):
        run(half(lambda i, o, b: i["w"]), rule=None)


def test_a_metric_that_is_not_finite_on_one_side() -> None:
    problem = half(lambda i, o, b: (o["lam"] + 0 * i["w"]).log(), 0.2)
    with pytest.raises(NonFiniteError, match="outer loss is"):
        run(problem, radius=0.5)


@pytest.mark.parametrize("name", ["first-order", "unrolled", "penalty"])
def test_a_number_has_no_gradient(name: str) -> None:
    more = {} if name == "first-order" else {"num_steps": 1, "rule": HALF}
    problem = half(lambda i, o, b: i["w"].item())
    with pytest.raises(
        TypeError, match=r"outer_loss returned float, not.*estimator='zeroth-order'"
    ):
        make_estimator(name, **more).estimate(
            problem, inner_batch=None, outer_batch=None
        )


@pytest.mark.parametrize("bad", [True, "0.5", None, [0.5]])
def test_a_metric_that_is_no_number(bad: Any) -> None:
    with pytest.raises(
        TypeError, match=f"outer_loss returned {type(bad).__name__}, not a"
    ):
        run(half(lambda i, o, b: bad))


def test_an_inner_loss_that_is_a_number() -> None:
    problem = BilevelProblem(
        lambda i, o, b: i["w"].item(),  # pyright: ignore[reportArgumentType]
        lambda i, o, b: i["w"].item(),
        {"w": leaf(4.0)},
        {"lam": leaf(0.0)},
    )
    with pytest.raises(TypeError, match="inner_loss returned float, not a tensor"):
        run(problem)
