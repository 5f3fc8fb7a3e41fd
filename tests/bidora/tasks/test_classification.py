"""Classification: what a class is, which rows are bad, how it is split and scored."""

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
from bidora.tasks.classification import Classification


def table(
    labels: Sequence[Any],
    origin: str = "train.csv",
    texts: Sequence[Any] | None = None,
    names: tuple[str, ...] | None = None,
) -> Table:
    texts = [f"{origin} {i}" for i in range(len(labels))] if texts is None else texts
    return Table(
        origin,
        ("text", "label"),
        tuple(zip(texts, labels, strict=True)),
        tuple(f"line {i + 2}" for i in range(len(labels))),
        () if names is None else (("label", names),),
    )


def source(train: Table, test: Table | None = None, **hints: Any) -> Source:
    parts = {"train": train} if test is None else {"train": train, "test": test}
    return Source("data", parts, hints=hints)


def names_of(labels: Sequence[Any]) -> tuple[str, ...]:
    return Classification().schema(source(table(labels))).label_names


def told(task: Classification, examples: Source) -> str:
    schema = task.schema(examples)
    rows = {part: task.rows(t, schema) for part, t in examples.parts.items()}
    return "\n".join(task.describe(rows, schema))


# What a class is


def test_one_and_one_point_zero_are_one_class_of_numbers() -> None:
    labels = [float(i % 2) if i % 3 else i % 2 for i in range(24)]
    assert names_of(labels) == ("0", "1")


def test_words_that_spell_whole_numbers_are_those_numbers() -> None:
    task = Classification()
    examples = source(table(["0", "1"] * 6), table(["1.0", "0.0"], "test.csv"))
    schema = task.schema(examples)
    assert schema.label_names == ("0", "1")
    assert task.rows(examples.parts["test"], schema).columns["labels"] == [1, 0]
    assert names_of(["0.0", "1.0"] * 6) == ("0", "1")


def test_words_beside_numbers_keep_their_spelling() -> None:
    assert names_of(["v1", "2.0"] * 6) == ("2.0", "v1")


def test_truth_values_are_classes_of_their_own() -> None:
    assert names_of([True, False] * 6) == ("false", "true")


def test_truth_values_and_numbers_do_not_mix() -> None:
    with pytest.raises(UserError, match=r"6 truth values .* and 12 numbers"):
        names_of([True, 1, 0] * 6)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"] * 6, ("-1", "9", "10")),
        (["b", "a", "10", "9"] * 6, ("9", "10", "a", "b")),
        ([0.5, 2, 10] * 6, ("0.5", "2", "10")),
        ([" a ", "b", "a"] * 6, ("a", "b")),
    ],
)
def test_numbers_stand_by_size_and_words_by_the_alphabet(
    labels: list[Any], names: tuple[str, ...]
) -> None:
    assert names_of(labels) == names


def test_digits_without_end_are_a_class_as_any_other() -> None:
    long = "1" * 5000
    assert names_of([long, "0", "2"] * 6) == ("0", "2", long)
    assert len(told(Classification(), source(table([long, "0"] * 6)))) < 400


def test_the_sources_own_order_of_classes_is_kept() -> None:
    names = ("unacceptable", "acceptable", "unused")
    task = Classification()
    examples = source(table([0, 1] * 6, names=names))
    schema = task.schema(examples)
    assert schema.label_names == names
    assert task.rows(examples.train, schema).columns["labels"] == [0, 1] * 6
    assert "no example of 'unused' in train" in told(task, examples)


def test_indices_and_names_of_listed_classes_both_count() -> None:
    names = ("no", "yes")
    task = Classification()
    examples = source(table(["0", "1", "no", "yes"] * 3, names=names))
    rows = task.rows(examples.train, task.schema(examples))
    assert rows.columns["labels"] == [0, 1, 0, 1] * 3


# Bad rows


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        ("", "a", "column 'text' holds no text"),
        ("  ", "a", "column 'text' holds no text"),
        (None, "a", "column 'text' holds no text"),
        (math.nan, "a", "column 'text' holds no text"),
        (["x"], "a", "column 'text' holds a list, and no text"),
        ("\ud83d", "a", "half a character"),
        ("x", "", "column 'label' holds no label"),
        ("x", None, "column 'label' holds no label"),
        ("x", math.nan, "column 'label' holds no label"),
        ("x", "NaN", "column 'label' holds no label"),
        ("x", math.inf, "column 'label' holds inf"),
        ("x", ["a"], "column 'label' holds a list"),
        ("x", {"a": 1}, "column 'label' holds a dict"),
        ("x", "\ud83d", "half a character"),
        ("", None, "'text' holds no text; column 'label' holds no label."),
    ],
)
def test_a_bad_row_is_told_with_its_place_and_the_others_stay(
    text: Any, label: Any, reason: str
) -> None:
    texts = ["one", "two", "three", "four", text]
    train = table(["a", "b", "a", "b", label], texts=texts)
    task = Classification()
    rows = task.rows(train, task.schema(source(train)))
    assert rows.columns == {"text": texts[:4], "labels": [0, 1, 0, 1]}
    assert rows.places == [f"train.csv, line {i}" for i in range(2, 6)]
    (bad,) = rows.bad
    assert bad.startswith("train.csv, line 6: ")
    assert reason in bad


@pytest.mark.parametrize(("label", "reason"), [(-1, "hidden label"), (2, "are 0 to 1")])
def test_an_index_without_a_class_is_a_bad_row(label: int, reason: str) -> None:
    train = table([0, 1, 0, 1, label], names=("no", "yes"))
    task = Classification()
    rows = task.rows(train, task.schema(source(train)))
    assert len(rows) == 4
    assert reason in rows.bad[0]


def test_an_unknown_class_is_a_bad_row_with_its_count_and_the_nearest_name() -> None:
    test = table(["biling", "shipping", "biling"], "test.csv")
    examples = source(table(["billing", "shipping"] * 4), test)
    task = Classification()
    rows = task.rows(test, task.schema(examples))
    assert rows.columns["labels"] == [1]
    assert [b.split(":")[0] for b in rows.bad] == [
        "test.csv, line 2",
        "test.csv, line 4",
    ]
    assert "'biling' (2 rows do)" in rows.bad[0]
    assert rows.bad[0].endswith("Did you mean 'billing'?")
    assert "test has classes that train lacks: 'biling' (2)" in told(task, examples)


def test_rows_to_be_scored_need_no_label() -> None:
    task = Classification()
    schema = task.schema(source(table(["a", "b"] * 4)))
    new = Table("new.csv", ("text",), (("one",), ("",)), ("line 2", "line 3"))
    rows = task.rows(new, schema, labelled=False)
    assert rows.columns == {"text": ["one"]}
    assert len(rows.bad) == 1


def test_a_schema_comes_back_from_json() -> None:
    task = Classification(min_examples_per_class=3)
    examples = source(table(["a", "b"] * 4 + ["c"]))
    schema = task.schema(examples)
    again = Schema.from_dict(json.loads(json.dumps(schema.to_dict())))
    assert again == schema
    assert task.rows(examples.train, again) == task.rows(examples.train, schema)


# Columns


@pytest.mark.parametrize(
    "pair",
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
    ],
)
def test_usual_pairs_of_columns_are_found(pair: tuple[str, str]) -> None:
    rows = tuple((f"l{i}", f"r{i}", "ab"[i % 2]) for i in range(6))
    train = Table("t.csv", (*pair, "label"), rows, ("",) * 6)
    task = Classification()
    found = task.rows(train, task.schema(source(train)))
    assert found.columns["text"] == [row[0] for row in rows]
    assert found.columns["text_pair"] == [row[1] for row in rows]
    alone = Classification(text_column=pair[1])
    assert "text_pair" not in alone.rows(train, alone.schema(source(train))).columns


def test_a_setting_goes_before_a_hint_and_a_hint_before_a_usual_name() -> None:
    rows = tuple((f"a{i}", f"b{i}", "xy"[i % 2], "zw"[i % 2]) for i in range(6))
    train = Table("t.csv", ("text", "body", "label", "kind"), rows, ("",) * 6)
    hinted = source(train, text_column="body", label_column="kind")
    schema = Classification().schema(hinted)
    assert schema.settings["text_column"] == "body"
    assert schema.label_names == ("w", "z")
    schema = Classification(text_column="text", label_column="label").schema(hinted)
    assert schema.settings["text_column"] == "text"
    assert schema.label_names == ("x", "y")


def test_a_wrong_column_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no column 'txt' .*Did you mean 'text'"):
        Classification(text_column="txt").schema(source(table(["a", "b"] * 4)))


def test_one_column_cannot_serve_twice() -> None:
    with pytest.raises(UserError, match="one column serves twice"):
        Classification(label_column="text").schema(source(table(["a", "b"] * 4)))


# What is refused, left out, or odd


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a"] * 8, "holds only 'a'"),
        ([None] * 8, "holds no class"),
        ([f"w{i}" for i in range(8)], "8 different values in 8 rows.*multilabel"),
        ([f"{i}" for i in range(8)], "8 different values in 8 rows.*regression"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        names_of(labels)


def test_rare_classes_are_left_out_of_every_part_and_told() -> None:
    train = table(["a", "b"] * 5 + ["c", "c"])
    test = table(["a", "c", "b"], "test.csv")
    task = Classification(min_examples_per_class=3)
    examples = source(train, test)
    schema = task.schema(examples)
    assert schema.label_names == ("a", "b")
    rows = task.rows(test, schema)
    assert rows.columns["labels"] == [0, 1]
    assert rows.places == ["test.csv, line 2", "test.csv, line 4"]
    assert not rows.bad
    assert (
        "classes with fewer than 3 examples in train are left out, with all their "
        "3 examples: 'c'." in told(task, examples)
    )


def test_what_was_understood_is_told() -> None:
    text = told(
        Classification(), source(table(["b", "a"] * 5), table(["a"], "test.csv"))
    )
    assert text.splitlines() == [
        "text from column 'text', label from column 'label'",
        "2 classes: a (train 5, test 1), b (train 5, test 0)",
    ]


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (
            ["Billing", "billing", " billing "] * 6,
            "'Billing' (6), 'billing' (12) differ",
        ),
        (["no_entry", "no entry", "x"] * 6, "differ in spelling alone"),
        ([str(i) for i in range(6)] * 6, "all 6 classes are numbers"),
        (["a", "b", "a;b"] * 6, "joined ('a;b')"),
    ],
)
def test_odd_classes_are_warned_of(labels: list[str], warning: str) -> None:
    assert warning in told(Classification(), source(table(labels)))


def test_the_class_that_binary_f1_scores_is_told() -> None:
    text = told(Classification(metric="f1"), source(table(["spam", "ham"] * 6)))
    assert "f1 is that of class 'spam'." in text


def test_plus_and_minus_one_are_not_alike() -> None:
    assert "warning" not in told(Classification(), source(table([1, -1] * 6)))


def test_texts_that_train_and_test_share_are_counted() -> None:
    train = table(["a", "b"] * 3, texts=list("uvwxyz"))
    test = table(["a", "b", "a"], "test.csv", texts=["u", "new", "u"])
    text = told(Classification(), source(train, test))
    assert "2 of 3 examples of test have a text that train has too, such as 'u'" in text


# Splits


@given(
    sizes=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    fraction=st.floats(0.1, 0.5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_a_split_keeps_the_shares_and_every_example(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    rows = Rows({"labels": labels}, [""] * len(labels))
    schema = Schema("classification", label_names=tuple("abcde"[: len(sizes)]))
    task = Classification()
    first, second = task.split(rows, schema, fraction, seed)
    assert task.split(rows, schema, fraction, seed) == (first, second)
    assert sorted(first + second) == list(range(len(labels)))
    held = max(math.ceil(fraction * len(labels)), len(sizes))
    assert len(second) == held
    counts = Counter(labels[i] for i in second)
    for label, size in enumerate(sizes):
        # scikit-learn deals whole examples: each class within one of its share.
        assert abs(counts[label] - size * held / len(labels)) <= 1


def test_a_class_with_one_example_cannot_be_split() -> None:
    task = Classification()
    train = table(["a", "a", "b", "a"])
    schema = task.schema(source(train))
    with pytest.raises(UserError, match=r"single example: b\..*min-examples-per-class"):
        task.split(task.rows(train, schema), schema, 0.25, 0)


# Scores


def scored(metric: str, classes: int, pairs: list[tuple[int, int, int]]) -> Any:
    """Score `count` examples of class `truth` that are said to be of class `said`."""
    labels = [t for t, _, n in pairs for _ in range(n)]
    chosen = [c for _, c, n in pairs for _ in range(n)]
    schema = Schema("classification", label_names=tuple("abc"[:classes]), metric=metric)
    logits = np.eye(classes)[chosen]
    return Classification().metrics(logits, np.array(labels), schema)


def test_binary_scores_by_hand() -> None:
    # tp 6, fn 2, fp 1, tn 3
    pairs = [(1, 1, 6), (1, 0, 2), (0, 1, 1), (0, 0, 3)]
    scores = scored("matthews_correlation", 2, pairs)
    assert scores["accuracy"] == pytest.approx(9 / 12, rel=1e-15)
    assert scores["f1_macro"] == pytest.approx((12 / 15 + 6 / 9) / 2, rel=1e-15)
    matthews = (6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5)
    assert scores["matthews_correlation"] == pytest.approx(matthews, rel=1e-14)
    assert scored("f1", 2, pairs)["f1"] == pytest.approx(12 / 15, rel=1e-15)


def test_scores_of_three_classes_by_hand() -> None:
    # Class b is never right: F1 of a is 2·2/(2·2 + 1 + 0), of c 2·1/(2·1 + 0 + 0).
    scores = scored("accuracy", 3, [(0, 0, 2), (1, 0, 1), (2, 2, 1)])
    assert scores == {
        "accuracy": 0.75,
        "f1_macro": pytest.approx((4 / 5 + 0 + 1) / 3, rel=1e-15),
    }


@pytest.mark.filterwarnings("error")
def test_one_class_for_all_has_no_correlation() -> None:
    assert scored("matthews_correlation", 2, [(0, 0, 3), (1, 0, 2)])[
        "matthews_correlation"
    ] == pytest.approx(0.0, abs=0)
    assert scored("matthews_correlation", 2, [(0, 0, 3)])["matthews_correlation"] == 0
    assert scored("f1", 2, [(0, 0, 3)])["f1"] == 0


def test_a_tuple_of_outputs_begins_with_the_scores() -> None:
    schema = Schema("classification", label_names=("a", "b"), metric="accuracy")
    logits = (np.eye(2), np.zeros((2, 7)))
    assert Classification().metrics(logits, np.array([0, 1]), schema)["accuracy"] == 1  # pyright: ignore[reportArgumentType]


def test_outputs_that_are_not_finite_are_refused() -> None:
    schema = Schema("classification", label_names=("a", "b"), metric="accuracy")
    logits = np.array([[0.0, 1.0], [np.nan, 0.0]])
    with pytest.raises(UserError, match=r"not finite for 1 of 2 .*--learning-rate"):
        Classification().metrics(logits, np.array([0, 1]), schema)


def test_the_main_metric_is_chosen_or_hinted() -> None:
    examples = source(table(["a", "b"] * 4), metric="matthews_correlation")
    assert Classification().schema(examples).metric == "matthews_correlation"
    assert Classification(metric="f1").schema(examples).metric == "f1"
    assert Classification().schema(source(examples.train)).metric == "accuracy"
    with pytest.raises(UserError, match="unknown metric 'f2'"):
        Classification(metric="f2").schema(examples)
    with pytest.raises(UserError, match="has 3 classes"):
        Classification(metric="f1").schema(source(table(["a", "b", "c"] * 4)))


def test_answers_are_a_class_and_every_probability() -> None:
    schema = Schema("classification", label_names=("a", "b"))
    logits = np.log(np.array([[1.0, 3.0], [4.0, 1.0]]))
    rows = Rows({"text": ["x", "y"]}, ["", ""])
    first, second = Classification().answers(logits, rows, schema)
    assert first == {
        "label": "b",
        "probability": pytest.approx(0.75, rel=1e-15),
        "p(a)": pytest.approx(0.25, rel=1e-15),
        "p(b)": pytest.approx(0.75, rel=1e-15),
    }
    assert second["label"] == "a"


# With a model


def test_features_make_batches_that_a_model_learns_from(tiny_encoder: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = Classification()
    texts = ["a small apple", "iron and tin of the crow", "plum", "zinc"]
    train = table(["fruit", "metal", "fruit", "metal"], texts=texts)
    schema = task.schema(source(train))
    rows = task.rows(train, schema)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    features = task.features(rows.columns, tokenizer, schema, 6)
    assert features["labels"] == [0, 1, 0, 1]
    assert max(map(len, features["input_ids"])) == 6
    # [CLS] a small apple [SEP] is five, the next eight.
    assert task.count_over_long(rows, tokenizer, 6) == 1
    assert task.count_over_long(rows, tokenizer, 8) == 0
    data = Dataset.from_dict(rows.columns)
    examples = data.map(
        lambda batch: task.features(batch, tokenizer, schema, 6),
        batched=True,
        remove_columns=data.column_names,
    )
    batch = task.collator(tokenizer)(list(examples))
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder, **task.model_kwargs(schema)
    )
    loss = model(**batch).loss
    assert math.isfinite(loss.item())
    assert model.config.id2label == {0: "fruit", 1: "metal"}
    loss.backward()


def test_another_kind_of_loss_in_the_bases_configuration_does_not_stay(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_encoder, num_labels=2, problem_type="regression"
    )
    base.save_pretrained(tmp_path)
    task = Classification()
    kwargs = task.model_kwargs(task.schema(source(table(["a", "b"] * 4))))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **kwargs)
    labels = torch.tensor([0, 1])
    found = model(input_ids=torch.tensor([[2, 6, 3], [2, 7, 3]]), labels=labels)
    expected = torch.nn.functional.cross_entropy(found.logits, labels)
    assert found.loss.item() == expected.item()
