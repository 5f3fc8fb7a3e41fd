"""Generation: what is learnt, what stays together, and how it is measured, by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.tasks import Rows, Schema, make_task
from bidora.tasks.generation import Generation
from bidora.tasks.splits import draw_groups, grouped_split
from tests.bidora.language_models import tokenizer_of_words

TASK = Generation()


def source(*rows: tuple[Any, ...]) -> Source:
    lines = tuple(f"line {i}" for i in range(2, len(rows) + 2))
    return Source("t.csv", {"train": Table("t.csv", ("mr", "ref"), rows, lines)})


def read(*rows: tuple[Any, ...]) -> tuple[Rows, Schema]:
    data = source(*rows)
    schema = TASK.schema(data)
    return TASK.rows(data.train, schema), schema


def test_the_reference_alone_is_learnt() -> None:
    rows, schema = read(("name [ Aromi ]", "Aromi is a pub"))
    tokenizer = tokenizer_of_words(pad=False)
    made = TASK.features(rows.columns, tokenizer, schema, 99)
    tokens = tokenizer.convert_ids_to_tokens(made["input_ids"][0])
    assert tokens[:5] == ["name", "[", "Aromi", "]", "\n"]
    assert tokens[5:] == ["Aromi", "is", "a", "pub", "</s>"]
    assert made["labels"][0] == [-100] * 5 + made["input_ids"][0][5:]
    alone = TASK.features({"text": rows.columns["text"]}, tokenizer, schema, 99)
    assert alone["input_ids"][0] == made["input_ids"][0][:5]
    assert "labels" not in alone


def test_a_prompt_has_no_end_and_a_reference_has_one() -> None:
    rows, schema = read(("name", "Aromi"))
    tokenizer = tokenizer_of_words(ends=True)  # after every text, as that of T5
    ids = TASK.features(rows.columns, tokenizer, schema, 99)["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["name", "\n", "Aromi", "</s>"]
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token that ends a text"):
        TASK.features(rows.columns, tokenizer, schema, 99)


def test_an_encoder_decoder_reads_and_writes_apart() -> None:
    from transformers import GPT2Config, T5Config

    assert TASK.for_model(GPT2Config()) is TASK
    task = Generation(num_beams=7).for_model(T5Config())
    assert task.peft_type == "SEQ_2_SEQ_LM"
    assert task.auto_model == "AutoModelForSeq2SeqLM"
    assert task.generation()["num_beams"] == 7
    rows, schema = read(("name [ Aromi ]", "Aromi is"))
    tokenizer = tokenizer_of_words(ends=True)
    made = task.features(rows.columns, tokenizer, schema, 5)
    assert tokenizer.convert_ids_to_tokens(made["input_ids"][0])[-1] == "</s>"
    assert tokenizer.convert_ids_to_tokens(made["labels"][0]) == ["Aromi", "is", "</s>"]
    assert task.count_over_long(rows, tokenizer, 2) == 1
    with pytest.raises(UserError, match="1 prompt"):
        task.check_lengths(rows, tokenizer, schema, 4, None)


def test_padding_is_not_learnt() -> None:
    rows, schema = read(("name", "Aromi is a pub"), ("name", "Aromi"))
    tokenizer = tokenizer_of_words()
    made = TASK.features(rows.columns, tokenizer, schema, 99)
    made = [{n: x[i] for n, x in made.items()} for i in range(2)]
    batch = TASK.collator(tokenizer)(made)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 7)
    assert (batch["labels"] != -100).sum(1).tolist() == [5, 2]
    assert batch["attention_mask"].sum(1).tolist() == [7, 4]


def test_all_references_of_an_input_stay_on_one_side() -> None:
    rows, schema = read(*[(f"name {i % 7}", f"text {i}") for i in range(40)])
    inputs = rows.columns["text"]
    for seed in range(5):
        first, second = TASK.split(rows, schema, 0.3, seed)
        assert sorted([*first, *second]) == list(range(40))
        assert not {inputs[i] for i in first} & {inputs[i] for i in second}
        assert len({inputs[i] for i in second}) == 3  # 0.3 of 7, rounded up
        drawn = TASK.draw(rows, schema, 13, seed)
        assert 0 < len(drawn) <= 13
        kept = {inputs[i] for i in drawn}
        assert len(drawn) == sum(name in kept for name in inputs)
    with pytest.raises(UserError, match="too few to hold 2 of these back"):
        grouped_split(["a", "b"], 0.9, 0)
    with pytest.raises(UserError, match="the smallest such group has 2"):
        draw_groups(["a", "a", "b", "b", "b"], 1, 0)
    with pytest.raises(UserError, match="between 0 and 1"):
        grouped_split(["a", "b"], 1.0, 0)


def test_bad_rows_are_told_with_their_places() -> None:
    rows, _ = read(
        ("name", "Aromi"), ("", "Aromi is a pub"), ("name", " "), ("name", None)
    )
    assert len(rows) == 1
    assert [line.split(": ")[0] for line in rows.bad] == [
        "t.csv, line 3",
        "t.csv, line 4",
        "t.csv, line 5",
    ]
    assert "column 'mr' holds no text" in rows.bad[0]  # a reference without its meaning
    assert "column 'ref' holds no reference" in rows.bad[1]
    with pytest.raises(UserError, match="put both texts into one column"):
        Generation(text_pair_column="ref").schema(source(("a", "b")))
    with pytest.raises(UserError, match="unknown metric 'accuracy'"):
        Generation(metric="accuracy").schema(source(("a", "b")))


def test_a_prompt_that_leaves_no_room_is_refused_and_an_answer_is_cut() -> None:
    rows, schema = read(("name [ Aromi ]", "Aromi is a pub"))
    tokenizer = tokenizer_of_words()
    assert TASK.count_over_long(rows, tokenizer, 9) == 1
    assert TASK.count_over_long(rows, tokenizer, 10) == 0
    made = TASK.features(rows.columns, tokenizer, schema, 6)
    assert sum(x != -100 for x in made["labels"][0]) == 1
    TASK.check_lengths(rows, tokenizer, schema, 6, None)
    with pytest.raises(UserError, match=r"1 prompt.* 5 tokens.*--max-length 5"):
        TASK.check_lengths(rows, tokenizer, schema, 5, None)


@pytest.mark.parametrize(
    ("length", "longest", "remedy"),
    [
        (4, None, "train with --max-length above 7, or shorten them"),
        (4, 8, "train with --max-length above 7, or shorten them"),
        (4, 7, "train with --max-length 7, which is all that the model takes, and"),
        (4, 4, "the model takes 4 tokens, so shorten them or leave them out"),
    ],
)
def test_all_prompts_that_are_too_long_are_counted_and_the_remedy_is_possible(
    length: int, longest: int | None, remedy: str
) -> None:
    short, long, longer = ("a", "ref"), ("a a a", "ref"), ("a a a a a a", "ref")
    given = [longer if i == 3400 else short if i % 500 else long for i in range(3500)]
    rows, schema = read(*given)
    said = (
        f"8 prompt(s) have 4 to 7 tokens, and --max-length {length} keeps no token of "
        "their answers (t.csv, line 2; t.csv, line 502; t.csv, line 1002; and 5 more)."
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}.*{re.escape(remedy)}"):
        TASK.check_lengths(rows, tokenizer_of_words(), schema, length, longest)


@pytest.mark.parametrize("two_parts", [False, True])
def test_prompts_that_are_too_long_may_be_left_out_with_all_references(
    two_parts: bool,
) -> None:
    from transformers import T5Config

    task = TASK.for_model(T5Config()) if two_parts else TASK
    tokenizer = tokenizer_of_words(ends=two_parts)
    long, short = "name [ Aromi ]", "Cotto"
    rows, schema = read((long, "a pub"), (short, "a"), (long, "is a pub in the city"))
    left_out = task.check_lengths(rows, tokenizer, schema, 4, None, skip=True)
    tokens = 4 if two_parts else 5  # with the line's end
    why = f"its prompt has {tokens} tokens, and --max-length 4 keeps no token of an answer"
    assert left_out == {0: f"t.csv, line 2: {why}.", 2: f"t.csv, line 4: {why}."}
    assert task.check_lengths(rows, tokenizer, schema, 9, None, skip=True) == {}


@pytest.mark.parametrize("two_parts", [False, True])
def test_perplexity_counts_every_token_alike(two_parts: bool) -> None:
    from transformers import T5Config

    task = TASK.for_model(T5Config()) if two_parts else TASK
    # Probability of the right token: 1/2 twice in the first example, 1/8 in the second.
    right = [[1, 1], [1, -100]]
    logits = torch.zeros(2, 2, 8)
    logits[0, :, 1] = math.log(7)  # 7 / (7 + 7)
    labels = torch.tensor(right)
    if not two_parts:  # what stands at a place foretells the next
        logits = torch.cat([logits, torch.full((2, 1, 8), 9.0)], dim=1)
        labels = torch.cat([torch.full((2, 1), -100), labels], dim=1)
    kept = task.kept((logits, None), labels)
    assert kept.shape == (2, 3)
    scores = task.metrics(np.asarray(kept), np.zeros(0), Schema("generation"))
    assert scores["perplexity"] == pytest.approx((2 * 2 * 8) ** (1 / 3), rel=1e-6)
    assert scores["token_accuracy"] == pytest.approx(2 / 3)


def test_the_settings_of_writing_are_kept_for_new_rows() -> None:
    task = Generation(num_beams=3, max_new_tokens=5, length_penalty=0.0)
    schema = task.schema(source(("a", "b")))
    again = make_task(schema.task, **schema.settings)
    assert again.generation() == task.generation()
    assert again.generation() == {
        "max_new_tokens": 5,
        "num_beams": 3,
        "length_penalty": 0.0,
        "do_sample": False,
    }
    assert Generation().generation()["num_beams"] == 4


def test_texts_are_scored_once_for_each_input_by_all_its_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(
        "bidora.tasks.generation.text_scores", lambda *given: heard.append(given)
    )
    rows, schema = read(("a", "one"), ("b", "two"), ("a", "three"))
    TASK.text_scores(["x", "y", "x"], rows, schema)
    assert heard == [(["x", "y"], [["one", "three"], ["two"]])]
    assert TASK.text_records(["x", "y", "x"], rows, schema) == [
        {"input": "a", "references": ["one", "three"], "generated": "x"},
        {"input": "b", "references": ["two"], "generated": "y"},
    ]
