"""Forward mode: what `unrolled` gives, along directions of λ; and its noise, by formula."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hypergrad import (
    BilevelProblem,
    HypergradError,
    NonFiniteError,
    NumericalWarning,
    make_estimator,
    take_steps,
    tree,
)
from hypergrad.batches import Accumulated
from hypergrad.compare._measure import collected, peak_bytes
from hypergrad.estimators._directions import Directions
from hypergrad.rules import SGD, AdamW, Rule
from hypergrad.rules.base import Pushforward
from hypergrad.tree import Params
from tests.hypergrad.estimators.truths import (
    HANDS,
    Start,
    estimate,
    hand_indirect,
    network_case,
    path_of,
    real_run,
    reweighting_case,
    warm,
)
from tests.hypergrad.test_learned import SETUPS, worst
from tests.hypergrad.test_learned import problem as problem_of
from tests.hypergrad.test_whole_run import linear
from tests.tolerances import error

F64 = torch.float64
N = 20
"""Entries of λ below: a log weight for each of 20 examples."""


def unrolled_of(opt: Any, case: Any, steps: int) -> Any:
    return make_estimator("unrolled", num_steps=steps).estimate(
        opt.problem,
        inner_batch=None,
        outer_batch=case.outer_batch,
        steps=opt.recorded_steps,
    )


# -- along every entry: exact -----------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("hand", ["momentum", "adamw"])
def test_it_is_what_unrolled_gives(hand: str, steps: int) -> None:
    case = network_case()
    start = warm(case, HANDS[hand], 20)
    made = make_estimator("forward", num_steps=steps, num_directions="all")
    opt = real_run(case, HANDS[hand], made, steps, start=start)
    found, truth = estimate(opt, case), unrolled_of(opt, case, steps)
    assert error(found.indirect, truth.indirect) <= 1e-12
    assert error(found.direct, truth.direct) == 0.0


@pytest.mark.parametrize("hand", ["nesterov", "adamw-clip"])
def test_it_is_what_autograd_gives_through_the_written_out_steps(hand: str) -> None:
    case = network_case()
    start: Start = warm(case, HANDS[hand], 20)
    opt = real_run(case, HANDS[hand], make_estimator("forward"), 5, start=start)
    truth = hand_indirect(case, HANDS[hand], start, path_of(case, 5, False), case.outer)
    assert error(estimate(opt, case).indirect, truth) <= 1e-12  # λ has 6 entries


@pytest.mark.parametrize("product", ["forward-over-reverse", "finite-difference"])
def test_other_products(product: str) -> None:
    case = network_case()
    start = warm(case, HANDS["momentum"], 20)
    made = make_estimator("forward", num_steps=3, product=product)
    opt = real_run(case, HANDS["momentum"], made, 3, start=start)
    bar = 1e-12 if product == "forward-over-reverse" else 1e-8
    assert (
        error(estimate(opt, case).indirect, unrolled_of(opt, case, 3).indirect) <= bar
    )


def test_several_micro_batches() -> None:
    case = network_case()
    batch = Accumulated([case.batch(0), case.batch(1)], weights=[0.3, 0.7])
    forward, unrolled = (
        make_estimator(name, num_steps=3, rule=SGD(0.05, momentum=0.9)).estimate(
            case.problem(), inner_batch=batch, outer_batch=case.outer_batch
        )
        for name in ("forward", "unrolled")
    )
    assert error(forward.outer_grads, unrolled.outer_grads) <= 1e-14


def test_moved_outer_parameters_are_told_of() -> None:
    case = network_case()
    opt = real_run(
        case, HANDS["sgd"], make_estimator("forward", num_steps=3), 3, moving=True
    )
    found, truth = estimate(opt, case), unrolled_of(opt, case, 3)
    assert error(found.indirect, truth.indirect) <= 1e-12
    assert found.info.reason == truth.info.reason
    assert "common shift" in found.info.reason


# -- λ in the optimizer and in the start ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "product"),
    [*((name, "exact") for name in SETUPS), ("momentum", "finite-difference")],
)
def test_learned_settings_and_starts(name: str, product: str) -> None:
    case, setup = network_case(), SETUPS[name]
    more: dict[str, Any] = {"learned": {"schedule": [1.0, 0.7, 0.4]}}
    made = problem_of(case, setup, learn_start="bias", **more)
    # Not from the first step: Adam's does not depend on its betas.
    settings = {"num_steps": 3, "rule": setup.rule(), "product": product}
    found = make_estimator("forward", num_directions="all", **settings).estimate(
        made, inner_batch=case.batch(0), outer_batch=case.outer_batch
    )
    known = make_estimator("unrolled", **{**settings, "product": "exact"}).estimate(
        made, inner_batch=case.batch(0), outer_batch=case.outer_batch
    )
    assert {"log_schedule", "start of bias"} <= set(found.indirect)
    # From nothing, Adam's first step cancels terms of its own size.
    bar = 1e-9 if product == "exact" else 1e-6
    assert worst(found.indirect, known.indirect) <= bar
    assert found.info.unused == known.info.unused


def test_a_window_that_does_not_begin_where_the_start_is_learned() -> None:
    case = network_case()
    made = problem_of(case, SETUPS["sgd"], learn_start=True)
    steps, end = take_steps(made, [case.batch(0)] * 3, SGD(0.1))
    with (
        made.at(end),
        pytest.raises(HypergradError, match="Forward looks back at is num"),
    ):
        make_estimator("forward", num_steps=2).estimate(
            made, inner_batch=None, outer_batch=case.outer_batch, steps=steps
        )


# -- cost -------------------------------------------------------------------------------


def virtual(case: Any, **settings: Any) -> Any:
    made = make_estimator("forward", **{"rule": SGD(0.05, momentum=0.9), **settings})
    return made.estimate(
        case.problem(), inner_batch=case.batch(0), outer_batch=case.outer_batch
    )


@pytest.mark.parametrize("directions", [1, 4])
def test_a_gradient_and_a_product_for_each_direction_and_step(directions: int) -> None:
    info = virtual(network_case(), num_steps=3, num_directions=directions).info
    # Three virtual steps, three graphs, and the gradient of f.
    assert info.n_forward == 3 + 3 + 1
    assert info.n_backward == 3 + 3 * (1 + directions) + 1
    assert info.n_hvp == 3 * directions


def test_records_with_few_copies_give_the_same_bits() -> None:
    case = network_case()
    few, every = (virtual(case, num_steps=9, snapshots=n) for n in (3, "all"))
    assert all(torch.equal(few.indirect[n], t) for n, t in every.indirect.items())
    assert few.info == every.info  # nothing was taken again
    problem = case.problem()
    steps, _ = take_steps(problem, [case.batch(0)] * 9, SGD(0.05), snapshots=3)
    assert sum(step.is_snapshot for step in steps) == 1


def test_a_window_that_starts_between_two_copies() -> None:
    case = network_case()
    problem = case.problem()
    batches = [case.batch(i) for i in range(8)]
    steps, end = take_steps(problem, batches, SGD(0.05, momentum=0.9), snapshots=3)
    with problem.at(end):
        found, truth = (
            make_estimator(name, num_steps=3, snapshots=3).estimate(
                problem, inner_batch=None, outer_batch=case.outer_batch, steps=steps
            )
            for name in ("forward", "unrolled")
        )
    assert error(found.indirect, truth.indirect) <= 1e-14


def wide(numel: int) -> BilevelProblem:
    w = torch.zeros(numel, requires_grad=True)
    lam = torch.ones((), requires_grad=True)
    return BilevelProblem(
        lambda i, o, b: (i["w"] - o["lam"]).square().sum(),
        lambda i, o, b: i["w"].square().sum(),
        {"w": w},
        {"lam": lam},
    )


def test_memory_does_not_grow_with_the_steps() -> None:
    problem, peaks = wide(10**5), []
    for steps in (4, 4, 32):
        made = make_estimator(
            "forward", num_steps=steps, snapshots=3, rule=SGD(0.1, momentum=0.5)
        )

        def run(made: Any = made) -> None:
            made.estimate(problem, inner_batch=None, outer_batch=None)

        with collected():
            peaks.append(peak_bytes(run, [torch.device("cpu")]))
    _, few, many = peaks
    assert few is not None
    assert many is not None
    copy = 4 * 10**5  # bytes of w; 28 more records of w and momentum would be 56 of it
    assert many - few <= copy


# -- long ways --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 31), (F64, 61)])
def test_growth_beyond_the_precision_is_said(dtype: torch.dtype, most: int) -> None:
    """η h = 3: of w after k steps the derivative is 1 - (-2)^k, first 3, -3 and 9.

    After K steps it grew by about 2^K/9, which is 1/ε for each of K - 2 at
    K - log2(9(K - 2)) = 23 in float32 and 52 in float64: between 31 and 32, 61 and 62.
    """
    made = make_estimator("forward", num_steps=most, rule=SGD(1.0))
    batches: dict[str, Any] = {"inner_batch": None, "outer_batch": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        result = made.estimate(linear(3.0, dtype), **batches)
    assert result.info.reason == ""
    assert error(result.outer_grads["lam"], torch.tensor(1 - (-2.0) ** most)) <= 1e-7
    beyond = make_estimator("forward", num_steps=most + 1, rule=SGD(1.0))
    says = (
        rf"from 9 after inner step 3 to .* after step {most + 1} of {most + 1}: by mo"
    )
    with pytest.warns(NumericalWarning, match=says):
        result = beyond.estimate(linear(3.0, dtype), **batches)
    assert "lower it, clip inner gradients" in result.info.reason


def test_what_each_step_adds_is_no_explosion() -> None:
    """η h = 1/512 in bfloat16, 1/ε = 128: 200 steps add up to 165 times the first."""
    made = make_estimator("forward", num_steps=200, rule=SGD(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        result = made.estimate(
            linear(1 / 512, torch.bfloat16), inner_batch=None, outer_batch=None
        )
    assert result.outer_grads["lam"] > 128 / 512
    assert result.info.reason == ""


@pytest.mark.parametrize("settings", [None, {"lr": 1e-2}, {"betas": (0.9, 0.999)}])
def test_the_first_step_of_adam_is_no_measure_of_growth(
    settings: dict[str, Any] | None,
) -> None:
    """It is the sign of the gradient, whatever λ makes of it: a derivative of rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randn(40)
    lam = {} if settings else {"penalty": torch.tensor(-1.0, requires_grad=True)}

    def inner_loss(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        fit = (x[:20] @ inner["w"] - y[:20]).square().mean()
        return fit + sum(t.exp() for t in outer.values()) * inner["w"].square().sum()

    problem = BilevelProblem(
        inner_loss,
        lambda i, o, b: (x[20:] @ i["w"] - y[20:]).square().mean(),
        {"w": torch.randn(5, requires_grad=True)},
        lam,
        inner_settings=settings,
    )
    batches: dict[str, Any] = {"inner_batch": None, "outer_batch": None}
    made, back = (
        make_estimator(name, num_steps=20, rule=AdamW(1e-2))
        for name in ("forward", "unrolled")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        result = made.estimate(problem, **batches)
    assert result.info.reason == ""
    truth = back.estimate(problem, **batches).outer_grads
    # Derivatives of 20 steps, each with the rounding of some ten operations.
    for name, t in result.outer_grads.items():
        assert error(t, truth[name]) <= 20 * 10 * torch.finfo(torch.float32).eps


def test_an_overflow_on_the_way_names_the_step() -> None:
    """Before step 128 it is -2^127, and three times that is too much in float32."""
    told: list[int] = []
    with pytest.raises(
        NonFiniteError, match=r"going forward, at inner step 128 of 200: .*grew .*-fold"
    ):
        make_estimator("forward", num_steps=200, rule=SGD(1.0)).estimate(
            linear(3.0, torch.float32),
            inner_batch=None,
            outer_batch=None,
            on_progress=lambda done, _: told.append(done),
        )
    assert told[-1] < 200  # and the rest of the way is not taken in vain


def test_progress_is_told_after_every_step() -> None:
    """20 entries go through the two steps 8 at a time."""
    made, problem, data = drawn("all")
    told: list[tuple[int, int]] = []
    made.estimate(problem, **data, on_progress=lambda *now: told.append(now))
    assert told == [(done, 6) for done in range(1, 7)]


# -- along random directions ------------------------------------------------------------


def drawn(directions: Any, **settings: Any) -> Any:
    case = reweighting_case()
    made = make_estimator(
        "forward", num_steps=2, num_directions=directions, rule=SGD(0.5), **settings
    )
    return (
        made,
        case.problem(),
        {"inner_batch": case.batch(0), "outer_batch": case.outer_batch},
    )


def test_few_directions_sum_up_slopes_of_the_gradient() -> None:
    exact, problem, data = drawn("all")
    truth = exact.estimate(problem, **data)
    made, _, _ = drawn(3, seed=5)
    found = made.estimate(problem, **data)
    total: Params = tree.zeros_like(truth.indirect)
    for number in range(3):
        u = Directions(truth.indirect, 3, 5, 0)[number]
        assert {abs(x) for x in u["log_weight"].tolist()} == {1.0}
        total = tree.add(total, u, alpha=tree.dot(truth.indirect, u) / 3)
    assert error(found.indirect, total) <= 1e-13
    assert error(found.direct, truth.direct) == 0.0


def test_it_is_unbiased_with_the_noise_of_the_formula() -> None:
    """E ĝ = ∇ and E‖ĝ - ∇‖² = (n-1)/m ‖∇‖² for m random signs in n entries."""
    exact, problem, data = drawn("all")
    truth = exact.estimate(problem, **data).indirect["log_weight"]
    size, m, seeds = float(truth.square().sum()), 4, 40
    found = []
    for seed in range(seeds):
        made, _, _ = drawn(m, seed=seed)
        found.append(made.estimate(problem, **data).indirect["log_weight"])
    off = torch.stack(found) - truth
    one = (N - 1) / m * size
    squares = off.square().sum(1)
    # The mean of 40 squares, within four of its standard errors.
    assert abs(squares.mean() - one) <= 4 * squares.std() / seeds**0.5
    assert squares.std() / seeds**0.5 < one / 5  # or the line above says nothing
    # An unbiased mean errs by one/seeds, squared; a bias of |∇| would be 8 times that.
    assert 0.3 * one / seeds <= float(off.mean(0).square().sum()) <= 2.5 * one / seeds


def test_the_formula_on_many_draws() -> None:
    gradient = torch.linspace(-1, 2, 7, dtype=F64)
    lam, seeds, m = {"a": gradient[:3], "b": gradient[3:].reshape(2, 2)}, 800, 2
    errors = []
    for seed in range(seeds):
        found = Directions(lam, m, seed, 0)
        u = [torch.cat([t.reshape(-1) for t in found[i].values()]) for i in range(m)]
        total = found.sum([float(gradient @ each) for each in u])
        errors.append(torch.cat([t.reshape(-1) for t in total.values()]) - gradient)
    off = torch.stack(errors)
    one = 6 / m * float(gradient.square().sum())
    squares = off.square().sum(1)
    assert abs(float(squares.mean()) - one) <= 4 * float(squares.std()) / seeds**0.5
    assert float(off.mean(0).square().sum()) <= 3 * one / seeds


def test_as_many_directions_as_entries_are_the_entries() -> None:
    exact, problem, data = drawn("all")
    made, _, _ = drawn(N)
    found, truth = made.estimate(problem, **data), exact.estimate(problem, **data)
    assert torch.equal(found.indirect["log_weight"], truth.indirect["log_weight"])
    assert found.info == truth.info
    assert found.state == {}


def test_each_estimate_draws_others_and_none_from_the_program() -> None:
    made, problem, data = drawn(2)
    torch.manual_seed(1)
    first = made.estimate(problem, **data)
    torch.manual_seed(2)
    again = made.estimate(problem, **data)
    following = made.estimate(problem, **data, state=first.state)
    other, _, _ = drawn(2, seed=1)
    values = [
        each.indirect["log_weight"]
        for each in (first, again, following, other.estimate(problem, **data))
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[3])
    assert int(following.state["draws"]) == 2


# -- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_directions": 0}, "num_directions=0"),
        ({"num_directions": -3}, "num_directions=-3"),
        ({"num_directions": "auto"}, "num_directions='auto' must be 'all' or a whole"),
        ({"num_directions": 2.5}, "num_directions=2.5"),
        ({"num_directions": True}, "num_directions=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"snapshots": 2}, "snapshots=2"),
        ({"rule": "sgd"}, "rule='sgd'"),
        ({"product": "fast"}, "'fast' is unknown"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make_estimator("forward", **settings)


def test_a_run_shorter_than_the_window() -> None:
    case = network_case()
    opt = real_run(case, HANDS["sgd"], make_estimator("forward", num_steps=2), 1)
    with pytest.raises(ValueError, match=r"looks back at 2 inner steps.*holds 1"):
        estimate(opt, case)


def test_without_steps_or_rule() -> None:
    with pytest.raises(ValueError, match="set rule="):
        make_estimator("forward").estimate(
            network_case().problem(), inner_batch=None, outer_batch=None
        )


class OneWay(Rule):
    """A step without a forward direction."""

    def apply(self, params: Any, state: Any, grads: Any) -> Any:
        return tree.add(params, grads, alpha=-0.1), state

    def pullback(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any
    ) -> Any:
        raise NotImplementedError

    def learning_rates(self, params: Any) -> dict[str, float]:
        return dict.fromkeys(params, 0.1)

    def config(self) -> dict[str, Any]:
        return {}


def test_a_rule_without_forward_direction() -> None:
    with pytest.raises(HypergradError, match="OneWay has no forward direction"):
        virtual(network_case(), rule=OneWay())


class Kinked(OneWay):
    """A step by sqrt(g), whose derivative at 0 is infinite."""

    def apply(self, params: Any, state: Any, grads: Any) -> Any:
        return {n: t - grads[n].sqrt() for n, t in params.items()}, state

    def pushforward(
        self,
        params: Any,
        state: Any,
        grads: Any,
        params_dot: Any,
        state_dot: Any,
        grads_dot: Any,
        settings_dot: Any = None,
    ) -> Pushforward:
        moved = {n: -t / (2 * grads[n].sqrt()) for n, t in grads_dot.items()}
        return Pushforward(tree.add(params_dot, moved), {})


def test_a_step_without_a_derivative_names_the_parameter() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    lam = torch.zeros((), dtype=F64, requires_grad=True)
    problem = BilevelProblem(
        lambda i, o, b: (o["lam"] * i["w"]).sum(),
        lambda i, o, b: i["w"].square().sum(),
        {"w": w},
        {"lam": lam},
    )
    made = make_estimator("forward", num_steps=1, rule=Kinked())
    with pytest.raises(NonFiniteError, match=r"derivative of an inner step.*in w:"):
        made.estimate(problem, inner_batch=None, outer_batch=None)
