"""Instructions whose columns are not all there, or hold lists as texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bidora.data.files import read_file
from bidora.data.load import load_source
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.tasks import Schema
from bidora.tasks.instruction import Instruction

TASK = Instruction()
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Bye"},
]


def trained_on_two_columns(folder: Path) -> Schema:
    """Return what is found out about a file of which one row has no second part."""
    rows = [{"instruction": "Add", "input": "2, 2", "output": "4"}] * 2
    rows.append({"instruction": "Hi", "output": "Hello"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    source = load_source(str(folder / "train.jsonl"))
    schema = TASK.schema(source)
    read = TASK.rows(source.train, schema)
    assert read.columns["text"] == ["Add\n\n2, 2", "Add\n\n2, 2", "Hi"]
    assert not read.bad
    return schema


def new_rows(folder: Path, **row: str) -> Table:
    (folder / "new.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return read_file(folder / "new.jsonl")[0]


def test_rows_without_a_second_part_need_no_column_for_it(tmp_path: Path) -> None:
    schema = trained_on_two_columns(tmp_path)
    new = new_rows(tmp_path, instruction="Say 3")
    assert TASK.rows(new, schema, labelled=False).columns == {"text": ["Say 3"]}


def test_a_second_part_that_is_spelled_otherwise_is_not_lost(tmp_path: Path) -> None:
    schema = trained_on_two_columns(tmp_path)
    new = new_rows(tmp_path, instruction="Add", Input="2, 2")
    with pytest.raises(UserError, match="Rename column 'Input' to 'input', as in the"):
        TASK.rows(new, schema, labelled=False)


@pytest.mark.parametrize("written", [json.dumps, repr], ids=["json", "python"])
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_conversations_that_are_texts_are_sent_to_jsonl(
    written: Any, column: str
) -> None:
    rows = ((written(CHAT),),) * 3
    table = Table("t.csv", (column,), rows, ("line 2", "line 3", "line 4"))
    with pytest.raises(UserError, match="They are read from jsonl") as error:
        TASK.schema(Source("t.csv", {"train": table}))
    example = str(error.value).partition("such as ")[2].removesuffix(".")
    (turns,) = json.loads(example).values()
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert "--label-column" not in str(error.value)


def test_prompts_that_are_lists_of_something_else_are_prompts() -> None:
    prompts = ('[{"price": 3}]', "[1, 2]", "Sum up: [{'role': 'user'}]")
    table = Table("t.csv", ("prompt", "completion"),
                  tuple((p, "x") for p in prompts), ("",) * 3)  # fmt: skip
    schema = TASK.schema(Source("t.csv", {"train": table}))
    assert TASK.rows(table, schema).columns["text"] == list(prompts)
