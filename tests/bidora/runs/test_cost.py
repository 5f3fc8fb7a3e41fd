"""How long a job will take: timed without a trace, and counted in gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bidora.runs.cost import (
    duration,
    inner_step_cost,
    memory_in_use,
    outer_step_cost,
    time_a_step,
)
from hypergrad import make_estimator


def test_timing_leaves_no_trace(finished: Callable[[str], Any]) -> None:
    run = finished("lora")
    data = run.job.sets["train"]
    before = {n: p.detach().clone() for n, p in run.job.model.named_parameters()}
    state = torch.random.get_rng_state()
    batch = run.job.collate([data[i] for i in range(4)])
    assert time_a_step(run.job.model, lambda: batch) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in run.job.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("name", "settings", "cost"),
    [
        ("first-order", {}, 1.0),
        ("darts", {}, 3.0),
        ("neumann", {"num_terms": 5}, 8.0),
        ("cg", {"max_iter": 20}, 23.0),
        ("zeroth-order", {"num_steps": 3, "num_directions": 2}, 16.0),
        ("forward", {"num_steps": 2, "num_directions": 4}, 13.0),
        ("penalty", {"num_steps": 10}, 32.0),
        ("f2sa", {"num_points": 2}, 6.0),
        ("pbgd-free", {}, 1.0),
    ],
)
def test_outer_costs_follow_the_number_of_products(
    name: str, settings: dict[str, Any], cost: float
) -> None:
    assert outer_step_cost(make_estimator(name, **settings)) == cost


def test_an_estimator_may_have_a_part_in_inner_steps() -> None:
    assert inner_step_cost(make_estimator("darts")) == 1.0
    assert inner_step_cost(make_estimator("pbgd-free")) == 2.0
    assert inner_step_cost(make_estimator("f2sa")) == 3.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 seconds"), (89.4, "89 seconds"), (90.0, "1.5 minutes")],
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_memory_is_that_of_the_process() -> None:
    # Python with torch takes some hundred MiB, and no machine of ours has a PiB.
    assert 2**26 < memory_in_use(torch.device("cpu")) < 2**50
