"""Regression: what a number is, which rows are bad, how it is split and scored."""

from __future__ import annotations

import json
import math
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
from bidora.tasks.regression import Regression


def table(labels: Sequence[Any], origin: str = "train.csv") -> Table:
    return Table(
        origin,
        ("text", "score"),
        tuple((f"{origin} {i}", label) for i, label in enumerate(labels)),
        tuple(f"line {i + 2}" for i in range(len(labels))),
    )


def source(train: Table, **parts: Table) -> Source:
    return Source("data", {"train": train, **parts})


def schema_of(labels: Sequence[Any]) -> Schema:
    return Regression().schema(source(table(labels)))


def plain_schema(mean: float = 0.0, deviation: float = 1.0) -> Schema:
    details = {"mean": mean, "deviation": deviation, "min": 0.0, "max": 1.0}
    return Schema("regression", metric="pearson", details=details)


# What a number is


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        (["1", "2.5", "-3", "1e1"], [1.0, 2.5, -3.0, 10.0]),
        ([1, 2.5, " 3 ", 4], [1.0, 2.5, 3.0, 4.0]),
        (["1", "2,5", "-3,25"], [1.0, 2.5, -3.25]),
    ],
)
def test_numbers_are_read(labels: list[Any], read: list[float]) -> None:
    train = table(labels)
    rows = Regression().rows(train, schema_of(labels))
    assert rows.columns["labels"] == read
    assert not rows.bad


def test_decimal_commas_are_told() -> None:
    train = table(["1,5", "2"] * 4)
    schema = Regression().schema(source(train))
    rows = Regression().rows(train, schema)
    text = "\n".join(Regression().describe({"train": rows}, schema))
    assert "read with a decimal comma" in text


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("", "holds no number"),
        (None, "holds no number"),
        ("good", "holds 'good', which is no number"),
        ("nan", "'nan', which is not finite"),
        (math.nan, "nan, which is not finite"),
        (-math.inf, "-inf, which is not finite"),
        ("1e999", "not finite or too large"),
        (10**400, "which is no number"),
        ("9" * 5000, "not finite or too large"),
        (True, "holds True, which is no number"),
        ([1.0], "which is no number"),
        ("1,5", "holds '1,5', which is no number"),
        ("1_0", "holds '1_0', which is no number"),
    ],
)
def test_a_bad_row_is_told_with_its_place(label: Any, reason: str) -> None:
    train = table(["1", "2.5", "3", label])
    task = Regression()
    rows = task.rows(train, task.schema(source(train)))
    assert rows.columns["labels"] == [1.0, 2.5, 3.0]
    (bad,) = rows.bad
    assert bad.startswith("train.csv, line 5: column 'score' holds ")
    assert reason in bad
    assert len(bad) < 200


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["good", "bad", "1"], "2 of 3 values are no numbers.*'good'.*classification"),
        (["2", "2.0", "2"], "every number in column 'score' is 2"),
    ],
)
def test_labels_that_say_nothing_are_refused(labels: list[Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        schema_of(labels)


# The schema


def test_the_schema_keeps_range_mean_and_deviation() -> None:
    schema = schema_of(["1", "3", "5", "3"])
    assert schema.details == {
        "min": 1.0,
        "max": 5.0,
        "mean": 3.0,
        "deviation": pytest.approx(math.sqrt(2), rel=1e-15),
        "decimal_commas": False,
    }
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert Regression().model_kwargs(schema) == {
        "num_labels": 1,
        "problem_type": "regression",
    }


def test_what_was_understood_is_told() -> None:
    train, test = table(["1", "3"] * 4), table(["9", "2"], "test.csv")
    task = Regression()
    schema = task.schema(source(train, test=test))
    rows = {"train": task.rows(train, schema), "test": task.rows(test, schema)}
    assert task.describe(rows, schema) == [
        "text from column 'text', label from column 'score'",
        "numbers from 1 to 3, mean 2, standard deviation 1 (train 8, test 2)",
        "warning: column 'score' has 2 different numbers alone (1, 3); if they name "
        "classes, use --task-type classification.",
        "warning: 1 of 2 numbers of test lie outside the range of train.",
    ]


def test_a_metric_that_is_better_when_smaller_is_no_main_metric() -> None:
    with pytest.raises(UserError, match=r"'mse'.*pearson, spearman"):
        Regression(metric="mse").schema(source(table(["1", "2"])))


# Splits


@given(
    labels=st.lists(
        st.sampled_from([0.0, 1.0, 1.5, 4.0, 99.0]), min_size=2, max_size=80
    )
    | st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=80),
    fraction=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_a_split_holds_the_share_of_every_bin(
    labels: list[float], fraction: float, seed: int
) -> None:
    count = len(labels)
    held = math.ceil(fraction * count)
    rows = Rows({"labels": labels}, [""] * count)
    task = Regression()
    if held == count:
        with pytest.raises(UserError, match="too few"):
            task.split(rows, plain_schema(), fraction, seed)
        return
    first, second = task.split(rows, plain_schema(), fraction, seed)
    assert task.split(rows, plain_schema(), fraction, seed) == (first, second)
    assert sorted(first + second) == list(range(count))
    assert len(second) == held
    # The share of labels below any example's is kept: bins are whole within one
    # example each, and one bin may be cut.
    bins = max(1, min(10, int(min(fraction, 1 - fraction) * count)))
    order = sorted(range(count), key=labels.__getitem__)
    inside = set(second)
    below = 0
    for rank, example in enumerate(order, start=1):
        below += example in inside
        assert abs(below - rank * held / count) <= bins + count / bins


def test_an_outlier_and_ties_do_not_hinder_a_split() -> None:
    rows = Rows({"labels": [0.0] * 39 + [1e9]}, [""] * 40)
    first, second = Regression().split(rows, plain_schema(), 0.2, 0)
    assert (len(first), len(second)) == (32, 8)
    assert len(set(Regression().strata(rows, plain_schema()))) == 4


# Scores


def test_scores_by_hand() -> None:
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-1, -2, 2, 1): covariance sum 1.5 + 1 + 1
    # + 1.5 = 5, squares 5 and 10. Ranks 1 2 3 4 and 2 1 4 3: 1 - 6·4 / (4·15).
    truth, said = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 5.0, 4.0])
    scores = Regression().metrics(said[:, None], truth, plain_schema())
    assert scores == {
        "pearson": pytest.approx(5 / math.sqrt(50), rel=1e-14),
        "spearman": pytest.approx(0.6, rel=1e-14),
        "mse": pytest.approx((1 + 1 + 4 + 0) / 4, rel=1e-14),
    }


def test_scores_are_in_the_labels_own_units() -> None:
    schema = plain_schema(mean=100.0, deviation=10.0)
    truth = np.array(Regression().targets([90.0, 110.0], schema))
    assert truth.tolist() == [-1.0, 1.0]
    said = np.array([[-0.5], [1.0]])
    scores = Regression().metrics(said, truth, schema)
    assert scores["mse"] == pytest.approx((95 - 90) ** 2 / 2, rel=1e-14)
    rows = Rows({"text": ["a", "b"]}, ["", ""])
    answers = Regression().answers(said, rows, schema)
    assert answers == [{"prediction": 95.0}, {"prediction": 110.0}]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("said", "truth"),
    [([0.7, 0.7, 0.7], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.1] * 3), ([1.0], [2.0])],
)
def test_a_correlation_with_a_constant_counts_nothing(
    said: list[float], truth: list[float]
) -> None:
    # A mean and a deviation that are no binary fractions: a constant stays one.
    schema = plain_schema(mean=0.1, deviation=0.3)
    scores = Regression().metrics(np.array(said)[:, None], np.array(truth), schema)
    assert scores["pearson"] == 0
    assert scores["spearman"] == 0
    assert scores["mse"] > 0


# With a model


@pytest.mark.parametrize("size", [1, 3])
def test_features_make_batches_that_a_model_learns_from(
    tiny_encoder: Path, size: int
) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = Regression()
    rows_ = (("a crow", "a wren", 10), ("iron", "tin", 30), ("plum", "pear", 20))
    columns = ("sentence1", "sentence2", "similarity")
    train = Table("t.csv", columns, rows_, ("line 2", "line 3", "line 4"))
    schema = task.schema(source(train))
    rows = task.rows(train, schema)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    features = task.features(rows.columns, tokenizer, schema, 16)
    deviation = math.sqrt(200 / 3)
    assert features["labels"] == pytest.approx([-10 / deviation, 10 / deviation, 0])
    assert 1 in features["token_type_ids"][0]
    data = Dataset.from_dict(rows.columns)
    examples = data.map(
        lambda batch: task.features(batch, tokenizer, schema, 16),
        batched=True,
        remove_columns=data.column_names,
    )
    batch = task.collator(tokenizer)(list(examples)[:size])
    assert batch["labels"].dtype == torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder, **task.model_kwargs(schema)
    )
    found = model(**batch)
    error = ((found.logits[:, 0] - batch["labels"]) ** 2).mean()
    assert found.loss.item() == pytest.approx(error.item(), rel=1e-6)
