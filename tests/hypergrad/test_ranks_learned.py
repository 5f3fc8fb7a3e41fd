"""Learned settings and starts on ranks that share the data out: what one process finds.

A rate, a decay, a momentum and the start are outer parameters that no loss sees, so their
derivatives come from averaged gradients and products alone, without a message of their own.
Two ranks run in every test run, four with `-m distributed`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hypergrad import BilevelOptimizer, BilevelProblem, make_estimator
from hypergrad.rules import SGD, AdamW, Rule
from tests.faults import differences
from tests.hypergrad.rank_cases import (
    LAYOUTS,
    bits,
    functional,
    joined,
    look,
    own,
    plain,
    train,
    values,
)
from tests.hypergrad.ranks import Outcomes, on_ranks, outcomes_of, recorded
from tests.tolerances import error

F64 = torch.float64
STEPS = 3
EXACT = 1e-12
"""Sums in another order: some hundred roundings in each of a few steps, which contract."""

RULES: dict[str, tuple[Rule, dict[str, Any]]] = {
    # What is learned replaces what a rule says.
    "sgd": (
        SGD(9.0, momentum=0.1, weight_decay=9.0),
        {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1},
    ),
    "adamw": (
        AdamW(9.0, weight_decay=9.0),
        {"lr": 0.05, "betas": (0.8, 0.95), "schedule": [1.0, 0.7, 0.4]},
    ),
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "unrolled": {},
    "forward": {"num_directions": "all"},
}


def problem(learned: dict[str, Any]) -> BilevelProblem:
    made = functional()
    return BilevelProblem(
        made.inner_loss,
        made.outer_loss,
        made.inner_params,
        made.outer_params,
        inner_settings=learned,
        learn_start=["shift", "rare"],
    )


# -- what each rank does, and one process with all of the data ---------------------------


def estimate(name: str, rule: str, made: BilevelProblem, inner: Any, outer: Any) -> Any:
    estimator = make_estimator(
        name, num_steps=STEPS, rule=RULES[rule][0], **ESTIMATORS[name]
    )
    return plain(estimator.estimate(made, inner_batch=inner, outer_batch=outer))


def estimated(name: str, rule: str, layout: str) -> dict[str, Any]:
    made, rank = problem(RULES[rule][1]), dist.get_rank()
    inner, outer = (LAYOUTS[layout](seed, rank) for seed in (1, 2))
    before = look(made)
    with recorded() as sent:
        result = estimate(name, rule, made, inner, outer)
    return {
        "result": result,
        "sent": [m.call for m in sent if m.dtypes == {F64}],
        "changed": differences(before, look(made)),
    }


def optimizer(name: str, rule: str) -> BilevelOptimizer:
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule]
    told, learned = RULES[rule]
    more: Any = {"momentum": 0.1} if rule == "sgd" else {}
    return BilevelOptimizer(
        problem(learned),
        estimator=make_estimator(name, num_steps=STEPS, **ESTIMATORS[name]),
        inner_optimizer=partial(kind, lr=9.0, weight_decay=told.weight_decay, **more),  # pyright: ignore[reportAttributeAccessIssue]
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
        max_grad_norm=0.5,
    )


def several_runs(opt: BilevelOptimizer, data: Callable[[int], Any]) -> dict[str, Any]:
    reports = []
    for run in range(3):
        opt.begin_run()
        reports += train(opt, data, range(run * STEPS, (run + 1) * STEPS))
    return {"reports": reports, "values": values(opt)}


def trained(name: str, rule: str, layout: str) -> dict[str, Any]:
    return several_runs(optimizer(name, rule), own(layout))


APART: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "value": ({"lr": 0.1}, {"lr": 0.2}),
    "one of two": ({"betas": (0.8, 0.9)}, {"betas": (0.8, 0.99)}),
    "factor": ({"schedule": [1.0, 0.5]}, {"schedule": [1.0, 0.25]}),
    "which": ({"lr": 0.1}, {"weight_decay": 0.1}),
    "number": ({"schedule": [1.0, 0.5]}, {"schedule": [1.0, 0.5, 0.25]}),
    "start": ({"learn_start": True}, {"learn_start": ["first"]}),
}


def apart() -> dict[str, str]:
    """Make optimizers of settings that differ in the last rank, then of equal ones."""
    last = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, str] = {}
    for name, pair in APART.items():
        found[name] = refused(pair[int(last)])
        found[f"same {name}"] = refused(pair[1])
    return found


def refused(given: dict[str, Any]) -> str:
    made, start = functional(), given.get("learn_start", False)
    learned = {n: v for n, v in given.items() if n != "learn_start"}
    made = BilevelProblem(
        made.inner_loss,
        made.outer_loss,
        made.inner_params,
        made.outer_params,
        inner_settings=learned,
        learn_start=start,
    )
    try:
        BilevelOptimizer(
            made,
            estimator="unrolled",
            inner_optimizer=partial(torch.optim.AdamW, lr=0.05),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        )
    except ValueError as failed:
        return str(failed)
    return ""


ESTIMATES = {
    f"estimate, {name}, {rule}, {layout}": partial(estimated, name, rule, layout)
    for name in ESTIMATORS
    for rule in RULES
    for layout in LAYOUTS
}
TRAININGS = {
    f"train, {name}, {rule}, uneven": partial(trained, name, rule, "uneven")
    for name in ESTIMATORS
    for rule in RULES
}
CASES: dict[str, Callable[[], Any]] = {**ESTIMATES, **TRAININGS, "apart": apart}


@pytest.fixture
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    return outcomes_of(request, tmp_path_factory)


# -- tests -------------------------------------------------------------------------------


@on_ranks(ESTIMATES, [case for case in ESTIMATES if case.endswith("uneven")])
def test_estimate(outcomes: Outcomes, case: str) -> None:
    _, name, rule, layout = case.split(", ")
    found, ranks = outcomes.results(case), outcomes.ranks
    results = [{**each["result"], "info": None} for each in found]
    for other in results[1:]:
        assert differences(bits(results[0]), bits(other)) == []
    assert [each["changed"] for each in found] == [[]] * ranks
    data = [joined(layout, seed, ranks) for seed in (1, 2)]
    made = problem(RULES[rule][1])
    truth, got = estimate(name, rule, made, *data), results[0]
    assert {"log_lr", "start of shift"} <= made.beside_losses
    for n in made.outer_params:  # each for itself: a rate is one number among many
        known = truth["outer_grads"][n]
        assert known.any()
        assert error(got["outer_grads"][n], known) <= EXACT, n
    # A message for each gradient and product, as without anything learned.
    directions = sum(t.numel() for t in made.outer_params.values())
    counts = {
        "unrolled": STEPS + 1 + STEPS,
        "forward": STEPS + 1 + STEPS * directions,
    }
    assert {*found[0]["sent"]} == {"all_reduce"}
    assert len(found[0]["sent"]) == counts[name]


@on_ranks(TRAININGS, TRAININGS)
def test_training(outcomes: Outcomes, case: str) -> None:
    _, name, rule, layout = case.split(", ")
    found = outcomes.results(case)
    for other in found[1:]:
        assert differences(bits(found[0]["values"]), bits(other["values"])) == []
    opt = optimizer(name, rule)
    begun = values(opt)
    truth = several_runs(opt, partial(joined, layout, ranks=outcomes.ranks))
    assert sum(r["outer_step"] for r in truth["reports"]) == 3
    for report, true in zip(found[0]["reports"], truth["reports"], strict=True):
        assert report["outer_step"] == true["outer_step"]
        assert report["skipped"] is None
    for n, known in truth["values"].items():
        assert not torch.equal(known, begun[n]), n
        assert error(found[0]["values"][n], known) <= EXACT, n


@on_ranks(["apart"], ["apart"])
def test_ranks_that_learn_from_different_values_are_refused(
    outcomes: Outcomes, case: str
) -> None:
    found = outcomes.results(case)
    assert [differences(found[0], other) for other in found[1:]] == [[]] * (
        outcomes.ranks - 1
    )
    for name in APART:
        assert "ranks differ in how their optimizers are set up" in found[0][name], name
        assert not found[0][f"same {name}"], name
    # exp and log are rounded, so that the numbers are those of the logarithm.
    told = found[0]["factor"]
    assert "learned={'log_schedule': [0.0, -0.69" in told
    assert "learned={'log_schedule': [0.0, -1.38" in told
