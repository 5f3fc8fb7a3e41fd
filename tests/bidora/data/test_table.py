"""Columns of the training data, looked for in other rows."""

from __future__ import annotations

import pytest

from bidora.data.table import Table, same_column
from bidora.errors import UserError


def test_a_column_that_is_spelled_otherwise_is_to_be_renamed() -> None:
    table = Table("new.csv", ("id", "Text"), (), ())
    with pytest.raises(UserError, match="Rename column 'Text' to 'text', as in the"):
        same_column(table, "text")


@pytest.mark.parametrize(
    ("origin", "offered"), [("new.csv", True), ("new.tsv", True), ("new.jsonl", False)]
)
def test_names_for_columns_are_offered_where_a_file_may_have_none(
    origin: str, offered: bool
) -> None:
    table = Table(origin, ("words",), (), ())
    with pytest.raises(UserError, match=r"its columns are 'words'\. Rename the") as e:
        same_column(table, "text")
    assert ("--column-names" in str(e.value)) == offered
