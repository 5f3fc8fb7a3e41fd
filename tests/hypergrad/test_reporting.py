"""Warnings: each kind once for a problem, at the caller's line; a user's own as ever."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch

from hypergrad import BilevelOptimizer, BilevelProblem, NumericalWarning, make_estimator
from hypergrad.reporting import once_for, report, silenced
from hypergrad.solvers import CGSolver
from hypergrad.testing import quadratic


def indefinite(scale: float = 1.0) -> BilevelProblem:
    def loss(inner: Any, outer: Any, batch: Any) -> Any:
        curved = inner["w"][0] ** 2 - (1 + (batch or 0) / 7) * inner["w"][1] ** 2
        return scale * curved + (inner["w"] * outer["m"]).sum()

    w, m = torch.tensor([0.3, 0.4]), torch.ones(2)
    return BilevelProblem(
        loss, loss, {"w": w.requires_grad_()}, {"m": m.requires_grad_()}
    )


def ours(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    return [w for w in caught if issubclass(w.category, NumericalWarning)]


def test_once_for_a_problem_though_the_numbers_change() -> None:
    problem, estimator = indefinite(), make_estimator("cg")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(50):
            estimator.estimate(problem, inner_batch=k, outer_batch=k)
        assert len(ours(caught)) == 1
        make_estimator("cg").estimate(indefinite(), inner_batch=1, outer_batch=1)
    assert len(ours(caught)) == 2  # another problem


def test_at_the_callers_own_line() -> None:
    problem = indefinite()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_estimator("cg").estimate(problem, inner_batch=1, outer_batch=1)
    (warning,) = ours(caught)
    assert warning.filename == __file__


def test_once_in_a_run_of_an_optimizer() -> None:
    opt = BilevelOptimizer(
        indefinite(),
        estimator="neumann",
        inner_optimizer=partial(torch.optim.SGD, lr=1e-3),
        outer_optimizer=partial(torch.optim.SGD, lr=1e-3),
        outer_warmup=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(10):
            assert opt.step(k, k).info.reason  # pyright: ignore[reportOptionalMemberAccess]
    (warning,) = ours(caught)
    assert warning.filename == __file__


def test_a_solver_alone_warns_each_time() -> None:
    def flipped(vector: Any) -> Any:
        return {"w": torch.tensor([1.0, -1.0]) * vector["w"]}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            CGSolver().solve(flipped, {"w": torch.ones(2)})
    assert len(ours(caught)) == 3


def test_a_users_own_warning_is_given_once_at_its_place() -> None:
    known = quadratic().problem

    def loss(inner: Any, outer: Any, batch: Any) -> Any:
        warnings.warn("mine, from within a loss", UserWarning, stacklevel=1)
        return known.inner_loss(inner, outer, batch)

    problem = BilevelProblem(
        loss, known.outer_loss, known.inner_params, known.outer_params
    )
    opt = BilevelOptimizer(
        problem,
        estimator="cg",
        inner_optimizer=partial(torch.optim.SGD, lr=1e-3),
        outer_optimizer=partial(torch.optim.SGD, lr=1e-3),
        outer_warmup=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        # Python's own default: once for each place.
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for _ in range(8):
            opt.step(None, None)
    assert len([w for w in caught if "mine" in str(w.message)]) == 1


def test_a_loss_runs_under_the_filters_of_its_caller() -> None:
    known, seen = quadratic().problem, []

    def loss(inner: Any, outer: Any, batch: Any) -> Any:
        seen.append((list(warnings.filters), warnings.showwarning))
        return known.inner_loss(inner, outer, batch)

    problem = BilevelProblem(
        loss, known.outer_loss, known.inner_params, known.outer_params
    )
    before = list(warnings.filters), warnings.showwarning
    make_estimator("cg").estimate(problem, inner_batch=None, outer_batch=None)
    make_estimator("auto").estimate(problem, inner_batch=None, outer_batch=None)
    assert seen
    assert all(each == before for each in seen)


def test_silence_and_once_nest() -> None:
    given: set[str] = set()
    with warnings.catch_warnings(record=True) as caught, once_for(given):
        warnings.simplefilter("always")
        with silenced():
            report("off by 1.0")
        report("off by 2.5e-3")
        report("off by 3")
        with once_for(set()):
            report("off by 4")
    assert [str(w.message) for w in ours(caught)] == ["off by 2.5e-3", "off by 4"]
    assert len(given) == 1
