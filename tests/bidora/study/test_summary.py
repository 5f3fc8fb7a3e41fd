"""The numbers of a comparison's report, against sums done by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from bidora.study._cautions import cautions
from bidora.study._words import advice, cells, pairs, statements
from bidora.study.records import Record
from bidora.study.results import Difference, Summary, Table
from bidora.study.summary import summarise
from tests.bidora.study.made_up import full_study, record

# With two values, the t distribution is Cauchy's: its quantile is a tangent.
T_ONE = math.tan(0.475 * math.pi)


def only(summary: Summary) -> Table:
    (table,) = summary.tables
    return table


def difference(found: Difference | None) -> Difference:
    assert found is not None
    return found


def test_mean_and_interval_over_seeds() -> None:
    table = only(summarise([record("lora", 0.6, seed=0), record("lora", 0.8, seed=1)]))
    result = table.result("sst2", "lora")
    assert result is not None
    assert result.score is not None
    # Half of the distance is the standard error of two values.
    half = T_ONE * 10
    assert result.score.mean == pytest.approx(70)
    assert result.score.low == pytest.approx(70 - half)
    assert result.score.high == pytest.approx(70 + half)
    assert result.score.n == 2


def test_difference_is_that_of_pairs() -> None:
    # Means alone would mislead: lora's third seed has no partner.
    table = only(
        summarise(
            [
                *(record("lora", s, seed=i) for i, s in enumerate((0.5, 0.6, 0.1))),
                *(record("bidora", s, seed=i) for i, s in enumerate((0.6, 0.8))),
            ],
            reference="lora",
        )
    )
    result = table.result("sst2", "bidora")
    assert result is not None
    gap = difference(result.over_reference)
    assert gap.mean == pytest.approx(15)
    assert (gap.n, gap.wins, gap.ties, gap.losses) == (2, 2, 0, 0)
    assert gap.low == pytest.approx(15 - T_ONE * 5)
    # Two of four patterns of signs are as far from zero. One method: Holm leaves p alone.
    assert (gap.p, gap.adjusted) == (0.5, 0.5)
    assert gap.verdict == "no difference shown"
    assert not gap.decidable
    base = table.result("sst2", "lora")
    assert base is not None
    assert base.over_reference is None


def test_wins_ties_and_losses() -> None:
    scores = {"lora": (0.5, 0.5, 0.5), "dora": (0.75, 0.5, 0.25)}
    table = only(
        summarise(
            [record(m, s, seed=i) for m, v in scores.items() for i, s in enumerate(v)],
            reference="lora",
        )
    )
    gap = difference(table.average("dora").over_reference)
    assert (gap.wins, gap.ties, gap.losses) == (1, 1, 1)
    assert gap.verdict == "no difference shown"


def found(pairs: int, **gaps: float) -> dict[str, Difference]:
    """Compare methods that are always ahead, or behind, by about as much."""
    records = [record("lora", 0.5, seed=i) for i in range(pairs)]
    for name, gap in gaps.items():
        records += [
            record(name, 0.5 + gap * (1 + i / 100), seed=i) for i in range(pairs)
        ]
    table = only(summarise(records, reference="lora"))
    return {
        name: difference(result.over_reference)
        for name in gaps
        if (result := table.result("sst2", name))
    }


def test_verdicts_follow_the_adjusted_p() -> None:
    # All six signs agree: that is 2 of 64 patterns.
    alone = found(6, dora=0.1)["dora"]
    assert (alone.p, alone.adjusted, alone.verdict) == (1 / 32, 1 / 32, "better")
    assert found(6, dora=-0.1)["dora"].verdict == "worse"
    both = found(6, dora=0.1, full=0.2)
    assert (both["dora"].p, both["dora"].adjusted) == (1 / 32, 1 / 16)
    assert both["dora"].verdict == "no difference shown"
    low = both["dora"].low
    assert low is not None
    assert low > 0  # the interval is not adjusted


def test_what_no_outcome_could_show_is_not_decidable() -> None:
    # The least p is 1 / 16 with five pairs, and 1 / 32 with six.
    assert not found(5, dora=0.1)["dora"].decidable
    assert found(6, dora=0.1)["dora"].decidable
    assert not found(6, dora=0.1, full=0.1)["dora"].decidable
    assert found(7, dora=0.1, full=0.1)["dora"].decidable


def test_ties_can_decide_nothing() -> None:
    # Six pairs, of which four differ: no p is below 1 / 8.
    records = [record("lora", 0.5, seed=i, probe=None) for i in range(6)]
    records += [
        record("dora", 0.5 + i / 100 * (i > 1), seed=i, probe=None) for i in range(6)
    ]
    summary = summarise(records, reference="lora")
    gap = difference(only(summary).average("dora").over_reference)
    assert (gap.n, gap.ties, gap.p, gap.decidable) == (6, 2, 1 / 8, False)
    (standing,) = statements(summary)
    assert standing[1].startswith("too few pairs to tell with 100 examples")
    (sentence,) = advice(summary)
    assert "6 pairs of runs, 2 ties among them, cannot show a difference" in sentence
    assert "n pairs that differ" in cautions(summary)[0]
    same = [record(m, 0.5, seed=i) for m in ("lora", "dora") for i in range(8)]
    table = only(summarise(same, reference="lora"))
    assert not difference(table.average("dora").over_reference).decidable


def test_a_verdict_is_always_decidable() -> None:
    # Holm goes down the steps: after the p of ten pairs, six pairs need no factor of 2.
    records = [record("lora", 0.5, seed=i) for i in range(10)]
    records += [record("dora", 0.6 + i / 1000, seed=i) for i in range(10)]
    records += [record("full", 0.6 + i / 1000, seed=i) for i in range(6)]
    table = only(summarise(records, reference="lora"))
    gap = difference(table.average("full").over_reference)
    assert (gap.p, gap.adjusted) == (1 / 32, 1 / 32)
    assert (gap.verdict, gap.decidable) == ("better", True)
    # Of eight pairs that differ, p is 2 / 256, which seven methods raise to 0.055; with
    # the 30 ties of these the signs are drawn, and p is 0.007.
    records = [record("lora", 0.5, seed=i, probe=None) for i in range(38)]
    for name in ("a", "b", "c", "d", "e", "f", "g"):
        records += [
            record(name, 0.6 if i < 8 else 0.5, seed=i, probe=None) for i in range(38)
        ]
    table = only(summarise(records, reference="lora"))
    gap = difference(table.average("a").over_reference)
    assert (gap.verdict, gap.decidable) == ("better", True)


def test_the_probe_is_not_compared_with_itself() -> None:
    def compared(*methods: str, **settings: str) -> dict[str, Difference | None]:
        records = [
            record(
                method,
                0.5 if "head" in method else 0.6 + i / 100,
                seed=i,
                settings={"method": settings.get(method, method)},
            )
            for method in methods
            for i in range(6)
        ]
        table = only(summarise(records, reference="lora"))
        found = {r.method: r.over_probe for r in table.results}
        assert found == {a.method: a.over_probe for a in table.averages}
        return found

    without = compared("lora", "dora")
    found = compared("lora", "dora", "head", head="probe")
    assert found == {**without, "head": None}
    # Two methods, and not three: twice the least p of six pairs.
    assert difference(found["lora"]).adjusted == 2 / 32
    # A method that is the probe by its name alone is the probe too.
    assert summarise([record("probe", 0.5, settings={})]).tables[0].probes == ("probe",)


def test_pairs_that_failed_are_counted_beside_those_that_did_not() -> None:
    records = [
        *(record("lora", s, seed=i) for i, s in enumerate((0.5, None, 0.5, None))),
        *(record("dora", s, seed=i) for i, s in enumerate((0.6, 0.6, None, None, 0.6))),
    ]
    table = only(summarise(records, reference="lora"))
    gap = difference(table.average("dora").over_reference)
    # One pair failed on each side, and one on both; the last was not run on the other.
    assert (gap.n, gap.failed) == (1, 3)
    assert pairs(gap) == "1 pair, 3 failed"
    probed = difference(table.average("dora").over_probe)
    assert (probed.n, probed.failed) == (3, 2)


def test_a_run_without_a_probe_is_compared_with_the_one_that_was_a_method() -> None:
    records = [
        *(record("probe", s, seed=i) for i, s in enumerate((0.5, 0.6, 0.4))),
        *(record("setfit", 0.7, seed=i, probe=None) for i in range(3)),
        record(
            "setfit", 0.7, seed=3, probe=None
        ),  # the probe was not run with this seed
    ]
    table = only(summarise(records, reference="setfit"))
    gap = difference(table.average("setfit").over_probe)
    assert gap.mean == pytest.approx(20.0)
    assert (gap.n, gap.wins, gap.failed) == (3, 3, 0)


def test_methods_are_compared_over_all_sizes() -> None:
    gains = {("a", 100): 0.1, ("a", 0): 0.2, ("b", 100): 0.3}
    records = [
        record(method, 0.5 + own + seed / 1000, task=task, size=size, seed=seed)
        for (task, size), gain in gains.items()
        for seed in range(2)
        for method, own in (("lora", 0.0), ("dora", gain), ("full", -gain))
        if method != "full" or size
    ]
    records.append(record("lora", 0.1, task="b", size=0, purpose="time"))
    summary = summarise(records, reference="lora")
    (overall,) = summary.overall
    assert (overall.purpose, overall.cells) == (
        "steps",
        (("a", 100), ("b", 100), ("a", 0)),
    )
    lora, dora, full = (
        next(a for a in overall.averages if a.method == name)
        for name in ("lora", "dora", "full")
    )
    gap = difference(dora.over_reference)
    assert gap.mean == pytest.approx((10 + 20 + 30) / 3)
    # All six signs agree, and no other method has a pair in each cell.
    assert (gap.n, gap.wins, gap.p, gap.adjusted) == (6, 6, 2 / 64, 2 / 64)
    assert (gap.verdict, gap.decidable) == ("better", True)
    assert dora.score is not None
    assert dora.score.mean == pytest.approx(70.05)
    assert lora.over_reference is None
    assert (full.score, full.over_reference, full.over_probe) == (None, None, None)
    # To the probe there are two methods: Holm doubles the least p, and lora ties thrice.
    to_probe = [difference(one.over_probe) for one in (lora, dora)]
    assert [(gap.p, gap.adjusted) for gap in to_probe] == [
        (1 / 4, 1 / 4),
        (1 / 32, 1 / 16),
    ]
    said = cells(summary, overall)
    assert "a with 100 and all examples; b with 100 examples." in said
    assert said.endswith("and so not here: full.")
    standings = dict(statements(summary))["dora against lora, at equal steps"]
    assert "; better over all sizes (+20.0 [" in standings


def test_one_size_is_not_compared_over_all_sizes() -> None:
    assert summarise(full_study().records, reference="lora").overall == ()
    alone = [record("lora", 0.5, size=size, probe=None) for size in (1, 2)]
    assert summarise(alone).overall == ()


def test_averages_count_each_pair_once() -> None:
    scores = {
        ("lora", "a"): (0.5, 0.5, 0.5),
        ("lora", "b"): (0.5, 0.5, 0.5),
        ("dora", "a"): (0.6, 0.7, 0.8),
        ("dora", "b"): (0.6, 0.5, None),
    }
    table = only(
        summarise(
            [
                record(m, s, task=t, seed=i, error="" if s else "ValueError: no")
                for (m, t), values in scores.items()
                for i, s in enumerate(values)
            ],
            reference="lora",
        )
    )
    average = table.average("dora")
    gap = difference(average.over_reference)
    # Each of five pairs once; the score is of the two seeds that have both tasks.
    assert gap.n == 5
    assert gap.mean == pytest.approx((10 + 20 + 30 + 10 + 0) / 5)
    assert (gap.wins, gap.ties, gap.losses) == (4, 1, 0)
    assert average.score is not None
    assert average.score.n == 2
    assert average.score.mean == pytest.approx((60 + 60) / 2)


def test_a_task_that_a_method_never_ran_leaves_it_without_average() -> None:
    table = only(
        summarise(
            [
                record("lora", 0.5, task="a"),
                record("lora", 0.5, task="b"),
                record("dora", 0.9, task="a"),
            ],
            reference="lora",
        )
    )
    assert table.result("b", "dora") is None
    assert table.average("dora").score is None
    # Against the probe, both tasks count, as lora has pairs on both.
    assert table.average("dora").over_probe is None


def test_failed_collapsed_and_missing_runs_are_counted() -> None:
    summary = summarise(
        [
            record("lora", 0.25, seed=0),
            record("lora", 0.75, seed=1),
            record("lora", seed=2, error="ValueError: no"),
            record("lora", math.nan, seed=3),
        ],
        missing=[record("lora", seed=seed).cell for seed in (4, 5)],
    )
    result = only(summary).result("sst2", "lora")
    assert result is not None
    assert result.score is not None
    assert (result.failed, result.collapsed, result.missing) == (2, 1, 2)
    assert result.score.n == 2
    assert result.score.mean == pytest.approx(50)
    assert [f.error for f in summary.failures] == [
        "ValueError: no",
        "the test score is missing or not finite",
    ]
    said = " ".join(cautions(summary))
    assert "2 runs failed" in said
    assert "1 run collapsed" in said
    assert "2 planned runs" in said


@pytest.mark.parametrize(
    ("test", "baseline", "metric", "collapsed"),
    [
        # Half of the answers are right by chance.
        ({"accuracy": 0.5, "f1_macro": 0.49}, {"f1_macro": 1 / 3}, "accuracy", False),
        ({"accuracy": 0.5, "f1_macro": 1 / 3}, {"f1_macro": 1 / 3}, "accuracy", True),
        ({"accuracy": 0.5, "loss": 0.7}, {"loss": 0.8}, "accuracy", True),
        ({"accuracy": 0.5}, {"f1_macro": 1 / 3}, "accuracy", True),
        # Tags that were found, and are all wrong.
        ({"f1": 0.0, "accuracy": 0.7}, {"f1": 0.0, "accuracy": 0.8}, "f1", False),
        # One number for all orders nothing, whichever it is.
        ({"pearson": 0.0, "mse": 2.0}, {"pearson": 0.0, "mse": 1.5}, "pearson", True),
        ({"f1_macro": 1 / 3}, {"f1_macro": 1 / 3}, "accuracy", False),
        ({"accuracy": math.nan}, {}, "accuracy", False),
    ],
)
def test_a_run_collapsed_if_all_its_scores_are_those_of_a_constant(
    test: dict[str, float], baseline: dict[str, float], metric: str, collapsed: bool
) -> None:
    run = record("lora", 0.5, constant=0.5)
    if metric == "accuracy":
        baseline = {"accuracy": 0.5, **baseline}
    run = dataclasses.replace(run, metric=metric, test=test, baseline=baseline)
    assert run.collapsed is collapsed


def test_planned_groups_without_any_run_are_counted() -> None:
    planned = [
        record("lora", seed=1).cell,
        record("dora", seed=0, task="other").cell,
        record("lora", seed=0, purpose="time").cell,
        record("lora", seed=0, purpose="sweep").cell,  # its choice, not a result
    ]
    both = [record("lora", 0.6, task="other"), record("dora", 0.6), record("lora", 0.6)]
    summary = summarise(both, missing=planned)
    assert summary.missing == 3
    empty = only(summary).result("other", "dora")
    assert empty is not None
    assert (empty.score, empty.missing, empty.over_probe) == (None, 1, None)
    assert (
        "3 planned runs are not done yet, 1 of them of methods, tasks or sizes that have "
        "no run at all and are in no table."
    ) in cautions(summary)


def test_budgets_that_are_not_equal_are_said() -> None:
    took = {"lora": (120, 10.0), "bidora": (140, 20.0), "probe": (0, 0.1)}
    records = [
        record(method, 0.5, task=task, purpose=purpose, steps=steps, seconds=seconds)
        for method, (steps, seconds) in took.items()
        for task in ("a", "b")
        for purpose in ("steps", "time")
    ]
    summary = summarise(records, reference="lora", methods=took)
    said = cautions(summary)
    assert (
        "Equal steps are not the same for all: bidora took 140 steps where 120 are usual "
        "(a and b). A method of two phases counts the steps of both."
    ) in said
    assert (
        "Equal time is not the same for all: bidora took 2.0× the seconds of lora "
        "(a and b)."
    ) in said
    # Without a reference, the usual steps are those of most methods.
    without = [r for r in records if r.cell.purpose == "steps"]
    without += [record("full", 0.5, task=t, steps=140) for t in ("a", "b")]
    assert "lora took 120 steps where 140" in " ".join(cautions(summarise(without)))
    same = [record(method, 0.5, seed=i) for method in ("lora", "dora") for i in (0, 1)]
    assert "same for all" not in " ".join(cautions(summarise(same, reference="lora")))


def test_a_row_of_its_own_stands_for_the_probe() -> None:
    records = [
        record("lora", 0.6, task="a"),
        record("lora", 0.6, task="b"),
        record("head", 0.5, task="a", settings={"method": "probe"}),
    ]
    table = only(summarise(records))
    assert table.probes == ("head",)
    assert sorted(table.probe) == ["a", "b"]  # figures draw a line on both
    assert sorted(table.anchors["probe"]) == ["b"]
    assert sorted(table.anchors["constant answer"]) == ["a", "b"]
    assert "probe" not in only(summarise([records[0], records[2]])).anchors


def test_cost_is_medians_and_a_ratio() -> None:
    times = {"lora": (10.0, 30.0, 20.0), "bidora": (50.0, 40.0, 30.0)}
    table = only(
        summarise(
            [
                record(m, 0.5, seed=i, seconds=s, steps=i)
                for m, v in times.items()
                for i, s in enumerate(v)
            ],
            reference="lora",
        )
    )
    result = table.result("sst2", "bidora")
    assert result is not None
    # 50 / 10, 40 / 30 and 30 / 20: seeds are compared with their own.
    assert (result.seconds, result.steps, result.time_ratio) == (40.0, 1.0, 1.5)
    assert table.average("bidora").time_ratio == 1.5


def test_probe_and_constant_count_once_a_seed() -> None:
    records = [
        record(m, 0.7, seed=i, probe=p, constant=0.25)
        for m in ("lora", "dora")
        for i, p in enumerate((0.4, 0.6))
    ]
    table = only(summarise(records))
    assert (table.probe["sst2"].mean, table.probe["sst2"].n) == (50, 2)
    assert (table.constant["sst2"].mean, table.constant["sst2"].n) == (25, 2)
    gap = difference(table.average("lora").over_probe)
    assert gap.mean == pytest.approx(20)
    assert only(summarise([record("lora", 0.5, probe=None)])).probe == {}


def test_probes_that_differ_stand_for_no_method_but_their_own() -> None:
    records = [
        record(m, 0.7, task=task, seed=i, probe=probe)
        for m, own in (("dora", 0.4), ("lora", 0.6))
        for task, probe in (("a", own), ("b", 0.5))
        for i in range(2)
    ]
    summary = summarise(records)
    table = only(summary)
    assert table.unlike_probes == ("a",)
    assert {task: one.mean for task, one in table.probe.items()} == {"b": 50}
    assert list(table.anchors["probe"]) == ["b"]
    gaps = [difference(r.over_probe).mean for r in table.results if r.task == "a"]
    assert gaps == pytest.approx([30, 10])
    said = (
        "Methods have probes that differ (a), as with another model: each is compared"
    )
    assert said in " ".join(cautions(summary))
    # What the order of a sum changes is no other probe.
    close = [record("dora", 0.7, probe=0.5 + 1e-16), record("lora", 0.7, probe=0.5)]
    table = only(summarise(close))
    assert table.probe["sst2"].mean == pytest.approx(50)
    assert table.unlike_probes == ()
    assert "probes that differ" not in " ".join(cautions(summarise(close)))
    # A probe that was run as a method is no other than the one that runs began with.
    run = record("probe", 0.5, probe=None)
    assert only(summarise([run, *close])).unlike_probes == ()
    assert only(summarise([run, records[0]])).unlike_probes == ()


def test_tables_are_one_each_purpose_and_size_with_all_examples_last() -> None:
    summary = summarise(
        record("lora", 0.5, size=size, purpose=purpose)
        for purpose in ("time", "sweep", "steps")
        for size in (0, 1000, 100)
    )
    assert [(t.purpose, t.size) for t in summary.tables] == [
        (purpose, size) for purpose in ("steps", "time") for size in (100, 1000, 0)
    ]


def test_the_order_is_the_grids_and_not_that_of_the_records() -> None:
    records = [record(m, 0.5, task=t) for m in ("b", "a", "c") for t in ("y", "x")]
    first = summarise(records, methods=["c", "a", "gone"], tasks=["y"])
    assert (first.methods, first.tasks) == (("c", "a", "b"), ("y", "x"))
    assert summarise(records[::-1], methods=["c", "a"], tasks=["y"]) == first


def test_one_run_a_seed_and_that_with_the_chosen_settings() -> None:
    trial = (("learning_rate", 0.1),)
    records = [
        record("lora", 0.8, trial=trial),
        record("lora", 0.2, trial=(("learning_rate", 0.2),)),
    ]
    for order in (records, records[::-1]):
        summary = summarise(order, chosen={("sst2", "lora", 100): trial})
        result = only(summary).result("sst2", "lora")
        assert result is not None
        assert result.score is not None
        assert (result.score.mean, result.score.n) == (80, 1)
        assert "1 run " in summary.notes[0]


def test_a_sweep_is_summed_up_by_trial() -> None:
    def tried(rate: float, value: float | None, seed: int, error: str = "") -> Record:
        return record(
            "lora",
            purpose="sweep",
            seed=seed,
            trial=(("learning_rate", rate),),
            validation=value,
            error=error,
        )

    records = [
        tried(0.1, 0.5, 0),
        tried(0.1, 0.7, 1),
        tried(0.2, 0.9, 0),
        tried(0.2, None, 1, "ValueError: no"),
    ]
    summary = summarise(
        records,
        chosen={("sst2", "lora", 100): {"learning_rate": 0.2}},
    )
    first, second = summary.sweep
    assert first.validation is not None
    assert second.validation is not None
    assert (first.validation.mean, first.validation.n, first.failed, first.chosen) == (
        pytest.approx(60),
        2,
        0,
        False,
    )
    assert (second.validation.mean, second.failed, second.chosen) == (90, 1, True)
    assert summary.tables == ()
    assert [(f.cell.seed, f.error) for f in summary.failures] == [(1, "ValueError: no")]


def test_a_reference_without_a_run_is_none() -> None:
    summary = summarise([record("lora", 0.5)], reference="dora")
    assert summary.reference == ""
    result = only(summary).result("sst2", "lora")
    assert result is not None
    assert result.over_reference is None
    assert result.time_ratio is None


# --- sentences ----------------------------------------------------------------------


def runs(method: str, *scores: float, **changed: Any) -> list[Record]:
    return [record(method, s, seed=i, **changed) for i, s in enumerate(scores)]


def said(*records: list[Record], reference: str = "lora") -> Summary:
    together = [one for some in records for one in some]
    return summarise(together, reference=reference)


LOW = (0.60, 0.61, 0.62, 0.63, 0.64, 0.65, 0.66, 0.67)
HIGH = (0.72, 0.71, 0.74, 0.73, 0.76, 0.75, 0.78, 0.77)  # its mean is 11 points more
MIXED = (0.60, 0.66, 0.58, 0.64, 0.66, 0.60, 0.70, 0.67)
AROUND_PROBE = (0.5, 0.6, 0.4, 0.45, 0.55, 0.52, 0.48, 0.5)


def test_advice_is_the_winner_over_reference_and_probe() -> None:
    summary = said(runs("lora", *LOW), runs("bidora", *HIGH, seconds=25.0))
    (sentence,) = advice(summary)
    assert sentence.startswith(
        "With 100 examples, at equal steps: take bidora, which scores 74.5: +11.0 "
    )
    assert "against lora and +24.5 " in sentence
    assert sentence.endswith("in 2.5× the training time of lora.")


def test_advice_is_the_reference_where_nothing_is_shown_to_beat_it() -> None:
    (sentence,) = advice(said(runs("lora", *LOW), runs("bidora", *MIXED)))
    assert "take lora, which scores 63.5" in sentence
    assert "No other method is shown to beat it; the nearest is bidora" in sentence


def test_advice_is_the_probe_where_nothing_is_shown_to_beat_it() -> None:
    worse = [score - 0.1 for score in AROUND_PROBE]
    (sentence,) = advice(said(runs("lora", *worse), runs("bidora", *AROUND_PROBE)))
    assert "take the probe" in sentence
    assert "The highest mean is bidora's, 0.0 [" in sentence


def test_advice_claims_nothing_without_probe_and_reference() -> None:
    (sentence,) = advice(
        said(
            runs("dora", *LOW, probe=None),
            runs("bidora", *HIGH, probe=None),
            reference="",
        )
    )
    assert "there is nothing to test against; the highest mean is that of bidora" in (
        sentence
    )
    assert "take" not in sentence


def test_means_are_ranked_over_the_seeds_that_methods_share() -> None:
    # The probe's other seed is an easy one, and its own mean the higher.
    head = {"settings": {"method": "probe"}, "probe": None}
    probe = runs("probe", 0.800, 0.966, **head)
    (sentence,) = advice(said(probe, runs("lora", 0.817, probe=None)))
    assert sentence == (
        "With 100 examples, at equal steps: 1 pair of runs cannot show a difference; over "
        "the 1 seed that methods share, the highest mean is that of lora, which scores "
        "81.7: +1.7 against the probe (1 pair)."
    )
    late = [record("lora", 0.9, seed=5)]
    (sentence,) = advice(said(runs("dora", 0.8), late))
    assert sentence.endswith(
        "1 pair of runs cannot show a difference; none can be said to have the highest "
        "mean, since methods share no seed."
    )
    # dora failed on a hard seed.
    hard = [(0.1, *HIGH), (0.0, *HIGH), LOW]
    names = ("bidora", "full", "lora")
    shorter = [record("dora", s, seed=i) for i, s in enumerate(LOW, start=1)]
    every = [runs(m, *scores, probe=0.5) for m, scores in zip(names, hard, strict=True)]
    (sentence,) = advice(said(*every, shorter, reference=""))
    assert "over the 7 seeds that methods share" in sentence


def test_the_nearest_is_so_over_the_seeds_that_methods_share() -> None:
    def nearest(*dora: Record) -> str:
        others = [runs("lora", *LOW), runs("full", *MIXED), list(dora)]
        (sentence,) = advice(said(*others))
        return sentence.split("No other method is shown to beat it")[1]

    # Two easy seeds alone, on which dora is behind full.
    two = [record("dora", MIXED[i] - 0.01, seed=i) for i in (6, 7)]
    assert nearest(*two).startswith(
        "; over the 2 seeds that methods share, the nearest is full, +0.4 ["
    )
    assert nearest(record("dora", 0.9, seed=20)) == "."


def test_the_probe_is_advised_whichever_mean_is_the_highest() -> None:
    scores = (0.51, 0.6, 0.4, 0.45, 0.55, 0.52, 0.48, 0.49)

    def highest(first: int) -> str:
        late = [record("dora", s, seed=i) for i, s in enumerate(scores, start=first)]
        (sentence,) = advice(said(runs("lora", *scores), late))
        return sentence.split("no method is shown to beat it.")[1]

    assert highest(0).startswith(" The highest mean is dora's, 0.0 [")
    assert highest(2).startswith(
        " Over the 6 seeds that methods share, the highest mea"
    )
    assert highest(8) == ""


def test_advice_needs_pairs_enough() -> None:
    (sentence,) = advice(said(runs("lora", 0.6), runs("bidora", 0.9)))
    assert sentence == (
        "With 100 examples, at equal steps: 1 pair of runs cannot show a difference; the "
        "highest mean is that of bidora, which scores 90.0: +30.0 against lora (1 pair) "
        "and +40.0 against the probe (1 pair), in 1.0× the training time of lora."
    )
    (sentence,) = advice(said(runs("lora", *LOW[:3]), runs("bidora", *HIGH[:3])))
    assert "3 pairs of runs cannot show a difference" in sentence


def test_advice_claims_nothing_of_a_probe_that_no_outcome_could_have_beaten() -> None:
    # Six pairs: one method against the reference can be told, two against the probe not.
    (sentence,) = advice(said(runs("lora", *LOW[:6]), runs("dora", *HIGH[:6])))
    assert sentence.startswith(
        "With 100 examples, at equal steps: 6 pairs of runs cannot show a difference to "
        "the probe; the highest mean is that of dora, which scores 73.5: +11.0 ["
    )
    (sentence,) = advice(said(runs("lora", *LOW[:7]), runs("dora", *HIGH[:7])))
    assert "take dora" in sentence


def test_advice_without_reference_is_the_highest_of_those_over_the_probe() -> None:
    (sentence,) = advice(
        said(
            runs("dora", *LOW),
            runs("bidora", *HIGH),
            runs("full", *[0.1, 0.2, *(0.99,) * 6]),
            reference="",
        )
    )
    assert (
        "of 2 methods shown to beat the probe, the highest mean is that of bidora"
        in sentence
    )


def test_advice_without_any_final_run_says_why() -> None:
    assert advice(summarise([])) == [
        "There are no runs yet, so there is nothing to compare."
    ]
    (sentence,) = advice(summarise([record("lora", purpose="sweep", validation=0.5)]))
    assert sentence.startswith("Only runs of the sweep")
    (sentence,) = advice(summarise([record("lora", error="ValueError: no")]))
    assert "none can be advised" in sentence


def test_statements_are_of_the_bidora_family_whatever_the_grid_calls_it() -> None:
    records = [
        record(m, s, seed=i, settings={"method": known})
        for m, known, scores in (
            ("lora", "lora", LOW),
            ("dora", "dora", LOW),
            ("ours", "bidora-one-split", HIGH),
        )
        for i, s in enumerate(scores)
    ]
    summary = summarise(records, reference="lora")
    assert summary.outer == ("ours",)
    first, second = statements(summary)
    assert first[0] == "ours against lora, at equal steps"
    assert first[1].startswith("better with 100 examples (+11.0 ")
    assert second[0] == "ours against the probe, at equal steps"


def test_statements_count_tasks() -> None:
    def first(pairs: int) -> str:
        records = [
            record(m, s, seed=i, task=t)
            for m, t, scores in (
                ("lora", "a", LOW),
                ("lora", "b", LOW),
                ("bidora", "a", HIGH),
                ("bidora", "b", MIXED),
            )
            for i, s in enumerate(scores[:pairs])
        ]
        return statements(summarise(records, reference="lora"))[0][1]

    assert first(8).endswith("better on 1 and no difference shown on 1 of 2 tasks.")
    assert first(5).endswith("too few pairs to tell on 2 of 2 tasks.")


def test_few_seeds_are_said() -> None:
    def reserved(seeds: int) -> list[str]:
        return cautions(summarise(record("lora", 0.6, seed=i) for i in range(seeds)))

    assert "one seed" in reserved(1)[1]
    assert "2 seeds" in reserved(2)[1]
    assert ["can show nothing" in text for text in reserved(5)] == [True]
    assert reserved(6) == []


def test_a_whole_study_is_summed_up() -> None:
    whole = full_study()
    summary = summarise(whole.records, reference="lora", chosen=whole.chosen)
    assert len(summary.tables) == 2
    assert len(summary.failures) == 1
    assert [t.chosen for t in summary.sweep] == [False, True]
