"""One set of defaults, the budgets, and after which steps the outer level moves."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from bidora import BiDoRAOptimizer, BiDoRATrainingArguments, defaults
from bidora.budget import budget_defaults, outer_schedule, outer_steps_due
from bidora.errors import UserError
from bidora.runs.settings import TrainSettings
from hypergrad import make_estimator


def of(budget: str, **changed: Any) -> dict[str, Any]:
    given = {"steps": 90, "batch_size": 12, "validation_fraction": 0.2, **changed}
    return budget_defaults(budget, **given)


def test_what_the_budgets_stand_for() -> None:
    assert of("full") == {
        "estimator": "darts",
        "estimator_settings": {},
        "outer_every": 1,
        "outer_batch_size": 12,
        "steps": 90,
        "retrain_steps": 90,
        "retrain": "fresh",
        "orthogonality": 1e-5,
    }
    assert of("economical", steps=91) == {
        "estimator": "darts",
        "estimator_settings": {"product_fraction": 0.25},
        "outer_every": 4,
        "outer_batch_size": 3,  # a fifth is held back, a quarter of the other part
        "steps": 46,
        "retrain_steps": 61,  # two thirds
        "retrain": "warm",
        "orthogonality": 0.0,
    }
    halves = of("economical", validation_fraction=0.5)
    assert halves["outer_batch_size"] == 12


def test_an_unknown_budget() -> None:
    with pytest.raises(UserError, match=r"unknown --budget 'cheap'.*economical, full"):
        of("cheap")


def test_all_have_the_same_defaults(tmp_path: Path) -> None:
    """Literal here, so that a change of one of them is seen."""
    args = BiDoRATrainingArguments(str(tmp_path), max_steps=100)
    settings = args.bidora_settings()
    signature = inspect.signature(BiDoRAOptimizer).parameters
    optimizer = {name: p.default for name, p in signature.items()}
    assert (args.budget, defaults.BUDGET) == ("economical", "economical")
    assert settings["estimator"] == optimizer["estimator"] == "darts"
    assert args.learning_rate == optimizer["inner_lr"] == 5e-4
    assert settings["outer_learning_rate"] == 5e-4
    assert args.weight_decay == optimizer["inner_weight_decay"] == 0.1
    assert settings["outer_weight_decay"] == 0.1
    # None stands for that of the inner level.
    assert optimizer["outer_lr"] is optimizer["outer_weight_decay"] is None
    assert args.max_grad_norm == optimizer["max_grad_norm"] == 1.0
    assert settings["outer_warmup_steps"] == optimizer["outer_warmup"] == 10
    assert settings["outer_every"] == 4
    assert settings["orthogonality"] is optimizer["orthogonality"] is None
    assert defaults.ORTHOGONALITY == of("full")["orthogonality"] == 1e-5
    assert of("economical")["orthogonality"] == 0.0
    assert (args.warmup_steps, args.validation_fraction) == (0.06, 0.2)
    assert settings["retrain"] == "warm"


def test_the_command_has_them_too(tmp_path: Path) -> None:
    settings = TrainSettings()
    args = BiDoRATrainingArguments(str(tmp_path))
    for name in ("budget", "weight_decay", "validation_fraction", "estimator"):
        assert getattr(settings, name) == getattr(args, name), name
    assert settings.warmup_ratio == args.warmup_steps
    assert settings.orthogonality is args.orthogonality is None


def due(steps: int, every: int, warmup: int, lookback: int = 0) -> list[int]:
    """Count one by one, as the optimizer does."""
    return [
        step
        for step in range(1, steps + 1)
        if step % every == 0 and step >= max(warmup, lookback)
    ]


def test_how_many_outer_steps_are_due() -> None:
    cases = [
        (steps, every, warmup, lookback)
        for steps in (1, 3, 8, 24)
        for every in (1, 3, 4, 9)
        for warmup in (0, 1, 4, 10)
        for lookback in (0, 5)
    ]
    for steps, every, warmup, lookback in cases:
        found = outer_steps_due(steps, every=every, warmup=warmup, lookback=lookback)
        assert found == len(due(steps, every, warmup, lookback))


@pytest.mark.parametrize(
    ("steps", "given", "expected"),
    [
        (240, {}, (4, 10)),
        (40, {}, (4, 10)),
        (24, {}, (4, 6)),  # a quarter
        (8, {}, (4, 2)),
        (3, {}, (3, 0)),  # one outer step, after the last
        (1, {}, (1, 0)),
        (12, {"warmup": 12}, (4, 12)),  # as given
        (12, {"every": 1, "warmup": 10}, (1, 10)),
        (6, {"usual_every": 5, "lookback": 5}, (5, 1)),
    ],
)
def test_what_is_left_open_is_scaled(
    steps: int, given: dict[str, Any], expected: tuple[int, int]
) -> None:
    asked: dict[str, Any] = {"every": None, "warmup": None, "usual_every": 4, **given}
    assert outer_schedule(steps, **asked) == expected


@pytest.mark.parametrize(
    ("steps", "given", "said"),
    [
        (8, {"warmup": 10}, "outer_every=4 with outer_warmup_steps=10 .* the 8 steps"),
        (8, {"every": 9}, "outer_every=9 with outer_warmup_steps=2 leaves no outer"),
        (4, {"lookback": 5, "usual_every": 5}, "looks back at 5 steps,.* the 4 steps"),
    ],
)
def test_a_search_without_an_outer_step_is_refused(
    steps: int, given: dict[str, Any], said: str
) -> None:
    asked: dict[str, Any] = {"every": None, "warmup": None, "usual_every": 4, **given}
    with pytest.raises(UserError, match=said):
        outer_schedule(steps, **asked)


def test_an_estimator_that_looks_back_farther_steps_less_often(tmp_path: Path) -> None:
    def every(**settings: Any) -> int:
        args = BiDoRATrainingArguments(str(tmp_path), **settings)
        return args.bidora_settings()["outer_every"]

    six: dict[str, Any] = {
        "estimator": "unrolled",
        "estimator_settings": {"num_steps": 6},
    }
    assert make_estimator("unrolled", num_steps=6).needs.lookback == 6
    assert every(**six) == every(budget="full", **six) == 6
    assert every(estimator="sama") == 4
    assert every(estimator="sama", budget="full") == 1
    assert every(outer_every=2, **six) == 2
