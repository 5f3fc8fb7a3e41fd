"""The benchmark of what held-back data can do for magnitudes, over two steps each."""

from __future__ import annotations

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
        "FOLDS": 2,
        "ITERATIONS": 1,
    }.items():
        monkeypatch.setattr(held_back, name, value)


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
    if name == "fixed":
        assert all(torch.equal(x, torch.ones_like(x)) for x in moved.values())
        return
    assert all((x - 1).abs().max() > 1e-4 for x in moved.values())
    if name == "whole-run-factors":
        # Adam's first step is its rate whatever the gradient: e^0.05 or its inverse.
        for x in moved.values():
            assert x.log().abs().numpy() == pytest.approx(0.05, rel=1e-3)
            assert x.max() - x.min() < 1e-6
    if name.startswith("whole-run"):
        (told,) = result["iterations"]
        assert len(told) == 2
        assert all(fold["indirect"] > 0 and fold["direct"] > 0 for fold in told)


def test_folds_hold_each_example_back_once(job: held_back.Job) -> None:
    folds = held_back._folds(job, 2)
    assert sorted(i for fold in folds for i in fold) == job.everything
