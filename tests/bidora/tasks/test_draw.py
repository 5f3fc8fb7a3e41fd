"""Some of the examples: exactly as many as asked, with the shares of the classes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.registry import make_task
from bidora.tasks.splits import draw_in_proportion

NAMES = ("a", "b", "c")
SHARES = [0] * 60 + [1] * 30 + [2] * 10


def rows(**columns: list[Any]) -> Rows:
    count = len(next(iter(columns.values())))
    return Rows(columns, [f"line {i}" for i in range(count)])


def of(kind: str) -> tuple[Any, Rows, Schema]:
    """Return a task, a hundred examples and their schema."""
    words = [["w", "x"]] * 100
    made = {
        "classification": rows(labels=SHARES),
        "regression": rows(labels=[float(i % 50) for i in range(100)]),
        "multilabel": rows(
            labels=[[y, (y + 1) % 3][: 1 + i % 2] for i, y in enumerate(SHARES)]
        ),
        "tagging": rows(words=words, tags=[[f"B-{NAMES[y]}", "O"] for y in SHARES]),
    }
    task = make_task(kind)
    return task, made[kind], Schema(kind, {}, NAMES, "accuracy")


KINDS = ("classification", "regression", "multilabel", "tagging")


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_exact(kind: str) -> None:
    task, examples, schema = of(kind)
    for count in (3, 7, 10, 33, 50, 90, 97, 98, 99, 100, 101):
        drawn = task.draw(examples, schema, count, 0)
        assert len(drawn) == min(count, 100), count
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= set(range(100))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_draws(kind: str) -> None:
    task, examples, schema = of(kind)
    first, same, other = (task.draw(examples, schema, 30, seed) for seed in (0, 0, 1))
    assert first == same != other


def test_classes_keep_their_shares() -> None:
    task, examples, schema = of("classification")
    for count, shares in ((50, (30, 15, 5)), (10, (6, 3, 1)), (99, (59, 30, 10))):
        drawn = task.draw(examples, schema, count, 0)
        found = Counter(SHARES[i] for i in drawn)
        for name, share in enumerate(shares):
            assert abs(found[name] - share) <= 1
        assert min(found.values()) >= 1


def test_rare_classes_have_one_each() -> None:
    """In proportion, 20 of them were 19.4 of the first and a fifth of each other."""
    strata = ["often"] * 97 + ["x", "y", "z"]
    for seed in range(5):
        found = Counter(strata[i] for i in draw_in_proportion(strata, 20, seed))
        assert found == {"often": 17, "x": 1, "y": 1, "z": 1}
    assert len(draw_in_proportion(strata, 4, 0)) == 4
    with pytest.raises(UserError, match=r"3 of 100 examples are too few .* 4 classes"):
        draw_in_proportion(strata, 3, 0)


def test_every_example_may_be_drawn() -> None:
    seen = {
        i for seed in range(60) for i in draw_in_proportion([0] * 6 + [1] * 3, 3, seed)
    }
    assert seen == set(range(9))


def test_small_and_large_numbers_are_drawn() -> None:
    task, examples, schema = of("regression")
    values = examples.columns["labels"]
    for count in (2, 5, 10):
        found = sorted(values[i] for i in task.draw(examples, schema, count, 3))
        # One of each part of like size, of numbers from 0 to 49.
        for place, number in enumerate(found):
            assert abs(number - 50 * (place + 0.5) / count) <= 50 / count


def test_labels_keep_their_shares() -> None:
    task, examples, schema = of("multilabel")
    labels = examples.columns["labels"]
    drawn = task.draw(examples, schema, 50, 0)
    whole = Counter(y for row in labels for y in row)
    found = Counter(y for i in drawn for y in labels[i])
    for name, count in whole.items():
        assert abs(found[name] - count / 2) <= 3


def test_entities_keep_their_shares() -> None:
    task, examples, schema = of("tagging")
    drawn = task.draw(examples, schema, 50, 0)
    found = Counter(SHARES[i] for i in drawn)
    assert [found[name] for name in range(3)] == [30, 15, 5]
