"""Intervals, tests and corrections against sums by hand, scipy and simulation."""

from __future__ import annotations

import math
from itertools import pairwise, product
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from bidora.study.records import Cell, Record
from bidora.study.statistics import holm, interval, paired, sign_flips, signed_rank


def test_the_interval_of_three_numbers_by_hand() -> None:
    # s is 1, and t with two degrees of freedom solves F(t) = 0.975: 4.302653.
    low, high = interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    narrow = interval([1.0, 2.0, 3.0], level=0.5)
    # With two degrees of freedom, t = 0.816497 = sqrt(2/3) has F(t) = 0.75.
    assert narrow[1] == pytest.approx(2 + math.sqrt(2 / 3) / math.sqrt(3), abs=1e-9)
    assert interval([3.0]) == interval([]) == (None, None)
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_the_interval_holds_the_mean_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, n))
    ends = [interval(list(row)) for row in draws]
    held = fmean(low < 3.0 < high for low, high in ends if low is not None and high)
    # Of 2000 trials, four standard deviations of a share of 0.95.
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def flips_one_by_one(values: list[float]) -> float:
    seen = abs(math.fsum(values))
    sums = [
        abs(math.fsum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in product((-1, 1), repeat=len(values))
    ]
    return fmean(total >= seen - 1e-9 for total in sums)


@pytest.mark.parametrize(
    "values",
    [
        [2.0],
        [1.0, 2.0, 3.0],
        [1.0, 2.0, -3.0, 4.0],
        [0.1, 0.2, -0.3, 0.0, 0.7, 0.7],
        [0.0, 0.0],
        [-1.5, -2.5, -0.5, -3.5, -0.25, 1.0, -2.0],
    ],
)
def test_sign_flips_are_those_of_the_definition(
    values: list[float],
) -> None:
    p = sign_flips(values)
    assert p == pytest.approx(flips_one_by_one(values), abs=1e-12)
    assert sign_flips([-v for v in values]) == pytest.approx(p)


@pytest.mark.parametrize("examples", [300, 872, 4096])
def test_sums_of_signs_that_are_equal_are_found_so(examples: int) -> None:
    # In points, most of these have no end: rounded, equal sums come out 1e-9 apart.
    random = np.random.default_rng(examples)
    cases = [
        [3, 3, 4, -1, 3, 2, 4, -1, -1, -1],  # 88 of 1024 patterns
        *(
            list(map(int, random.integers(-3, 7, size=random.integers(2, 12))))
            for _ in range(40)
        ),
    ]
    for case in cases:
        signs = np.array(list(product((-1, 1), repeat=len(case))))
        exact = float(np.mean(abs(signs @ case) >= abs(sum(case))))
        differences = [round(100 * right / examples, 9) for right in case]
        assert sign_flips(differences) == pytest.approx(exact, abs=1e-12), case


def test_many_sign_flips_are_drawn_and_agree_with_all_of_them() -> None:
    values = list(np.random.default_rng(1).normal(0.4, 1.0, size=18))
    n = np.arange(2**18)[:, None] >> np.arange(18) & 1
    exact = float(np.mean(abs((1 - 2 * n) @ values) >= abs(sum(values)) - 1e-12))
    p = sign_flips(values)
    assert p is not None
    assert p == pytest.approx(exact, abs=5 * math.sqrt(exact / 100_000))
    assert sign_flips(values) == p  # the draws are the same each time
    assert sign_flips([1.0] * 40) == pytest.approx(2 / 100_000)
    thirds = [round(k * 100 / 300, 9) for k in (*range(-3, 8), *range(-3, 8))]
    whole = [float(k) for k in (*range(-3, 8), *range(-3, 8))]
    assert sign_flips(thirds) == sign_flips(whole)


def test_the_least_p_of_n_pairs() -> None:
    for n in range(1, 9):
        values = [float(i + 1) for i in range(n)]
        assert sign_flips(values) == 2.0 ** (1 - n)
        assert signed_rank(values) == pytest.approx(2.0 ** (1 - n))


@pytest.mark.parametrize("test", [sign_flips, signed_rank])
def test_a_difference_that_is_not_there_is_seldom_found(test: Any) -> None:
    draws = np.random.default_rng(2).normal(size=(1000, 8))
    found = fmean(test(list(row)) <= 0.05 for row in draws)
    # p are multiples of 2/256: at most 12 patterns of 256 fit under 0.05 (of the ranks'
    # sums 10, as W = 3 has p = 10/256 and W = 4 has 14/256).
    level = 12 / 256 if test is sign_flips else 10 / 256
    assert found == pytest.approx(level, abs=4 * math.sqrt(level / 1000))


def test_signed_rank_by_hand() -> None:
    # Ranks 1..5; the negative ones sum to 2. Sums of 2 or less: {}, {1}, {2}; p = 2 * 3/32.
    assert signed_rank([1.0, -2.0, 3.0, 4.0, 5.0]) == pytest.approx(6 / 32)
    assert signed_rank([0.0, 0.0]) == 1.0
    assert signed_rank([]) is None
    assert sign_flips([]) is None
    assert signed_rank([0.0, 1.0, 2.0, 3.0]) == signed_rank([1.0, 2.0, 3.0])
    tied = signed_rank([1.0, 1.0, 1.0, -1.0, 2.0])
    assert tied is not None
    assert 0.1 < tied < 1


def test_holm_by_hand() -> None:
    # Four tests: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 0.04 raised to what came before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_keeps_the_order_and_stays_between_p_and_bonferroni() -> None:
    for p in np.random.default_rng(3).uniform(size=(200, 6)) ** 2:
        adjusted = np.array(holm(list(p)))
        ordered = adjusted[np.argsort(p)]
        assert all(a <= b for a, b in pairwise(ordered))
        assert np.all(adjusted >= p)
        assert np.all(adjusted <= np.minimum(1, 6 * p) + 1e-15)
        assert adjusted.min() == pytest.approx(min(1, 6 * p.min()))


def test_holm_seldom_finds_anything_where_nothing_is() -> None:
    # Five true nulls: the least p times 5 is below 0.05 with chance 1 - 0.99**5.
    draws = np.random.default_rng(4).uniform(size=(4000, 5))
    found = fmean(min(holm(list(row))) < 0.05 for row in draws)
    wanted = 1 - 0.99**5
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted / 4000))
    assert found < 0.06


# -- pairs --------------------------------------------------------------------------


def run(method: str, seed: int, score: float | None, **values: Any) -> Record:
    """Return a record; None for the score of a failed one."""
    task, size = values.get("task", "a"), values.get("size", 0)
    cell = Cell(task, method, size, seed, values.get("purpose", "steps"))
    if score is None:
        return Record(cell, {}, error="ValueError: no")
    return Record(cell, {}, metric="f1", test={"f1": score, "loss": 9.0})


def test_pairs_are_of_one_task_size_and_seed() -> None:
    records = [
        run("lora", 0, 0.5),
        run("dora", 0, 0.6),
        run("lora", 1, 0.7),
        run("dora", 1, 0.7),
        run("lora", 0, 0.9, task="b"),
        run("dora", 0, 0.6, task="b"),
        run("lora", 0, 0.1, size=100),
        run("dora", 0, 0.4, size=100),
        run("dora", 0, 1.0, purpose="time"),
        run("lora", 0, 0.0, purpose="time"),
        run("full", 0, 0.0),
    ]
    found = paired(reversed(records), "dora", "lora", "steps")
    assert found.differences == (10.0, 0.0, 30.0, -30.0)
    assert found.mean == 2.5
    assert (found.low, found.high) == interval(found.differences)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.sign_flips == sign_flips(found.differences)
    assert found.signed_rank == signed_rank(found.differences)
    assert paired(records, "dora", "lora", "steps", task="b").differences == (-30.0,)
    assert paired(records, "dora", "lora", "time").differences == (100.0,)
    turned = paired(records, "lora", "dora", "steps")
    assert turned.mean == -2.5
    assert turned.sign_flips == found.sign_flips


def test_failed_and_missing_sides_are_counted_apart() -> None:
    nan = math.nan
    records = [
        *(
            run("lora", seed, s)
            for seed, s in enumerate([0.5, 0.5, None, None, 0.5, nan])
        ),
        *(run("dora", seed, s) for seed, s in enumerate([0.6, None, None, 0.5])),
        run("dora", 5, 0.5),
        run("dora", 7, 0.5),
    ]
    found = paired(records, "dora", "lora", "steps")
    assert found.differences == (10.0,)
    assert (found.failed, found.both_failed) == (1, 1)
    assert found.reference_failed == 2  # one that failed, one that is not a number
    assert found.unpaired == 2
    assert (found.low, found.high) == (None, None)
    none = paired(records, "full", "lora", "steps")
    assert (none.mean, none.signed_rank, none.sign_flips) == (None, None, None)
    assert none.unpaired == 6
