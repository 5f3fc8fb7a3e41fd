"""The benchmark of what held-back data can do for magnitudes, over two steps each."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import held_back
from bidora.dora import magnitudes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning"),
]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "STEPS": 2,
        "SEARCH_STEPS": 4,
        "OUTER_EVERY": 2,
        "ITERATIONS": 1,
    }.items():
        monkeypatch.setattr(held_back, name, value)
    folds = held_back._folds  # of which there are two at least
    monkeypatch.setattr(
        held_back, "_folds", lambda job, count: folds(job, max(count, 2))[:count]
    )


@pytest.fixture(scope="module")
def job() -> held_back.Job:
    return held_back.Job(100, 6e-4, ("query",))


@pytest.mark.parametrize("name", held_back.VARIANTS)
def test_each_variant_moves_the_magnitudes_that_it_should(
    name: str, job: held_back.Job
) -> None:
    job.restart(job.everything, {})
    first = job.values()
    result = held_back.VARIANTS[name](job)
    assert 0 < result["accuracy"] < 1
    moved = {n: p.detach() / first[n] for n, p in magnitudes(job.model).items()}
    if name in ("fixed", "whole-run-rates"):
        assert all(torch.equal(x, torch.ones_like(x)) for x in moved.values())
    if name == "whole-run-rates":
        (told,) = result["iterations"]
        assert told["indirect"] > 0 == told["direct"]
        # Adam's first step is its rate, and less where a gradient is near its epsilon.
        for kind, rate in result["rates"].items():
            change = math.log(rate / told["rates"][kind])
            assert 0.25 < abs(change) < 0.3 * 1.001
    if name in ("fixed", "whole-run-rates"):
        return
    assert all((x - 1).abs().max() > 1e-4 for x in moved.values())
    if name == "whole-run-factors":
        # Adam's first step is its rate whatever the gradient: e^0.05 or its inverse.
        for x in moved.values():
            assert x.log().abs().numpy() == pytest.approx(0.05, rel=1e-3)
            assert x.max() - x.min() < 1e-6
    if name.startswith("whole-run"):
        (told,) = result["iterations"]
        assert told["indirect"] > 0
        assert told["direct"] > 0


def test_the_loss_of_what_is_held_back_has_no_dropout(job: held_back.Job) -> None:
    batch = job.batch(job.everything[:8])
    without = {**batch, "without_dropout": True}
    first = held_back._loss(job.model, without)
    assert not job.model.training
    assert held_back._loss(job.model, without) == first
    assert held_back._loss(job.model, batch) != first
    assert job.model.training


def test_folds_hold_each_example_back_once(job: held_back.Job) -> None:
    folds = held_back._folds(job, 2)
    assert sorted(i for fold in folds for i in fold) == job.everything
