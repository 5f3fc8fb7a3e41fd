"""Files, folders and official layouts: what is read, and which part serves for what."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bidora.data import Table, load_source
from bidora.data.load import choose_parts, is_hub_name
from bidora.data.source import Source
from bidora.errors import UserError
from tests.shared import shared_data

HEADER = "text,label\n"
TRAIN = HEADER + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(6))
TEST = HEADER + "other,a\nanother,b\n"
THIRD = HEADER + "third,a\n"
HIDDEN = HEADER + "new,\nnewer,-1\n"


def write(folder: Path, **files: str) -> Path:
    """Write files, `train_csv=` as `train.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def sizes(source: Source) -> dict[str, int]:
    return {part: len(table) for part, table in source.parts.items()}


# -- which table serves for what ------------------------------------------------------


def labelled(*labels: Any, column: str = "label") -> Table:
    rows = tuple((f"{labels} {i}", label) for i, label in enumerate(labels))
    return Table(f"{labels}", ("text", column), rows, ("",) * len(rows))


TEXTS = Table("texts", ("text",), (("a",), ("b",)), ("", ""))
A, B, C = labelled("a", "b"), labelled("b"), labelled("a")


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"train": A}, {"train": A}),
        ({"train": A, "test": B}, {"train": A, "test": B}),
        ({"train": A, "dev": B}, {"train": A, "test": B}),
        ({"train": A, "dev": B, "test": C}, {"train": A, "validation": B, "test": C}),
        ({"train": A, "dev": B, "test": TEXTS}, {"train": A, "test": B}),
        ({"train": A, "dev": B, "test": labelled(-1, -1)}, {"train": A, "test": B}),
        ({"train": A, "dev": B, "test": labelled("", None)}, {"train": A, "test": B}),
        ({"train": A, "dev": TEXTS, "test": C}, {"train": A, "test": C}),
        ({"train": A, "test": TEXTS}, {"train": A}),
    ],
)
def test_hidden_parts_are_passed_over(
    tables: dict[str, Table], expected: dict[str, Table]
) -> None:
    assert choose_parts(tables)[0] == expected


def test_minus_one_is_a_class_where_train_has_it() -> None:
    tables = {"train": labelled("-1", "1"), "test": labelled("-1")}
    assert choose_parts(tables)[0] == tables
    numbers = {"train": labelled(-1.0, 0.5), "test": labelled(-1.0)}
    assert choose_parts(numbers)[0] == numbers
    hidden = {"train": labelled(0.0, 0.5), "test": labelled(-1.0, None)}
    assert list(choose_parts(hidden)[0]) == ["train"]


def test_one_label_is_enough_and_empty_lists_are_labels() -> None:
    mixed = {"train": A, "dev": B, "test": labelled("a", "")}
    assert list(choose_parts(mixed)[0]) == ["train", "validation", "test"]
    lists = {"train": labelled(["x"], []), "test": labelled([], [])}
    assert choose_parts(lists)[0] == lists
    tags = {
        "train": labelled(["O"], column="tags"),
        "test": labelled([None], column="tags"),
    }
    assert list(choose_parts(tags)[0]) == ["train"]


def test_the_label_column_may_be_named_and_a_wrong_name_is_the_tasks_to_tell() -> None:
    tables = {"train": labelled("a", column="y"), "test": TEXTS}
    assert list(choose_parts(tables, "y")[0]) == ["train"]
    assert list(choose_parts(tables, "z")[0]) == ["train", "test"]


def test_columns_of_zeros_and_ones_are_labels() -> None:
    rows = (("one", "0", "1"), ("two", "1", "1"))
    train = Table("train", ("text", "toxic", "threat"), rows, ("", ""))
    assert list(choose_parts({"train": train, "dev": train, "test": TEXTS})[0]) == [
        "train",
        "test",
    ]


def test_mismatched_tables_go_with_theirs() -> None:
    tables = {"train": A, "dev": B, "dev_mismatched": C, "test": TEXTS}
    tables["test_mismatched"] = TEXTS
    assert choose_parts(tables)[0] == {"train": A, "test": B, "test_mismatched": C}
    both = {"train": A, "dev": B, "dev_mismatched": C, "test": C}
    assert list(choose_parts(both)[0]) == [
        "train",
        "validation",
        "test",
        "validation_mismatched",
    ]


# -- files and folders ----------------------------------------------------------------


def test_a_file_alone_is_all_train(tmp_path: Path) -> None:
    path = write(tmp_path, a_csv=TRAIN) / "a.csv"
    source = load_source(str(path))
    assert (source.name, sizes(source), source.hints) == (str(path), {"train": 6}, {})
    assert source.place("train", 2) == f"{path}, line 4"
    assert source.note == f"train: {path}."


def test_files_of_other_parts_are_named(tmp_path: Path) -> None:
    write(tmp_path, a_csv=TRAIN, b_csv=TEST, c_csv=THIRD)
    train, test, dev = (str(tmp_path / f"{n}.csv") for n in "abc")
    source = load_source(train, test_file=test, validation_file=dev)
    assert sizes(source) == {"train": 6, "validation": 1, "test": 2}
    alone = load_source(train, validation_file=dev)
    assert sizes(alone) == {"train": 6, "validation": 1}


@pytest.mark.parametrize("stem", ["dev", "validation", "valid", "val"])
def test_folders_by_the_usual_names(tmp_path: Path, stem: str) -> None:
    folder = write(tmp_path, train_csv=TRAIN, **{f"{stem}_csv": TEST})
    assert sizes(load_source(str(folder))) == {"train": 6, "test": 2}
    write(tmp_path, test_csv=THIRD)
    assert sizes(load_source(str(folder))) == {"train": 6, "validation": 2, "test": 1}
    write(tmp_path, test_csv=HIDDEN)
    source = load_source(str(folder))
    assert sizes(source) == {"train": 6, "test": 2}
    assert "test.csv has no labels and is not used" in source.note


def test_folders_may_mix_kinds_and_take_files_from_elsewhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", dev_jsonl='{"text": "a", "label": "b"}\n')
    (folder / "train.csv.gz").write_bytes(gzip.compress(TRAIN.encode()))
    assert sizes(load_source(str(folder))) == {"train": 6, "test": 1}
    test = write(tmp_path, t_csv=TEST) / "t.csv"
    source = load_source(str(folder), test_file=str(test))
    assert sizes(source) == {"train": 6, "validation": 1, "test": 2}


def test_settings_reach_every_file(tmp_path: Path) -> None:
    text = 'caf\xe9 "x\ta\n'
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_bytes((name + text).encode("latin-1"))
    source = load_source(
        str(tmp_path), column_names=("text", "label"), encoding="latin-1"
    )
    assert source.train.rows == (('train.tsvcaf\xe9 "x', "a"),)
    assert source.parts["test"].rows == (('test.tsvcaf\xe9 "x', "a"),)


def test_hidden_parts_without_a_header_are_passed_over(tmp_path: Path) -> None:
    files = {"train_tsv": "a\tx\nb\ty\n", "dev_tsv": "c\tx\n", "test_tsv": "d\n"}
    folder = str(write(tmp_path, **files))
    source = load_source(folder, column_names=("text", "label"))
    assert sizes(source) == {"train": 2, "test": 1}
    named = load_source(folder, column_names=("text", "mood"), label_column="mood")
    assert sizes(named) == {"train": 2, "test": 1}
    write(tmp_path, test_tsv="d\te\tf\n")
    with pytest.raises(UserError, match=r"3 field\(s\) where 2 were expected"):
        load_source(folder, column_names=("text", "label"))


def test_a_guessed_encoding_is_in_the_note(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(TRAIN.replace("text 1", "caf\xe9").encode("cp1252"))
    assert "Windows-1252" in load_source(str(path)).note


def test_column_files(tmp_path: Path) -> None:
    words = "EU B-ORG\nrejects O\n\nPeter B-PER\n"
    folder = write(tmp_path / "own", train_txt=words, dev_txt=words + "\nno O\n")
    source = load_source(str(folder))
    assert (sizes(source), source.hints) == (
        {"train": 2, "test": 3},
        {"task_type": "tagging"},
    )
    alone = load_source(str(folder / "train.txt"), test_file=str(folder / "dev.txt"))
    assert (sizes(alone), alone.hints) == (sizes(source), source.hints)
    named = write(tmp_path / "conll2003", eng_train=words, eng_testa=words + "\nno O\n")
    with pytest.raises(UserError, match=r"lacks eng.testb of conll2003.*clips"):
        load_source("conll2003", data_dir=str(named))
    write(named, eng_testb=words + "\nyes O\n")
    for source in (
        load_source(str(named)),
        load_source("conll2003", data_dir=str(tmp_path)),
        load_source("CoNLL-2003", data_dir=str(named)),
    ):
        assert sizes(source) == {"train": 2, "validation": 3, "test": 3}
        assert source.hints["label_column"] == "tags"


def test_the_e2e_challenge_is_read_by_its_files(tmp_path: Path) -> None:
    row = '"name[{}], food[French]","{} serves ""French"" food, mostly."\n'
    text = "mr,ref\n" + row.format("A", "A") + row.format("A", "The A")
    folder = write(tmp_path / "official", trainset_csv=text)
    write(folder, devset_csv="mr,ref\n" + row.format("B", "B"))
    (folder / "testset_w_refs.csv").write_text("mr,ref\n" + row.format("C", "C"))
    for source in (
        load_source("e2e", data_dir=str(folder)),
        load_source("E2E", data_dir=str(folder)),
        load_source(str(folder)),  # by the files' own names
    ):
        assert sizes(source) == {"train": 2, "validation": 1, "test": 1}
        assert source.hints["task_type"] == "generation"
        assert source.train.rows[1] == (
            "name[A], food[French]",
            'The A serves "French" food, mostly.',
        )
    (folder / "testset_w_refs.csv").write_text("MR\nname[C]\n")
    with pytest.raises(UserError, match=r"has no column mr, ref.*official file of e2e"):
        load_source("e2e", data_dir=str(folder))
    with pytest.raises(UserError, match=r"lacks trainset.csv and devset.csv of e2e"):
        load_source("e2e", data_dir=str(tmp_path))


def test_the_real_e2e_challenge() -> None:
    source = load_source("e2e", data_dir=str(shared_data("e2e")))
    assert sizes(source) == {"train": 42061, "validation": 4672, "test": 4693}
    meanings = [set(table.values("mr")) for table in source.parts.values()]
    assert [len(some) for some in meanings] == [4862, 547, 630]
    assert not meanings[0] & meanings[2]


def test_reuters_is_read_by_its_name_or_its_files(tmp_path: Path) -> None:
    document = {
        "newid": 1,
        "lewissplit": "TRAIN",
        "cgisplit": "TRAINING-SET",
        "topics_attr": "YES",
        "topics": ["cocoa"],
        "title": "T",
        "body": "B",
    }
    other = {**document, "lewissplit": "TEST", "topics_attr": "NO"}
    lines = "\n".join(map(json.dumps, (document, other)))
    folder = write(tmp_path / "r", reuters21578_jsonl=lines)
    source = load_source("reuters/modlewis", data_dir=str(folder))
    assert (source.name, sizes(source)) == ("reuters/modlewis", {"train": 1, "test": 1})
    assert source.hints["task_type"] == "multilabel"
    assert sizes(load_source(str(folder))) == {"train": 1}  # ModApte
    plain = load_source(str(folder / "reuters21578.jsonl"))
    assert "topics" in plain.train.columns
    with pytest.raises(UserError, match=r"--data-dir FOLDER"):
        load_source("reuters/modapte")
    with pytest.raises(UserError, match=r"--test-file does not apply"):
        load_source("reuters/modapte", data_dir=str(folder), test_file="a.csv")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"other.csv": TRAIN}, r"no train.csv.*it holds other.csv.*--data-dir"),
        ({}, "it is empty"),
        ({"train.csv": TRAIN, "train.tsv": TRAIN}, "train.csv and train.tsv.*--task"),
        (
            {"train.csv": TRAIN, "dev.csv": TEST, "val.csv": TEST},
            "val.csv and dev.csv.*--validation-file",
        ),
        (
            {"train.csv": TRAIN, "test.csv": TRAIN},
            "train and the test examples are the",
        ),
        (
            {"train.csv": TRAIN, "dev.csv": TEST, "test.csv": TEST},
            "validation and the test examples are the same",
        ),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_source(str(tmp_path))


def test_the_training_file_is_no_test_file(tmp_path: Path) -> None:
    path = write(tmp_path, a_csv=TRAIN) / "a.csv"
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(TRAIN.encode()))
    for other in (path, tmp_path / "." / "a.csv", packed):
        with pytest.raises(
            UserError, match="the train and the test examples are the s"
        ):
            load_source(str(path), test_file=str(other))
        with pytest.raises(
            UserError, match="train and the validation examples are the"
        ):
            load_source(str(path), validation_file=str(other))


def test_named_files_need_labels(tmp_path: Path) -> None:
    write(tmp_path, a_csv=TRAIN, b_csv=HIDDEN, c_csv="text\nnew\n")
    train = str(tmp_path / "a.csv")
    for name in "bc":
        with pytest.raises(UserError, match=r"\(--test-file\) has no labels.*predict"):
            load_source(train, test_file=str(tmp_path / f"{name}.csv"))


def test_names_that_go_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none.csv"):
        load_source(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="there is no file"):
        load_source(str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no folder"):
        load_source("owner/data", data_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"there is no folder.*gluebenchmark"):
        load_source("glue/cola", data_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match="--data-dir goes with the name"):
        load_source(str(tmp_path), data_dir=str(tmp_path))
    with pytest.raises(UserError, match="Did you mean 'glue/cola'"):
        load_source("glue/colla")
    with pytest.raises(UserError, match=r"unknown task 'reuters'.*reuters/modapte"):
        load_source("reuters")
    with pytest.raises(UserError, match="--data-dir, --quoting does not apply"):
        load_source("docstrings", data_dir=str(tmp_path), quoting="csv")
    with pytest.raises(UserError, match="--column-names does not apply"):
        load_source("glue/cola", data_dir=str(tmp_path), column_names=["a"])


def test_a_data_set_that_nobody_knows_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, train_csv=TRAIN, dev_csv=TEST)
    source = load_source("owner/data", data_dir=str(folder))
    assert (source.name, sizes(source)) == ("owner/data", {"train": 6, "test": 2})


def test_names_of_the_hub(tmp_path: Path) -> None:
    assert is_hub_name("glue/cola")
    assert is_hub_name("owner/data:config")
    for name in ("docstrings", "a.csv", "./x", "~/x", "r.sgm", "eng.train"):
        assert not is_hub_name(name)
    assert not is_hub_name(str(tmp_path))
    assert is_hub_name("x" * 5000)


# -- official layouts -----------------------------------------------------------------

PAIRS = "index\tsentence1\tsentence2\tlabel\n"
HIDDEN_PAIRS = "index\tsentence1\tsentence2\n0\tnew\tnewer\n"
MNLI = "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label\n"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
STS = "main\tMSRvid\t2012\t{}\t{}\tone {}\ttwo {}"

# Name -> folder, files, first training row, sizes.
LAYOUTS: dict[str, tuple[str, dict[str, str], tuple[Any, ...], dict[str, int]]] = {
    "cola": (
        "CoLA",
        {
            "train.tsv": 'gj04\t1\t\tHe said "no.\ngj04\t0\t*\tHe no said.\n',
            "dev.tsv": "gj04\t0\t*\tOf dogs.\n",
            "test.tsv": "index\tsentence\n0\tA dog.\n",
        },
        ('He said "no.', 1),
        {"train": 2, "test": 1},
    ),
    "sst2": (
        "SST-2",
        {
            "train.tsv": "sentence\tlabel\nbad \t0\nit 's fine \t1\n",
            "dev.tsv": "sentence\tlabel\ngood\t1\n",
            "test.tsv": "index\tsentence\n0\tso so\n",
        },
        ("bad ", 0),
        {"train": 2, "test": 1},
    ),
    "mrpc": (
        "MRPC",
        {
            "train.tsv": MRPC + '1\t7\t8\tShe said "yes.\t"Yes," she said.\n',
            "dev.tsv": MRPC + "0\t7\t8\tone\ttwo\n",
            "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\ta\tb\n",
        },
        ('She said "yes.', '"Yes," she said.', 1),
        {"train": 1, "test": 1},
    ),
    "stsb": (
        "STS-B",
        {
            "train.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tg\ta\tb\t2.5\n",
            "dev.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tg\tc\td\t5.000\n",
            "test.tsv": "index\tgenre\tsentence1\tsentence2\n0\tg\te\tf\n",
        },
        ("a", "b", "2.5"),
        {"train": 1, "test": 1},
    ),
    "qqp": (
        "QQP",
        {
            "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "0\t1\t2\thow?\twhy?\t0\n3\t4\t5\ttorn?\n0\t1\t2\twho?\twhom?\t1\n",
            "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "0\t1\t2\twhen?\twhere?\t1\n",
            "test.tsv": "id\tquestion1\tquestion2\n0\ta?\tb?\n",
        },
        ("how?", "why?", 0),
        {"train": 2, "test": 1},
    ),
    "mnli": (
        "MNLI",
        {
            "train.tsv": MNLI + "0\t1\tp\th\tneutral\tneutral\n",
            "dev_matched.tsv": MNLI + "0\t1\tp2\th2\tneutral\tcontradiction\n",
            "dev_mismatched.tsv": MNLI + "0\t1\tp3\th3\tneutral\tentailment\n" * 2,
            "test_matched.tsv": "index\tpairID\tsentence1\tsentence2\n0\t1\tp\th\n",
            "test_mismatched.tsv": "index\tpairID\tsentence1\tsentence2\n0\t1\tq\th\n",
        },
        ("p", "h", 1),
        {"train": 1, "test": 1, "test_mismatched": 2},
    ),
    "qnli": (
        "QNLI",
        {
            "train.tsv": "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n",
            "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tq2\ts\tentailment\n",
            "test.tsv": "index\tquestion\tsentence\n0\tq3\ts\n",
        },
        ("q", "s", 1),
        {"train": 1, "test": 1},
    ),
    "rte": (
        "RTE",
        {
            "train.tsv": PAIRS + "0\ta\tb\tentailment\n",
            "dev.tsv": PAIRS + "0\tc\td\tnot_entailment\n",
            "test.tsv": HIDDEN_PAIRS,
        },
        ("a", "b", 0),
        {"train": 1, "test": 1},
    ),
    "wnli": (
        "WNLI",
        {
            "train.tsv": PAIRS + "0\ta\tb\t1\n",
            "dev.tsv": PAIRS + "0\tc\td\t0\n",
            "test.tsv": HIDDEN_PAIRS,
        },
        ("a", "b", 1),
        {"train": 1, "test": 1},
    ),
}
METRICS = {"cola": "matthews_correlation", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}


def official(folder: Path, name: str) -> Path:
    place, files, _, _ = LAYOUTS[name]
    (folder / place).mkdir()
    for file, content in files.items():
        (folder / place / file).write_text(content, encoding="utf-8")
    return folder / place


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_layouts_of_glue(tmp_path: Path, name: str) -> None:
    folder = official(tmp_path, name)
    _, _, first, expected = LAYOUTS[name]
    by_name = load_source(f"glue/{name}", data_dir=str(folder))
    assert (by_name.train.rows[0], sizes(by_name)) == (first, expected)
    hints = by_name.hints
    assert hints["metric"] == METRICS.get(name, "accuracy")
    assert hints["task_type"] == ("regression" if name == "stsb" else "classification")
    texts = [hints["text_column"], hints.get("text_pair_column"), hints["label_column"]]
    assert [c for c in texts if c] == list(by_name.train.columns)
    assert not any(table.bad for table in by_name.parts.values())
    for other in (
        load_source(f"glue/{name}", data_dir=str(tmp_path)),
        load_source(str(folder)),
    ):
        assert (other.parts, other.hints) == (by_name.parts, by_name.hints)


def test_classes_are_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    orders = {
        "cola": ("unacceptable", "acceptable"),
        "mrpc": ("not_equivalent", "equivalent"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "wnli": ("not_entailment", "entailment"),
    }
    for name, names in orders.items():
        source = load_source(f"glue/{name}", data_dir=str(official(tmp_path, name)))
        for table in source.parts.values():
            assert table.class_names == (("label", names),)


def test_torn_rows_of_qqp_are_left_out_and_counted(tmp_path: Path) -> None:
    source = load_source("glue/qqp", data_dir=str(official(tmp_path, "qqp")))
    assert source.train.lines == ("line 2", "line 4")
    assert "1 row(s) of" in source.note
    assert "torn in the official file" in source.note


def test_labels_of_mrpc_that_glue_hides(tmp_path: Path) -> None:
    folder = official(tmp_path, "mrpc")
    (folder / "msr_paraphrase_test.txt").write_text(MRPC + "0\t7\t8\ta\tb\n" * 2)
    source = load_source("glue/mrpc", data_dir=str(folder))
    assert sizes(source) == {"train": 1, "validation": 1, "test": 2}


def test_the_sts_benchmark_itself(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "dev", "test")):
        lines = [STS.format(i, f"{i}.500", f'"{part}', i) for i in range(number + 1)]
        lines[0] += "\tsource\tother"
        (tmp_path / f"sts-{part}.csv").write_text("\n".join(lines))
    by_files = load_source(str(tmp_path))
    assert sizes(by_files) == {"train": 1, "validation": 2, "test": 3}
    assert by_files.train.rows == (('one "train', "two 0", "0.500"),)
    assert by_files.hints["task_type"] == "regression"
    named = load_source("glue/sts-b", data_dir=str(tmp_path))
    assert named.parts == by_files.parts


def test_lacking_and_foreign_files_are_told(tmp_path: Path) -> None:
    folder = official(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    match = r"lacks dev_mismatched.tsv of glue/mnli \(it holds .*gluebenchmark.com"
    with pytest.raises(UserError, match=match):
        load_source("glue/mnli", data_dir=str(folder))
    rte = official(tmp_path, "rte")
    (rte / "train.tsv").write_text("text\tlabel\nb\ta\n")
    with pytest.raises(
        UserError, match=r"train.tsv, line 1: not laid out.*'sentence1'"
    ):
        load_source("glue/rte", data_dir=str(rte))
    assert load_source(str(rte)).train.columns == ("text", "label")  # one's own
    (rte / "train.tsv").write_text(HIDDEN_PAIRS)
    with pytest.raises(UserError, match=r"not laid out.*'label'"):
        load_source("glue/rte", data_dir=str(rte))


def test_bad_rows_of_official_files(tmp_path: Path) -> None:
    folder = official(tmp_path, "rte")
    text = PAIRS.encode() + b"0\ta\tb\tentailment\n1\tc\n2\t\xff\td\tentailment\n"
    (folder / "train.tsv").write_bytes(text + "3\té\té\tnone\n".encode() * 2)
    source = load_source("glue/rte", data_dir=str(folder))
    assert source.train.values("label") == [0, "none", "none"]  # the task tells those
    told = [bad.split("train.tsv, ")[1] for bad in source.train.bad]
    assert told[0].startswith("line 3: 2 field(s) where 4 were expected")
    assert told[1].startswith("line 4: the byte 0xff")


# -- real data ------------------------------------------------------------------------

# From the folder's README: rows, and classes 1 and 0, as the papers publish them.
COUNTS = {
    "cola": {"train": (8551, 6023), "test": (1043, 721)},
    "mrpc": {"train": (3668, 2474), "validation": (408, 279), "test": (1725, 1147)},
    "sst2": {"train": (67349, 37569), "test": (872, 444)},
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_glue_has_the_published_counts(name: str) -> None:
    source = load_source(f"glue/{name}", data_dir=str(shared_data("glue")))
    found = {
        part: (len(table), sum(table.values("label")))
        for part, table in source.parts.items()
    }
    assert found == COUNTS[name]
    assert not any(table.bad for table in source.parts.values())


def test_real_sts_benchmark_has_the_published_counts() -> None:
    source = load_source("glue/stsb", data_dir=str(shared_data("glue")))
    assert sizes(source) == {"train": 5749, "validation": 1500, "test": 1379}
    scores = [float(v) for t in source.parts.values() for v in t.values("label")]
    assert (min(scores), max(scores)) == (0.0, 5.0)


def test_real_csv_has_the_published_counts() -> None:
    assert sizes(load_source(str(shared_data("bbp")))) == {"train": 200, "test": 38}
    dev = shared_data("e2e", "devset.csv.gz")
    assert sizes(load_source(str(dev))) == {"train": 4672}
