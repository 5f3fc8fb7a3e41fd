"""Several labels: how they are written, which rows are bad, splits and scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.multilabel import MultiLabel, iterative_split


def table(
    labels: Sequence[Any],
    origin: str = "train.csv",
    names: tuple[str, ...] | None = None,
) -> Table:
    return Table(
        origin,
        ("text", "topics"),
        tuple((f"{origin} {i}", label) for i, label in enumerate(labels)),
        tuple(f"line {i + 2}" for i in range(len(labels))),
        () if names is None else (("topics", names),),
    )


def source(train: Table, **parts: Table) -> Source:
    return Source("data", {"train": train, **parts})


def read(labels: Sequence[Any], **chosen: Any) -> tuple[tuple[str, ...], list[Any]]:
    task = MultiLabel(**chosen)
    train = table(labels)
    schema = task.schema(source(train))
    rows = task.rows(train, schema)
    assert not rows.bad
    return schema.label_names, rows.columns["labels"]


def told(task: MultiLabel, examples: Source) -> str:
    schema = task.schema(examples)
    rows = {part: task.rows(t, schema) for part, t in examples.parts.items()}
    return "\n".join(task.describe(rows, schema))


# How labels are written


@pytest.mark.parametrize(
    "labels",
    [
        [["b", "a"], ["a"], ["b"]],
        [("b", "a"), ("a",), ("b",)],
        ["b;a", "a", "b"],
        ["a|b", "a", "b"],
        ["a, b", "a", "b"],
        ["a;b;", " a ", "b;b"],
        ["['b', 'a']", '["a"]', "['b']"],
        ['["b", "a"]', '["\\u0061"]', '["b"]'],
    ],
)
def test_labels_are_lists_or_joined_words(labels: list[Any]) -> None:
    assert read(labels) == (("a", "b"), [[0, 1], [0], [1]])


def test_the_separator_can_be_chosen() -> None:
    labels = ["x,1 y", "y", "x,1"]
    assert read(labels, label_separator=" ") == (("x,1", "y"), [[0, 1], [1], [0]])


def test_labels_may_stand_in_columns_of_zeros_and_ones() -> None:
    rows = (("x", "1", "0"), ("y", "1.0", "1"), ("z", "0", "true"), ("v", "0", "0"))
    places = tuple(f"line {i}" for i in range(4))
    train = Table("t.csv", ("text", "toxic", "rude"), rows, places)
    task = MultiLabel()
    schema = task.schema(source(train))
    assert schema.label_names == ("toxic", "rude")
    assert task.rows(train, schema).columns["labels"] == [[0], [0, 1], [1], []]
    chosen = MultiLabel(label_columns=["rude", "toxic"]).schema(source(train))
    assert chosen.label_names == ("rude", "toxic")
    with pytest.raises(UserError, match=r"no column 'rud' .*Did you mean 'rude'"):
        MultiLabel(label_columns=["rud"]).schema(source(train))


def test_listed_classes_are_counted_by_number() -> None:
    train = table([[0, 2], [2], [0]], names=("z", "unused", "a"))
    task = MultiLabel()
    schema = task.schema(source(train))
    assert schema.label_names == ("z", "unused", "a")
    assert task.rows(train, schema).columns["labels"] == [[0, 2], [2], [0]]


def test_words_that_nothing_joins_are_refused() -> None:
    with pytest.raises(UserError, match=r"--label-separator.*classification"):
        read(["a", "b", "c"])


# Bad rows and missing labels


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (None, "holds no label"),
        ([None], "holds no label"),
        (["a", ["b"]], "holds a list"),
        ({"a": 1}, "holds a dict"),
        (["a", "\ud83d"], "half a character"),
        (["a", math.inf], "holds inf"),
    ],
)
def test_a_bad_row_is_told_with_its_place(label: Any, reason: str) -> None:
    train = table([["a"], ["b"], ["a", "b"], label])
    task = MultiLabel()
    rows = task.rows(train, task.schema(source(train)))
    assert rows.columns["labels"] == [[0], [1], [0, 1]]
    (bad,) = rows.bad
    assert bad.startswith("train.csv, line 5: column 'topics' ")
    assert reason in bad


def test_a_cell_that_is_neither_zero_nor_one_is_bad() -> None:
    rows = (("x", "1", "0"), ("y", "0", "1"), ("z", "2", "0"))
    train = Table("t.csv", ("text", "p", "q"), rows, ("line 2", "line 3", "line 4"))
    task = MultiLabel(label_columns=["p", "q"])
    found = task.rows(train, task.schema(source(train)))
    assert found.bad == ["t.csv, line 4: column 'p' holds '2', and not 0 or 1."]


def test_no_label_is_an_answer_in_lists_and_none_in_cells() -> None:
    assert read([["a"], [], ["b"]])[1] == [[0], [], [1]]
    assert read(["a;b", "", "b"], allow_empty=True)[1] == [[0, 1], [], [1]]
    for labels, chosen in ((["a;b", "", "b"], None), ([["a"], [], ["b"]], False)):
        train = table(labels)
        task = MultiLabel(allow_empty=chosen)
        rows = task.rows(train, task.schema(source(train)))
        assert rows.bad == ["train.csv, line 3: column 'topics' holds no label."]


# Labels that are left out


def test_labels_that_train_lacks_are_left_out_of_the_truth_and_told() -> None:
    train = table([["a"], ["b"], ["a", "b"]])
    test = table([["a", "new"], ["new"], ["b"]], "test.csv")
    task = MultiLabel()
    examples = source(train, test=test)
    rows = task.rows(test, task.schema(examples))
    assert rows.columns["labels"] == [[0], [], [1]]
    assert not rows.bad
    assert "test has labels that train lacks: 'new' (2)." in told(task, examples)


def test_rare_labels_are_left_out_and_their_examples_stay() -> None:
    train = table([["a"], ["a", "c"], ["b"], ["b"], ["c"], []])
    task = MultiLabel(min_examples_per_class=3)
    with pytest.raises(UserError, match="no label with at least 3 examples"):
        task.schema(source(train))
    train = table([["a"], ["a", "c"], ["b"], ["b"], []])
    task = MultiLabel(min_examples_per_class=2)
    examples = source(train)
    schema = task.schema(examples)
    assert schema.label_names == ("a", "b")
    assert task.rows(train, schema).columns["labels"] == [[0], [0], [1], [1], []]
    assert "labels with fewer than 2 examples in train are left out: 'c';" in told(
        task, examples
    )
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_what_was_understood_is_told() -> None:
    train = table([["a", "b"], ["b"], []])
    test = table([["b"]], "test.csv")
    assert told(MultiLabel(), source(train, test=test)).splitlines() == [
        "text from column 'text', label from column 'topics'",
        "2 labels: b (train 2, test 1), a (train 1, test 0)",
        "train: 1.00 labels an example; 1 of 3 have none.",
        "test: 1.00 labels an example; 0 of 1 have none.",
        "1 of 2 labels have no example in test; each counts 0 in its macro F1.",
    ]
    odd = told(MultiLabel(), source(table([["Tax"], ["tax"], ["tax"]])))
    assert "'Tax' (1), 'tax' (2) differ in spelling alone" in odd


# Splits


@given(
    labels=st.lists(
        st.lists(st.integers(0, 5), max_size=3, unique=True), min_size=10, max_size=80
    ),
    fraction=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_a_split_is_complete_and_the_same_again(
    labels: list[list[int]], fraction: float, seed: int
) -> None:
    first, second = iterative_split(labels, fraction, seed)
    assert iterative_split(labels, fraction, seed) == (first, second)
    assert sorted(first + second) == list(range(len(labels)))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    fraction=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_labels_that_never_meet_keep_their_shares_within_one(
    sizes: list[int], fraction: float, seed: int
) -> None:
    # The mean m of a label's excess and of the excess of all stays in [-1/2, 1/2), and
    # their difference is what the excess of all was before: so both stay within one.
    labels = [[label] for label, size in enumerate(sizes) for _ in range(size)]
    try:
        _, second = iterative_split(labels, fraction, seed)
    except UserError:
        assert min(fraction, 1 - fraction) * len(labels) <= 1
        return
    counts = Counter(labels[i][0] for i in second)
    assert abs(len(second) - fraction * len(labels)) <= 1 + 1e-9
    for label, size in enumerate(sizes):
        assert abs(counts[label] - fraction * size) <= 1 + 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rare_labels_do_not_all_go_to_one_part(size: int) -> None:
    labels = [[label] for label in range(60) for _ in range(size)]
    _, second = iterative_split(labels, 0.2, seed=0)
    assert abs(len(second) - 0.2 * 60 * size) <= 1


def test_labels_that_meet_keep_their_shares_better_than_at_random() -> None:
    draw = np.random.default_rng(0)
    share = np.array([0.4, 0.2, 0.1, 0.05, 0.02])
    held = draw.random((1000, 5)) < share
    labels = [np.flatnonzero(row).tolist() for row in held]
    first, second = iterative_split(labels, 0.2, seed=0)
    assert len(first) + len(second) == 1000
    counts = held.sum(axis=0)
    # At random, the standard deviation is sqrt(count · 0.2 · 0.8): 8.0 for the first.
    assert np.abs(held[second].sum(axis=0) - 0.2 * counts).max() <= 2
    assert abs(len(second) - 200) <= 2


def test_the_second_part_is_not_the_end_of_the_file() -> None:
    labels = [[i % 3] for i in range(300)]
    _, second = iterative_split(labels, 0.2, seed=0)
    # The mean of 60 places drawn at random has a standard deviation of about 10.
    assert abs(np.mean(second) - 149.5) < 40


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="leaves one part empty"):
        iterative_split([[0], [1]], fraction, seed=0)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(UserError, match="1 examples are too few"):
        iterative_split([[0]], 0.2, seed=0)


# Scores


@pytest.mark.filterwarnings("error")
def test_scores_by_hand() -> None:
    # Label a: tp 2, fp 1, fn 0; b: tp 0, fp 0, fn 1; c neither occurs nor is predicted.
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=np.float32)
    logits = np.array([[2.0, -1.0, -1.0], [0.1, -0.1, -9.0], [3.0, 0.0, -2.0]])
    schema = Schema("multilabel", label_names=("a", "b", "c"), metric="f1_micro")
    assert MultiLabel().metrics(logits, truth, schema) == {
        "f1_micro": pytest.approx(2 * 2 / (2 * 2 + 1 + 1), rel=1e-15),
        "f1_macro": pytest.approx((4 / 5 + 0 + 0) / 3, rel=1e-15),
    }


def test_answers_are_the_labels_above_one_half_and_every_probability() -> None:
    schema = Schema("multilabel", label_names=("a", "b"))
    logits = np.array([[math.log(3), 0.0], [-math.log(3), -9.0]])
    rows = Rows({"text": ["x", "y"]}, ["", ""])
    first, second = MultiLabel().answers(logits, rows, schema)
    assert first == {
        "labels": ["a"],
        "p(a)": pytest.approx(0.75, rel=1e-15),
        "p(b)": 0.5,
    }
    assert second["labels"] == []
    assert first.keys() == second.keys()


# With a model


def test_features_make_batches_that_a_model_learns_from(tiny_encoder: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = MultiLabel()
    train = table([["a", "b"], ["c"], []])
    schema = task.schema(source(train))
    rows = task.rows(train, schema)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    features = task.features(rows.columns, tokenizer, schema, 16)
    assert features["labels"] == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    data = Dataset.from_dict(rows.columns)
    examples = data.map(
        lambda batch: task.features(batch, tokenizer, schema, 16),
        batched=True,
        remove_columns=data.column_names,
    )
    batch = task.collator(tokenizer)(list(examples))
    assert batch["labels"].dtype == torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder, **task.model_kwargs(schema)
    )
    found = model(**batch)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        found.logits, batch["labels"]
    )
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-6)
