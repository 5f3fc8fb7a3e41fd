"""A tag for each word: named entities and other spans, in the IOB schemes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bidora.data.source import Source
from bidora.data.table import Table, name_column, same_column
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema, Task
from bidora.tasks.iob import entities_of, is_iob, odd_tags, scheme_of, to_iob2
from bidora.tasks.labels import BadValueError, class_names_of, nearest, shown
from bidora.tasks.metrics import choose_metric, outputs
from bidora.tasks.pieces import cut_at_the_end, readable_words

if TYPE_CHECKING:
    import numpy as np

__all__ = ["IGNORED", "SCHEMES", "Tagging"]

SCHEMES = ("auto", "IOB1", "IOB2")
METRICS = ("f1", "precision", "recall", "accuracy")
TOKEN_COLUMNS = ("tokens", "words", "text", "sentence")
TAG_COLUMNS = ("tags", "ner_tags", "labels", "label")

IGNORED = -100
"""Label of what is not scored: special tokens, padding, and a word's later pieces."""

_OTHER_SCHEMES = re.compile(r"[ESLUM]-\S+")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_FEWEST = 5  # sentences of a stratum; a split at 0.6 to 0.9 leaves some in each part
_NAMELESS = "entity"  # the type of spans in files that write B and I alone


@dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """A tag for each word of a sentence, scored by whole entities.

    Words and tags are lists, or texts whose words are divided by blanks. The first piece
    of a word that the tokenizer makes carries its tag, the others count for nothing.
    Tags are IOB1 or IOB2, and the model learns IOB2.

    A sentence of more than `max_length` pieces loses its last words: they are neither
    learned from nor scored, and `count_over_long` says how many sentences do.

    Args:
        text_column: Column of the words; None for one with a usual name.
        label_column: Column of the tags; None for one with a usual name.
        scheme: `IOB1`, `IOB2`, or `auto` to see from the training examples. The
            entities are the same by either; it says which tags are told as odd.
        metric: `f1`, `precision` or `recall` of entities, or the `accuracy` of tags;
            None for the data set's own, or else f1.

    Raises:
        UserError: If the scheme is another.

    Example:
        >>> rows = ((["Ada", "Lovelace", "wrote"], ["I-PER", "I-PER", "O"]),)
        >>> table = Table("t.txt", ("tokens", "tags"), rows, ("line 1",))
        >>> Tagging().schema(Source("t.txt", {"train": table})).label_names
        ('O', 'B-PER', 'I-PER')
    """

    name: ClassVar[str] = "tagging"
    peft_type: ClassVar[str | None] = "TOKEN_CLS"
    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    main_metric: ClassVar[str] = "f1"

    text_column: str | None = None
    label_column: str | None = None
    scheme: Literal["auto", "IOB1", "IOB2"] = "auto"
    metric: str | None = None

    def __post_init__(self) -> None:
        """Check the scheme."""
        if self.scheme not in SCHEMES:
            raise UserError(
                f"unknown scheme {self.scheme!r} of tags; choose one of "
                f"{', '.join(SCHEMES)}."
            )

    def schema(self, source: Source) -> Schema:
        """Find the columns, the types of entities, and the scheme of their tags."""
        table, hints = source.train, source.hints
        text = self.text_column or hints.get("text_column")
        text = name_column(table, text, "--text-column", TOKEN_COLUMNS)
        usual = [name for name in TAG_COLUMNS if name != text]
        label = self.label_column or hints.get("label_column")
        label = name_column(table, label, "--label-column", usual)
        if text == label:
            raise UserError(
                f"{table.origin}: column {text!r} is to hold the words and the tags. "
                "Name one of each with --text-column and --label-column."
            )
        metric = self.metric or hints.get("metric") or self.main_metric
        choose_metric(metric, METRICS)
        given = class_names_of(table, label)
        sentences = list(_readable(table, label, given))
        _check_tags(table, label, sentences, given)
        scheme = self.scheme
        if scheme == "auto":
            scheme = scheme_of(sentences)
        return Schema(
            self.name,
            {"text_column": text, "label_column": label, "scheme": scheme},
            _names(sentences, given),
            metric,
        )

    def rows(self, table: Table, schema: Schema, *, labelled: bool = True) -> Rows:
        """Read words and tags; every bad row is told."""
        text = same_column(table, schema.settings["text_column"])
        columns: dict[str, list[Any]] = {"tokens": []}
        tags: list[Any] = [None] * len(table)
        given = None
        if labelled:
            columns |= {"tags": [], "labels": []}
            label = same_column(table, schema.settings["label_column"])
            tags, given = table.values(label), class_names_of(table, label)
        indices = {name: index for index, name in enumerate(schema.label_names)}
        places: list[str] = []
        bad: list[str] = []
        for row, (value, tag) in enumerate(zip(table.values(text), tags, strict=True)):
            try:
                words = _words(value, "words")
                read = {"tokens": words}
                if labelled:
                    read["tags"] = _tags(tag, given)
                    read["labels"] = _labels(words, read["tags"], indices)
            except BadValueError as error:
                bad.append(f"{table.place(row)}: {error}")
                continue
            places.append(table.place(row))
            for name, values in read.items():
                columns[name].append(values)
        return Rows(columns, places, bad)

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell columns, scheme, entities by type, and what looks odd."""
        settings = schema.settings
        lines = [
            f"words from column {settings['text_column']!r}, tags in {settings['scheme']} "
            f"from column {settings['label_column']!r}"
        ]
        known: set[str] = set()
        odd: list[str] = []
        for part, read in rows.items():
            types = Counter(_types(read.columns.get("tags", ())))
            words = sum(map(len, read.columns["tokens"]))
            line = f"{part}: {len(read):,} sentences of {words:,} words"
            if "tags" in read.columns:
                listed = ", ".join(
                    f"{t or _NAMELESS} {n:,}" for t, n in sorted(types.items())
                )
                line += f", {types.total():,} entities" + (listed and f" ({listed})")
                odd += _odd_tags(part, read, settings["scheme"])
            lines.append(line)
            known |= set(types)
            missing = ", ".join(t or _NAMELESS for t in sorted(known - set(types)))
            if missing and "tags" in read.columns:
                odd.append(f"warning: {part} has no entity of type {missing}.")
        return [*lines, *odd, *_shared(rows)]

    def strata(self, rows: Rows, schema: Schema) -> Sequence[Hashable] | None:
        """Return the rarest type of each sentence, where enough sentences have it."""
        del schema
        types = [set(_types([tags])) for tags in rows.columns["tags"]]
        counts = Counter(kind for found in types for kind in found)
        strata = [
            f"entity {min(found, key=lambda kind: (counts[kind], kind))}"
            if found
            else "none"
            for found in types
        ]
        for merged in ("entity", "none"):
            sizes = Counter(strata)
            strata = [s if sizes[s] >= _FEWEST else merged for s in strata]
        few = min(Counter(strata).values(), default=0) < _FEWEST
        return None if few else strata

    def model_kwargs(self, schema: Schema) -> dict[str, Any]:
        """Return the number of tags and their names."""
        names = schema.label_names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    def features(
        self,
        batch: Mapping[str, list[Any]],
        processor: Any,
        schema: Schema,
        length: int,
    ) -> dict[str, list[Any]]:
        """Tokenise sentences, cut at `length` pieces, special ones included.

        There are `labels` in any case: the n-th that is not `IGNORED` belongs to the n-th
        word, which is how `answers` finds words. They are 0 where tags are unknown.

        Args:
            batch: Columns of `rows`.
            processor: The model's tokenizer, a fast one.
            schema: Of the data.
            length: Pieces kept of a sentence.

        Returns:
            What the tokenizer makes, and `labels`.
        """
        del schema
        sentences = readable_words(batch["tokens"], processor)
        with cut_at_the_end(processor):
            pieces = processor(
                sentences, is_split_into_words=True, truncation=True, max_length=length
            )
        made = {name: list(values) for name, values in pieces.items()}
        known = batch.get("labels") or [[0] * len(words) for words in sentences]
        made["labels"] = []
        for row, tags in enumerate(known):
            words = pieces.word_ids(row)
            made["labels"].append(
                [
                    IGNORED if word is None or word == before else tags[word]
                    for before, word in zip([None, *words], words, strict=False)
                ]
            )
        return made

    def count_over_long(self, rows: Rows, processor: Any, length: int) -> int:
        """Return how many sentences have more than `length` pieces, so that words go.

        Args:
            rows: The examples.
            processor: The model's tokenizer.
            length: Pieces kept, special ones included.
        """
        tokens = rows.columns["tokens"]
        count = 0
        for start in range(0, len(rows), 1000):
            sentences = readable_words(tokens[start : start + 1000], processor)
            pieces = processor(
                sentences, is_split_into_words=True, truncation=False, verbose=False
            )
            count += sum(len(ids) > length for ids in pieces["input_ids"])
        return count

    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that pads pieces and labels to the longest sentence."""
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(processor)

    def metrics(
        self, predictions: np.ndarray, labels: np.ndarray, schema: Schema
    ) -> dict[str, float]:
        """Return precision, recall and F1 of entities, and the accuracy of tags.

        An entity counts where its type and both its ends are right. As in conlleval, an
        `I-` without a beginning begins an entity. Words that were cut off are not scored.
        """
        from seqeval.metrics.sequence_labeling import (
            accuracy_score,
            precision_recall_fscore_support,
        )

        said = _spelled(outputs(predictions).argmax(axis=-1), labels, schema)
        truth = _spelled(labels, labels, schema)
        zero: Any = 0  # seqeval's annotation knows words alone
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, said, average="micro", zero_division=zero
        )
        scores = {
            "f1": f1,
            "precision": precision,
            "recall": recall,
            "accuracy": accuracy_score(truth, said),
        }
        return {name: float(score) for name, score in scores.items()}

    def answers(
        self,
        predictions: np.ndarray,
        rows: Rows,
        schema: Schema,
        labels: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Return tags and entities of each sentence, by words.

        Args:
            predictions: The model's outputs, one row a sentence.
            rows: What they are predictions of.
            schema: Of the training data.
            labels: What the collator made of the rows: it says at which piece each word
                begins. `Trainer.predict` returns it as `label_ids`.

        Returns:
            For each sentence `tags`, one a word, None for words that were cut off;
            `spans`, each with `type`, `start`, `end` (after the last word) and `text`;
            and `words_cut`.

        Raises:
            ValueError: If `labels` is missing.
        """
        if labels is None:
            raise ValueError(
                "tags belong to words by the first piece of each: pass the label_ids "
                "that Trainer.predict returned as labels."
            )
        spelled = _spelled(outputs(predictions).argmax(axis=-1), labels, schema)
        answers: list[dict[str, Any]] = []
        for words, tags in zip(rows.columns["tokens"], spelled, strict=True):
            cut = len(words) - len(tags)
            spans = [
                {
                    "type": kind or _NAMELESS,
                    "start": start,
                    "end": end,
                    "text": " ".join(words[start:end]),
                }
                for kind, start, end in entities_of(tags)
            ]
            answers.append(
                {"tags": [*tags, *[None] * cut], "spans": spans, "words_cut": cut}
            )
        return answers


# -- reading --------------------------------------------------------------------------


def _words(value: Any, what: str) -> list[Any]:
    """Return the items of a list, or the words of a text."""
    if isinstance(value, str):
        value = value.split()
    if value is None or (isinstance(value, float) and value != value):
        raise BadValueError(f"holds no {what}")
    if not isinstance(value, list | tuple):
        raise BadValueError(
            f"holds a {type(value).__name__} where a list of {what} was expected"
        )
    if not value:
        raise BadValueError(f"holds no {what}")
    if what == "words":
        other = next((v for v in value if not isinstance(v, str)), None)
        if other is not None or None in value:
            raise BadValueError(
                f"a {type(other).__name__} stands among its words; each is to be a text"
            )
        return [_HALF_PAIR.sub("\ufffd", word) for word in value]
    return list(value)


def _tags(value: Any, given: Sequence[str] | None) -> list[str]:
    """Return a sentence's tags by name."""
    tags: list[str] = []
    for tag in _words(value, "tags"):
        if isinstance(tag, int) and not isinstance(tag, bool) and given is not None:
            if not 0 <= tag < len(given):
                raise BadValueError(f"holds the tag {tag}, of {len(given)} from 0")
            tag = given[tag]
        if not isinstance(tag, str):
            raise BadValueError(
                f"holds the tag {tag!r}, and a tag is a word such as O or B-PER"
            )
        tags.append(tag)
    return tags


def _labels(words: list[str], tags: list[str], indices: Mapping[str, int]) -> list[int]:
    if len(words) != len(tags):
        raise BadValueError(f"holds {len(words)} words and {len(tags)} tags")
    odd = next((tag for tag in tags if not is_iob(tag)), None)
    if odd is not None:
        raise BadValueError(
            f"holds the tag {shown(odd)!r}, which is neither O nor begins with B- or I-"
        )
    unknown = next((tag for tag in to_iob2(tags) if tag not in indices), None)
    if unknown is not None:
        raise BadValueError(
            f"holds the tag {shown(unknown)!r}, which the training examples lack."
            f"{nearest(unknown, list(indices))}"
        )
    return [indices[tag] for tag in to_iob2(tags)]


def _readable(
    table: Table, column: str, given: Sequence[str] | None
) -> Iterator[list[str]]:
    for value in table.values(column):
        try:
            yield _tags(value, given)
        except BadValueError:  # told with its place by `rows`
            continue


def _check_tags(
    table: Table, column: str, sentences: list[list[str]], given: Sequence[str] | None
) -> None:
    """Refuse a column that does not hold IOB tags; a few odd ones are bad rows."""
    where = f"{table.origin}: column {column!r}"
    counts = Counter(tag for tags in sentences for tag in tags)
    counts.update(tag for tag in given or () if tag not in counts)
    odd = [tag for tag in counts if not is_iob(tag)]
    entities = sum(n for tag, n in counts.items() if tag != "O" and tag not in odd)
    if not sentences:
        first = table.values(column)[0]
        raise UserError(
            f"{where} holds no tags ({shown(repr(first), 60)} in the first row). A tag "
            "is a word such as O or B-PER, one for each word; name the column with "
            "--label-column."
        )
    if sum(counts[tag] for tag in odd) > entities:
        listed = ", ".join(repr(shown(tag)) for tag in odd[:5])
        remedy = "Name the column of the tags with --label-column."
        if all(map(_OTHER_SCHEMES.fullmatch, odd)):
            remedy = (
                "They look like BIOES or BILOU: write E- and L- as I-, S- and U- as B-."
            )
        elif any(tag.startswith("[") for tag in odd):
            remedy = "They look like lists written as text: save the file as jsonl."
        raise UserError(
            f"{where} holds {listed} among its {len(counts)} tags, and tags are O, B- "
            f"and I- with a type, such as B-PER (IOB1 or IOB2). {remedy}"
        )
    if not entities:
        raise UserError(
            f"{where} holds no entity: each of its {counts.total():,} tags is 'O'. Name "
            "another column with --label-column, or add sentences with entities."
        )


def _names(sentences: list[list[str]], given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the tags of IOB2: those of the source in its order, then what they lack."""
    tags = set(given or ()).union(*sentences)
    types = sorted({tag[1:] for tag in tags if tag != "O" and is_iob(tag)})
    whole = ["O", *(f"{letter}{kind}" for kind in types for letter in "BI")]
    return tuple(dict.fromkeys([*(given or ()), *whole]))


# -- what is told ---------------------------------------------------------------------


def _odd_tags(part: str, rows: Rows, scheme: str) -> list[str]:
    """Tell tags that the scheme does not have, and how they are read."""
    places = [
        place
        for place, tags in zip(rows.places, rows.columns["tags"], strict=True)
        for _ in range(odd_tags(tags, scheme))
    ]
    if not places:
        return []
    what = (
        "an I- tag where no entity of its type goes on; it is read as the beginning of "
        "one, as conlleval does"
        if scheme == "IOB2"
        else "a B- tag where no entity of its type goes before, which IOB1 does not "
        "need; the entities are the same"
    )
    return [
        f"warning: {len(places):,} word(s) of {part} carry {what} (the first in "
        f"{places[0]})."
    ]


def _types(sentences: Iterable[Sequence[str]]) -> Iterator[str]:
    for tags in sentences:
        for kind, _, _ in entities_of(tags):
            yield kind


def _shared(rows: Mapping[str, Rows]) -> list[str]:
    if "train" not in rows:
        return []
    known = set(map(tuple, rows["train"].columns["tokens"]))
    told: list[str] = []
    for part, read in rows.items():
        both = [
            w for w in read.columns["tokens"] if part != "train" and tuple(w) in known
        ]
        if both:
            told.append(
                f"warning: {len(both):,} of {len(read):,} sentences of {part} are in "
                f"train too, such as {shown(' '.join(both[0]), 60)!r}."
            )
    return told


def _spelled(chosen: np.ndarray, labels: np.ndarray, schema: Schema) -> list[list[str]]:
    """Return the tags of each row's words, where `labels` says that words begin."""
    names = schema.label_names
    scored = labels != IGNORED
    return [
        [names[index] for index in row[mask]]
        for row, mask in zip(chosen, scored, strict=True)
    ]
