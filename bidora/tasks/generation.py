"""Texts from data or from other texts: one reference or several for each input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table, name_column, same_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema, TextScores
from bidora.tasks.labels import BadValueError, plain
from bidora.tasks.language import IGNORED, Encoded, LanguageTask
from bidora.tasks.metrics import choose_metric
from bidora.tasks.text_scores import TEXT_METRICS, check_scorer, text_scores

__all__ = ["INPUT_COLUMNS", "REFERENCE_COLUMNS", "Generation"]

INPUT_COLUMNS = (
    "mr",
    "meaning_representation",
    "source",
    "input",
    "text",
    "article",
    "document",
)
REFERENCE_COLUMNS = (
    "ref",
    "reference",
    "human_reference",
    "target",
    "output",
    "summary",
    "label",
)

SEPARATOR = "\n"
"""Stands between an input and its text, for models that read both as one."""


@dataclass(frozen=True, kw_only=True)
class Generation(LanguageTask):
    """A text for each input, such as a sentence that says what a table means.

    A row holds an input and one reference; rows of one input are its references, and
    stay on one side of every split. The model reads the input, a line's end and the
    reference, and learns the reference alone. At the end of a run, the model writes one
    text for each input by beam search, and all its references score it.

    During a run, perplexity is what curves show and early stopping asks: to write texts at
    every evaluation would cost more than the training.

    Args:
        text_column: Column of the input; None for one with a usual name.
        label_column: Column of the reference; None for one with a usual name.
        metric: The metric that the run is told by; None for BLEU.

    Example:
        >>> rows = (
        ...     ("name[Aromi]", "Aromi is a pub."),
        ...     ("name[Aromi]", "A pub: Aromi."),
        ... )
        >>> table = Table("t.csv", ("mr", "ref"), rows, ("line 2", "line 3"))
        >>> task = Generation()
        >>> schema = task.schema(Source("t.csv", {"train": table}))
        >>> task.groups(task.rows(table, schema), schema)
        ['name[Aromi]', 'name[Aromi]']
    """

    name: ClassVar[str] = "generation"
    main_metric: ClassVar[str] = "bleu"
    scores_texts: ClassVar[bool] = True
    usual_beams: ClassVar[int] = 4
    takes_two_parts: ClassVar[bool] = True
    usual_label_columns: ClassVar[Sequence[str]] = REFERENCE_COLUMNS

    def for_model(self, config: Any) -> LanguageTask:
        """Return the task for an encoder-decoder, or for a decoder alone.

        Args:
            config: Of the model.

        Raises:
            UserError: If the model does not write texts.
        """
        super().for_model(config)
        if not getattr(config, "is_encoder_decoder", False):
            return self
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return EncoderDecoderGeneration(**given)

    def text_columns(self, source: Source) -> dict[str, str]:
        """Return the column of the input.

        Args:
            source: The examples.

        Raises:
            UserError: If there is none, or more is named.
        """
        self.refuse_other_texts()
        given = self.text_column or source.hints.get("text_column")
        column = name_column(source.train, given, "--text-column", INPUT_COLUMNS)
        return {"text_column": column}

    def schema(self, source: Source) -> Schema:
        """Find the columns."""
        metric = self.metric or source.hints.get("metric") or self.main_metric
        choose_metric(metric, TEXT_METRICS)
        columns = self.columns(source)
        return Schema(
            self.name, {**columns, **self.settings_of_generation()}, (), metric
        )

    def check_metric(self, schema: Schema) -> None:
        """Refuse a main metric whose library is missing or can't run.

        Args:
            schema: Of the data.

        Raises:
            UserError: If that is so.
        """
        check_scorer(schema.metric)

    def read_labels(self, table: Table, schema: Schema) -> Sequence[Any]:
        """Return each row's reference."""
        column = same_column(table, schema.settings["label_column"])
        return [_reference(value, column) for value in table.values(column)]

    def groups(self, rows: Rows, schema: Schema) -> list[Hashable]:
        """Return each row's input: all references of one stay together."""
        del schema
        return list(rows.columns["text"])

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell columns, inputs and references of each part, and inputs of two parts."""
        lines = super().describe(rows, schema)
        counts = ", ".join(
            f"{part} {len(set(found.columns['text'])):,} inputs with {len(found):,} "
            "references"
            for part, found in rows.items()
        )
        return [lines[0], counts, *lines[1:]]

    def encoded(
        self, batch: Mapping[str, list[Any]], processor: Any, schema: Schema
    ) -> Encoded:
        """Return the tokens of an input, a line's end and its reference, and the end's."""
        del schema
        texts = [text + SEPARATOR for text in batch["text"]]
        prompts = [without_end(ids, processor) for ids in processor(texts)["input_ids"]]
        answers: list[list[int]] = [[] for _ in prompts]
        if "labels" in batch:
            answers = with_end(batch["labels"], processor)
        return (
            [[*p, *a] for p, a in zip(prompts, answers, strict=True)],
            [[*[IGNORED] * len(p), *a] for p, a in zip(prompts, answers, strict=True)],
        )

    def text_scores(
        self, texts: Sequence[str], rows: Rows, schema: Schema
    ) -> TextScores:
        """Score one text for each input, by all its references."""
        found = self.text_records(texts, rows, schema)
        return text_scores(
            [record["generated"] for record in found],
            [record["references"] for record in found],
        )

    def text_records(
        self, texts: Sequence[str], rows: Rows, schema: Schema
    ) -> list[dict[str, Any]]:
        """Return each input with its references and the text that was written for it."""
        del schema
        found: dict[str, dict[str, Any]] = {}
        for text, given, reference in zip(
            texts, rows.columns["text"], rows.columns["labels"], strict=True
        ):
            new = {"input": given, "references": [], "generated": text}
            found.setdefault(given, new)["references"].append(reference)
        return list(found.values())


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderGeneration(Generation):
    """The same for T5 and its kin: the encoder reads the input, the decoder writes."""

    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"
    two_parts: ClassVar[bool] = True

    def features(
        self,
        batch: Mapping[str, list[Any]],
        processor: Any,
        schema: Schema,
        length: int,
    ) -> dict[str, list[Any]]:
        """Tokenise inputs as the tokenizer does by itself, and references with an end."""
        del schema
        made = {name: list(x) for name, x in processor(list(batch["text"])).items()}
        made.pop("token_type_ids", None)
        if "labels" in batch:
            made["labels"] = [x[:length] for x in with_end(batch["labels"], processor)]
        return made

    def prompt_lengths(
        self, batch: Mapping[str, list[Any]], processor: Any, schema: Schema
    ) -> Sequence[int | BadValueError]:
        """Return how many tokens each input has, without the token that ends it.

        Args:
            batch: Columns of `rows`.
            processor: The model's tokenizer.
            schema: Not used.
        """
        del schema
        return [len(ids) - 1 for ids in processor(list(batch["text"]))["input_ids"]]

    def count_over_long(self, rows: Rows, processor: Any, length: int) -> int:
        """Return how many references have more than `length` tokens and are cut.

        Args:
            rows: The examples.
            processor: The model's tokenizer.
            length: Tokens kept of a reference.
        """
        ends = with_end(rows.columns["labels"], processor)
        return sum(len(ids) > length for ids in ends)


def without_end(ids: Sequence[int], processor: Any) -> list[int]:
    """Return tokens without the end that some tokenizers put after every text.

    Args:
        ids: What the tokenizer made.
        processor: The tokenizer.
    """
    ended = bool(ids) and ids[-1] == processor.eos_token_id
    return list(ids[:-1] if ended else ids)


def with_end(texts: Sequence[str], processor: Any) -> list[list[int]]:
    """Return the tokens of texts, each with the token that ends it.

    Args:
        texts: The texts.
        processor: The tokenizer.

    Raises:
        UserError: If the tokenizer has no such token.
    """
    end = processor.eos_token_id
    if end is None:
        raise UserError(
            "the model's tokenizer has no token that ends a text, so that the model would "
            "never learn to stop; set eos_token in its tokenizer_config.json."
        )
    plain_ids = processor(list(texts), add_special_tokens=False)["input_ids"]
    return [[*ids, end] for ids in plain_ids]


def _reference(value: Any, column: str) -> Any:
    try:
        if not isinstance(value, str):
            raise BadValueError("holds no reference")
        return plain(value, "reference")
    except BadValueError as error:
        return BadValueError(f"column {column!r} {error}")
