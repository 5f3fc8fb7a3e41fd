"""Proteins as texts: residues checked, one token each, in every kind of text task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.models import find_model, load_tokenizer
from bidora.tasks.classification import Classification
from bidora.tasks.labels import BadValueError
from bidora.tasks.proteins import RESIDUES, by_residue, mostly_residues, read_residues
from bidora.tasks.regression import Regression

ROWS = (("MKTAYGK", "1"), ("acd ef*", "0"), ("WWWX", "1"), ("GGAVL", "0"))


def source(rows: Any = ROWS, column: str = "sequence", **hints: Any) -> Source:
    lines = tuple(f"line {i + 2}" for i in range(len(rows)))
    table = Table("p.csv", (column, "label"), tuple(rows), lines)
    return Source("p.csv", {"train": table}, hints=hints)


def tokenizer_of(vocabulary: list[str], folder: Path, **settings: Any) -> Any:
    from transformers import BertTokenizer

    path = folder / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *vocabulary]))
    return BertTokenizer(vocab=str(path), **settings)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("MKTAYGK", "MKTAYGK"),
        ("mk t\nay", "MKTAY"),
        ("MK*", "MK"),
        ("BJOUXZ", "BJOUXZ"),
    ],
)
def test_residues_are_read_in_capitals(text: str, read: str) -> None:
    assert read_residues(text) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MK-V", r"'-' at residue 3"),
        ("MK*V", r"'\*' at residue 3"),
        ("MKÄ", r"'Ä' at residue 3"),
        ("M1", r"'1' at residue 2"),
        ("*", "no residues"),
    ],
)
def test_what_is_no_residue_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(BadValueError, match=said):
        read_residues(text)


def test_a_bad_protein_is_a_bad_row_and_the_others_stay() -> None:
    data = source([*ROWS, ("MK?", "1")], proteins=True)
    task = Classification()
    rows = task.rows(data.train, task.schema(data))
    assert rows.columns["text"] == ["MKTAYGK", "ACDEF", "WWWX", "GGAVL"]
    (bad,) = rows.bad
    assert bad.startswith("p.csv, line 6: column 'sequence' has '?' at residue 3")


@pytest.mark.parametrize(
    ("given", "hint", "column", "expected"),
    [
        (None, None, "sequence", True),  # three of four are residues in capitals
        (True, None, "sequence", True),
        (None, True, "text", True),
        (False, True, "sequence", False),
        (None, None, "text", False),
    ],
)
def test_who_says_that_texts_are_proteins(
    given: bool | None, hint: bool | None, column: str, expected: bool
) -> None:
    data = source(column=column, **({} if hint is None else {"proteins": hint}))
    schema = Classification(proteins=given).schema(data)
    assert schema.settings["proteins"] is expected


def test_a_column_called_sequence_is_seen_to_hold_proteins() -> None:
    data = source([("MKT", "0.5"), ("ACX", "1.5"), ("W*", "7")])
    assert Regression().schema(data).settings["proteins"] is True
    small = source([("mkt", "0.5"), ("acx", "1.5"), ("W", "7")])
    assert Regression().schema(small).settings["proteins"] is True


@pytest.mark.parametrize("odd", ["MKT-AY", "MK1", "see P12345", ""])
def test_an_odd_value_among_proteins_is_a_bad_row(odd: str) -> None:
    data = source([("MKTAYGK", "1"), ("ACDEF", "0"), ("mktay", "1"), (odd, "0")])
    task = Classification()
    schema = task.schema(data)
    assert schema.settings["proteins"] is True
    rows = task.rows(data.train, schema)
    assert rows.columns["text"] == ["MKTAYGK", "ACDEF", "MKTAY"]
    assert [line.split(": ")[0] for line in rows.bad] == ["p.csv, line 5"]


WORDS = [
    ["MKT", "ONE TWO", "THE END", "Ab"],
    ["The cat sat on the mat", "A dog", "It rained all day", "Nothing was there"],
    ["left right", "left left wait", "right wait", "wait right left"],
    ["hello", "goodbye", "yes", "about"],
    ["STOP THE COUNT", "GOOD MORNING", "HOW ARE YOU", "NOTHING TO DO"],
    ["Das Haus", "und", "Zug", "Baum"],
    ["MKTAY", "two words", "1, 2, 3", "MK-V"],
    ["", "  "],
]


@pytest.mark.parametrize("texts", WORDS)
def test_words_in_a_column_called_sequence_are_no_proteins(texts: list[str]) -> None:
    assert mostly_residues(texts) is False
    data = source([(text, str(i % 2)) for i, text in enumerate(texts)])
    assert Classification().schema(data).settings["proteins"] is False


def test_the_task_made_again_from_its_schema_reads_alike() -> None:
    data = source(proteins=True)
    schema = Classification().schema(data)
    again = Classification(**schema.settings)
    assert again.rows(data.train, schema).columns["text"][1] == "ACDEF"


def test_a_protein_tokenizer_gets_a_token_a_residue(tmp_path: Path) -> None:
    # Without blanks between residues, WordPiece makes one unknown word of a protein.
    known = tokenizer_of(list(RESIDUES), tmp_path, do_lower_case=False)
    assert known("MKV", add_special_tokens=False)["input_ids"] == [known.unk_token_id]
    changed = by_residue(known)
    ids = changed("MKV", add_special_tokens=False)["input_ids"]
    assert changed.convert_ids_to_tokens(ids) == ["M", "K", "V"]
    assert known("MKV", add_special_tokens=False)["input_ids"] == [known.unk_token_id]
    assert by_residue(changed) is changed


def test_the_division_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    known = tokenizer_of(list(RESIDUES), tmp_path, do_lower_case=False)
    by_residue(known).save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["MKVAC", "MK"]
    assert again(texts).data == by_residue(known)(texts).data
    tokens = again.convert_ids_to_tokens(again("MK")["input_ids"])
    assert tokens == ["[CLS]", "M", "K", "[SEP]"]


def test_a_packaged_model_has_its_tokens_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "antiberty"
    (package / "trained_models" / "AntiBERTy_md_smooth").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    (package / "trained_models" / "AntiBERTy_md_smooth" / "config.json").write_text(
        "{}"
    )
    tokenizer_of(list(RESIDUES), package / "trained_models")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = find_model("antiberty")
    assert source.is_local
    assert source.hub_name == source.location
    tokenizer = by_residue(load_tokenizer(source))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("MKV")["input_ids"])
    assert tokens == ["[CLS]", "M", "K", "V", "[SEP]"]


def test_a_model_of_words_is_refused(tmp_path: Path) -> None:
    words = tokenizer_of(["the", "cat", "A", "C"], tmp_path, do_lower_case=False)
    with pytest.raises(UserError, match=r"cannot read proteins\. Pass a protein model"):
        by_residue(words)


def test_contradicting_labels_are_told() -> None:
    data = source([("MK", "1"), ("MK", "0"), ("AC", "1"), ("AC", "1"), ("WW", "0")])
    task = Classification()
    schema = task.schema(data)
    told = task.describe({"train": task.rows(data.train, schema)}, schema)
    assert "proteins: one token a residue" in told
    (torn,) = [line for line in told if "several labels" in line]
    assert torn.startswith("warning: 1 text(s) of train")
    assert "'MK'" in torn
