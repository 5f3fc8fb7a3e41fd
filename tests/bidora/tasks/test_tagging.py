"""Tagging: schemes, word pieces, entity scores, and what a user is told."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

from bidora.data.formats import conll_source
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.tasks.base import Rows, Schema
from bidora.tasks.iob import Entity, entities_of, odd_tags, scheme_of, to_iob2
from bidora.tasks.registry import make_task
from bidora.tasks.tagging import IGNORED, Tagging
from tests.shared import shared_data


def table(
    rows: Sequence[tuple[Any, ...]],
    columns: tuple[str, ...] = ("tokens", "tags"),
    name: str = "train.txt",
    **more: Any,
) -> Table:
    lines = tuple(f"line {i + 1}" for i in range(len(rows)))
    return Table(name, columns, tuple(rows), lines, **more)


def source(rows: Sequence[tuple[Any, ...]], **more: Any) -> Source:
    return Source("data", {"train": table(rows, **more)})


def schema_of(*tags: str) -> Schema:
    return Tagging().schema(source([([f"w{i}" for i in range(len(tags))], [*tags])]))


# -- schemes --------------------------------------------------------------------------

# What each sentence is in IOB1, the same in IOB2, and its entities.
BY_HAND: list[tuple[str, str, list[Entity]]] = [
    ("O O", "O O", []),
    ("I-PER", "B-PER", [("PER", 0, 1)]),
    ("I-PER I-PER O", "B-PER I-PER O", [("PER", 0, 2)]),
    # Two of one type that touch: the only place where IOB1 writes B-.
    ("I-PER B-PER", "B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
    (
        "I-PER I-PER B-PER I-PER O",
        "B-PER I-PER B-PER I-PER O",
        [("PER", 0, 2), ("PER", 2, 4)],
    ),
    # Two of different types that touch need none.
    ("I-PER I-LOC", "B-PER B-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
    ("O I-LOC O I-LOC", "O B-LOC O B-LOC", [("LOC", 1, 2), ("LOC", 3, 4)]),
    ("I I B O I", "B I B O B", [("", 0, 2), ("", 2, 3), ("", 4, 5)]),
    ("I-a-b I-a-b", "B-a-b I-a-b", [("a-b", 0, 2)]),
]


@pytest.mark.parametrize(("iob1", "iob2", "entities"), BY_HAND)
def test_schemes_by_hand(iob1: str, iob2: str, entities: list[Entity]) -> None:
    assert to_iob2(iob1.split()) == iob2.split()
    assert to_iob2(iob2.split()) == iob2.split()
    assert entities_of(iob1.split()) == entities_of(iob2.split()) == entities
    assert odd_tags(iob1.split(), "IOB1") == 0
    assert odd_tags(iob2.split(), "IOB2") == 0


def strict_iob1(tags: Sequence[str]) -> list[Entity]:
    """Read IOB1 by its definition: runs of one type, cut at each B- inside."""
    found: list[Entity] = []
    start = 0
    while start < len(tags):
        end = start + 1
        if tags[start] != "O":
            while end < len(tags) and tags[end] == f"I{tags[start][1:]}":
                end += 1
            found.append((tags[start][2:], start, end))
        start = end
    return found


def strict_iob2(tags: Sequence[str]) -> list[Entity]:
    """Read IOB2 by its definition; an I- that goes on with nothing is an error."""
    found: list[Entity] = []
    for index, tag in enumerate(tags):
        if tag[0] == "B":
            found.append((tag[2:], index, index + 1))
        elif tag[0] == "I":
            kind, start, end = found.pop()
            assert (kind, end) == (tag[2:], index)
            found.append((kind, start, index + 1))
    return found


TAGS = st.lists(
    st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y", "B", "I"]), max_size=12
)


@given(TAGS)
def test_iob1_turned_to_iob2_keeps_its_entities(tags: list[str]) -> None:
    direct = strict_iob1(tags)
    assert strict_iob2(to_iob2(tags)) == direct
    assert entities_of(tags) == direct
    assert odd_tags(to_iob2(tags), "IOB2") == 0


@given(TAGS.filter(bool))
def test_entities_are_those_that_seqeval_scores(tags: list[str]) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = [(t.replace("_", ""), a, b + 1) for t, a, b in get_entities(tags)]
    assert entities_of(tags) == theirs


def test_the_scheme_is_seen_from_how_entities_begin() -> None:
    assert scheme_of([["O", "I-X", "B-X"]]) == "IOB1"
    assert scheme_of([["O", "B-X", "I-X"], ["O", "B-X"], ["I-X"]]) == "IOB2"
    # No word tells: all entities are one word long and touch none before.
    assert scheme_of([["O"]]) == "IOB2"


# -- schema and rows ------------------------------------------------------------------


def test_tags_are_in_order_and_complete() -> None:
    assert schema_of("I-PER", "O", "I-LOC").label_names == (
        "O",
        "B-LOC",
        "I-LOC",
        "B-PER",
        "I-PER",
    )
    assert schema_of("B", "O").label_names == ("O", "B", "I")
    schema = schema_of("I-PER", "B-PER")
    assert schema.settings == {
        "text_column": "tokens",
        "label_column": "tags",
        "scheme": "IOB1",
    }
    assert schema.metric == "f1"
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert Tagging().model_kwargs(schema) == {
        "num_labels": 3,
        "id2label": {0: "O", 1: "B-PER", 2: "I-PER"},
        "label2id": {"O": 0, "B-PER": 1, "I-PER": 2},
    }


def test_a_task_is_found_by_name_and_takes_settings() -> None:
    task = make_task("tagging", scheme="IOB1", metric="recall", text_column="w")
    with pytest.raises(UserError, match="no column 'w'"):
        task.schema(source([(["a"], ["B-X"])]))
    with pytest.raises(UserError, match="unknown scheme 'BIOES'"):
        make_task("tagging", scheme="BIOES")
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        make_task("tagging", metric="bleu").schema(source([(["a"], ["B-X"])]))
    with pytest.raises(UserError, match="is to hold the words and the tags"):
        make_task("tagging", label_column="tokens").schema(source([(["a"], ["B-X"])]))


def test_the_order_of_classes_on_the_hub_is_kept() -> None:
    names = ("O", "B-PER", "I-PER", "B-LOC")
    hub = table(
        [(["Ada", "sees", "Bern"], [1, 0, 3]), (["Bern"], [-1])],
        ("tokens", "ner_tags"),
        class_names=(("ner_tags", names),),
    )
    schema = Tagging().schema(Source("hub", {"train": hub}))
    assert schema.label_names == (*names, "I-LOC")
    assert schema.settings["label_column"] == "ner_tags"
    rows = Tagging().rows(hub, schema)
    assert rows.columns["labels"] == [[1, 0, 3]]
    assert rows.columns["tags"] == [["B-PER", "O", "B-LOC"]]
    assert rows.bad == ["train.txt, line 2: holds the tag -1, of 4 from 0"]


def test_iob1_is_learned_as_iob2() -> None:
    schema = schema_of("I-PER", "B-PER", "O")
    rows = Tagging().rows(table([(["a", "b", "c"], ["I-PER", "B-PER", "O"])]), schema)
    assert rows.columns["labels"] == [[1, 1, 0]]
    assert rows.columns["tags"] == [["I-PER", "B-PER", "O"]]


def test_texts_of_csv_are_divided_at_blanks() -> None:
    rows = [("Ada  sees Bern ", " B-PER O B-LOC"), ("It rains", "O O")]
    data = source(rows, columns=("sentence", "labels"))
    schema = Tagging().schema(data)
    read = Tagging().rows(data.train, schema)
    assert read.columns["tokens"] == [["Ada", "sees", "Bern"], ["It", "rains"]]
    assert [len(labels) for labels in read.columns["labels"]] == [3, 2]


def test_bad_rows_are_told_with_their_places() -> None:
    task, schema = Tagging(), schema_of("B-PER", "I-PER", "O")
    rows = [
        (["Ada"], ["B-PER"]),
        (["Ada", "sees"], ["B-PER"]),
        (["Bern"], ["B-LOC"]),
        (["Bern"], ["B_PER"]),
        ([], []),
        (None, ["O"]),
        (["a", 7], ["O", "O"]),
        (["a"], [1]),
        (["a"], [None]),
        ({"a": 1}, ["O"]),
        (["a"], "  "),
        (["cut \ud83d"], ["O"]),
    ]
    data = table(rows)
    read = task.rows(data, schema)
    assert read.columns["tokens"] == [["Ada"], ["cut \ufffd"]]
    assert read.places == ["train.txt, line 1", "train.txt, line 12"]
    expected = [
        "line 2: holds 2 words and 1 tags",
        "line 3: holds the tag 'B-LOC', which the training examples lack.",
        "line 4: holds the tag 'B_PER', which is neither O nor begins with B- or I-",
        "line 5: holds no words",
        "line 6: holds no words",
        "line 7: a int stands among its words; each is to be a text",
        "line 8: holds the tag 1, and a tag is a word such as O or B-PER",
        "line 9: holds the tag None, and a tag is a word such as O or B-PER",
        "line 10: holds a dict where a list of words was expected",
        "line 11: holds no tags",
    ]
    for told, line in zip(read.bad, expected, strict=True):
        assert told.startswith(f"train.txt, {line}")
    new = task.rows(table([(["Ada"],)], ("tokens",)), schema, labelled=False)
    assert new.columns == {"tokens": [["Ada"]]}


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (["S-PER", "O", "E-LOC"], "BIOES or BILOU"),
        (["NN", "VBZ", "O"], "Name the column of the tags"),
        (["O", "O", "O"], "no entity: each of its 3 tags is 'O'"),
        ("['B-PER', 'O', 'O']", "lists written as text"),
        ([1, 0, 0], r"holds no tags \(\[1, 0, 0\] in the first row\)"),
    ],
)
def test_columns_that_hold_no_iob_tags_are_refused(tags: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Tagging().schema(source([(["a", "b", "c"], tags)]))


def test_what_is_understood_is_told() -> None:
    task = Tagging()
    rows = [(["Ada", "Bern"], ["B-PER", "B-LOC"]), (["It", "Bern"], ["O", "I-LOC"])]
    other = [(["Ada", "Bern"], ["B-PER", "O"]), (["so"], ["O"])]
    data = Source("d", {"train": table(rows), "test": table(other, name="test.txt")})
    schema = task.schema(data)
    told = task.describe(
        {p: task.rows(t, schema) for p, t in data.parts.items()}, schema
    )
    assert told == [
        "words from column 'tokens', tags in IOB2 from column 'tags'",
        "train: 2 sentences of 4 words, 3 entities (LOC 2, PER 1)",
        "test: 2 sentences of 3 words, 1 entities (PER 1)",
        "warning: 1 word(s) of train carry an I- tag where no entity of its type goes "
        "on; it is read as the beginning of one, as conlleval does (the first in "
        "train.txt, line 2).",
        "warning: test has no entity of type LOC.",
        "warning: 1 of 2 sentences of test are in train too, such as 'Ada Bern'.",
    ]


def test_a_scheme_that_the_tags_do_not_have_is_told() -> None:
    task = Tagging(scheme="IOB1")
    data = source([(["Ada", "so"], ["B-PER", "O"])])
    schema = task.schema(data)
    told = task.describe({"train": task.rows(data.train, schema)}, schema)
    assert "carry a B- tag where no entity of its type goes before" in told[-1]


# -- splits ---------------------------------------------------------------------------


def rows_of(kinds: Sequence[str]) -> Rows:
    tags = [[f"B-{kind}" if kind else "O"] for kind in kinds]
    return Rows({"tags": tags}, ["line"] * len(tags))


def test_splits_keep_the_shares_of_types() -> None:
    kinds = ["PER"] * 50 + ["LOC"] * 20 + [""] * 30
    task, schema = Tagging(), schema_of("B-PER", "B-LOC")
    first, second = task.split(rows_of(kinds), schema, 0.2, seed=3)
    held = [kinds[i] for i in second]
    assert {kind: held.count(kind) for kind in ("PER", "LOC", "")} == {
        "PER": 10,
        "LOC": 4,
        "": 6,
    }
    assert sorted([*first, *second]) == list(range(100))


def test_a_sentence_counts_for_its_rarest_type() -> None:
    tags = [["B-PER", "B-LOC"]] * 5 + [["B-PER"]] * 5 + [["O"]] * 5
    rows = Rows({"tags": tags}, [""] * 15)
    strata = Tagging().strata(rows, schema_of("B-PER", "B-LOC"))
    assert strata == ["entity LOC"] * 5 + ["entity PER"] * 5 + ["none"] * 5


@given(
    st.lists(st.sampled_from(["", "PER", "LOC", "RARE"]), min_size=4, max_size=40),
    st.sampled_from([0.1, 0.2, 0.4]),
)
def test_any_sentences_can_be_split(kinds: list[str], fraction: float) -> None:
    first, second = Tagging().split(
        rows_of(kinds), schema_of("B-PER"), fraction, seed=0
    )
    assert sorted([*first, *second]) == list(range(len(kinds)))
    assert first
    assert second


# -- word pieces ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordpiece(tiny_encoder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def pieces() -> Any:
    """Return a WordPiece tokenizer that knows one word in pieces."""
    from transformers import BertTokenizer

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "new",
        "##ton",
        "##ian",
        "saw",
    ]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def test_the_first_piece_of_a_word_carries_its_tag(pieces: Any) -> None:
    schema = schema_of("B-PER", "I-PER", "O")
    batch = {"tokens": [["Newtonian", "saw", "New ton"]], "labels": [[1, 0, 2]]}
    made = Tagging().features(batch, pieces, schema, 16)
    assert pieces.convert_ids_to_tokens(made["input_ids"][0]) == (
        ["[CLS]", "new", "##ton", "##ian", "saw", "new", "[UNK]", "[SEP]"]
    )
    i = IGNORED
    assert made["labels"] == [[i, 1, i, i, 0, 2, i, i]]
    unknown = Tagging().features({"tokens": batch["tokens"]}, pieces, schema, 16)
    assert unknown["labels"] == [[i, 0, i, i, 0, 0, i, i]]
    assert unknown["input_ids"] == made["input_ids"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_end_of_long_sentences_is_cut(pieces: Any, side: str) -> None:
    pieces.truncation_side = side
    try:
        rows = Rows({"tokens": [["newtonian"] * 3, ["saw"]]}, ["1", "2"])
        batch = {**rows.columns, "labels": [[1, 2, 0], [0]]}
        made = Tagging().features(batch, pieces, schema_of("B-X"), 7)
        i = IGNORED
        assert made["labels"] == [[i, 1, i, i, 2, i, i], [i, 0, i]]
        assert pieces.truncation_side == side
    finally:
        pieces.truncation_side = "right"
    assert Tagging().count_over_long(rows, pieces, 7) == 1
    assert Tagging().count_over_long(rows, pieces, 11) == 0


def test_words_that_a_tokenizer_drops_keep_their_place(pieces: Any) -> None:
    batch = {"tokens": [["saw", "\u200b\x02", "", "newton"]], "labels": [[0, 1, 2, 3]]}
    made = Tagging().features(batch, pieces, schema_of("B-X"), 16)
    assert [label for label in made["labels"][0] if label != IGNORED] == [0, 1, 2, 3]


BYTES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "c", "d", "Ġ", "Ġa", "Ġb"]
MERGES = [("Ġ", "a"), ("Ġ", "b")]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", [RobertaTokenizer, GPT2Tokenizer])
def test_byte_level_tokenizers_see_words_apart(kind: Any, prefix: bool) -> None:
    tokenizer = kind(
        vocab={piece: i for i, piece in enumerate(BYTES)},
        merges=MERGES,
        add_prefix_space=prefix,
    )
    made = Tagging().features(
        {"tokens": [["ac", "b", "\u200b"]], "labels": [[1, 2, 0]]},
        tokenizer,
        schema_of("B-X"),
        32,
    )
    pieces = tokenizer.convert_ids_to_tokens(made["input_ids"][0])
    assert [p for p in pieces if p in "ĠaĠbcd"] == ["Ġa", "c", "Ġb", "Ġ"]
    assert [label for label in made["labels"][0] if label != IGNORED] == [1, 2, 0]


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow does not say which pieces"):
        Tagging().features({"tokens": [["a"]]}, Slow(), schema_of("B-X"), 8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_with_what_is_not_scored(wordpiece: Any, side: str) -> None:
    wordpiece.padding_side = side
    try:
        schema = schema_of("B-X", "O")
        batch = {
            "tokens": [["apple", "pear", "tin"], ["crow"]],
            "labels": [[1, 0, 0], [1]],
        }
        made = Tagging().features(batch, wordpiece, schema, 16)
        rows = [{k: v[i] for k, v in made.items()} for i in range(2)]
        labels = Tagging().collator(wordpiece)(rows)["labels"].tolist()
    finally:
        wordpiece.padding_side = "right"
    i = IGNORED
    assert labels[0] == [i, 1, 0, 0, i]
    assert labels[1] == ([i, 1, i, i, i] if side == "right" else [i, i, i, 1, i])


# -- scores and answers ---------------------------------------------------------------


def outputs_of(tags: Sequence[Sequence[str]], labels: np.ndarray, names: Any) -> Any:
    """Return scores whose largest, at each word's first piece, is its tag."""
    scores = np.zeros((*labels.shape, len(names)), dtype=np.float32)
    for row, said in enumerate(tags):
        for place, tag in zip(
            np.flatnonzero(labels[row] != IGNORED), said, strict=True
        ):
            scores[row, place, names.index(tag)] = 1.0
    return scores


NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
SCHEMA = Schema("tagging", {}, NAMES, "f1")
I_ = IGNORED
LABELS = np.array([[I_, 3, I_, 4, 0, 1, I_], [I_, 0, 3, 0, I_, I_, I_]])  # 3 entities


def test_f1_counts_whole_entities_by_hand() -> None:
    # Said are four, of which LOC and the second PER are right; the first PER is cut short.
    said = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER", "O"]]
    scores = Tagging().metrics(outputs_of(said, LABELS, NAMES), LABELS, SCHEMA)
    assert scores == pytest.approx(
        {"f1": 4 / 7, "precision": 2 / 4, "recall": 2 / 3, "accuracy": 5 / 7}
    )


def test_an_end_without_beginning_is_an_entity_as_in_conlleval() -> None:
    said = [["I-PER", "I-PER", "O", "I-LOC"], ["O", "B-PER", "O"]]
    scores = Tagging().metrics(outputs_of(said, LABELS, NAMES), LABELS, SCHEMA)
    assert scores["f1"] == 1.0
    assert scores["accuracy"] == pytest.approx(5 / 7)


def test_a_sentence_does_not_go_on_in_the_next() -> None:
    labels = np.array([[3], [4]])
    scores = Tagging().metrics(np.eye(5)[labels], labels, SCHEMA)
    assert scores["f1"] == 1.0
    answers = Tagging().answers(
        np.eye(5)[labels], Rows({"tokens": [["a"], ["b"]]}, ["", ""]), SCHEMA, labels
    )
    assert [len(answer["spans"]) for answer in answers] == [1, 1]


def test_nothing_said_scores_nothing_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = Tagging().metrics(np.zeros((2, 7, 5)), LABELS, SCHEMA)
        none = Tagging().metrics(np.zeros((1, 2, 5)), np.zeros((1, 2), int), SCHEMA)
    assert scores == pytest.approx(
        {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 3 / 7}
    )
    assert none["f1"] == 0.0
    assert none["accuracy"] == 1.0
    with pytest.raises(UserError, match="not finite for 2 of 2"):
        Tagging().metrics(np.full((2, 7, 5), np.nan), LABELS, SCHEMA)


def test_answers_are_tags_and_spans_by_word() -> None:
    rows = Rows(
        {
            "tokens": [
                ["Ada", "Lovelace", "sees", "Bern"],
                ["so", "Eve", "ran", "off", "."],
            ]
        },
        ["line 1", "line 5"],
    )
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER", "O"]]
    scores = outputs_of(truth, LABELS, NAMES)
    answers = Tagging().answers(scores, rows, SCHEMA, LABELS)
    assert answers[0] == {
        "tags": truth[0],
        "spans": [
            {"type": "PER", "start": 0, "end": 2, "text": "Ada Lovelace"},
            {"type": "LOC", "start": 3, "end": 4, "text": "Bern"},
        ],
        "words_cut": 0,
    }
    assert answers[1]["tags"] == ["O", "B-PER", "O", None, None]
    assert answers[1]["words_cut"] == 2
    assert json.loads(json.dumps(answers)) == answers
    with pytest.raises(ValueError, match="pass the label_ids"):
        Tagging().answers(scores, rows, SCHEMA)


def test_spans_without_a_type_have_a_name() -> None:
    schema = Schema("tagging", {}, ("O", "B", "I"), "f1")
    labels = np.array([[1, 2]])
    answers = Tagging().answers(
        np.eye(3)[labels], Rows({"tokens": [["p", "53"]]}, [""]), schema, labels
    )
    assert answers[0]["spans"] == [
        {"type": "entity", "start": 0, "end": 2, "text": "p 53"}
    ]


def test_a_trainer_learns_and_answers(tiny_encoder: Path, tmp_path: Path) -> None:
    """Follow the way of a job: rows, features, Trainer, metrics, answers."""
    import transformers
    from datasets import Dataset

    task = Tagging()
    birds, metals = ["crow", "wren", "swift"], ["iron", "tin", "zinc"]
    sentences = [
        ([bird, "and", metal, "copper"], ["I-BIRD", "O", "I-METAL", "I-METAL"])
        for bird in birds
        for metal in metals
    ]
    data = source(sentences * 3)
    schema = task.schema(data)
    rows = task.rows(data.train, schema)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    made = Dataset.from_dict(rows.columns).map(
        lambda batch: task.features(batch, tokenizer, schema, 5),  # cuts the last word
        batched=True,
        remove_columns=list(rows.columns),
    )
    model = getattr(transformers, task.auto_model).from_pretrained(
        tiny_encoder, **task.model_kwargs(schema)
    )
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=40, learning_rate=0.02, report_to=[], use_cpu=True
        ),
        train_dataset=made,
        eval_dataset=made,
        data_collator=task.collator(tokenizer),
        compute_metrics=lambda p: task.metrics(p.predictions, p.label_ids, schema),  # pyright: ignore[reportArgumentType]
    )
    trainer.train()
    assert trainer.evaluate()["eval_f1"] == 1.0
    new = task.rows(
        table([(["zinc", "of", "crow"],)], ("tokens",)), schema, labelled=False
    )
    features = Dataset.from_dict(task.features(new.columns, tokenizer, schema, 16))
    out: Any = trainer.predict(features)  # pyright: ignore[reportArgumentType]
    answer = task.answers(out.predictions, new, schema, out.label_ids)[0]
    assert len(answer["tags"]) == 3
    assert answer["words_cut"] == 0


# -- real data ------------------------------------------------------------------------


def test_conll2003_has_the_published_entities() -> None:
    data = conll_source(shared_data("conll2003"))
    task = Tagging()
    schema = task.schema(data)
    assert schema.settings["scheme"] == "IOB2"
    assert len(schema.label_names) == 9
    rows = {part: task.rows(each, schema) for part, each in data.parts.items()}
    assert not any(read.bad for read in rows.values())
    told = task.describe(rows, schema)
    assert [line.split(" (")[0] for line in told[1:4]] == [
        "train: 14,041 sentences of 203,621 words, 23,499 entities",
        "validation: 3,250 sentences of 51,362 words, 5,942 entities",
        "test: 3,453 sentences of 46,435 words, 5,648 entities",
    ]
    assert "(LOC 7,140, MISC 3,438, ORG 6,321, PER 6,600)" in told[1]
    assert not any("carry" in line for line in told)
