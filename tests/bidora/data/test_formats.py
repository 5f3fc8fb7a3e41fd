"""Column files and Reuters-21578: official layouts, what editors do to them, counts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidora.data.formats import (
    conll_source,
    is_conll,
    is_reuters,
    read_conll,
    reuters_source,
    sgml,
)
from bidora.data.formats.conll import SUFFIXES
from bidora.data.formats.sgml import EMPTY_TEXT
from bidora.data.source import PARTS
from bidora.errors import UserError
from tests.shared import shared_data

# -- column files ---------------------------------------------------------------------

WORDS = (["Ada", "sees", "Bern"], ["It", "rains"])
TAGS = (["I-PER", "O", "I-LOC"], ["O", "O"])
ROWS = tuple(zip(WORDS, TAGS, strict=True))

CONLL = """\
-DOCSTART- -X- -X- O

Ada NNP I-NP I-PER
sees VBZ I-VP O
Bern NNP I-NP I-LOC

It PRP I-NP O
rains VBZ I-VP O
"""
MEDLINE = """\
###MEDLINE:1

Ada\tI-PER
sees\tO
Bern\tI-LOC

###MEDLINE:2

It\tO
rains\tO

"""
COMMENTED = """\
# id 7\tdomain=en
Ada _ _ I-PER
sees _ _ O
Bern _ _ I-LOC

# text = It rains
# sent_id = 8
It _ _ O
rains _ _ O
"""

SAME: dict[str, bytes] = {
    "conll2003": CONLL.encode(),
    "crlf": CONLL.replace("\n", "\r\n").encode(),
    "mac": CONLL.replace("\n", "\r").encode(),
    "mark": CONLL.encode("utf-8-sig"),
    "utf16": CONLL.encode("utf-16"),
    "gzip": gzip.compress(CONLL.encode()),
    "no end": CONLL.rstrip().encode(),
    "blank lines": CONLL.replace("\n\n", "\n \t\n\n\n").encode(),
    "trailing": CONLL.replace("O\n", "O  \t\n").encode(),
    "wide": CONLL.replace(" ", "   ").encode(),
    "mixed": CONLL.replace("sees VBZ", "sees\tVBZ").encode(),
    "tabs": CONLL.replace(" ", "\t").encode(),
    "tabs and blanks": CONLL.replace(" ", " \t ").encode(),
    "two columns": "\n".join(
        " ".join((*line.split()[:1], *line.split()[-1:])) for line in CONLL.split("\n")
    ).encode(),
    "medline": MEDLINE.encode(),
    "comments": COMMENTED.encode(),
}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("kind", SAME)
def test_a_column_file_is_read_whatever_wrote_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "eng.train"
    path.write_bytes(SAME[kind])
    table = read_conll(path)
    assert table.columns == ("tokens", "tags")
    assert table.rows == ROWS
    assert table.bad == ()
    assert is_conll(path)


def test_a_place_is_the_line_of_the_first_word(tmp_path: Path) -> None:
    path = write(tmp_path / "eng.train.gz", CONLL)
    table = read_conll(path)
    assert table.lines == ("line 3", "line 7")
    assert table.place(1) == f"{path}, line 7"


def test_words_keep_the_blanks_that_do_not_divide_columns(tmp_path: Path) -> None:
    tabs = write(tmp_path / "a.tsv", "1 000\tB-NUM\nNew York \tB-LOC\n\n\x85\x0b\tO\n")
    assert read_conll(tabs).values("tokens") == [["1 000", "New York"], ["\x85\x0b"]]
    blanks = write(tmp_path / "b.txt", "10\xa0000 B-NUM\n\xa0 O\nlast O\n")
    assert read_conll(blanks).values("tokens") == [["10\xa0000", "\xa0", "last"]]


def test_hash_and_docstart_may_be_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "# O\nid O\n\nsee O\n#1 O\n")
    assert read_conll(path).values("tokens") == [["#", "id"], ["see", "#1"]]


def test_ragged_lines_are_told_and_their_sentences_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.txt",
        "good O\n\nAda I-PER extra\nsees\n\nBern I-LOC\n\nalone\n",
    )
    table = read_conll(path)
    assert table.values("tokens") == [["good"], ["Bern"]]
    assert table.lines == ("line 1", "line 6")
    assert table.bad == (
        f"{path}, line 3: 3 field(s) where the file has 2 (Ada | I-PER | extra), and "
        "1 more of this sentence",
        f"{path}, line 8: 1 field(s) where the file has 2 (alone)",
    )


def test_empty_fields_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "Ada\tB-PER\n\n\tO\n\nBern\tO\n")
    assert read_conll(path).bad == (f"{path}, line 3: an empty field ( | O)",)


def test_a_byte_of_another_encoding_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", "Zürich O\nBär O\n\n".encode() + b"B\xe4r O\n")
    table = read_conll(path)
    assert len(table) == 1
    assert table.bad[0].startswith(f"{path}, line 4: the byte 0xe4")
    assert "--encoding" in table.bad[0]


def test_columns_may_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "eng.train", CONLL)
    assert read_conll(path, tag_column=1).rows[1] == (WORDS[1], ["PRP", "VBZ"])
    assert read_conll(path, token_column=-4, tag_column=2).rows[0][0] == WORDS[0]
    for token, tag in ((0, 4), (-5, -1)):
        with pytest.raises(UserError, match=r"has 4 column\(s\).*count from 0"):
            read_conll(path, token_column=token, tag_column=tag)
    with pytest.raises(UserError, match="are the same of its 4 columns"):
        read_conll(path, token_column=3)


def test_words_alone_are_read_for_prediction(tmp_path: Path) -> None:
    table = read_conll(write(tmp_path / "new.txt", "It\nrains\n\nBern\n"))
    assert table.columns == ("tokens",)
    assert table.rows == ((["It", "rains"],), (["Bern"],))


def test_what_is_no_column_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none\.txt"):
        read_conll(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is empty"):
        read_conll(write(tmp_path / "empty.txt", ""))
    with pytest.raises(UserError, match=r"documents\.txt has no sentences"):
        read_conll(write(tmp_path / "documents.txt", "-DOCSTART- O\n\n"))
    damaged = bytearray(gzip.compress(CONLL.encode() * 50))
    damaged[30:60] = bytes(30)
    (tmp_path / "eng.train.gz").write_bytes(damaged)
    with pytest.raises(UserError, match="archive is damaged"):
        read_conll(tmp_path / "eng.train.gz")


# Anything but what divides columns, lines or documents, or comments them out.
WORD = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs"], exclude_characters="#\ufeff"),
    min_size=1,
    max_size=6,
).filter(lambda word: word.strip() == word and not word.startswith("-DOC"))


@settings(max_examples=50)
@given(
    sentences=st.lists(
        st.lists(
            st.tuples(WORD, st.sampled_from(["O", "B-X", "I-X"])),
            min_size=1,
            max_size=4,
        ),
        min_size=1,
        max_size=4,
    ),
    divider=st.sampled_from([" ", "\t", " _ ", "\t_\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    sentences: list[list[tuple[str, str]]],
    divider: str,
    end: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.txt"
    blocks = [end.join(divider.join(pair) for pair in s) for s in sentences]
    path.write_bytes((end + end).join(blocks).encode())
    table = read_conll(path)
    assert table.rows == tuple(
        ([w for w, _ in s], [t for _, t in s]) for s in sentences
    )
    starts = [int(line.removeprefix("line ")) for line in table.lines]
    lengths = [len(s) + 1 for s in sentences]
    assert starts == [1 + sum(lengths[:i]) for i in range(len(sentences))]


LAYOUTS = {
    "conll2003": ("eng.train", "eng.testa", "eng.testb"),
    "packed": ("eng.train.gz", "eng.testa.gz", "eng.testb.gz"),
    "upper": ("ENG.TRAIN", "ENG.TESTA", "ENG.TESTB"),
    "dev": ("train.txt", "dev.txt", "test.txt"),
    "valid": ("train.conll", "valid.conll.gz", "test.conll"),
    "devel": ("train.tsv", "devel.tsv", "test.tsv"),
    "bare": ("train", "validation", "test"),
    "jnlpba": ("Genia4ERtask1.iob2", "", "Genia4EReval1.iob2"),
    "train alone": ("train.bio", "", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_in_their_layouts(tmp_path: Path, layout: str) -> None:
    files: dict[str, str] = dict(zip(PARTS, LAYOUTS[layout], strict=True))
    texts = (CONLL, CONLL.replace("Ada", "Eve"), CONLL.replace("Ada", "Ida"))
    for name, text in zip(files.values(), texts, strict=True):
        if name:
            write(tmp_path / name, text)
    write(tmp_path / "README.txt", "about the data")
    source = conll_source(tmp_path)
    assert source.hints == {"task_type": "tagging"}
    first = {part: table.rows[0][0][0] for part, table in source.parts.items()}
    words: dict[str, str] = dict(zip(PARTS, ("Ada", "Eve", "Ida"), strict=True))
    assert first == {part: words[part] for part, name in files.items() if name}
    for part, table in source.parts.items():
        assert table.origin == str(tmp_path / files[part])
        assert files[part] in source.note
    assert is_conll(tmp_path)


def test_one_file_is_what_is_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "ner.txt", CONLL)
    source = conll_source(path)
    assert list(source.parts) == ["train"]
    assert source.place("train", 0) == f"{path}, line 3"


def test_a_test_file_without_tags_is_left_out_and_told(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", CONLL)
    write(tmp_path / "test.txt", "It\nrains\n")
    source = conll_source(tmp_path)
    assert list(source.parts) == ["train"]
    assert "test.txt, left out: it has no tags" in source.note
    with pytest.raises(UserError, match="has one column, which leaves no tags"):
        conll_source(tmp_path / "test.txt")


def test_a_guessed_encoding_is_told(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "München B-LOC\nliegt O\n".encode("cp1252"))
    source = conll_source(tmp_path)
    assert source.train.values("tokens") == [["München", "liegt"]]
    assert "Windows-1252" in source.note
    named = conll_source(tmp_path, encoding="latin-1")
    assert "Windows" not in named.note
    assert named.train.rows == source.train.rows


def test_sentences_that_are_all_damaged_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "\tO\n\n\tB-X\n")
    with pytest.raises(UserError, match=r"(?s)none of its 2.*line 1: an empty field"):
        conll_source(path)


def test_folders_that_lack_a_file_or_have_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eng\.train.*conll2003.*JNLPBA"):
        conll_source(tmp_path)
    assert not is_conll(tmp_path)
    write(tmp_path / "train.txt", CONLL)
    write(tmp_path / "train.txt.gz", CONLL.replace("Ada", "packed"))
    assert conll_source(tmp_path).train.rows == ROWS
    write(tmp_path / "train.conll", CONLL)
    with pytest.raises(UserError, match=r"train part: train\.txt, .*keep one"):
        conll_source(tmp_path)


def test_tables_are_not_taken_for_column_files(tmp_path: Path) -> None:
    for name, text in {
        "a.csv": "text,label\nOne,O\n",
        "b.tsv": "sentence\tlabel\na film\t1\n",
        "c.txt": "A book.\n\nIts second page.\n",
        "d.txt": "-DOCSTART- O\n",
    }.items():
        assert not is_conll(write(tmp_path / name, text))
    assert not is_conll(tmp_path / "none.txt")
    assert len(SUFFIXES) == len(set(SUFFIXES))


def test_conll2003_has_the_published_counts() -> None:
    source = conll_source(shared_data("conll2003"))
    counts = {
        part: (len(table), sum(map(len, table.values("tokens"))), len(table.bad))
        for part, table in source.parts.items()
    }
    assert counts == {
        "train": (14_041, 203_621, 0),
        "validation": (3_250, 51_362, 0),
        "test": (3_453, 46_435, 0),
    }
    assert source.train.rows[0] == (
        ["EU", "rejects", "German", "call", "to", "boycott", "British", "lamb", "."],
        ["B-ORG", "O", "B-MISC", "O", "O", "O", "B-MISC", "O", "O"],
    )


# -- Reuters-21578 --------------------------------------------------------------------


def document(**fields: Any) -> dict[str, Any]:
    usual = {
        "newid": 1,
        "lewissplit": "TRAIN",
        "cgisplit": "TRAINING-SET",
        "topics_attr": "YES",
        "topics": ["cocoa"],
        "text_type": "NORM",
        "title": "A TITLE",
        "body": "A body.\n Reuter",
    }
    return {**usual, **fields}


def as_sgml(documents: list[dict[str, Any]]) -> str:
    """Write documents as the collection has them, control characters included."""

    def escaped(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;")

    lines = ['<!DOCTYPE lewis SYSTEM "lewis.dtd">']
    for d in documents:
        kind = "" if d["text_type"] == "NORM" else f' TYPE="{d["text_type"]}"'
        title = f"<TITLE>{escaped(d['title'])}</TITLE>\n" if d["title"] else ""
        body = f"{escaped(d['body'])}\n&#3;"
        if d["text_type"] == "NORM":
            body = f"<DATELINE>    PARIS, Feb 26 - </DATELINE><BODY>{body}</BODY>"
        lines += [
            f'<REUTERS TOPICS="{d["topics_attr"]}" LEWISSPLIT="{d["lewissplit"]}" '
            f'CGISPLIT="{d["cgisplit"]}" OLDID="5" NEWID="{d["newid"]}">',
            "<DATE>26-FEB-1987 15:01:01.79</DATE>",
            "<TOPICS>" + "".join(f"<D>{t}</D>" for t in d["topics"]) + "</TOPICS>",
            "<PLACES><D>usa</D></PLACES>",
            "<UNKNOWN> \n&#5;&#5;&#5;C T\n&#22;&#22;&#1;f0704&#31;reute</UNKNOWN>",
            f"<TEXT{kind}>&#2;\n{title}{body}</TEXT>",
            "</REUTERS>",
        ]
    return "\n".join(lines) + "\n"


# One document for each pair of attributes; their numbers name them.
SPLITS = ("TRAIN", "TEST", "NOT-USED")
TOPICS = ("YES", "NO", "BYPASS")
INVENTED = [
    document(
        newid=10 * i + j,
        title=f"T{i}{j}",
        lewissplit=split,
        topics_attr=topics,
        # As in the collection, those not used by Lewis are those that Hayes tested on.
        cgisplit="PUBLISHED-TESTSET" if split == "NOT-USED" else "TRAINING-SET",
    )
    for i, split in enumerate(SPLITS)
    for j, topics in enumerate(TOPICS)
]
EXPECTED = {
    "modapte": (["T00"], ["T10"]),
    "modlewis": (["T00", "T01"], ["T10", "T11"]),
    "modhayes": (["T00", "T01", "T02", "T10", "T11", "T12"], ["T20", "T21", "T22"]),
}

Writer = Callable[[Path, list[dict[str, Any]]], Path]


def write_sgml(folder: Path, documents: list[dict[str, Any]]) -> Path:
    half = (len(documents) + 1) // 2
    write(folder / "reut2-000.sgm", as_sgml(documents[:half]).encode("latin-1"))
    write(folder / "reut2-001.sgm.gz", as_sgml(documents[half:]).encode("latin-1"))
    return folder


def write_jsonl(folder: Path, documents: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(d) + "\n" for d in documents)
    write(folder / "reuters21578.jsonl.gz", lines)
    return folder


@pytest.mark.parametrize("split", EXPECTED)
@pytest.mark.parametrize("writer", [write_sgml, write_jsonl])
def test_splits_are_those_of_the_readme(
    tmp_path: Path, writer: Writer, split: str
) -> None:
    source = reuters_source(writer(tmp_path, INVENTED), split)
    found = {
        part: [text.split("\n")[0] for text in table.values("text")]
        for part, table in source.parts.items()
    }
    assert found == dict(zip(("train", "test"), EXPECTED[split], strict=True))
    assert source.hints == {
        "task_type": "multilabel",
        "text_column": "text",
        "label_column": "labels",
        "metric": "f1_micro",
    }
    assert "where the whole collection has" in source.note
    assert is_reuters(tmp_path)


def test_texts_are_titles_and_bodies_without_control_characters(tmp_path: Path) -> None:
    documents = [
        document(
            body="Fish &lt;A> & chips <B>\n\tü &#65;.", topics=["acq", "earn", "acq"]
        ),
        document(text_type="BRIEF", title="BRIEF NOTE ", body="", topics=[]),
        document(text_type="UNPROC", title="", body="TABLE\n    one  two"),
        document(text_type="UNPROC", title="", body=""),
    ]
    first = as_sgml(documents).replace("A TITLE", "&#127;A &lt;TITLE>", 1)
    write(tmp_path / "reut2-000.sgm", first.encode("latin-1"))
    source = reuters_source(tmp_path)
    assert source.train.values("text") == [
        # What is escaped twice is resolved once.
        "A <TITLE>\nFish &lt;A> & chips <B>\n\tü &#65;.",
        "BRIEF NOTE",
        "TABLE\n    one  two",
        EMPTY_TEXT,
    ]
    assert source.train.values("labels") == [["acq", "earn"], [], ["cocoa"], ["cocoa"]]
    # Each document takes as many lines as its texts say; the first line is DOCTYPE.
    assert source.train.lines[0] == "reut2-000.sgm, line 2"
    assert (
        "without any text, so read as '(no text)': reut2-000.sgm, line" in source.note
    )


def test_places_count_lines(tmp_path: Path) -> None:
    source = reuters_source(write_sgml(tmp_path, INVENTED), "modhayes")
    text = (tmp_path / "reut2-000.sgm").read_text("latin-1").split("\n")
    for place in source.train.lines[:5]:
        number = int(place.removeprefix("reut2-000.sgm, line "))
        assert text[number - 1].startswith("<REUTERS ")
    assert source.train.lines[5] == "reut2-001.sgm.gz, line 2"


def test_the_same_documents_come_from_sgml_and_from_jsonl(tmp_path: Path) -> None:
    documents = [
        *INVENTED,
        document(body="5 < 6 & 7 > 3\n\n    so; &amp; it stays", topics=["b", "a"]),
        document(text_type="UNPROC", title="", body="all in one"),
        document(text_type="BRIEF", body="", title="ÜBER\n TWO LINES"),
    ]
    sgml_source = reuters_source(write_sgml(tmp_path / "sgml", documents))
    json_source = reuters_source(write_jsonl(tmp_path / "json", documents))
    for part in ("train", "test"):
        assert sgml_source.parts[part].rows == json_source.parts[part].rows
    one = reuters_source(tmp_path / "json" / "reuters21578.jsonl.gz")
    assert one.train.rows == json_source.train.rows


def test_a_copy_in_utf8_is_read_as_such(tmp_path: Path) -> None:
    text = as_sgml([document(body="für"), document()])
    write(tmp_path / "REUT2-000.SGM", text.encode())
    assert reuters_source(tmp_path).train.values("text")[0] == "A TITLE\nfür"


def test_damaged_documents_are_told(tmp_path: Path) -> None:
    text = as_sgml([document(), document(newid=8), document(newid=9)])
    whole, cut = text[: text.rindex("<REUTERS")], text[text.rindex("<REUTERS") :]
    nameless = whole.replace(' LEWISSPLIT="TRAIN"', "", 1)
    path = write(tmp_path / "reut2-000.sgm", nameless + cut[:300])
    source = reuters_source(path)
    assert len(source.train) == 1
    assert source.train.bad == (
        f"{path}, line 2: a <REUTERS> element without LEWISSPLIT",
        f"{path}, line 28: document 9 has no end or no text; it was cut",
    )


def test_json_documents_of_another_form_are_told(tmp_path: Path) -> None:
    good = json.dumps(document())
    lines = [
        good,
        good.replace('"TRAIN"', "3").replace('["cocoa"]', '"cocoa"'),
        "{",
        good.replace('"title": "A TITLE", ', ""),
    ]
    path = write(tmp_path / "reuters21578.jsonl", "\n".join(lines))
    source = reuters_source(path)
    assert len(source.train) == 1
    assert len(source.train.bad) == 3
    told = "\n".join(source.train.bad)
    assert f"{path}, line 2: a document without lewissplit, topics" in told
    assert f"{path}, line 3: not JSON" in told
    assert f"{path}, line 4: a document without title" in told


def test_folders_that_lack_files_say_where_they_come_from(tmp_path: Path) -> None:
    assert not is_reuters(tmp_path)
    with pytest.raises(UserError, match=r"neither reut2-000\.sgm.*archive\.ics\.uci"):
        reuters_source(tmp_path)
    for number in (0, 1, 4):
        write(tmp_path / f"reut2-00{number}.sgm", as_sgml([document()]))
    with pytest.raises(UserError, match=r"lacks reut2-002\.sgm, reut2-003\.sgm of"):
        reuters_source(tmp_path)
    write(tmp_path / "b" / "reut2-000.sgm", "<html>moved</html>")
    with pytest.raises(UserError, match="holds no <REUTERS> element"):
        reuters_source(tmp_path / "b")


def test_unknown_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown split 'modapt'.*modapte, modhayes"):
        reuters_source(tmp_path, "modapt")
    write_jsonl(tmp_path, INVENTED)
    assert len(reuters_source(tmp_path, "ModApte").train) == 1


@pytest.fixture(scope="module")
def real_documents() -> list[Any]:
    return list(sgml._documents(shared_data("reuters21578")))


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("modapte", (9603, 3299)),
        ("modhayes", (20856, 722)),
        ("modlewis", (13625, 6188)),
    ],
)
def test_reuters_has_the_published_counts(
    monkeypatch: pytest.MonkeyPatch,
    real_documents: list[Any],
    split: str,
    sizes: tuple[int, int],
) -> None:
    monkeypatch.setattr(sgml, "_documents", lambda path: iter(real_documents))
    source = reuters_source(shared_data("reuters21578"), split)
    assert tuple(len(table) for table in source.parts.values()) == sizes
    assert "whole collection" not in source.note
    assert all(text.strip() for text in source.train.values("text"))
    # One document has no text at all; it is no part of ModApte.
    empty = source.train.values("text").count(EMPTY_TEXT)
    assert empty == (split != "modapte")
    assert ("line 12793 (train)" in source.note) == bool(empty)


def test_real_documents_survive_sgml(tmp_path: Path, real_documents: list[Any]) -> None:
    documents = [d for _, d in real_documents[:1500]]
    assert {d["text_type"] for d in documents} == {"NORM", "BRIEF", "UNPROC"}
    as_json = write_jsonl(tmp_path / "json", documents)
    as_files = write_sgml(tmp_path / "sgml", documents)
    for split in ("modapte", "modhayes"):
        assert (
            reuters_source(as_files, split).train.rows
            == reuters_source(as_json, split).train.rows
        )
