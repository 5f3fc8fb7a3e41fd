"""Conversations as a tokenizer's template writes them, and which of it is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from bidora.errors import UserError
from bidora.tasks.labels import BadValueError, shown

__all__ = [
    "ROLES",
    "WANTED",
    "RefusedChatError",
    "as_messages",
    "encode_chat",
    "open_prompt",
]

WANTED = "Many want turns of user and assistant one after the other, or no system turn."
"""What templates usually raise errors for."""

ROLES = ("system", "user", "assistant")

Message = dict[str, str]
Span = tuple[int, int]
"""Where a part of a text begins and ends."""

SHARE_GPT = {"human": "user", "gpt": "assistant"}
"""What ShareGPT's files call the roles, beside `from` and `value` for a turn's parts."""

_MARKS = re.compile(r"\{%-?\s*generation\b")
"""Begin what an assistant wrote, in templates that say so."""


class RefusedChatError(UserError):
    """Report a conversation that a chat template refuses; it may write the others.

    Args:
        reason: What the template says.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the chat template of the model's tokenizer refuses a conversation "
            f"({reason}). {WANTED}"
        )
        self.reason = reason


def as_messages(value: Any, *, answered: bool) -> list[Message]:
    """Return the turns of a conversation.

    Args:
        value: What a row holds.
        answered: Whether the assistant has to say something in it, from which to learn;
            otherwise the last turn is left out where it is the assistant's, for the
            model is to write it.

    Returns:
        One `role` and `content` a turn.

    Raises:
        BadValueError: If the row holds something else.

    Example:
        >>> as_messages([{"from": "human", "value": "Hi"}], answered=False)
        [{'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(value, list | tuple) or not value:
        raise BadValueError(
            'holds no conversation: a list such as [{"role": "user", "content": "..."}, '
            '{"role": "assistant", "content": "..."}] was expected'
        )
    turns = [_turn(turn, number) for number, turn in enumerate(value, start=1)]
    if not answered:
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if not turns:
            raise BadValueError("holds an answer alone, and nothing to answer")
        return turns
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadValueError(
            "has no turn of the assistant, so there is nothing to learn from it"
        )
    return turns


def _turn(turn: Any, number: int) -> Message:
    if isinstance(turn, dict) and "role" not in turn and {"from", "value"} <= set(turn):
        others = {k: v for k, v in turn.items() if k not in ("from", "value")}
        role = SHARE_GPT.get(str(turn["from"]), turn["from"])
        turn = {"role": role, "content": turn["value"], **others}
    if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
        raise BadValueError(f"turn {number} has no role and content")
    others = [k for k, v in turn.items() if k not in ("role", "content") and v]
    if others:
        raise BadValueError(
            f"turn {number} has {', '.join(map(repr, others))} too, and role and content "
            "alone are read; leave it out"
        )
    role, content = turn["role"], _plain_content(turn["content"])
    if role not in ROLES:
        raise BadValueError(
            f"turn {number} is by {shown(str(role), 20)!r}; roles are {', '.join(ROLES)}"
        )
    if not isinstance(content, str) or not content.strip():
        raise BadValueError(f"turn {number} ({role}) has no text")
    return {"role": role, "content": content}


def _plain_content(content: Any) -> Any:
    """Return the text of a content in parts, where all of them are texts."""
    if not isinstance(content, list | tuple):
        return content
    texts = [
        part["text"]
        for part in content
        if isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if len(texts) == len(content) else None


def open_prompt(messages: Sequence[Message], processor: Any) -> list[int]:
    """Return the tokens of a conversation up to where the assistant goes on.

    Args:
        messages: Its turns.
        processor: The tokenizer.

    Raises:
        UserError: If there is no template.
        RefusedChatError: If it refuses the turns.
    """
    text = _rendered(messages, processor, add_generation_prompt=True)
    return processor(text, add_special_tokens=False)["input_ids"]


def encode_chat(
    messages: Sequence[Message], processor: Any
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which of them the assistant wrote.

    A template that marks what the assistant writes says it itself. With others, an answer
    begins where the conversation before it ends with the assistant called on, and ends
    where the conversation with it does; blanks at its end are not the assistant's. One
    that opens the conversation begins where another one would.

    Args:
        messages: Its turns.
        processor: The tokenizer.

    Returns:
        Tokens, and one truth value each.

    Raises:
        UserError: If there is no template, or it writes turns in another way once others
            follow.
        RefusedChatError: If it refuses the turns, or no token of them is the assistant's.
    """
    marks = _MARKS.search(_template(processor))
    whole, spans = (_marked if marks else _compared)(messages, processor)
    made = processor(whole, add_special_tokens=False, return_offsets_mapping=True)
    answered = [
        any(start < b and a < end for start, end in spans)
        for a, b in made["offset_mapping"]
    ]
    if not any(answered):
        raise RefusedChatError("no token of it is the assistant's")
    return made["input_ids"], answered


def _marked(messages: Sequence[Message], processor: Any) -> tuple[str, list[Span]]:
    """Return a conversation as it is written, and where the template's marks stand.

    Differs from `apply_chat_template(..., return_assistant_tokens_mask=True)`, which asks
    for the token of a span's first and last character. Where the tokenizer drops a blank
    there, that loses this answer and those after it, or takes the user's turns for
    answers; of a last character in several tokens it keeps the first.

    Raises:
        RefusedChatError: If the template refuses the turns.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=processor.get_chat_template(),
            return_assistant_tokens_mask=True,
            **processor.special_tokens_map,
        )
    except Exception as error:  # what a template raises is its own
        raise RefusedChatError(_reason(error)) from error
    (whole,), (spans,) = rendered
    return whole, [(start, end) for start, end in spans if start < end]


def _compared(messages: Sequence[Message], processor: Any) -> tuple[str, list[Span]]:
    """Return a conversation as it is written, and where it has more with an answer."""
    whole = _rendered(messages, processor)
    spans: list[Span] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        with_it = _rendered(messages[: place + 1], processor)
        before = (
            _rendered(messages[:place], processor, add_generation_prompt=True)
            if place
            else _opening(message, with_it, processor)
        )
        if not (whole.startswith(with_it) and with_it.startswith(before)):
            raise UserError(
                "the chat template of the model's tokenizer writes a turn in another way "
                "once others follow, so that which part is the answer can't be seen from "
                "outside. Put {% generation %} and {% endgeneration %} around the answer "
                "in its chat_template, or give each answer a conversation of its own."
            )
        spans.append((len(before), len(with_it.rstrip())))
    return whole, spans


def _rendered(messages: Sequence[Message], processor: Any, **how: Any) -> str:
    _template(processor)
    try:
        return processor.apply_chat_template(list(messages), tokenize=False, **how)
    except Exception as error:  # what a template raises is its own
        raise RefusedChatError(_reason(error)) from error


def _opening(first: Message, written: str, processor: Any) -> str:
    """Return what a template writes before a turn of the assistant that opens.

    transformers writes no conversation without turns, so another opening is written: up
    to where the two differ, neither is the assistant's.

    Args:
        first: The turn.
        written: As the template writes it.
        processor: The tokenizer.
    """
    other = "b" if first["content"].strip().startswith("a") else "a"
    same = _rendered([{**first, "content": other}], processor)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(written, same, strict=False))
    return "".join(letter for letter, _ in alike)


def _reason(error: Exception) -> str:
    """Return what a template says, in one line and without an end of its own."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _template(processor: Any) -> str:
    found = processor.chat_template
    if not found:
        raise UserError(
            "the model's tokenizer has no chat template, so nothing says how turns are "
            "written. Choose a model that was trained for conversations, put a "
            "chat_template.jinja into the model's folder, or give columns prompt and "
            "completion, which need none."
        )
    return found if isinstance(found, str) else found.get("default", "")
