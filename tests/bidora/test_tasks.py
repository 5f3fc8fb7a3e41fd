"""Tasks: where examples come from, how they are split, tokenised and scored."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer

import bidora.tasks.docstrings
from bidora.errors import UserError
from bidora.tasks import (
    BatchStream,
    Columns,
    Encoded,
    Examples,
    Task,
    classification_scores,
    collect_docstrings,
    encode,
    holdout_split,
    load_task,
)
from bidora.tasks.columns import Table, label_names_of
from bidora.tasks.docstrings import MASK, Docstring, load_docstrings_task
from bidora.tasks.files import read_table

# -- docstrings -------------------------------------------------------------------


@pytest.fixture(scope="module")
def docstrings() -> list[Docstring]:
    return collect_docstrings()


@pytest.fixture(scope="module")
def task(docstrings: list[Docstring]) -> Task:
    return docstring_task(docstrings, seed=0)


def docstring_task(docstrings: list[Docstring], seed: int) -> Task:
    """Build the task without parsing the library again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bidora.tasks.docstrings, "collect_docstrings", lambda root: docstrings
        )
        return load_docstrings_task(seed)


def test_docstrings_are_the_same_each_time_and_read_without_import(
    docstrings: list[Docstring],
) -> None:
    assert collect_docstrings() == docstrings
    assert not {"antigravity", "this", "idlelib.pyshell"} & set(sys.modules)


def test_docstrings_are_many_distinct_and_one_line(
    docstrings: list[Docstring],
) -> None:
    assert len(docstrings) > 4000
    texts = [docstring.text for docstring in docstrings]
    assert len(set(texts)) == len(texts)
    assert all(text == " ".join(text.split()) for text in texts)


def test_docstrings_never_name_their_package(docstrings: list[Docstring]) -> None:
    for docstring in docstrings:
        unmasked = docstring.text.replace(MASK, "").lower()
        assert docstring.package.lower() not in unmasked


def test_docstrings_of_tests_and_other_packages_are_left_out(
    docstrings: list[Docstring],
) -> None:
    packages = {docstring.package for docstring in docstrings}
    assert "asyncio" in packages
    assert not packages & {"test", "site-packages", "torch", "peft"}


def test_docstring_task_has_the_promised_sizes(task: Task) -> None:
    assert len(task.label_names) == 12
    assert Counter(task.train.labels) == dict.fromkeys(range(12), 20)
    assert max(Counter(task.test.labels).values()) <= 100
    assert not set(task.train.texts) & set(task.test.texts)
    assert not any(name.startswith("_") for name in task.label_names)


def test_docstring_split_depends_on_the_seed_and_not_on_the_order(
    task: Task, docstrings: list[Docstring]
) -> None:
    assert docstring_task(docstrings[::-1], seed=0) == task
    other = docstring_task(docstrings, seed=1)
    assert other.label_names == task.label_names
    assert other.train.texts != task.train.texts


def library(tmp_path: Path) -> Path:
    """Write a small library in which each rule is broken or kept once."""
    (tmp_path / "alpha" / "tests").mkdir(parents=True)
    (tmp_path / "alpha" / "core.py").write_text(
        '''
raise RuntimeError("this file is only ever parsed")

def public():
    """Open the ALPHA
    file.

    Second paragraph.
    """

def _private():
    """Not read."""

def bare(): pass

class Thing:
    """Hold a thing."""

    def method(self):
        """Return alphabetical order."""

    def __len__(self):
        """Not read either."""

async def shared():
    """Do what beta does too."""

def again():
    """Hold a thing."""
''',
        encoding="utf-8",
    )
    (tmp_path / "alpha" / "broken.py").write_text('def f(:\n    """No."""\n')
    (tmp_path / "alpha" / "tests" / "test_it.py").write_text(
        'def f():\n    """No."""\n'
    )
    (tmp_path / "_pybeta.py").write_text(
        'def f():\n    """Do what beta does too."""\n\ndef g():\n    """Beta."""\n'
        "\n\ndef h():\n    '''Return the beta of it.'''\n",
        encoding="utf-8",
    )
    return tmp_path


def test_docstring_rules(tmp_path: Path) -> None:
    assert collect_docstrings(library(tmp_path)) == [
        # Of "Do what beta does too" each package masks another part: both are kept.
        Docstring("beta", f"Do what {MASK} does too."),
        Docstring("beta", f"Return the {MASK} of it."),
        Docstring("alpha", f"Open the {MASK} file."),
        Docstring("alpha", "Hold a thing."),
        Docstring("alpha", f"Return {MASK}betical order."),
        Docstring("alpha", "Do what beta does too."),
    ]


def test_text_of_two_packages_is_left_out(tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text('def f():\n    """Return a copy."""\n')
    assert collect_docstrings(tmp_path) == []


def test_library_without_sources_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 packages.*--task FILE.csv"):
        load_docstrings_task(root=tmp_path / "nowhere")


# -- splits and scores --------------------------------------------------------------


def test_split_is_stratified_and_complete() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    first, second = holdout_split(labels, 0.2, seed=3)
    assert sorted(first + second) == list(range(100))
    assert Counter(labels[i] for i in second) == {0: 10, 1: 6, 2: 4}
    assert holdout_split(labels, 0.2, seed=3) == (first, second)
    assert holdout_split(labels, 0.2, seed=4) != (first, second)


def test_small_split_holds_one_of_each_class_back() -> None:
    _, second = holdout_split([0, 0, 0, 1, 1, 1, 2, 2, 2], 0.1, seed=0)
    assert len(second) == 3


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0, 0, 1], 0.2, "single example: no"),
        ([0, 0, 1, 1], 0.9, "too few"),
        ([0, 0, 1, 1], 1.0, "between 0 and 1"),
        ([0, 0, 1, 1], 0.0, "between 0 and 1"),
    ],
)
def test_impossible_splits_are_explained(
    labels: list[int], fraction: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        holdout_split(labels, fraction, seed=0, label_names=("yes", "no"))


def test_scores_agree_with_sklearn_and_with_hand() -> None:
    scores = classification_scores([0, 0, 1, 1], [0, 0, 1, 0])
    assert scores["accuracy"] == 0.75
    # F1 of class 0 is 4/5, of class 1 is 2/3.
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert scores["macro_f1"] == f1_score([0, 0, 1, 1], [0, 0, 1, 0], average="macro")


def test_examples_check_their_lengths() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Examples(("a", "b"), (0,))
    with pytest.raises(ValueError, match="differ in length"):
        Examples(("a", "b"), (0, 1), pairs=("c",))


def test_task_without_test_examples_is_refused() -> None:
    train = Examples(("a", "b"), (0, 1))
    with pytest.raises(UserError, match="--test-file"):
        Task("t", train, Examples((), ()), ("no", "yes"))


# -- tokens and batches ---------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tiny_encoder: Path, labelled_rows: list[tuple[str, str]]) -> Encoded:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    names = sorted({label for _, label in labelled_rows})
    examples = Examples(
        tuple(text for text, _ in labelled_rows),
        tuple(names.index(label) for _, label in labelled_rows),
    )
    return encode(examples, tokenizer, max_length=6)


def test_encoding_cuts_and_batches_pad(encoded: Encoded) -> None:
    assert max(len(f["input_ids"]) for f in encoded.features) == 6
    batch = encoded.batch([0, 1, 2])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 6)
    assert batch["labels"].tolist() == [encoded.labels[i] for i in (0, 1, 2)]


def test_pairs_are_joined(tiny_encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    examples = Examples(("iron", "tin"), (0, 1), pairs=("crow and wren", "swift"))
    encoded = encode(examples, tokenizer, max_length=24)
    batch = encoded.batch([0, 1])
    assert batch["token_type_ids"].tolist() == [
        [0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0],
    ]


def test_stream_draws_each_example_once_an_epoch(encoded: Encoded) -> None:
    stream = BatchStream(encoded, 16, seed=0)
    drawn = [i for _ in range(15) for i in stream.next_indices()]
    assert len(drawn) == 240
    for epoch in range(4):
        assert sorted(drawn[60 * epoch : 60 * (epoch + 1)]) == list(range(60))
    again = BatchStream(encoded, 16, seed=0)
    assert [i for _ in range(15) for i in again.next_indices()] == drawn


def test_stream_leaves_the_global_random_numbers_alone(encoded: Encoded) -> None:
    before = torch.random.get_rng_state()
    BatchStream(encoded, 100, seed=0)()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stream_of_few_examples_is_one_batch(encoded: Encoded) -> None:
    stream = BatchStream(encoded.select([3, 5]), 16, seed=0)
    assert sorted(stream.next_indices()) == [0, 1]
    with pytest.raises(UserError, match="no examples"):
        BatchStream(encoded.select([]), 16, seed=0)


def test_batches_by_length_take_each_example_once(encoded: Encoded) -> None:
    batches = list(encoded.batches_by_length(7))
    assert sorted(i for batch in batches for i in batch) == list(range(60))


# -- files ----------------------------------------------------------------------------


def test_csv_task_holds_a_stratified_fifth_back(labelled_csv: Path) -> None:
    task = load_task(str(labelled_csv), seed=0)
    assert task.label_names == ("bird", "fruit", "metal")
    assert Counter(task.train.labels) == dict.fromkeys(range(3), 16)
    assert Counter(task.test.labels) == dict.fromkeys(range(3), 4)
    assert load_task(str(labelled_csv), seed=0) == task
    assert load_task(str(labelled_csv), seed=1).test != task.test


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
            rows
        )
    return path


ROWS = [["crow", "b"], ["iron", "m"], ["wren", "b"], ["tin", "m"]]


def test_every_kind_of_file_reads_the_same(tmp_path: Path) -> None:
    header = ["text", "label"]
    files = [
        write(tmp_path / "a.csv", [header, *ROWS]),
        write(tmp_path / "a.tsv", [header, *ROWS]),
        tmp_path / "a.jsonl",
        tmp_path / "a.csv.gz",
        tmp_path / "bom.csv",
        tmp_path / "semicolons.csv",
    ]
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    files[2].write_text("\n".join(lines) + "\n\n")
    files[3].write_bytes(gzip.compress(files[0].read_bytes()))
    files[4].write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes())
    files[5].write_text(files[0].read_text().replace(",", ";"))
    tasks = [load_task(str(f), test_file=str(files[0])) for f in files]
    for task in tasks:
        assert task.train.texts == ("crow", "iron", "wren", "tin")
        assert task.train.labels == (0, 1, 0, 1)
        assert task.test == task.train


def test_folder_with_train_and_dev(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [["text", "label"], *ROWS])
    write(tmp_path / "dev.csv", [["text", "label"], *ROWS[:2]])
    task = load_task(str(tmp_path))
    assert len(task.train) == 4
    assert task.test.texts == ("crow", "iron")


def test_headerless_tsv_with_plain_quotes_and_pairs(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('1\the said "no\ttrue\n0\tshe said "yes\tfalse\n' * 5)
    task = load_task(
        str(path),
        columns=Columns("first", "second", "answer"),
        column_names=("answer", "first", "second"),
    )
    assert task.label_names == ("0", "1")
    assert task.columns == ("first", "second")
    assert set(zip(task.train.texts, task.train.pairs or (), strict=True)) == {
        ('he said "no', "true"),
        ('she said "yes', "false"),
    }


def test_quoted_csv_keeps_commas_and_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["text", "label"], ["a,b\nc", "x"], ['"', "y"]])
    assert read_table(path).rows == (("a,b\nc", "x"), ('"', "y"))


def test_sentence_pair_columns_are_found_by_name(tmp_path: Path) -> None:
    rows = [["sentence1", "sentence2", "label"], *(["a", "b", c] for c in "xyxyxyxyxy")]
    assert load_task(str(write(tmp_path / "a.csv", rows))).train.pairs == ("b",) * 8


def test_numeric_labels_are_in_order_of_size() -> None:
    rows = tuple((label,) for label in ["10", "9", "-1"] * 4)
    table = Table("t", ("y",), rows, ("",) * 12)
    assert label_names_of(table, "y") == ("-1", "9", "10")


HEADER = "text,label\n"
BAD_FILES = {
    "a.csv": [
        ("", "no rows"),
        (HEADER, "no rows"),
        (HEADER + "one,a,b\n", r"line 2: 3 field\(s\) where 2"),
        (HEADER + 'one,"a\n', "line 2: not readable as a table.*--quoting none"),
        (HEADER + "one,\n", r"line 2: column 'label' has no label \(''\)"),
        (HEADER + "one,NaN\n", r"no label \('NaN'\)"),
        (HEADER + "one,a\n,b\none,a\none,b\n", "line 3: column 'text' is empty"),
        (HEADER + "one,a\n" * 6, r"1 class\(es\) \(a\).*--label-column"),
        (HEADER + "one,a\n" * 6 + "two,b\n", "single example: b"),
        (HEADER + "".join(f"t,{i}.5\n" for i in range(9)), "9 different values"),
        ("words,label\none,a\n", "no column with a usual name.*'words', 'label'"),
        ("text,text\none,a\n", "'text' more than once.*--column-names"),
    ],
    "a.jsonl": [
        ("{", "line 1: not JSON"),
        ('"text"', "line 1: a str where an object"),
        ('{"text": "a", "label": ["x"]}', "holds a list"),
        ('{"text": "a", "label": "x"}\n{"text": "b"}', r"line 2.*no label \(None\)"),
        ('{"text": null, "label": "x"}\n' * 3, "line 1: column 'text' is empty"),
        ('{"text": "a", "label": NaN}', r"no label \(nan\)"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BAD_FILES.items() for case in cases],
)
def test_bad_files_are_explained(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_task(str(path))


def test_other_unreadable_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncaf\xe9,a\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_task(str(latin))
    torn = tmp_path / "torn.csv.gz"
    torn.write_bytes(gzip.compress(b"text,label\n")[:-4])
    with pytest.raises(UserError, match="cannot be read"):
        load_task(str(torn))
    with pytest.raises(UserError, match="there is no file"):
        load_task(str(tmp_path / "missing.csv"))
    with pytest.raises(UserError, match=r"ends in \.csv, \.tsv, \.jsonl"):
        load_task(str(torn.rename(tmp_path / "table.xlsx")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train\.csv"):
        load_task(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="unknown quoting"):
        load_task(str(latin), quoting="loud")


def test_unknown_columns_list_the_known(labelled_csv: Path) -> None:
    for columns, option in (
        (Columns(text="no"), "--text-column"),
        (Columns(pair="no"), "--text-pair-column"),
        (Columns(label="no"), "--label-column"),
    ):
        with pytest.raises(UserError, match=rf"{option}.*'text', 'label'"):
            load_task(str(labelled_csv), columns=columns)
    with pytest.raises(UserError, match="one column serves twice"):
        load_task(str(labelled_csv), columns=Columns(text="label"))


def test_test_file_with_other_labels(tmp_path: Path, labelled_csv: Path) -> None:
    test = write(tmp_path / "test.csv", [["text", "label"], ["salmon", "fish"]])
    with pytest.raises(UserError, match=r"fish do not occur.*bird, fruit, metal"):
        load_task(str(labelled_csv), test_file=str(test))


def test_file_options_need_a_file() -> None:
    with pytest.raises(UserError, match=r"--test-file.*local files"):
        load_task("docstrings", test_file="test.csv")
    with pytest.raises(UserError, match="do not apply to --task docstrings"):
        load_task("docstrings", columns=Columns(text="text"))


# -- the Hub --------------------------------------------------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    """Let `load_dataset` return or raise `answer`; return what it is asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> Any:
        asked.append(arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def parts(**rows: Any) -> Any:
    return datasets.DatasetDict(list(rows.items()))


def part(labels: list[int], **columns: list[str]) -> datasets.Dataset:
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    features["label"] = datasets.ClassLabel(names=["bad", "good"])
    return datasets.Dataset.from_dict(
        {**columns, "label": labels}, features=datasets.Features(features)
    )


def test_glue_task_is_tested_on_its_validation_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub(
        monkeypatch,
        parts(
            train=part([0, 1, 1], sentence=["a", "b", "c"]),
            validation=part([1], sentence=["d"]),
            test=part([-1], sentence=["e"]),
        ),
    )
    task = load_task("glue/cola")
    assert asked == [("nyu-mll/glue", "cola")]
    assert task.label_names == ("bad", "good")
    assert (task.train.texts, task.train.labels) == (("a", "b", "c"), (0, 1, 1))
    assert task.test.texts == ("d",)


def test_glue_pairs_and_any_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"premise": ["a", "b"] * 5, "hypothesis": ["c", "d"] * 5}
    asked = hub(monkeypatch, parts(train=part([0, 1] * 5, **rows)))
    task = load_task("glue/mnli")
    assert task.columns == ("premise", "hypothesis")
    assert (len(task.train), len(task.test)) == (8, 2)
    load_task("owner/data:small", columns=Columns("premise"))
    assert asked[1] == ("owner/data", "small")


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("glue/cola", ConnectionError("no network"), r"cannot be fetched.*--task FILE"),
        ("owner/none", FileNotFoundError("404"), "cannot be fetched.*404"),
        ("glue/stsb", None, "is a regression"),
        ("glue/other", None, "choose one of glue/cola"),
        (
            "owner/x",
            parts(dev=part([0], text=["a"])),
            "no part named tr",
        ),
        (
            "owner/x",
            parts(train=part([0, 1], words=["a", "b"])),
            "columns are 'words', 'label'",
        ),
    ],
)
def test_hub_failures_are_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, answer: Any, message: str
) -> None:
    hub(monkeypatch, answer)
    with pytest.raises(UserError, match=message):
        load_task(name)
