"""FASTA files: sequences, names, what name lines say, a class a file, and bad input."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from bidora.data.formats import fasta_table
from bidora.data.load import load_source
from bidora.data.source import Source
from bidora.data.table import name_column
from bidora.errors import UserError
from bidora.tasks.classification import Classification
from tests.shared import shared_data

TWO = ">sp|P1|ONE first protein\nMKTA\nYGK*\n\n>P2\n acd\tef\n"


def test_a_sequence_goes_on_until_the_next_name() -> None:
    table = fasta_table("t.fasta", TWO)
    assert table.columns == ("sequence", "name")
    assert table.rows == (("MKTAYGK*", "sp|P1|ONE"), ("acdef", "P2"))
    assert [table.place(i) for i in range(2)] == ["t.fasta, line 1", "t.fasta, line 5"]


def test_comments_of_old_files_and_both_ends_of_lines_are_read() -> None:
    table = fasta_table("t.fasta", ">A\r\nMK\r\n; a comment\r\nV\r\n>B\r\nC")
    assert table.rows == (("MKV", "A"), ("C", "B"))


def test_words_that_most_name_lines_have_are_columns() -> None:
    text = ">A label=1 OX=9606\nMK\n>B OX=10090 label=0 PE=1\nAC\n"
    table = fasta_table("t.fasta", text)
    assert table.columns == ("sequence", "name", "label", "OX")
    assert table.rows[1] == ("AC", "B", "0", "10090")


def test_a_name_line_without_its_label_is_a_bad_row() -> None:
    text = ">A label=1\nMK\n>B label=0\nAC\n>C lable=0\nGG\n"
    table = fasta_table("t.fasta", text)
    assert table.columns == ("sequence", "name", "label")
    task = Classification()
    rows = task.rows(table, task.schema(Source("t.fasta", {"train": table})))
    assert len(rows) == 2
    assert rows.bad == ["t.fasta, line 5: column 'label' holds no label."]


def test_a_file_without_labels_is_told_how_it_can_have_them() -> None:
    table = fasta_table("t.fasta", ">P1\nMK\n>P2\nAC\n")
    with pytest.raises(
        UserError, match=r"'>P12345 label=1', or pass a folder with a file"
    ):
        name_column(table, None, "--label-column", ("label",))


def test_a_name_without_a_sequence_is_a_bad_row_and_the_others_stay() -> None:
    table = fasta_table("t.fasta", ">A\n>B\nMK\n>\n")
    assert table.rows == (("MK", "B"),)
    assert table.bad == (
        "t.fasta, line 1: the sequence A has no residues.",
        "t.fasta, line 4: the sequence without a name has no residues.",
    )


def test_a_file_that_begins_otherwise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_text("sequence,label\nMK,1\n")
    with pytest.raises(
        UserError, match=r"line 1: a FASTA file begins with .*'sequence"
    ):
        load_source(str(path))


def write_classes(folder: Path) -> None:
    (folder / "cold.fasta").write_text(">A\nMK\n>B\nMKV\n")
    with gzip.open(folder / "hot.fa.gz", "wt") as file:
        file.write(">C\nAC\n")


def test_a_folder_has_a_class_a_file(tmp_path: Path) -> None:
    write_classes(tmp_path)
    source = load_source(str(tmp_path))
    assert source.train.rows == (
        ("MK", "A", "cold"),
        ("MKV", "B", "cold"),
        ("AC", "C", "hot"),
    )
    assert source.place("train", 2) == f"{tmp_path}, hot.fa.gz, line 1"
    assert source.hints["proteins"] is True
    assert set(source.parts) == {"train"}


def test_every_bad_row_of_such_a_folder_names_its_place_alike(tmp_path: Path) -> None:
    write_classes(tmp_path)
    (tmp_path / "cold.fasta").write_text(">A\nMK\n>B\n>C\nMK1\n>D\nMKV\n")
    source = load_source(str(tmp_path))
    task = Classification()
    rows = task.rows(source.train, task.schema(source))
    assert [line.split(":")[0] for line in (*source.train.bad, *rows.bad)] == [
        f"{tmp_path}, cold.fasta, line 3",
        f"{tmp_path}, cold.fasta, line 4",
    ]
    (tmp_path / "cold.fasta").write_text("MKV\n")
    with pytest.raises(UserError) as told:
        load_source(str(tmp_path))
    assert str(told.value).startswith(f"{tmp_path}, cold.fasta, line 1: a FASTA file")


def test_train_and_test_files_are_parts_and_no_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.fasta").write_text(f">A label=1\nMK\n>B label=0\n{part}\n")
    source = load_source(str(tmp_path))
    assert source.train.columns == ("sequence", "name", "label")
    assert source.parts["test"].rows[1] == ("test", "B", "0")


def test_thermophilicity_is_known_by_its_files_and_by_name(tmp_path: Path) -> None:
    hot = tmp_path / "ProtThermoPred_thermo_preprocessed.fasta"
    hot.write_text(">sp|A|A\nMK\n")
    with pytest.raises(UserError, match=r"lacks ProtThermoPred_non_thermo_prep.*fasta"):
        load_source("thermophilicity", data_dir=str(tmp_path))
    (tmp_path / "ProtThermoPred_non_thermo_preprocessed.fasta").write_text(">B\nAC\n")
    for source in (
        load_source("thermophilicity", data_dir=str(tmp_path)),
        load_source(str(tmp_path)),
    ):
        assert source.train.values("name") == ["B", "sp|A|A"]
        assert source.train.values("label") == ["non-thermophilic", "thermophilic"]
        assert source.hints["max_length"] == 256
    with pytest.raises(UserError, match=r"read from its files; fetch them"):
        load_source("thermophilicity")


def test_peptides_are_known_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sequence,label\nMKV,1\nACD,0\n")
    (tmp_path / "test.csv").write_text("sequence,label\nMKVA,1\n")
    source = load_source("bbp", data_dir=str(tmp_path))
    assert set(source.parts) == {"train", "test"}
    assert source.hints["proteins"] is True


def test_sheets_of_peptides_are_told_to_be_saved_as_csv(tmp_path: Path) -> None:
    said = (
        r"UniDL4BioPep\. They are sheets there, BBP_train.xlsx and BBP_test.xlsx: save "
    )
    said += r"them as train\.csv and test\.csv"
    with pytest.raises(UserError, match=rf"fetch them .*{said}"):
        load_source("bbp")
    with pytest.raises(UserError, match=rf"there is no such folder.*{said}"):
        load_source("bbp", data_dir=str(tmp_path / "none"))
    for name in ("BBP_train.xlsx", "BBP_test.xlsx"):
        (tmp_path / name).write_bytes(b"PK")
    holds = r"lacks train\.csv of bbp \(it holds BBP_test\.xlsx, BBP_train\.xlsx\)"
    with pytest.raises(UserError, match=rf"{holds}.*{said}"):
        load_source("bbp", data_dir=str(tmp_path))


def test_real_files_have_their_published_counts() -> None:
    peptides = load_source("bbp", data_dir=str(shared_data("bbp")))
    assert [len(peptides.parts[p]) for p in ("train", "test")] == [200, 38]
    place = shared_data("thermophilicity")
    proteins = load_source("thermophilicity", data_dir=str(place))
    labels = proteins.train.values("label")
    assert labels.count("thermophilic") == 1699
    assert labels.count("non-thermophilic") == 3440
