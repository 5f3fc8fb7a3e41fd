"""The Hub, with a stand-in for the network: parts, classes, names and failures."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from bidora.data import load_source
from bidora.errors import UserError


def hub(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> list[tuple[Any, ...]]:
    """Let `load_dataset` return or raise the answers in turn; return what is asked."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, *options.values()))
        answer = answers[min(len(asked), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def part(
    labels: list[Any], names: list[str] | None = None, **texts: list[str]
) -> Dataset:
    features: dict[str, Any] = {name: Value("string") for name in texts}
    features["label"] = ClassLabel(names=names) if names else Value("float32")
    return Dataset.from_dict({**texts, "label": labels}, features=Features(features))


def parts_of(**parts: Dataset) -> DatasetDict:
    return DatasetDict(list(parts.items()))


COLA = ["unacceptable", "acceptable"]


def test_glue_is_tested_on_its_validation_part_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = parts_of(
        train=part([0, 1, 1], COLA, sentence=["a", "b", "c"]),
        validation=part([1], COLA, sentence=["d"]),
        test=part([-1], COLA, sentence=["e"]),
    )
    asked = hub(monkeypatch, parts)
    source = load_source("glue/cola")
    assert asked == [("nyu-mll/glue", "cola")]
    assert source.train.rows == (("a", 0), ("b", 1), ("c", 1))
    assert source.train.class_names == (("label", ("unacceptable", "acceptable")),)
    assert list(source.parts) == ["train", "test"]
    assert source.parts["test"].rows == (("d", 1),)
    assert source.place("test", 0) == "glue/cola (validation), row 0"
    assert source.hints["metric"] == "matthews_correlation"
    assert "glue/cola (test) has no labels and is not used" in source.note


def test_mnli_has_two_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["entailment", "neutral", "contradiction"]

    def pairs(labels: list[int], text: str) -> Dataset:
        texts = [f"{text} {i}" for i in range(len(labels))]
        return part(labels, names, premise=texts, hypothesis=texts)

    parts = parts_of(
        train=pairs([0, 1, 2], "train"),
        validation_matched=pairs([0, 1], "one"),
        validation_mismatched=pairs([2], "two"),
        test_matched=pairs([-1], "three"),
        test_mismatched=pairs([-1], "four"),
    )
    hub(monkeypatch, parts)
    source = load_source("glue/mnli")
    sizes = {name: len(table) for name, table in source.parts.items()}
    assert sizes == {"train": 3, "test": 2, "test_mismatched": 1}
    assert source.hints["text_pair_column"] == "hypothesis"


def test_scores_stay_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"sentence1": ["a"], "sentence2": ["b"]}
    parts = parts_of(
        train=part([2.5], **texts),
        validation=part([5.0], **texts),
        test=part([-1.0], **texts),
    )
    hub(monkeypatch, parts)
    source = load_source("glue/stsb")
    assert source.train.rows == (("a", "b", 2.5),)
    assert source.train.class_names == ()
    assert source.parts["test"].values("label") == [5.0]
    assert source.hints["task_type"] == "regression"


def test_any_data_set_by_its_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(
        train=part([0], COLA, text=["a"]),
        valid=part([1], COLA, text=["b"]),
        test=part([1], COLA, text=["c"]),
        unsupervised=part([-1], COLA, text=["d"]),
    )
    asked = hub(monkeypatch, parts)
    source = load_source("owner/data:small")
    assert asked == [("owner/data", "small")]
    assert (source.name, source.hints) == ("owner/data:small", {})
    assert list(source.parts) == ["train", "validation", "test"]
    assert "unsupervised are not used" in source.note


def test_tags_are_words_and_scripts_have_a_converted_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tags = datasets.List(ClassLabel(names=["O", "B-PER"]))
    features = Features({"tokens": datasets.List(Value("string")), "ner_tags": tags})
    rows = {"tokens": [["Ada", "sings"], ["No"]], "ner_tags": [[1, 0], [-1]]}
    script = RuntimeError("Dataset scripts are no longer supported, but found c.py")
    parts = parts_of(train=Dataset.from_dict(rows, features=features))
    asked = hub(monkeypatch, script, parts)
    source = load_source("conll2003")
    assert asked == [
        ("eriktks/conll2003", None),
        ("eriktks/conll2003", None, "refs/convert/parquet"),
    ]
    assert source.train.columns == ("tokens", "tags")
    assert source.train.rows == ((["Ada", "sings"], ["B-PER", "O"]), (["No"], [None]))


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        (
            "glue/cola",
            ConnectionError("no network\nmore"),
            r"cannot be fetched.*ConnectionError: no network\).*--data-dir FOLDER",
        ),
        ("owner/none", FileNotFoundError("404"), "cannot be fetched.*404"),
        ("owner/x", RuntimeError(""), "cannot be fetched"),
        ("owner/x", parts_of(dev=part([0], COLA, text=["a"])), "no part named tr"),
        ("owner/x", parts_of(train=part([], COLA, text=[])), "has no rows"),
        ("glue/other", None, "choose one of glue/cola"),
    ],
)
def test_failures_are_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, answer: Any, message: str
) -> None:
    hub(monkeypatch, answer)
    with pytest.raises(UserError, match=message):
        load_source(name)


def test_options_of_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, AssertionError("nothing is fetched"))
    with pytest.raises(UserError, match=r"--test-file, --encoding does not apply"):
        load_source("owner/x", test_file="a.csv", encoding="utf-8")
