"""What tasks on texts and pairs of texts share: their columns, tokens and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

from bidora.data.source import Source
from bidora.data.table import Table, name_column, same_column
from bidora.tasks.base import Rows, Schema
from bidora.tasks.labelled import LABEL_COLUMNS, SKIP, LabelledTask
from bidora.tasks.labels import BadValueError, plain, shown
from bidora.tasks.proteins import by_residue, mostly_residues, read_residues

__all__ = [
    "LABEL_COLUMNS",
    "PAIRS",
    "SKIP",
    "TEXT_COLUMNS",
    "TextTask",
]

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
TEXT_COLUMNS = (
    "text",
    "sentence",
    "sentence1",
    "content",
    "review",
    "question",
    "sequence",
)

PAIR = "pair_"
"""What stands before the names of a second text's inputs, where it is read apart."""


@dataclass(frozen=True, kw_only=True)
class TextTask(LabelledTask):
    """What tasks share whose examples are texts, or pairs of texts.

    Args:
        text_column: Column of the text; None for one with a usual name.
        text_pair_column: Column of the second text; None for none, unless both columns
            have usual names, such as `premise` and `hypothesis`.
        label_column: Column of what the model is to give; None for one with a usual
            name.
        proteins: Whether the texts are proteins, one letter a residue; None for what a
            column called `sequence` holds.
        metric: The metric that choices are made by; None for the data set's own, or
            else the task's.
        apart: Whether the model reads two texts each by itself; `for_model` finds out.
    """

    peft_type: ClassVar[str | None] = "SEQ_CLS"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    noun: ClassVar[str] = "text"

    text_column: str | None = None
    text_pair_column: str | None = None
    proteins: bool | None = None
    apart: bool = False

    def for_model(self, config: Any) -> Self:
        """Return the task as the model reads two texts: together, or apart.

        Args:
            config: Of the model.

        Returns:
            A copy that knows.
        """
        return replace(self, apart=getattr(config, "pairs", "together") == "apart")

    def text_columns(self, source: Source) -> dict[str, str]:
        """Return the columns of texts by setting: chosen, hinted, or by usual names.

        Args:
            source: The examples.

        Raises:
            UserError: If there is none.
        """
        table, hints = source.train, source.hints
        text, pair = self.text_column, self.text_pair_column
        if text is None:
            text = hints.get("text_column")
            pair = pair or (hints.get("text_pair_column") if text else None)
        if text is None and "text" not in table.columns:
            usual = (p for p in PAIRS if set(p) <= set(table.columns))
            first, second = next(usual, (None, None))
            text, pair = first, pair or second
        text = name_column(table, text, "--text-column", TEXT_COLUMNS)
        if pair is None:
            return {"text_column": text}
        pair = name_column(table, pair, "--text-pair-column", ())
        return {"text_column": text, "text_pair_column": pair}

    def input_columns(self, source: Source) -> dict[str, str]:
        """Return the columns of texts."""
        return self.text_columns(source)

    def holds_proteins(self, source: Source, columns: Mapping[str, str]) -> bool:
        """Return whether the texts are proteins: chosen, known, or seen.

        They are seen by most values of a column called `sequence`, so that an odd one
        among them is a bad row, and does not make words of all others.

        Args:
            source: The examples.
            columns: What `columns` returned.
        """
        given = (
            self.proteins
            if self.proteins is not None
            else (source.hints.get("proteins"))
        )
        if given is not None:
            return given
        column = columns["text_column"]
        if column != "sequence":
            return False
        return mostly_residues(
            v for v in source.train.values(column) if isinstance(v, str)
        )

    def read_inputs(self, table: Table, schema: Schema) -> dict[str, Sequence[Any]]:
        """Return the texts, without the blanks around them."""
        columns = {"text": schema.settings["text_column"]}
        if schema.settings.get("text_pair_column"):
            columns["text_pair"] = schema.settings["text_pair_column"]
        for column in columns.values():
            same_column(table, column)
        proteins = schema.settings.get("proteins", False)
        return {
            key: [
                self.read_text(value, column, proteins)
                for value in table.values(column)
            ]
            for key, column in columns.items()
        }

    def contents(self, part: Rows) -> list[tuple[str, ...]]:
        """Return each example's text, or its two texts."""
        names = [n for n in ("text", "text_pair") if n in part.columns]
        return list(zip(*(part.columns[n] for n in names), strict=True))

    def spelled(self, part: Rows, index: int) -> str:
        """Return the beginning of a text, quoted."""
        return repr(shown(" / ".join(self.contents(part)[index]), 60))

    def read_text(self, value: Any, column: str, proteins: bool) -> str | BadValueError:
        """Return a text without the blanks around it, or what is wrong with it.

        Args:
            value: As the table has it.
            column: Where it stands, for the message.
            proteins: Whether it is a protein.
        """
        return _text(value, column, proteins)

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Return which columns are read, and how many texts two parts share."""
        told = super().describe(rows, schema)
        if schema.settings.get("proteins"):
            told.insert(1, "proteins: one token a residue")
        return told

    def usual_pooling(self, schema: Schema) -> str:
        """Return `mean` for proteins, whose models seldom trained their first token."""
        return "mean" if schema.settings.get("proteins") else "head"

    def fit_processor(self, processor: Any, schema: Schema) -> Any:
        """Return the tokenizer, for proteins one that gives a token a residue."""
        return by_residue(processor) if schema.settings.get("proteins") else processor

    def features(
        self,
        batch: Mapping[str, list[Any]],
        processor: Any,
        schema: Schema,
        length: int,
    ) -> dict[str, list[Any]]:
        """Tokenise texts, cut at `length` tokens, special ones included.

        Two texts share those tokens; read apart, each has as many.

        Args:
            batch: As for any task.
            processor: The model's tokenizer.
            schema: Of the data.
            length: Tokens kept.

        Returns:
            Inputs, those of a second text that is read apart with `PAIR` before them.
        """
        kept: dict[str, Any] = {"truncation": True, "max_length": length}
        first, second = list(batch["text"]), batch.get("text_pair")
        if self.apart and second is not None:
            made: dict[str, list[Any]] = {}
            for prefix, texts in (("", first), (PAIR, list(second))):
                tokens = processor(texts, return_token_type_ids=False, **kept)
                made |= {f"{prefix}{name}": list(v) for name, v in tokens.items()}
        else:
            tokens = processor(
                first, list(second) if second is not None else None, **kept
            )
            made = {name: list(values) for name, values in tokens.items()}
        if "labels" in batch:
            made["labels"] = self.targets(batch["labels"], schema)
        return made

    def targets(self, labels: Sequence[Any], schema: Schema) -> list[Any]:
        """Return labels of `rows` as the model's loss takes them.

        Args:
            labels: As `rows` has them.
            schema: Of the data.
        """
        del schema
        return list(labels)

    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that pads to the longest text of the batch."""
        from transformers import DataCollatorWithPadding

        pad = DataCollatorWithPadding(processor)
        return partial(_pad_pairs, pad) if self.apart else pad

    def count_over_long(self, rows: Rows, processor: Any, length: int) -> int:
        """Return how many examples have more than `length` tokens, so that they are cut.

        Args:
            rows: The examples.
            processor: The model's tokenizer.
            length: Tokens kept.
        """
        pairs = rows.columns.get("text_pair")
        count = 0
        for start in range(0, len(rows), 1000):
            part = slice(start, start + 1000)
            texts = [rows.columns["text"][part], *([pairs[part]] if pairs else [])]
            each = [(t,) for t in texts] if self.apart else [tuple(texts)]
            found = [
                processor(*both, truncation=False, verbose=False)["input_ids"]
                for both in each
            ]
            count += sum(
                any(len(ids) > length for ids in row)
                for row in zip(*found, strict=True)
            )
        return count


def _pad_pairs(
    pad: Callable[[list[Any]], dict[str, Any]], examples: list[Any]
) -> dict[str, Any]:
    """Return a batch of pairs whose texts are apart, first and second of one length.

    Args:
        pad: Makes a batch of single texts.
        examples: Features, those of the second text with `PAIR` before their names.
    """
    own = [{n: v for n, v in e.items() if not n.startswith(PAIR)} for e in examples]
    second = [
        {n.removeprefix(PAIR): v for n, v in e.items() if n.startswith(PAIR)}
        for e in examples
    ]
    batch = dict(pad(own))
    both = pad([{name: e[name] for name in second[0]} for e in own] + second)
    for name, value in both.items():
        batch[name], batch[f"{PAIR}{name}"] = value.chunk(2)
    return batch


def _text(value: Any, column: str, proteins: bool) -> str | BadValueError:
    if isinstance(value, int | float) and value == value:
        value = str(value)
    try:
        if value is None or isinstance(value, float):
            raise BadValueError("holds no text")
        if not isinstance(value, str):
            raise BadValueError(f"holds a {type(value).__name__}, and no text")
        return read_residues(value) if proteins else plain(value, "text")
    except BadValueError as error:
        return BadValueError(f"column {column!r} {error}")
