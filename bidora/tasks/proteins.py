"""Proteins as texts: residues are checked, and a tokenizer gives one token for each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from bidora.errors import UserError
from bidora.tasks.labels import BadValueError, shown

__all__ = [
    "RESIDUES",
    "by_residue",
    "looks_like_residues",
    "mostly_residues",
    "read_residues",
]

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The twenty amino acids of the genetic code, in their one-letter names."""

RARE = "BJOUXZ"
"""Letters of IUPAC for what is rare or not known: pyrrolysine, either of two, any."""

OF_WORDS = "BJOUZ"
"""Letters that texts are full of and proteins are not; X stands for any residue."""

MOST_OF_WORDS = 0.07
"""Share of such letters from which on they spell words: proteins have less than one in a
hundred, English and German ten."""

_SEQUENCE = re.compile(rf"[{RESIDUES}{RARE}\s]+\*?")
_FOREIGN = re.compile(f"[^{RESIDUES}{RARE}]")


def looks_like_residues(text: str) -> bool:
    """Return whether a text is a protein's sequence as files have it, in capitals.

    Args:
        text: The text.

    Example:
        >>> looks_like_residues("MKTAYGK"), looks_like_residues("A man in JAPAN")
        (True, False)
    """
    return _SEQUENCE.fullmatch(text.strip()) is not None


def mostly_residues(texts: Iterable[str]) -> bool:
    """Return whether more than half of some texts look like proteins.

    Small letters count as capitals, in texts without blanks: blanks divide words. The
    alphabet of residues has every letter, so what tells words in capitals, or single
    words, is how often they have the letters that proteins hardly know.

    Args:
        texts: The texts; empty ones do not count.

    Example:
        >>> (
        ...     mostly_residues(["MKTAYGK", "acdef", "MK-V"]),
        ...     mostly_residues(["left turn"]),
        ... )
        (True, False)
    """
    given = [found for text in texts if (found := text.strip())]
    alike = [
        text.upper()
        for text in given
        if looks_like_residues(text)
        or (len(text.split()) == 1 and looks_like_residues(text.upper()))
    ]
    letters = "".join(alike)
    of_words = sum(letters.count(letter) for letter in OF_WORDS)
    return 2 * len(alike) > len(given) and of_words < MOST_OF_WORDS * len(letters)


def read_residues(text: str) -> str:
    """Return a protein's sequence in capitals, without blanks and the stop at its end.

    Args:
        text: As a file has it.

    Returns:
        One letter a residue.

    Raises:
        BadValueError: If a letter is no residue.

    Example:
        >>> read_residues("mkt aygk*")
        'MKTAYGK'
    """
    sequence = "".join(text.split()).upper().removesuffix("*")
    foreign = _FOREIGN.search(sequence)
    if foreign:
        place = foreign.start()
        raise BadValueError(
            f"has {foreign[0]!r} at residue {place + 1}, which is none of {RESIDUES} "
            f"and {RARE} (it begins {shown(sequence, 30)!r})"
        )
    if not sequence:
        raise BadValueError("has no residues")
    return sequence


def by_residue(tokenizer: Any) -> Any:
    """Return a tokenizer that gives one token a residue.

    Those of protein models do, some of them only where blanks stand between residues; a
    fast tokenizer is told to divide there itself, which it keeps when it is saved.

    Args:
        tokenizer: The model's.

    Returns:
        The same where it does already, otherwise a changed copy.

    Raises:
        UserError: If the model does not know residues.
    """
    if _divides(tokenizer):
        return tokenizer
    if getattr(tokenizer, "is_fast", False):
        changed = _divided(tokenizer)
        if _divides(changed):
            return changed
    raise UserError(
        "the tokenizer of this model gives no token of its own for each residue, so it "
        "cannot read proteins. Pass a protein model, such as facebook/esm2_t6_8M_UR50D, "
        "as --model."
    )


def _divided(tokenizer: Any) -> Any:
    """Return a tokenizer of the same tokens that divides a text at every sign."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    tokens = copy.deepcopy(tokenizer.backend_tokenizer)
    tokens.pre_tokenizer = Split(Regex("."), "isolated")
    # A class of its own model, such as BERT's, would set its usual division again
    # when it is loaded.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )


def _divides(tokenizer: Any) -> bool:
    ids = tokenizer(RESIDUES, add_special_tokens=False)["input_ids"]
    return len(set(ids)) == len(RESIDUES) == len(ids) and (
        tokenizer.unk_token_id not in ids
    )
