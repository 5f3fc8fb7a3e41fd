"""Inner runs that end before their first outer step: told, and told when it matters."""

from __future__ import annotations

import io
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    NumericalWarning,
    make_estimator,
)


def made(
    estimator: Any, every: int | None = None, warmup: int = 0, outer_loss: Any = None
) -> BilevelOptimizer:
    problem = BilevelProblem(
        lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2,
        outer_loss or (lambda i, o, b: i["w"] ** 2 / 2),
        {"w": torch.tensor(1.0, requires_grad=True)},
        {"lam": torch.tensor(1.0, requires_grad=True)},
    )
    return BilevelOptimizer(
        problem,
        estimator=estimator,
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_every=every,
        outer_warmup=warmup,
    )


def unrolled(steps: int) -> Any:
    return make_estimator("unrolled", num_steps=steps)


def told(opt: BilevelOptimizer, runs: list[int], *, freeze: bool = False) -> list[str]:
    """Return what is said where runs of these lengths end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NumericalWarning)
        for steps in runs:
            opt.begin_run()
            for _ in range(steps):
                opt.step(None, None)
        if freeze:
            opt.freeze_outer()
        else:
            opt.begin_run()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("estimator", "every", "run", "says"),
    [
        (
            unrolled(20),
            None,
            10,
            "run ended at step 10 .* did not move: the first one follows step 20 of a run "
            r"\(by outer_every=20 and the 20 steps that Unrolled looks back at\).* Look "
            "back at 10 steps at most, with outer_every no larger, or take runs of at "
            "least 20",
        ),
        (
            "neumann",
            8,
            7,
            r"follows step 8 of a run \(by outer_every=8\), .* Call outer_step\(\) at the "
            "end of each run, lower outer_every, or take runs of at least 8 steps",
        ),
        # Due at step 6, when the 7 steps are not there, and at 12.
        (
            unrolled(7),
            6,
            11,
            r"follows step 12 .*outer_every=6 and the 7 .* Call outer_",
        ),
    ],
)
def test_runs_without_an_outer_step_are_told_once(
    estimator: Any, every: int | None, run: int, says: str
) -> None:
    opt = made(estimator, every)
    (text,) = told(opt, [run] * 4)
    assert opt.n_outer_steps == 0
    assert torch.equal(opt.problem.outer_params["lam"], torch.tensor(1.0))
    assert re.search(says, text), text
    opt = made(estimator, every)
    # One step more, and there is nothing to say.
    longer = {10: 20, 7: 8, 11: 12}[run]
    assert told(opt, [longer] * 2) == []
    assert opt.n_outer_steps == 2


def test_it_can_be_an_error_that_changes_nothing() -> None:
    opt = made(unrolled(20))
    for _ in range(10):
        opt.step(None, None)
    here = opt.problem.inner_params["w"].item()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        with pytest.raises(NumericalWarning, match="run ended at step 10"):
            opt.begin_run()
    assert len(opt.recorded_steps) == 10
    assert opt.problem.inner_params["w"].item() == here


def test_runs_that_have_their_outer_step_are_not_told() -> None:
    opt = made(unrolled(5), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        opt.begin_run()  # before any step
        opt.begin_run()
        for _ in range(2):
            for _ in range(10):
                opt.step(None, None)
            opt.outer_step(None)  # by hand
            opt.begin_run()
        for _ in range(10):  # a run that is to have none, such as that of a test task
            opt.inner_step(None)
        opt.begin_run()
    # The warmup is that of all runs, and passes with them.
    opt = made(unrolled(5), warmup=12)
    assert told(opt, [5, 5, 5]) == []
    assert opt.n_outer_steps == 1


def test_an_outer_step_that_was_skipped_was_due() -> None:
    scale = [1.0]
    opt = made(unrolled(2), 4, outer_loss=lambda i, o, b: scale[0] * i["w"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        for _ in range(3):
            opt.step(None, None)
        scale[0] = float("nan")
        assert opt.outer_step(None).skipped
        opt.begin_run()
    assert (opt.n_outer_steps, opt.n_skipped) == (0, 1)


def test_a_search_that_ends_without_an_outer_step() -> None:
    (text,) = told(made("neumann", 4, warmup=10), [9], freeze=True)
    assert "step 12 of a run (by outer_every=4 and outer_warmup=10)" in text
    assert told(made("neumann", 4, warmup=10), [12], freeze=True) == []
    # A last run that was cut short is no search in vain.
    assert told(made("neumann", 4), [4, 2], freeze=True) == []


def test_a_run_that_was_resumed_in_its_middle() -> None:
    opt, other = made("neumann", 8), made("neumann", 8)
    for _ in range(8):
        opt.step(None, None)
    opt.begin_run()
    for _ in range(3):
        opt.step(None, None)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        other.step(None, None)
    with pytest.warns(NumericalWarning, match="ended at step 5 without an outer"):
        other.begin_run()
