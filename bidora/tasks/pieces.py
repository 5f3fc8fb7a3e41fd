"""Words in front of a tokenizer: each gets a piece, and says which it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bidora.errors import UserError

__all__ = ["cut_at_the_end", "readable_words"]


@contextmanager
def cut_at_the_end(processor: Any) -> Iterator[None]:
    """Let a tokenizer cut the end of long texts, whatever it does otherwise.

    Args:
        processor: The tokenizer.

    Yields:
        Nothing; the tokenizer is as before when the block is left.
    """
    side, processor.truncation_side = processor.truncation_side, "right"
    try:
        yield
    finally:
        processor.truncation_side = side


def readable_words(
    sentences: Sequence[Sequence[str]], processor: Any
) -> list[list[str]]:
    """Return words as they are to be given to a tokenizer, so that each has a piece.

    Words that a tokenizer drops, such as control characters, become its unknown word.

    Args:
        sentences: Words of each sentence.
        processor: The tokenizer, to be called with `is_split_into_words=True`.

    Returns:
        As many words for each sentence.

    Raises:
        UserError: If the tokenizer does not tell which word a piece belongs to.
    """
    if not getattr(processor, "is_fast", False):
        raise UserError(
            f"the tokenizer {type(processor).__name__} does not say which pieces belong "
            "to which word, which tagging needs; choose a model with a fast tokenizer "
            "(a tokenizer.json) with --model."
        )
    blank = _leading_blank(processor)
    words = sorted({blank + word for sentence in sentences for word in sentence})
    pieces = processor(
        [[word] for word in words],
        is_split_into_words=True,
        add_special_tokens=False,
        verbose=False,
    )
    unknown = processor.unk_token or "?"
    read = {
        word: word if ids else unknown
        for word, ids in zip(words, pieces["input_ids"], strict=True)
    }
    return [[read[blank + word] for word in sentence] for sentence in sentences]


def _leading_blank(processor: Any) -> str:
    """Return what has to stand before a word for it to be read as inside a text.

    GPT-2's and RoBERTa's tokenizers glue words of a list together, unless they were made
    with `add_prefix_space=True`.
    """

    def ids(words: str | list[str], word: int | None = None) -> list[int]:
        pieces = processor(
            words, is_split_into_words=word is not None, add_special_tokens=False
        )
        return [
            piece
            for piece, of in zip(pieces["input_ids"], pieces.word_ids(), strict=True)
            if word is None or of == word
        ]

    whole, first = ids("a b"), ids("a")
    for blank in ("", " "):
        if whole == first + ids([f"{blank}a", f"{blank}b"], 1):
            return blank
    return ""
