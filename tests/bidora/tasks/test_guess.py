"""The type of a task: recognised from the values, asked for where they leave it open."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.tasks.base import Schema
from bidora.tasks.guess import guess_task_type
from bidora.tasks.registry import make_task


def source(
    labels: Sequence[Any],
    column: str = "label",
    names: tuple[str, ...] | None = None,
    **hints: Any,
) -> Source:
    table = Table(
        "t.csv",
        ("text", column),
        tuple((f"text {i}", label) for i, label in enumerate(labels)),
        ("",) * len(labels),
        () if names is None else ((column, names),),
    )
    return Source("data", {"train": table}, hints=hints)


SCORES = [f"{1 + i / 10:.1f}" for i in range(41)] * 3
STARS = ["1", "2", "3", "4", "5"] * 20


@pytest.mark.parametrize(
    ("labels", "name", "why"),
    [
        (SCORES, "regression", "41 different numbers from 1 to 5, with fractions"),
        ([s.replace(".", ",") for s in SCORES], "regression", "41 different numbers"),
        ([*SCORES, "", None], "regression", "41 different numbers"),
        (list(range(100, 200)), "regression", "100 different numbers"),
        (["0", "1"] * 5, "classification", "2 different numbers"),
        (["0", "1", "2"] * 5, "classification", "3 different numbers"),
        ([-1, 0, 1] * 5, "classification", "3 different numbers"),
        ([1, 1.0, 2] * 5, "classification", "2 different numbers"),
        ([True, False] * 5, "classification", "2 different words"),
        (["a", "b", "c"] * 5, "classification", "3 different words"),
        (["a", "b", "a;b"] * 5, "multilabel", "'a;b' and such in 5 of 15 rows"),
        (["a|b", "b|c", "c|a"] * 5, "multilabel", r"joined by '\|'"),
        (["a, b", "b, c", "a", "b", "c"] * 5, "multilabel", "joined by ','"),
        (["Korea, North", "Korea, South", "Fiji"] * 5, "classification", "3 different"),
        ([["a"], ["a", "b"]] * 5, "multilabel", r"lists \(10 of 10 rows\)"),
        (["['a']", "['a', 'b']"] * 5, "multilabel", "holds lists"),
    ],
)
def test_the_type_is_recognised(labels: list[Any], name: str, why: str) -> None:
    found, reason = guess_task_type(source(labels), {})
    assert found == name
    assert re.search(why, reason), reason


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (
            STARS,
            r"5 different numbers from 1 to 5 in 100 rows.*classification \(5 classes",
        ),
        (list(range(6)) * 5, r"6 different numbers.*--task-type regression"),
        (["0", "0.5", "1"] * 5, r"3 different numbers.*--task-type regression"),
        (
            ["a;b", "c;d", "e"] * 5,
            r"multilabel \(5 labels\) or .*classification \(3 cl",
        ),
    ],
)
def test_the_user_is_asked_where_it_is_open(labels: list[Any], options: str) -> None:
    with pytest.raises(UserError, match=options):
        guess_task_type(source(labels), {})


def test_the_users_choice_goes_first_and_then_the_data_sets_own() -> None:
    hinted = source(STARS, task_type="classification")
    assert guess_task_type(hinted, {"task_type": None})[0] == "classification"
    assert guess_task_type(hinted, {"task_type": "regression"})[0] == "regression"
    assert guess_task_type(source(STARS), {"label_separator": ";"})[0] == "multilabel"


def test_named_classes_are_classes_whatever_their_number() -> None:
    stars = source([0, 1, 2, 3, 4, 5] * 20, names=tuple("abcdef"))
    assert guess_task_type(stars, {})[0] == "classification"


def test_tagged_sentences_are_recognised() -> None:
    rows = ((["a", "b"], ["O", "B-X"]), (["c"], ["O"]))
    table = Table("t.jsonl", ("tokens", "ner_tags"), rows, ("", ""))
    name, why = guess_task_type(Source("t", {"train": table}), {})
    assert name == "tagging"
    assert why == "column 'ner_tags' holds a tag for each word of column 'tokens'"


def test_columns_of_zeros_and_ones_are_labels() -> None:
    rows = tuple((f"text {i}", i % 2, i % 3 // 2) for i in range(12))
    table = Table("t.csv", ("text", "toxic", "rude"), rows, ("",) * 12)
    assert guess_task_type(Source("t", {"train": table}), {})[0] == "multilabel"
    chosen = guess_task_type(Source("t", {"train": table}), {"label_column": "rude"})
    assert chosen[0] == "classification"


def test_the_column_of_the_label_is_chosen_or_has_a_usual_name() -> None:
    assert guess_task_type(source(SCORES, "similarity"), {})[0] == "regression"
    assert (
        guess_task_type(source(SCORES, "y"), {"label_column": "y"})[0] == "regression"
    )
    with pytest.raises(UserError, match="no column with a usual name"):
        guess_task_type(source(SCORES, "y"), {})


def test_rows_are_read_before_anything_large_is_loaded() -> None:
    code = (
        "import sys\n"
        "from bidora.data.source import Source\n"
        "from bidora.data.table import Table\n"
        "from bidora.tasks.guess import guess_task_type\n"
        "from bidora.tasks.registry import make_task\n"
        "rows = tuple((f'text {i}', 'ab'[i % 2]) for i in range(8))\n"
        "table = Table('t.csv', ('text', 'label'), rows, ('',) * 8)\n"
        "source = Source('t', {'train': table})\n"
        "for name in (guess_task_type(source, {})[0], 'classification'):\n"
        "    task = make_task(name)\n"
        "    schema = task.schema(source)\n"
        "    task.describe({'train': task.rows(table, schema)}, schema)\n"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'datasets') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("labels", "name", "given"),
    [
        (["a", "b", "c"] * 5, "classification", {"min_examples_per_class": 2}),
        (SCORES, "regression", {}),
        (["a;b", "b", "a"] * 5, "multilabel", {"allow_empty": True}),
        ([["a"], ["b"]] * 5, "multilabel", {"min_examples_per_class": 2}),
    ],
)
def test_a_saved_schema_makes_the_task_again(
    labels: list[Any], name: str, given: dict[str, Any]
) -> None:
    examples = source(labels)
    schema = make_task(name, **given).schema(examples)
    saved = Schema.from_dict(json.loads(json.dumps(schema.to_dict())))
    again = make_task(saved.task, **saved.settings)
    assert again.schema(examples) == schema
    assert len(again.rows(examples.train, saved, labelled=False)) == len(labels)
