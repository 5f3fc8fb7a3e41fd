"""Scores of generated texts by their references, thin over well-kept libraries.

A score whose library is missing, or can't run, is left out and the reason is told.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from bidora.errors import UserError
from bidora.tasks.base import TextScores

__all__ = ["TEXT_METRICS", "check_scorer", "text_scores"]

_QUOTES = ("''", "'", "``", "`")
NOT_COUNTED = frozenset([*_QUOTES, *"(){}.?!,:;-", "--", "..."])
"""Tokens that the scorer of COCO's captions leaves out."""

_TRIAL = ("The cafe Aromi is by the river.", "It serves French food to all who come.")
"""Texts that every scorer can score by themselves: two, of five tokens and more."""

INSTALL = 'pip install "hypergrad-bidora[generation]"'


class _UnavailableError(Exception):
    """Say why a score can't be computed."""


def text_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> TextScores:
    """Score texts by BLEU, NIST, METEOR, ROUGE-L and CIDEr, much as the E2E challenge does.

    BLEU, METEOR and ROUGE-L are shares from 0 to 1; CIDEr goes to 10, NIST has no bound.
    Blanks around a text, and its line ends, do not count.

    Args:
        texts: One for each input.
        references: All references of each input, one at least.

    Returns:
        Scores, and why others are missing.

    Example:
        >>> text_scores([], []).missing["bleu"]
        'there is no text to score'
    """
    said = [" ".join(text.split()) for text in texts]
    right = [[" ".join(r.split()) for r in some] for some in references]
    if not said:
        return TextScores({}, dict.fromkeys(_SCORERS, "there is no text to score"))
    return _scored(_SCORERS, said, right)


def check_scorer(metric: str) -> None:
    """Refuse a score that can't be computed here, by trying it.

    Args:
        metric: One of `TEXT_METRICS`, which a run is to be told by.

    Raises:
        UserError: If its library is missing, or can't run.

    Example:
        >>> check_scorer("bleu")
    """
    references = [[text] for text in _TRIAL]
    why = _scored([metric], _TRIAL, references).missing.get(metric)
    if why is None:
        return
    # METEOR's program takes long to start, and this is a hint.
    others = [name for name in _SCORERS if name not in (metric, "meteor")]
    found = _scored(others, _TRIAL, references).scores
    remedy = f", or choose one that can be with --metric: {', '.join(found)}"
    raise UserError(
        f"the metric {metric}, by which a run is judged, can't be computed here ({why}). "
        f"Install what is missing{remedy if found else ''}."
    )


def _scored(
    names: Iterable[str], said: Sequence[str], right: Sequence[Sequence[str]]
) -> TextScores:
    """Return the scores of those names, and why others of them are missing."""
    scores: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            scores[name] = float(_SCORERS[name](said, right))
        except _UnavailableError as error:
            missing[name] = str(error)
        except ImportError as error:
            missing[name] = f"{error}; {INSTALL}"
    return TextScores(scores, missing)


def _part(module: str, name: str) -> Any:
    """Return a part of an optional library, loaded when it is asked for."""
    return getattr(import_module(module), name)


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus BLEU by mteval-v13a's tokens, capitals kept."""
    corpus_bleu = _part("sacrebleu", "corpus_bleu")
    most = max(map(len, references))
    streams: Any = [
        [some[k] if k < len(some) else None for some in references] for k in range(most)
    ]
    return corpus_bleu(list(texts), streams).score / 100


def _nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return corpus NIST of up to 5-grams, by the same tokens as BLEU."""
    corpus_nist = _part("nltk.translate.nist_score", "corpus_nist")
    tokenizer = _part("sacrebleu.tokenizers.tokenizer_13a", "Tokenizer13a")
    tokens = tokenizer()
    said = [tokens(text).split() for text in texts]
    if max(map(len, said)) < 5:
        raise _UnavailableError("no text has five tokens, and NIST counts 5-grams")
    right = [[tokens(r).split() for r in some] for some in references]
    return corpus_nist(right, said, n=5)


def _rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean of ROUGE-L with the weight of recall that COCO's scorer has."""
    rouge = _part("pycocoevalcap.rouge.rouge", "Rouge")
    return rouge().compute_score(*_numbered(texts, references))[0]


def _cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr; how telling a word is comes from these references."""
    cider = _part("pycocoevalcap.cider.cider", "Cider")
    if len(texts) < 2:
        raise _UnavailableError(
            "of a single input every word is in every reference, so none tells anything"
        )
    return cider().compute_score(*_numbered(texts, references))[0]


def _meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return METEOR 1.5, which is a Java program."""
    meteor = _part("pycocoevalcap.meteor.meteor", "Meteor")
    if shutil.which("java") is None:
        raise _UnavailableError("METEOR 1.5 is a Java program, and there is no java")
    right, said = _numbered(texts, references)
    try:
        return meteor().compute_score(right, said)[0]
    except (OSError, ValueError) as error:
        raise _UnavailableError(f"METEOR's Java program failed ({error})") from error


_SCORERS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "bleu": _bleu,
    "nist": _nist,
    "meteor": _meteor,
    "rouge_l": _rouge_l,
    "cider": _cider,
}

TEXT_METRICS = tuple(_SCORERS)
"""Names of the scores."""


def _numbered(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and texts as COCO's scorers take them: by number, in tokens."""
    return (
        {i: [_words(r) for r in some] for i, some in enumerate(references)},
        {i: [_words(text)] for i, text in enumerate(texts)},
    )


def _words(text: str) -> str:
    """Return a text's tokens by the rules of the Penn Treebank, small, without points.

    Differs from COCO's own in the program alone: that is a Java one, and scores should not
    depend on whether it is there.
    """
    tokenizer = _part("nltk.tokenize", "NLTKWordTokenizer")
    # The rules part a point from its word at the end of a text alone, and know dollars.
    parts = re.split(r"(?<=[.?!])\s+", re.sub("([£€])", r" \1 ", text))
    tokens = [t for part in parts for t in tokenizer().tokenize(part)]
    return " ".join(t for t in map(str.lower, tokens) if t not in NOT_COUNTED)
