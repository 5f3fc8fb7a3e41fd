"""Instructions and answers: conversations, or prompts with a completion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

from bidora.data.source import Source
from bidora.data.table import Table, name_column, same_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.chat import (
    WANTED,
    RefusedChatError,
    as_messages,
    encode_chat,
    open_prompt,
)
from bidora.tasks.generation import with_end, without_end
from bidora.tasks.labels import BadValueError
from bidora.tasks.language import IGNORED, Encoded, LanguageTask
from bidora.tasks.metrics import choose_metric

__all__ = ["COMPLETION_COLUMNS", "PROMPT_COLUMNS", "Instruction"]

CHAT_COLUMNS = ("messages", "conversations")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")
ALPACA = ("instruction", "input")
"""Columns of a prompt in two parts, of which the second may be empty."""

_WRITTEN_CHAT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""How a conversation begins that is a text: as JSON, or as Python shows a list."""


@dataclass(frozen=True, kw_only=True)
class Instruction(LanguageTask):
    """What a user asks, and what the model is to answer.

    A row holds a conversation: a list of turns, each with `role` and `content`, which the
    tokenizer's chat template writes. Every turn of the assistant is learnt, and nothing
    else. Or it holds a prompt and its completion, which stand one after the other as they
    are, without a template. Where a prompt has the two columns `instruction` and `input`,
    the latter follows the former after an empty line.

    Args:
        text_column: Column of the conversation or of the prompt; None for one with a
            usual name.
        label_column: Column of the completion; None for one with a usual name. A
            conversation has none.
        metric: `token_accuracy`; None for the same. Early stopping asks perplexity, of
            which less is better.

    Example:
        >>> turns = [{"role": "user", "content": "2 + 2?"}]
        >>> turns.append({"role": "assistant", "content": "4"})
        >>> table = Table("t.jsonl", ("messages",), ((turns,),), ("line 1",))
        >>> Instruction().schema(Source("t.jsonl", {"train": table})).details
        {'format': 'chat'}
    """

    name: ClassVar[str] = "instruction"
    usual_length: ClassVar[int | None] = 1024
    usual_new_tokens: ClassVar[int] = 256
    usual_label_columns: ClassVar[Sequence[str]] = COMPLETION_COLUMNS
    often_refused: ClassVar[str] = WANTED

    def for_model(self, config: Any) -> LanguageTask:
        """Return this task; an encoder-decoder can't have it.

        Args:
            config: Of the model.

        Raises:
            UserError: If the model does not go on with what it reads.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                "instruction needs a decoder alone, such as --model smollm2; for an "
                "encoder-decoder say --task-type generation, with columns for input and "
                "output."
            )
        return super().for_model(config)

    def text_columns(self, source: Source) -> dict[str, str]:
        """Return the column of the conversation or of the prompt.

        Args:
            source: The examples.

        Raises:
            UserError: If there is none, or more is named.
        """
        self.refuse_other_texts()
        given = self.text_column or source.hints.get("text_column")
        usual = (*CHAT_COLUMNS, *PROMPT_COLUMNS)
        return {"text_column": name_column(source.train, given, "--text-column", usual)}

    def schema(self, source: Source) -> Schema:
        """Find the columns, and whether they hold conversations."""
        choose_metric(self.metric or self.main_metric, (self.main_metric,))
        columns = self.text_columns(source)
        column = columns["text_column"]
        values = source.train.values(column)
        is_chat = 2 * sum(isinstance(v, list | tuple) for v in values) > len(values)
        if is_chat and self.label_column is not None:
            raise UserError(
                f"{source.train.origin}: column {column!r} holds conversations, which have "
                "their answers in them; leave --label-column out."
            )
        texts = [v for v in values if isinstance(v, str)]
        if 2 * sum(map(bool, map(_WRITTEN_CHAT.match, texts))) > len(values):
            raise UserError(
                f"{source.train.origin}: column {column!r} holds conversations written as "
                "texts. They are read from jsonl, where they are lists: save the rows as "
                f'jsonl, each a line such as {{"{column}": [{{"role": "user", "content": '
                '"2 + 2?"}, {"role": "assistant", "content": "4"}]}.'
            )
        details = {"format": "chat" if is_chat else "prompt-completion"}
        if not is_chat:
            columns = self.columns(source)
            first, second = ALPACA
            others = set(source.train.columns) - {columns["label_column"]}
            if self.text_column is None and column == first and second in others:
                details["context"] = second
        settings = {**columns, **self.settings_of_generation()}
        return Schema(self.name, settings, (), self.main_metric, details)

    def rows(self, table: Table, schema: Schema, *, labelled: bool = True) -> Rows:
        """Read conversations, or prompts and completions; every bad row is told."""
        if schema.details["format"] != "chat":
            return super().rows(table, schema, labelled=labelled)
        column = same_column(table, schema.settings["text_column"])
        chats: list[Any] = []
        read = Rows({"messages": chats}, [])
        for row, value in enumerate(table.values(column)):
            try:
                chats.append(as_messages(value, answered=labelled))
                read.places.append(table.place(row))
            except BadValueError as error:
                read.bad.append(f"{table.place(row)}: column {column!r} {error}.")
        if labelled:  # which turns are to be learnt
            read.columns["labels"] = [
                [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
                for chat in chats
            ]
        return read

    def read_inputs(self, table: Table, schema: Schema) -> dict[str, Sequence[Any]]:
        """Return the prompts, each with what it is about where a column holds that.

        A table without that column is one whose rows hold nothing there.
        """
        read = super().read_inputs(table, schema)
        context = schema.details.get("context")
        if context is None:
            return read
        if context not in table.columns:
            others = set(table.columns) - {schema.settings["text_column"]}
            if get_close_matches(context, others):
                same_column(table, context)  # it is there, and spelled otherwise
            return read
        pairs = zip(read["text"], table.values(context), strict=True)
        return {
            "text": [_with_context(prompt, about, context) for prompt, about in pairs]
        }

    def read_text(self, value: Any, column: str, proteins: bool) -> str | BadValueError:
        """Return a prompt as it is: blanks at its end divide it from the completion.

        Args:
            value: As the table has it.
            column: Where it stands, for the message.
            proteins: Whether it is a protein, which no prompt is.
        """
        read = super().read_text(value, column, proteins)
        return value if isinstance(read, str) and isinstance(value, str) else read

    def read_labels(self, table: Table, schema: Schema) -> Sequence[Any]:
        """Return each row's completion."""
        column = same_column(table, schema.settings["label_column"])
        return [
            value
            if isinstance(value, str) and value.strip()
            else BadValueError(f"column {column!r} holds no completion")
            for value in table.values(column)
        ]

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell the columns, and how many answers there are to learn from."""
        if schema.details["format"] != "chat":
            told = super().describe(rows, schema)
            if "context" in schema.details:
                told.insert(
                    1,
                    f"a prompt is that text and, after an empty line, column "
                    f"{schema.details['context']!r} where it holds something",
                )
            return told
        lines = [f"conversations from column {schema.settings['text_column']!r}"]
        for part, found in rows.items():
            turns = [turn for chat in found.columns["messages"] for turn in chat]
            answers = sum(turn["role"] == "assistant" for turn in turns)
            lines.append(
                f"{part}: {len(found):,} conversations of {len(turns):,} turns, "
                f"{answers:,} of them the assistant's"
            )
        return lines

    def encoded(
        self, batch: Mapping[str, list[Any]], processor: Any, schema: Schema
    ) -> Encoded:
        """Return the tokens of each example, and labels on what the assistant says."""
        del schema
        if "messages" in batch:
            return _chats(batch["messages"], processor, answered="labels" in batch)
        prompts = [
            without_end(ids, processor)
            for ids in processor(list(batch["text"]))["input_ids"]
        ]
        answers: list[list[int]] = [[] for _ in prompts]
        if "labels" in batch:
            answers = with_end(batch["labels"], processor)
        both = list(zip(prompts, answers, strict=True))
        return [[*p, *a] for p, a in both], [[*[IGNORED] * len(p), *a] for p, a in both]

    def prompt_lengths(
        self, batch: Mapping[str, list[Any]], processor: Any, schema: Schema
    ) -> Sequence[int | BadValueError]:
        """Return the tokens before each first answer, or why a template refuses it.

        Args:
            batch: Columns of `rows`.
            processor: The model's tokenizer.
            schema: Of the data.
        """
        if "messages" not in batch:
            return super().prompt_lengths(batch, processor, schema)
        found: list[int | BadValueError] = []
        for i in range(len(batch["messages"])):  # one by one, so that the others count
            one = {name: values[i : i + 1] for name, values in batch.items()}
            try:
                found += super().prompt_lengths(one, processor, schema)
            except RefusedChatError as error:
                found.append(
                    BadValueError(
                        "the chat template of the model's tokenizer refuses it "
                        f"({error.reason})"
                    )
                )
        return found


def _with_context(prompt: Any, about: Any, column: str) -> Any:
    """Return a prompt and what it is about, or what is wrong with either."""
    if isinstance(prompt, BadValueError) or about is None:
        return prompt
    if not isinstance(about, str):
        kind = type(about).__name__
        return BadValueError(f"column {column!r} holds a {kind}, and no text")
    return f"{prompt}\n\n{about}" if about.strip() else prompt


def _chats(chats: Sequence[Any], processor: Any, *, answered: bool) -> Encoded:
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    for chat in chats:
        if answered:
            tokens, is_answer = encode_chat(chat, processor)
        else:
            tokens = open_prompt(chat, processor)
            is_answer = [False] * len(tokens)
        ids.append(tokens)
        labels.append(
            [t if a else IGNORED for t, a in zip(tokens, is_answer, strict=True)]
        )
    return ids, labels
