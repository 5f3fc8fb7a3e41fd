"""What tasks share whose examples are an input and a label: columns, rows, repetitions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table, name_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema, Task
from bidora.tasks.labels import BadValueError

__all__ = ["LABEL_COLUMNS", "SKIP", "LabelledTask"]

SKIP = object()
"""What `read_labels` returns for a row that is neither used nor wrong."""

LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


@dataclass(frozen=True, kw_only=True)
class LabelledTask(Task):
    """What tasks share that read inputs from some columns and a label from others.

    Args:
        label_column: Column of what the model is to give; None for one with a usual
            name.
        metric: The metric that choices are made by; None for the data set's own, or
            else the task's.

    Attributes:
        noun: What an example is called in messages.
        usual_label_columns: Names that a label's column is looked for by.
    """

    noun: ClassVar[str]
    usual_label_columns: ClassVar[Sequence[str]] = LABEL_COLUMNS

    label_column: str | None = None
    metric: str | None = None

    @abstractmethod
    def input_columns(self, source: Source) -> dict[str, str]:
        """Return the columns of inputs by setting: chosen, hinted, or by usual names.

        Args:
            source: The examples.

        Raises:
            UserError: If there is none.
        """

    @abstractmethod
    def read_inputs(self, table: Table, schema: Schema) -> dict[str, Sequence[Any]]:
        """Return what the inputs of each row are, by name.

        Args:
            table: The rows.
            schema: Of the training data.

        Returns:
            One value a row: the input, or a `BadValueError` that says what is wrong with
            it.

        Raises:
            UserError: If a column is missing.
        """

    @abstractmethod
    def read_labels(self, table: Table, schema: Schema) -> Sequence[Any]:
        """Return what each row's label means.

        Args:
            table: The rows.
            schema: Of the training data.

        Returns:
            One value a row: the label; `SKIP` for a row that is left out; or a
            `BadValueError` that says what is wrong with it.

        Raises:
            UserError: If a column is missing.
        """

    @abstractmethod
    def contents(self, part: Rows) -> Sequence[Hashable]:
        """Return what two examples have in common that are the same but for the label.

        Args:
            part: Examples.
        """

    @abstractmethod
    def spelled(self, part: Rows, index: int) -> str:
        """Return an example in a few words, for a message.

        Args:
            part: Examples.
            index: Which of them.
        """

    def columns(self, source: Source) -> dict[str, str]:
        """Return the columns of inputs and of the label, by setting.

        Args:
            source: The examples.

        Raises:
            UserError: If one is missing, or serves twice.
        """
        chosen = self.input_columns(source)
        label = self.label_column or source.hints.get("label_column")
        usual = [n for n in self.usual_label_columns if n not in chosen.values()]
        inputs = list(chosen)
        chosen["label_column"] = name_column(
            source.train, label, "--label-column", usual
        )
        if len(set(chosen.values())) < len(chosen):
            options = [f"--{name.replace('_', '-')}" for name in chosen]
            parts = [*(_words(name) for name in inputs), "label"]
            raise UserError(
                f"{source.train.origin}: one column serves twice "
                f"({', '.join(chosen.values())}). The {_listed(parts)} need a column "
                f"each; name them with {_listed(options)}."
            )
        return chosen

    def rows(self, table: Table, schema: Schema, *, labelled: bool = True) -> Rows:
        """Read inputs and labels; every bad row is told."""
        read = self.read_inputs(table, schema)
        if labelled:
            read["labels"] = self.read_labels(table, schema)
        clean: dict[str, list[Any]] = {key: [] for key in read}
        places: list[str] = []
        bad: list[str] = []
        for row, values in enumerate(zip(*read.values(), strict=True)):
            wrong = [str(v) for v in values if isinstance(v, BadValueError)]
            if wrong:
                end = "" if wrong[-1].endswith(("?", ".")) else "."
                bad.append(f"{table.place(row)}: {'; '.join(wrong)}{end}")
            elif values[-1] is not SKIP:
                places.append(table.place(row))
                for key, value in zip(read, values, strict=True):
                    clean[key].append(value)
        return Rows(clean, places, bad)

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Return which columns are read, and how many examples two parts share."""
        used = [
            f"{name.removesuffix('_column').replace('_', ' ')} from column {column!r}"
            for name, column in schema.settings.items()
            if name.endswith("_column") and column
        ]
        return [", ".join(used), *self._shared(rows)]

    def _shared(self, rows: Mapping[str, Rows]) -> list[str]:
        if "train" not in rows:
            return []
        known = set(self.contents(rows["train"]))
        told: list[str] = []
        for name, part in rows.items():
            if name == "train":
                continue
            both = [i for i, c in enumerate(self.contents(part)) if c in known]
            if both:
                told.append(
                    f"warning: {len(both):,} of {len(part):,} examples of {name} have "
                    f"{_a(self.noun)} that train has too, such as "
                    f"{self.spelled(part, both[0])}; what the model has seen makes its "
                    "scores too good."
                )
        return told


def _words(setting: str) -> str:
    """Return what a column holds, by the setting that names it."""
    kind = setting.removesuffix("_column")
    return "second text" if kind == "text_pair" else kind


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]])


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
