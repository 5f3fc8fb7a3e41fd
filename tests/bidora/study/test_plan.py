"""What is due next: sweeps, then steps with what they chose, then equal time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from bidora.study.grid import Grid
from bidora.study.plan import Plan
from bidora.study.reading import grid_from_dict
from bidora.study.records import Cell, Record

LOW, HIGH = (("learning_rate", 0.01),), (("learning_rate", 0.1),)
SWEPT: dict[str, Any] = {"sweep": {"learning_rate": [0.01, 0.1]}}


def grid_of(**changed: Any) -> Grid:
    return grid_from_dict(
        {
            "settings": {"max_steps": 40},
            "tasks": {"a": {}, "b": {}},
            "methods": {"lora": SWEPT, "full": {}},
            "seeds": [0, 1],
            "sweep": {"seeds": [100, 101]},
            "reference": "lora",
            **changed,
        }
    )


def done(cell: Cell, **values: Any) -> Record:
    """Return the record of a run; `score` is its score on validation examples."""
    score = values.pop("score", 0.5)
    return Record(
        cell,
        values.pop("settings", {"max_steps": 40}),
        metric="f1",
        validation={"f1": score},
        test={"f1": 0.9},
        steps=values.pop("steps", 40),
        **values,
    )


def finish(plan: Plan, **values: Any) -> Plan:
    """Return the plan after all that is due was run."""
    added = tuple(done(cell, **values) for cell in plan.due)
    return replace(plan, records=(*plan.records, *added))


def test_sweeps_come_first_and_then_seed_by_seed_over_everything() -> None:
    plan = Plan(grid_of())
    first = [(c.purpose, c.seed, c.trial, c.task, c.method) for c in plan.due]
    assert first == [
        *(
            ("sweep", seed, trial, task, "lora")
            for seed in (100, 101)
            for trial in (LOW, HIGH)
            for task in ("a", "b")
        ),
        *(("steps", seed, (), task, "full") for seed in (0, 1) for task in ("a", "b")),
    ]
    assert plan.total == plan.remaining == 8 + 8
    plan = finish(plan)
    assert [(c.method, c.seed, c.task) for c in plan.due] == [
        ("lora", 0, "a"),
        ("lora", 0, "b"),
        ("lora", 1, "a"),
        ("lora", 1, "b"),
    ]
    assert plan.remaining == 4
    plan = finish(plan)
    assert plan.due == []
    assert plan.remaining == 0


def swept(scores: dict[Any, Any], **values: Any) -> Plan:
    """Return the plan of one task after a sweep, with scores by trial and seed."""
    plan = Plan(grid_of(tasks={"a": {}}, **values))
    records = tuple(
        done(c, score=scores[c.trial, c.seed]) for c in plan.due if c.purpose == "sweep"
    )
    return replace(plan, records=records)


def test_the_best_mean_on_validation_examples_is_chosen() -> None:
    nan = math.nan
    for scores, chosen in (
        ([0.5, 0.5, 0.9, 0.2], HIGH),  # 0.50 against 0.55
        ([0.5, 0.5, 0.9, 0.0], LOW),  # 0.50 against 0.45
        ([0.25, 0.75, 0.5, 0.5], LOW),  # equal: the first
        ([0.1, 0.1, nan, 0.9], LOW),
        ([nan, 0.1, nan, 0.9], None),
        ([math.inf, 0.1, 0.1, 0.1], HIGH),
    ):
        keys = [(trial, seed) for trial in (LOW, HIGH) for seed in (100, 101)]
        plan = swept(dict(zip(keys, scores, strict=True)))
        assert plan.outcomes["a", "lora", 0] == chosen, scores


def test_a_choice_waits_for_the_whole_sweep_and_ignores_what_is_reported() -> None:
    plan = swept({(t, s): 0.5 for t in (LOW, HIGH) for s in (100, 101)})
    group = ("a", "lora", 0)
    for i in range(4):
        less = replace(plan, records=plan.records[:i] + plan.records[i + 1 :])
        assert group not in less.outcomes
    # Reports of the other trial, better in every way, change nothing.
    better = [
        replace(done(Cell(*group, seed, "steps", HIGH), score=1.0), test={"f1": 1.0})
        for seed in (0, 1)
    ]
    assert replace(plan, records=(*plan.records, *better)).chosen[group] == LOW


def test_a_method_without_a_trial_that_ended_well_has_failed_and_is_shown() -> None:
    plan = Plan(grid_of(tasks={"a": {}}))
    failed = tuple(
        Record(c, {}, error="ValueError: nan") for c in plan.due if c.purpose == "sweep"
    )
    plan = replace(plan, records=failed)
    assert [c.method for c in plan.due] == ["full", "full"]
    assert plan.remaining == 2
    study = plan.study()
    assert ("a", "lora", 0) not in study.chosen
    shown = [r for r in study.records if r.cell.purpose == "steps"]
    assert [(r.cell.method, r.cell.seed, r.failed) for r in shown] == [
        ("lora", 0, True),
        ("lora", 1, True),
    ]
    assert study.stand_ins == {r.cell for r in shown}
    assert study.served == frozenset()
    assert {(c.method, c.seed) for c in study.missing} == {("full", 0), ("full", 1)}
    (note,) = [n for n in study.notes if n.startswith("lora on a:")]
    assert "no trial of the sweep" in note
    assert "ValueError: nan" in note
    assert any("4 of 4 runs failed, such as lora on a, seed" in n for n in study.notes)


def test_nothing_is_swept_where_there_is_nothing_to_choose() -> None:
    plan = Plan(grid_of(methods={"lora": {"sweep": {"learning_rate": [0.1]}}}))
    assert {(c.purpose, c.trial) for c in plan.due} == {("steps", HIGH)}


# -- equal time ---------------------------------------------------------------------


def timed(seconds: dict[str, list[float]], **changed: Any) -> Plan:
    """Return the plan of one task after equal steps, with seconds by method and seed."""
    plan = Plan(
        grid_of(
            tasks={"a": {}},
            methods={name: {} for name in seconds},
            seeds=[*range(len(seconds["lora"]))],
            equal=["steps", "time"],
            **changed,
        )
    )
    records = tuple(done(c, seconds=seconds[c.method][c.seed]) for c in plan.due)
    return replace(plan, records=records)


def test_steps_are_scaled_to_the_time_of_the_reference() -> None:
    # Within the seeds, dora takes 2, 2.2 and 0.1 times as long: seeds run side by side.
    plan = timed({"lora": [10.0, 100.0, 90.0], "dora": [20.0, 220.0, 9.0]})
    assert plan.steps_in_time == {("a", "lora", 0): None, ("a", "dora", 0): 20}
    assert [(c.purpose, c.method, c.seed) for c in plan.due] == [
        ("time", "dora", seed) for seed in (0, 1, 2)
    ]
    settings = plan.grid.settings_of(plan.due[0], 20)
    assert settings.max_steps == 20
    faster = timed({"lora": [10.0], "dora": [4.0]})
    assert faster.steps_in_time["a", "dora", 0] == 100


@pytest.mark.parametrize(
    ("own", "steps"), [(9.1, None), (10.9, None), (8.9, 45), (11.2, 36)]
)
def test_runs_of_about_equal_time_serve_as_they_are(
    own: float, steps: int | None
) -> None:
    plan = timed({"lora": [10.0, 10.0], "dora": [own, own]})
    group = ("a", "dora", 0)
    assert plan.steps_in_time[group] == steps
    study = plan.study()
    of_time = [r for r in study.records if r.cell.purpose == "time"]
    served = {r.cell.method for r in of_time}
    assert served == ({"lora", "dora"} if steps is None else {"lora"})
    assert (group in study.served) == (steps is None)
    assert study.stand_ins == {record.cell for record in of_time}
    for record in of_time:
        twin = replace(record, cell=replace(record.cell, purpose="steps"))
        assert twin in study.records
    assert plan.remaining == (0 if steps is None else 2)


def test_time_is_held_equal_on_the_tasks_that_say_so() -> None:
    plan = Plan(
        grid_of(
            tasks={"a": {"equal": ["steps", "time"]}, "b": {}},
            methods={"lora": {}, "dora": {}},
            seeds=[0],
        )
    )
    assert plan.total == 5
    seconds = {"lora": 10.0, "dora": 20.0}
    records = tuple(done(c, seconds=seconds[c.method]) for c in plan.due)
    plan = replace(plan, records=records)
    assert plan.steps_in_time == {("a", "lora", 0): None, ("a", "dora", 0): 20}
    assert [(c.purpose, c.task, c.method) for c in plan.due] == [("time", "a", "dora")]


def test_a_method_without_steps_serves_as_it_is() -> None:
    plan = timed({"lora": [10.0], "probe": [0.2]})
    without = tuple(
        replace(r, steps=0) if r.cell.method == "probe" else r for r in plan.records
    )
    plan = replace(plan, records=without)
    assert plan.steps_in_time["a", "probe", 0] is None
    assert plan.due == []


def stopped(steps: int, seconds: float, **changed: Any) -> Plan:
    """Return the plan after equal steps of a method with early stopping."""
    patient = {"method": "lora", "early_stopping_patience": 2, "eval_steps": 10}
    plan = Plan(
        grid_of(
            tasks={"a": {}},
            methods={"lora": {}, "patient": patient},
            equal=["steps", "time"],
            **changed,
        )
    )
    records = tuple(
        done(c, seconds=10.0)
        if c.method == "lora"
        else done(c, steps=steps, seconds=seconds)
        for c in plan.due
    )
    return replace(plan, records=records)


def test_runs_that_stopped_early_serve_as_they_are_and_it_is_said() -> None:
    plan = stopped(20, 5.0)
    group = ("a", "patient", 0)
    assert plan.early_end(group) == 20
    assert plan.steps_in_time[group] is None
    assert plan.due == []
    study = plan.study()
    assert group in study.served
    (note,) = [n for n in study.notes if n.startswith("patient on a:")]
    assert "early stopping ended its runs after 20 steps (median)" in note
    # One that took all of its steps can be given more.
    plan = stopped(40, 5.0)
    assert plan.early_end(group) is None
    assert plan.steps_in_time[group] == 80
    assert not [n for n in plan.study().notes if n.startswith("patient on a:")]


def test_a_reference_that_took_no_time_is_no_measure() -> None:
    plan = timed({"lora": [0.0], "dora": [20.0]})
    assert plan.steps_in_time == {}
    assert plan.due == []
    assert plan.remaining == 0
    study = plan.study()
    assert {r.cell.purpose for r in study.records} == {"steps"}
    assert any("lora on a: no time of training was measured" in n for n in study.notes)
    # A method of no time serves as it is.
    plan = timed({"lora": [10.0], "dora": [0.0]})
    assert plan.steps_in_time["a", "dora", 0] is None


def test_time_waits_for_all_seeds_of_both_methods() -> None:
    plan = timed({"lora": [10.0, 10.0], "dora": [20.0, 20.0]})
    for i in range(4):
        less = replace(plan, records=plan.records[:i] + plan.records[i + 1 :])
        assert less.steps_in_time.get(("a", "dora", 0)) is None
        assert all(c.purpose == "steps" for c in less.due)
        # What there is of the reference counts at its own time.
        assert ("a", "lora", 0) in less.study().served
        assert less.remaining == 3


def test_the_steps_of_equal_time_stay_once_a_run_has_them() -> None:
    plan = timed({"lora": [10.0, 10.0], "dora": [20.0, 20.0]})
    first = done(plan.due[0], settings={"max_steps": 20})
    grown = replace(
        plan,
        grid=replace(plan.grid, tasks=(replace(plan.grid.tasks[0], seeds=(0, 1, 2)),)),
        records=(*plan.records, first),
    )
    more = tuple(done(c, seconds=99.0) for c in grown.due if c.purpose == "steps")
    grown = replace(grown, records=(*grown.records, *more))
    assert grown.steps_in_time["a", "dora", 0] == 20
    assert [(c.purpose, c.seed) for c in grown.due] == [("time", 1), ("time", 2)]


def test_runs_at_the_time_of_another_reference_are_due_again() -> None:
    plan = timed({"lora": [10.0], "dora": [20.0], "full": [40.0]})
    of_lora = {"max_steps": 20, "reference": "lora"}
    plan = finish(plan, seconds=10.0, settings=of_lora)
    assert plan.due == []
    changed = replace(plan, grid=replace(plan.grid, reference="full"))
    assert changed.steps_in_time == {
        ("a", "full", 0): None,
        ("a", "dora", 0): 80,
        ("a", "lora", 0): 160,
    }
    assert [(c.purpose, c.method) for c in changed.due] == [
        ("time", "lora"),
        ("time", "dora"),
    ]
    study = changed.study()
    assert {r.cell.method for r in study.records if r.cell.purpose == "time"} == {
        "full"
    }
    assert any("2 records of this folder belong to no run" in n for n in study.notes)
    of_full = {"max_steps": 80, "reference": "full"}
    changed = finish(changed, seconds=40.0, settings=of_full)
    assert changed.due == []
    assert len([r for r in changed.study().records if r.cell.purpose == "time"]) == 3
    # Records of before the reference was kept are of the grid's, whichever that is.
    bare = tuple(
        replace(record, settings={"max_steps": 20}) if record.seconds == 10.0
        and record.cell.purpose == "time" else record
        for record in plan.records
    )  # fmt: skip
    assert replace(plan, records=bare).due == []
    kept = replace(plan, records=bare, grid=replace(plan.grid, reference="full"))
    assert {cell.method for cell in kept.due} == {"lora"}


def test_without_a_measured_reference_no_time_is_equal() -> None:
    plan = timed({"lora": [10.0], "dora": [20.0]})
    failed = tuple(
        replace(r, error="OSError") if r.cell.method == "lora" else r
        for r in plan.records
    )
    plan = replace(plan, records=failed)
    assert plan.due == []
    assert plan.remaining == 0
    elsewhere = Plan(
        grid_of(methods={"lora": {"tasks": ["b"]}, "full": {}}, equal=["steps", "time"])
    )
    assert any("lora is not run on a" in note for note in elsewhere.study().notes)


def test_seeds_that_failed_have_no_part_in_the_medians() -> None:
    plan = timed({"lora": [10.0, 500.0], "dora": [20.0, 20.0]})
    records = tuple(
        replace(r, error="died") if r.seconds == 500.0 else r for r in plan.records
    )
    assert replace(plan, records=records).steps_in_time["a", "dora", 0] == 20


def test_missing_runs_are_those_of_the_whole_grid() -> None:
    plan = Plan(grid_of(equal=["steps", "time"]), (), ["b"], ["full"])
    missing = plan.study().missing
    # The trial is not chosen yet; the reference has no runs of its own at equal time.
    assert sorted({(c.method, c.purpose, c.trial) for c in missing}) == [
        ("full", "steps", ()),
        ("full", "time", ()),
        ("lora", "steps", ()),
    ]
    assert {c.task for c in missing} == {"a", "b"}
    assert len(missing) == 2 * 3 * 2
    plan = finish(finish(Plan(grid_of())))
    assert plan.study().missing == ()


# -- what is told -------------------------------------------------------------------


def test_unequal_budgets_and_settings_left_out_are_told() -> None:
    grid = grid_of(
        settings={"max_steps": 40, "lora_r": 8},
        methods={
            "lora": {"sweep": {"learning_rate": [0.01, 0.1], "lora_alpha": [1.0, 2.0]}},
            "dora": SWEPT,
            "full": {},
        },
        sweep={"trials": 3},
    )
    notes = Plan(grid).study(["First."]).notes
    assert notes[0] == "First."
    assert notes[1:5] == (
        "full has no use for lora_r, and ran without.",
        "lora: 3 of the 4 combinations of its swept settings were tried, drawn by a "
        "fixed seed.",
        "dora has 2 combinations of its swept settings, fewer than the 3 trials that a "
        "method may have.",
        "Nothing was swept for full.",
    )


def test_ranges_that_are_narrower_are_told() -> None:
    grid = grid_of(
        methods={
            "lora": {"sweep": {"learning_rate": [0.3, 0.1, 1.2]}},
            "dora": {"sweep": {"learning_rate": [0.01, 0.02]}},
            "full": {"sweep": {"learning_rate": [0.1, 1.2]}},
        }
    )
    (note,) = [n for n in Plan(grid).study().notes if "a factor of" in n]
    assert note == (
        "learning_rate was tried over a factor of 2 of dora, and of 12 of lora: what lies "
        "beyond was not open to it."
    )


def test_choices_at_the_end_of_what_was_tried_are_told() -> None:
    rates = [0.1, 0.3, 1.2]
    grid = grid_of(methods={"lora": {"sweep": {"learning_rate": rates}}, "dora": SWEPT})
    best = {"a": 1.2, "b": 0.3}  # the largest, and one within
    plan = Plan(grid)
    sweep = tuple(
        done(c, score=float(dict(c.trial)["learning_rate"] == best[c.task]))
        for c in plan.due
        if c.purpose == "sweep"
    )
    notes = replace(plan, records=sweep).study().notes
    (note,) = [n for n in notes if "beyond it" in n]
    assert note == (
        "The largest learning_rate that was tried was chosen for lora on a: one beyond it "
        "may do better."
    )


def test_records_of_another_grid_are_left_aside_and_counted() -> None:
    plan = finish(Plan(grid_of(methods={"lora": {}})))
    smaller = replace(plan, grid=grid_of(methods={"lora": {}}, seeds=[0]))
    study = smaller.study()
    assert len(study.records) == 2
    assert smaller.due == []
    assert any("2 records of this folder belong to no run" in n for n in study.notes)


def test_chosen_tasks_and_methods_alone_are_due() -> None:
    plan = Plan(grid_of(), (), ["b"], ["full"])
    assert {(c.task, c.method) for c in plan.due} == {("b", "full")}
    assert plan.total == plan.remaining == 2
