"""Learned settings among hooks, schedulers and hands that set the optimizer's groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    NumericalWarning,
    make_estimator,
)
from hypergrad.testing.snapshot import snapshot_of

F64 = torch.float64


def made(
    settings: dict[str, Any], kind: Any = torch.optim.SGD, **own: Any
) -> BilevelOptimizer:
    """g = f = w²/2 from w = 4, and an outer step after every second inner one."""
    problem = BilevelProblem(
        lambda i, o, b: i["w"] ** 2 / 2,
        lambda i, o, b: i["w"] ** 2 / 2,
        {"w": torch.tensor(4.0, dtype=F64, requires_grad=True)},
        {},
        inner_settings=settings,
    )
    return BilevelOptimizer(
        problem,
        estimator=make_estimator("unrolled", num_steps=2),
        inner_optimizer=partial(kind, **{"lr": 0.5, **own}),
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
        outer_warmup=0,
    )


def hook(opt: BilevelOptimizer, name: str, change: Callable[[Any], Any]) -> Any:
    def act(optimizer: Any, *_: Any) -> None:
        group = optimizer.param_groups[0]
        group[name] = change(group[name])

    return opt.inner.register_step_pre_hook(act)


def w_of(opt: BilevelOptimizer) -> float:
    return opt.problem.inner_params["w"].item()


# -- hooks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "own", "name", "value", "says"),
    [
        (
            {"lr": 0.5},
            {},
            "lr",
            0.25,
            r"lr of parameter group 0 is 0\.25 .* and 0\.5 is learned.*by a scheduler",
        ),
        ({"schedule": [0.5, 1.0]}, {}, "lr", 1.0, r"is 1\.0 .* and 0\.25 is learned"),
        (
            {"momentum": 0.5},
            {"momentum": 0.1},
            "momentum",
            0.9,
            r"momentum of parameter group 0 is 0\.9 .* and 0\.5 is.* 'momentum' out of",
        ),
    ],
)
def test_a_hook_that_sets_what_is_learned_is_refused(
    settings: Any, own: Any, name: str, value: float, says: str
) -> None:
    """With a rate of its own the true derivative in log lr is 0: w is the hook's."""
    opt = made(settings, **own)
    handle = hook(opt, name, lambda _: value)
    before = snapshot_of((opt.problem.tensors, opt.param_groups, dict(opt.state)))
    for call in (opt.inner_step, partial(opt.step, None)):
        with pytest.raises(ValueError, match=says):
            call(None)
    now = snapshot_of((opt.problem.tensors, opt.param_groups, dict(opt.state)))
    assert now == before
    assert (opt.n_inner_steps, opt.recorded_steps) == (0, ())
    handle.remove()
    opt.inner_step(None)
    assert opt.n_inner_steps == 1


def test_a_hook_that_sets_what_is_learned_to_the_same_is_none() -> None:
    opt = made({"lr": 0.25})
    rate = float(opt.problem.outer_params["log_lr"].detach().exp())
    hook(opt, "lr", lambda _: rate)
    opt.inner_step(None)
    assert abs(w_of(opt) - 3.0) <= 1e-14


def test_what_a_hook_changes_of_other_settings_stays() -> None:
    """Momentum is learned, and the hook halves the rate for good: 1/4, 1/8, 1/16."""
    opt = made({"momentum": 0.5}, momentum=0.1)
    hook(opt, "lr", lambda rate: rate / 2)
    rates = []
    for _ in range(3):
        opt.inner_step(None)
        rates.append(opt.recorded_steps[-1].rule.learning_rates({"w": None})["w"])  # pyright: ignore[reportArgumentType]
    assert rates == [0.25, 0.125, 0.0625]
    group = opt.inner.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.0625, 0.1)


def test_a_rate_that_is_a_tensor_and_not_learned_stays_one() -> None:
    rate = torch.tensor(0.5, dtype=F64)
    opt = made({"momentum": 0.5}, momentum=0.1, lr=rate)
    opt.inner_step(None)
    assert opt.inner.param_groups[0]["lr"] is rate
    assert w_of(opt) == 2.0


# -- schedules ----------------------------------------------------------------------------


def test_a_schedule_of_a_learned_momentum_is_told() -> None:
    opt = made({"lr": 0.1, "betas": (0.8, 0.99)}, torch.optim.AdamW, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt.inner, max_lr=0.1, total_steps=8)
    with pytest.warns(
        NumericalWarning,
        match=r"betas of parameter group 0 .* from \(0\.9, 0\.999\) to \(0\.95, 0\.999\), "
        r"which has no effect: .*cycle_momentum=False",
    ):
        opt.inner_step(None)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error", NumericalWarning)
        schedule.step()
        opt.inner_step(None)


def test_the_factor_of_one_cycle_is_that_of_its_own_first_rate() -> None:
    """max_lr / div_factor counts as 1, so that the peak is div_factor times the rate."""
    opt = made({"lr": 0.01})
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            opt.inner, 0.1, total_steps=10, div_factor=20, cycle_momentum=False
        )
        seen = []
        for _ in range(9):
            opt.inner_step(None)
            rule = opt.recorded_steps[-1].rule
            seen.append(rule.learning_rates({"w": None})["w"])  # pyright: ignore[reportArgumentType]
            schedule.step()
    assert abs(seen[0] - 0.01) <= 1e-15
    assert abs(max(seen) - 0.2) <= 1e-15


def test_a_decay_that_a_hand_changed_is_told_unless_it_acts() -> None:
    opt = made({"weight_decay": 0.1}, weight_decay=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        opt.inner_step(None)
        opt.inner.param_groups[0]["weight_decay"] = 0.0  # a decay that is off stays off
        here = w_of(opt)
        opt.inner_step(None)
        assert w_of(opt) == here / 2
    opt.inner.param_groups[0]["weight_decay"] = 0.5
    with pytest.warns(
        NumericalWarning,
        match=r"weight_decay of .* went from 1\.0 to 0\.5, which has no",
    ):
        opt.inner_step(None)


def test_the_last_factor_stays_where_the_search_has_ended() -> None:
    opt = made({"schedule": [1.0, 0.5]})
    for _ in range(2):
        opt.step(None, None)
    with pytest.raises(
        HypergradError, match=r"freeze_outer.*after which the last fact"
    ):
        opt.step(None, None)
    opt.freeze_outer()
    for _ in range(3):
        here = w_of(opt)
        opt.step(None, None)
        assert abs(w_of(opt) - 0.75 * here) <= 1e-15  # 1 - 0.5·0.5
    assert opt.inner.param_groups[0]["lr"] == 0.5
    opt.begin_run()  # and a run begins with the first
    here = w_of(opt)
    opt.step(None, None)
    assert abs(w_of(opt) - here / 2) <= 1e-15


# -- a start under another name -----------------------------------------------------------


class Tied(nn.Module):
    """One weight, `e.weight`, which is `h.weight` too."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Linear(2, 2, bias=False)
        self.h = nn.Linear(2, 2, bias=False)
        self.h.weight = self.e.weight


@pytest.mark.parametrize("names", [["h.weight"], "h.*", ["e.weight", "h.*"], True])
def test_a_start_of_a_tied_weight_goes_by_all_its_names(names: Any) -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        return model.h(model.e(batch)).square().mean()

    problem = BilevelProblem.from_module(Tied(), loss, learn_start=names)
    assert problem.aliases == {"h.weight": "e.weight"}
    assert problem.inner_start == {"e.weight": "start of e.weight"}
    with pytest.raises(ValueError, match=r"'g\.\*' fits no inner parameter"):
        BilevelProblem.from_module(Tied(), loss, learn_start="g.*")
