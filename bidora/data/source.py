"""What every way in returns: named parts of rows, each of which knows its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["PARTS", "Source"]

PARTS = ("train", "validation", "test")
"""Names of the parts that a source may have, in the order in which they are used."""


@dataclass(frozen=True)
class Source:
    """The examples of a job, before any task has looked at them.

    Args:
        name: What the user called it.
        parts: Tables by the names of `PARTS`; `train` is always there. A part whose
            labels are hidden is left out.
        note: One sentence that says where the examples come from.
        hints: What is known of the data beside its rows, by the names of a task's
            settings: `task_type`, `text_column`, `metric` and so on. A setting that the
            user gives goes before its hint.

    Raises:
        UserError: If there are no examples to train on.
    """

    name: str
    parts: dict[str, Table]
    note: str = ""
    hints: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there is something to learn from."""
        if not self.parts.get("train"):
            origin = self.parts["train"].origin if "train" in self.parts else self.name
            raise UserError(f"{origin} has no rows; give a file with examples.")

    @property
    def train(self) -> Table:
        """What may be trained on."""
        return self.parts["train"]

    def place(self, part: str, row: int) -> str:
        """Return where a row stands, such as `train.csv, line 7`."""
        return self.parts[part].place(row)
