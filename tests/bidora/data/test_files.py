"""Files: what people's programs write is read, and what is wrong is told with its line."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bidora.data.files import is_table_file, read_file
from bidora.data.table import Table
from bidora.errors import UserError

ROWS = (("crow", "b"), ("iron", "m"), ("wren", "b"), ("tin", "m"))
HEADER = "text,label\n"


def table(path: Path, content: str | bytes, **settings: str) -> Table:
    """Write a file and read it."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path, **settings).table


def written(
    rows: list[tuple[str, ...]], delimiter: str = ",", end: str = "\r\n"
) -> str:
    lines: list[str] = []

    class Sink:
        def write(self, line: str) -> None:
            lines.append(line)

    csv.writer(Sink(), delimiter=delimiter, lineterminator=end).writerows(rows)
    return "".join(lines)


# -- what is read ---------------------------------------------------------------------

PLAIN = written([("text", "label"), *ROWS])
LINES = "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in ROWS)
SAME = {
    "plain.csv": PLAIN.encode(),
    "lf.csv": PLAIN.replace("\r\n", "\n").encode(),
    "mac.csv": PLAIN.replace("\r\n", "\r").encode(),
    "cut.csv": PLAIN.rstrip().encode(),
    "semicolons.csv": PLAIN.replace(",", ";").encode(),
    "bars.csv": PLAIN.replace(",", "|").encode(),
    "excel.csv": ("sep=;\r\n" + PLAIN.replace(",", ";")).encode(),
    "tabs.csv": PLAIN.replace(",", "\t").encode(),
    "mark.csv": PLAIN.encode("utf-8-sig"),
    "utf16.csv": PLAIN.encode("utf-16"),
    "utf16be.csv": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "unmarked16.csv": PLAIN.encode("utf-16-le"),
    "utf32.csv": PLAIN.encode("utf-32"),
    "packed.csv.gz": gzip.compress(PLAIN.encode()),
    "renamed.csv": gzip.compress(PLAIN.encode()),
    "blank.csv": PLAIN.encode() + b"\r\n,\r\n,\r\n",
    "plain.tsv": PLAIN.replace(",", "\t").encode(),
    "mac.tsv": PLAIN.replace(",", "\t").replace("\r\n", "\r").encode(),
    "quoted.tsv": b'"text"\t"label"\n'
    + b"".join(f'"{t}"\t"{c}"\n'.encode() for t, c in ROWS),
    "packed.tsv.gz": gzip.compress(PLAIN.replace(",", "\t").encode()),
    "lines.jsonl": LINES.encode(),
    "spaced.jsonl": LINES.replace("\n", "\r\n\r\n").encode(),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "list.jsonl": json.dumps(
        [json.loads(line) for line in LINES.split("\n")[:-1]]
    ).encode(),
    "spread.json": json.dumps(
        [json.loads(line) for line in LINES.split("\n")[:-1]], indent=2
    ).encode(),
    "UPPER.CSV": PLAIN.encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_every_kind_of_file_reads_the_same(tmp_path: Path, name: str) -> None:
    found = table(tmp_path / name, SAME[name])
    assert (found.columns, found.rows, found.bad) == (("text", "label"), ROWS, ())


def test_rows_know_their_lines(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", 'text,label\n\n"one\ntwo",a\nthree,b\n')
    assert found.lines == ("line 3", "line 5")
    assert found.place(1).endswith("a.csv, line 5")
    assert table(tmp_path / "a.jsonl", '\n{"a": 1}\n').lines == ("line 2",)
    assert table(tmp_path / "b.jsonl", '[{"a": 1}]').lines == ("item 1",)
    excel = table(tmp_path / "e.csv", "sep=;\na;b\n1;2\n")
    assert excel.lines == ("line 3",)


def test_quotes_are_plain_text_in_tsv_and_marks_in_csv(tmp_path: Path) -> None:
    plain = 'text\tlabel\nhe said "no\ta\n"yes" she said\tb\n'
    assert [r[0] for r in table(tmp_path / "a.tsv", plain).rows] == [
        'he said "no',
        '"yes" she said',
    ]
    marks = 'text,label\n"a, ""b""",x\n'
    assert table(tmp_path / "a.csv", marks).rows == (('a, "b"', "x"),)
    assert table(
        tmp_path / "b.tsv", 'text\tlabel\n"a\tb"\tx\n', quoting="csv"
    ).rows == (("a\tb", "x"),)
    assert table(tmp_path / "b.csv", 'text,label\n"a,x\n', quoting="none").rows == (
        ('"a', "x"),
    )


def test_signs_that_end_lines_elsewhere_stay_in_texts(tmp_path: Path) -> None:
    text = "a\x85b\u2028c\x1cd\x0be"
    assert table(tmp_path / "a.tsv", f"text\tlabel\n{text}\tx\n").rows == ((text, "x"),)
    assert table(tmp_path / "a.csv", f"text,label\n{text},x\n").rows == ((text, "x"),)
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert table(tmp_path / "a.jsonl", line + "\n" + line).rows == ((text,), (text,))


def test_a_lone_carriage_return_stays_in_its_text(tmp_path: Path) -> None:
    for suffix, sign in ((".csv", ","), (".tsv", "\t")):
        content = f"label{sign}text\nx{sign}one\rtwo\ny{sign}three\n"
        found = table(tmp_path / f"a{suffix}", content)
        assert found.rows == (("x", "one\rtwo"), ("y", "three"))
        assert found.lines == ("line 2", "line 3")


def test_files_of_old_macs_break_lines_inside_cells(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", 'text,label\r"one\ntwo",a\rthree,b\rfour,a\r')
    assert found.rows[:2] == (("one\ntwo", "a"), ("three", "b"))


def test_decimal_commas_do_not_divide(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", "text;score\nso, so;2,5\nwell, fine;4,0\n")
    assert found.rows == (("so, so", "2,5"), ("well, fine", "4,0"))
    path = tmp_path / "b.csv"
    path.write_text("2,5;so, so\n4,0;fine\n")
    found = read_file(path, column_names=("score", "text")).table
    assert found.rows == (("2,5", "so, so"), ("4,0", "fine"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_long_fields_are_read_and_the_limit_is_put_back(
    tmp_path: Path, suffix: str
) -> None:
    before = csv.field_size_limit()
    sign = "," if suffix == ".csv" else "\t"
    long = "word " * 30_000
    found = table(tmp_path / f"a{suffix}", f"text{sign}label\n{long}{sign}a\n")
    assert found.rows == ((long, "a"),)
    assert csv.field_size_limit() == before


def test_given_names_differ(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PLAIN)
    with pytest.raises(UserError, match=r"--column-names gives a name twice \(a, a\)"):
        read_file(tmp_path / "a.csv", column_names=("a", "a"))


def test_columns_without_a_name_are_numbered(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", ",text,label\n0,crow,b\n1,iron,m\n")
    assert found.columns == ("column_1", "text", "label")
    assert found.values("text") == ["crow", "iron"]


def test_blank_rows_inside_stay_for_the_task_to_tell(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", "text,label\na,x\n,\nb,y\n,\n , \n")
    assert found.rows == (("a", "x"), ("", ""), ("b", "y"))


def test_json_keeps_values_and_misses_none(tmp_path: Path) -> None:
    found = table(tmp_path / "a.jsonl", '{"a": 1, "b": [1.5, true]}\n{"c": null}\n')
    assert found.columns == ("a", "b", "c")
    assert found.rows == ((1, [1.5, True], None), (None, None, None))


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    line = r'{"text": "cut \ud83d", "tags": ["\uDC00"], "whole": "\ud83d\ude00"}'
    found = table(tmp_path / "a.jsonl", line)
    assert found.rows == (("cut \ufffd", ["\ufffd"], "\U0001f600"),)
    str(found.rows).encode()


def test_column_files_are_known_by_name_or_by_their_lines(tmp_path: Path) -> None:
    words = "EU B-ORG\nrejects O\n\nPeter B-PER\n"
    tabs = words.replace(" ", "\t")
    for name, content in {
        "a.conll": words,
        "eng.testa": words,
        "a.bio": tabs,
        "a.txt": words,
        "a.tsv": tabs,
        "b.tsv": tabs.replace("\n", "\r\n"),
        "train": words,
    }.items():
        found = table(tmp_path / name, content)
        assert found.columns == ("tokens", "tags"), name
        assert found.rows[0] == (["EU", "rejects"], ["B-ORG", "O"])
    classes = table(tmp_path / "c.tsv", "text\tlabel\none\tB\ntwo\tO\n")
    assert classes.columns == ("text", "label")


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12
)


@given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(st.tuples(*[texts] * width), min_size=1, max_size=5)
    ),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, ...]],
    delimiter: str,
    end: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.csv"
    names = tuple(f"name {i}" for i in range(len(rows[0])))
    # With this line end, Python before 3.13 writes a carriage return without quotes.
    assume(end == "\r\n" or not any("\r" in text for row in rows for text in row))
    rows = [*rows, ("last",) * len(names)]  # blank rows at the end are left out
    path.write_bytes(written([names, *rows], delimiter, end).encode())
    found = read_file(path, encoding="utf-8").table
    assert (found.columns, list(found.rows), found.bad) == (names, rows, ())


# -- encodings ------------------------------------------------------------------------


def test_windows_text_is_read_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncaf\xe9 \u201cnoir\u201d,a\n".encode("cp1252"))
    found, note = read_file(path)
    assert found.rows == (("caf\xe9 \u201cnoir\u201d", "a"),)
    assert "Windows-1252" in note
    assert "'\xe9'" in note
    assert "--encoding" in note


@pytest.mark.parametrize("encoding", ["shift_jis", "cp1251", "gb18030", "latin-1"])
def test_a_named_encoding_is_taken(tmp_path: Path, encoding: str) -> None:
    text = {"cp1251": "привет", "latin-1": "\x81\xe9"}.get(encoding, "日本")
    path = tmp_path / "a.csv"
    path.write_bytes(f"text,label\n{text},a\n".encode(encoding))
    assert read_file(path, encoding=encoding) == (
        Table(str(path), ("text", "label"), ((text, "a"),), ("line 2",)),
        "",
    )


def test_a_damaged_byte_is_a_bad_row_and_no_other_language(tmp_path: Path) -> None:
    good = "text,label\ncafé,a\nnaïve,b\n".encode()
    found = table(tmp_path / "a.csv", good + b"cut \xc3,a\n")
    assert len(found.rows) == 2
    assert "line 4: the byte 0xc3 does not belong" in found.bad[0]
    lines = '{"text": "é é"}\n'.encode() + b'{"text": "\xff"}\n'
    found = table(tmp_path / "a.jsonl", lines)
    assert len(found.rows) == 1
    assert "line 2: the byte 0xff" in found.bad[0]
    named = table(tmp_path / "b.csv", b"text,label\nok,a\n\xe9,b\n", encoding="utf-8")
    assert "line 3: the byte 0xe9" in named.bad[0]


def test_zero_bytes_are_told(tmp_path: Path) -> None:
    found = table(tmp_path / "a.csv", b"text,label\none,a\nt\0o,b\n")
    assert "line 3: holds a zero byte" in found.bad[0]
    found = table(tmp_path / "a.tsv", b"text\tlabel\none\ta\n\0\0\0\0\0\0\n")
    assert "line 3: holds a zero byte" in found.bad[0]


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"text,label\n\x81\x8d,a\n", "auto", "neither UTF-8 nor Windows-1252.*line 2"),
        (b"text,label\n\xff,a\n", "ascii16", "unknown encoding 'ascii16'.*utf-8"),
        (b"text,label\none,a\n", "hex", "unknown encoding 'hex'"),
        (b"text,label\none,a\n", "a\0b", "unknown encoding"),
        (b"\xff\xfet\0e\0x", "auto", "is not utf-16 text"),
        (b"PK\x03\x04rest", "auto", "a zip archive or a spreadsheet"),
        (b"PAR1rest", "auto", "a Parquet file"),
    ],
)
def test_other_encodings_are_asked_for(
    tmp_path: Path, content: bytes, encoding: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        table(tmp_path / "a.csv", content, encoding=encoding)


# -- what cannot be read --------------------------------------------------------------

NONE_READ = {
    "a.csv": [
        ("", "is empty"),
        ("\n \n", "no rows"),
        (HEADER, "no rows"),
        (HEADER + ",\n,\n", "no rows"),
        (HEADER + "one,a,b\n", r"line 2: 3 field\(s\) where 2 were expected \(text, l"),
        (HEADER + "one,a,b\ntwo,a,b\n", "each of its 2 rows has 3.*--column-names"),
        (HEADER + 'one,"a\n', "line 2: not readable as csv.*--quoting none"),
        ('"text,label\none,a\n', "line 1: not readable as csv.*1 line"),
        ("text,text\none,a\n", "'text' more than once.*--column-names"),
    ],
    "a.tsv": [("text\tlabel\none\ta\tb\n", "line 2: 3 field.*a tab or a quote")],
    "a.jsonl": [
        ("{", "line 1: not JSON"),
        ('"text"', "line 1: a str where an object"),
        ("[1, 2]", r"none of its 2 row\(s\) can be read(.|\n)*item 1: a int where"),
        ('{\n  "text": "a"\n}', "JSON over several lines.*it is one object"),
        ('[\n {"a": 1},\n {"a" 2}\n]', "several lines.*line 3, sign 7"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in NONE_READ.items() for case in cases],
)
def test_files_of_which_nothing_is_read_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        table(tmp_path / name, content)


def test_all_bad_rows_of_a_csv_are_told_at_once(tmp_path: Path) -> None:
    content = 'text,label\none,a\nb\ntwo,b\nx,y,z\n"q" r,a\nthree,a\n"open,b\nend,a\n'
    found = table(tmp_path / "a.csv", content)
    assert found.rows == (("one", "a"), ("two", "b"), ("three", "a"))
    places = [
        bad.removeprefix(f"{tmp_path}/a.csv, ").split(":")[0] for bad in found.bad
    ]
    assert places == ["line 3", "line 5", "line 6", "line 8"]
    assert "1 line(s) after it are lost" in found.bad[3]
    assert all("--quoting none" in bad for bad in found.bad)


def test_all_bad_lines_of_a_jsonl_are_told_at_once(tmp_path: Path) -> None:
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    lines = [
        '{"text": "one"}',
        "{broken",
        "[1]",
        "3",
        deep,
        '{"text": ' + "[" * 150 + "]" * 150 + "}",
        '{"text": ' + "1" * 5000 + "}",
        '{"text": "one", "text": "other"}',
        "{}",
        '{"text": "two"}',
    ]
    found = table(tmp_path / "a.jsonl", "\n".join(lines))
    assert found.rows == (("one",), ("two",))
    assert found.lines == ("line 1", "line 10")
    told = [bad.split("a.jsonl, ")[1] for bad in found.bad]
    starts = [
        "line 2: not JSON",
        "line 3: a list where",
        "line 4: a int where",
        "line 5: JSON nested deeper",
        "line 6: JSON nested deeper",
        "line 7: a number of more digits",
        "line 8: an object names 'text' twice",
        "line 9: an empty object where",
    ]
    assert [t[: len(s)] for t, s in zip(told, starts, strict=True)] == starts


def test_many_flat_values_are_not_deep(tmp_path: Path) -> None:
    line = json.dumps({"tags": [{"a": [i]} for i in range(500)]})
    assert len(table(tmp_path / "a.jsonl", line)) == 1


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    noise = random.Random(0)
    rows = "".join(f"t {noise.random()},{'ab'[i % 2]}\n" for i in range(2000))
    raw = bytearray(gzip.compress((HEADER + rows).encode()))
    cut = bytes(raw[:-400])
    for k in range(40, 80):
        raw[k] ^= 0xA5
    checksum = bytearray(gzip.compress(HEADER.encode()))
    checksum[-8] ^= 1
    for content in (bytes(raw), cut, bytes(checksum), b"text,label\n", b"\x1f\x8b"):
        with pytest.raises(UserError, match="gzip archive is damaged or cut off"):
            table(tmp_path / "a.csv.gz", content)


def test_other_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_file(tmp_path / "missing.csv")
    with pytest.raises(UserError, match=r"ends in \.csv, \.tsv, \.jsonl"):
        table(tmp_path / "table.docx", "text")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_file(tmp_path / "folder.csv")
    with pytest.raises(UserError, match="unknown quoting 'loud'"):
        table(tmp_path / "a.csv", PLAIN, quoting="loud")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(Path("a\0b.csv"))


MARKS = [b"\xff\xfe", b"\xef\xbb\xbf", b"sep=", b'"a":', b"\\ud800", b"\xc3", b"\xa9"]
SIGNS = [bytes([sign]) for sign in b'",;\t\n\r\0{}[]1O ']
pieces = st.sampled_from(MARKS + SIGNS)


@given(
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.conll"]),
    content=st.lists(pieces, max_size=40).map(b"".join) | st.binary(max_size=60),
    quoting=st.sampled_from(["auto", "csv", "none"]),
)
def test_whatever_the_bytes_there_is_a_table_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, quoting: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        found = read_file(path, quoting=quoting).table
    except UserError:
        return
    assert len(found.rows) == len(found.lines) > 0
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert len(set(found.columns)) == len(found.columns)
    assert all(bad.startswith(str(path)) for bad in found.bad)
    repr(found).encode()


def test_names_of_tables() -> None:
    names = ("a.csv", "b/c.JSONL.gz", "eng.train", "x/ner.conll", "y.tsv")
    assert all(map(is_table_file, names))
    assert not any(map(is_table_file, ("glue/cola", "owner/data", "eng.train.d")))


def test_reading_a_file_loads_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\none,a\nbad\ntwo,b\n")
    (tmp_path / "test.csv").write_text("text,label\nthree,a\n")
    code = (
        "import sys; from bidora.data import load_source\n"
        f"source = load_source({str(tmp_path)!r})\n"
        "assert len(source.train.bad) == 1\n"
        "heavy = {'torch', 'datasets', 'transformers', 'pandas', 'numpy', 'sklearn'}\n"
        "print(*heavy & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("\n", "")
