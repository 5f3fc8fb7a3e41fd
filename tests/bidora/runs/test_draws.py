"""`--max-train-samples` and its kin: how many, which, and never one in two parts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.runs.examples import Examples, read_examples
from bidora.runs.settings import TrainSettings
from tests.bidora.conftest import Heard

SHARES = {"bird": 6, "fruit": 3, "metal": 1}  # of ten rows


def classes(path: Path, count: int) -> Path:
    """Write so many different texts, with those shares of the classes."""
    names = [name for name, share in SHARES.items() for _ in range(share)]
    lines = [f"{path.stem} text {i},{names[i % 10]}\n" for i in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,label\n" + "".join(lines))
    return path


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Return a folder of 100 training and 50 test examples."""
    classes(tmp_path / "data" / "train.csv", 100)
    classes(tmp_path / "data" / "test.csv", 50)
    return tmp_path / "data"


def read(task: Path, *, searches: bool = False, **given: Any) -> Examples:
    settings = TrainSettings(task=str(task), **given)
    return read_examples(settings, Heard(), searches=searches)


def texts(found: Examples, part: str) -> set[str]:
    rows = found.rows[part].columns["text"]
    assert len(set(rows)) == len(rows)
    return set(rows)


def sizes(found: Examples) -> dict[str, int]:
    return {part: len(rows) for part, rows in found.rows.items()}


def test_without_bounds_all_are_used(parts: Path) -> None:
    found = read(parts)
    assert sizes(found) == {"train": 100, "test": 50}
    assert "are used" not in found.source.note


def test_shares_of_the_classes_are_kept(parts: Path) -> None:
    found = read(parts, max_train_samples=30, max_test_samples=20)
    assert sizes(found) == {"train": 30, "test": 20}
    for part, scale in (("train", 3), ("test", 2)):
        counts = Counter(found.rows[part].columns["labels"])
        assert [counts[i] for i in range(3)] == [n * scale for n in SHARES.values()]
    note = found.record()["source"]
    assert "30 of 100 training examples are used." in note
    assert "20 of 50 test examples are used." in note


def test_seeds_draw_other_training_and_the_same_test_examples(parts: Path) -> None:
    bounds: dict[str, Any] = {"max_train_samples": 30, "max_test_samples": 20}
    bounds["max_validation_samples"] = 10
    one, two, again = (read(parts, seed=seed, **bounds) for seed in (0, 1, 0))
    for part in ("test", "validation"):
        assert texts(one, part) == texts(two, part)
    assert texts(one, "train") != texts(two, "train")
    assert texts(one, "train") == texts(again, "train")


def test_no_seed_learns_or_chooses_by_what_another_tests_with(tmp_path: Path) -> None:
    """A sweep has a seed of its own, and what it chose is scored with others."""
    file = classes(tmp_path / "all.csv", 100)
    bounds: dict[str, Any] = {"max_train_samples": 50, "max_validation_samples": 20}
    one, sweep = (read(file, seed=seed, **bounds) for seed in (0, 100))
    assert len(texts(one, "test")) == 20
    assert texts(sweep, "test") == texts(one, "test")
    for part in ("train", "validation"):
        assert not texts(sweep, part) & texts(one, "test")
    assert texts(sweep, "train") != texts(one, "train")


def test_validation_comes_from_what_training_leaves_out(parts: Path) -> None:
    whole = texts(read(parts), "train")
    for seed in range(3):
        found = read(parts, seed=seed, max_train_samples=60, max_validation_samples=40)
        assert sizes(found) == {"train": 60, "test": 50, "validation": 40}
        assert texts(found, "train") | texts(found, "validation") == whole
        counts = Counter(found.rows["validation"].columns["labels"])
        assert [counts[i] for i in range(3)] == [24, 12, 4]
        assert "40 training examples are for validation." in found.source.note


def test_a_validation_part_of_its_own_is_drawn_from(parts: Path) -> None:
    classes(parts / "validation.csv", 30)
    found = read(parts, max_train_samples=20, max_validation_samples=10)
    assert sizes(found) == {"train": 20, "validation": 10, "test": 50}
    assert all(text.startswith("validation") for text in texts(found, "validation"))
    same = read(parts, seed=5, max_validation_samples=10)
    assert texts(found, "validation") == texts(same, "validation")


def test_a_search_splits_what_was_drawn(parts: Path) -> None:
    found = read(parts, searches=True, max_train_samples=40)
    assert sorted(found.inner + found.outer) == list(range(40))
    assert len(found.outer) == 8


def test_bounds_above_what_is_there_change_nothing(parts: Path) -> None:
    found = read(parts, max_train_samples=1000, max_test_samples=50)
    assert sizes(found) == {"train": 100, "test": 50}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_train_samples": 2},
            r"--max-train-samples 2: 2 of 100 examples are too few .* the 3 classes",
        ),
        (
            {"max_test_samples": 1},
            r"--max-test-samples 1: 1 of 50 examples are too few",
        ),
        (
            {"max_train_samples": 95, "max_validation_samples": 6},
            r"--max-validation-samples 6: .* its 100 training .* leaves out 5\.",
        ),
        (
            {"max_train_samples": 90, "max_validation_samples": 2},
            r"--max-validation-samples 2: 2 of 100 examples are too few",
        ),
        (
            {"max_validation_samples": 6},
            r"no validation examples, .* leaves out 0\. .*--validation-file",
        ),
    ],
)
def test_too_few_name_the_option(
    parts: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(parts, **given)


def regression(path: Path) -> None:
    rows = [f"text {i},{i / 7:.3f}\n" for i in range(60)]
    path.write_text("text,label\n" + "".join(rows))


def multilabel(path: Path) -> None:
    names = ("a", "b", "c")
    rows = [f"text {i},{names[i % 3]};{names[(i + 1) % 3]}\n" for i in range(60)]
    path.write_text("text,label\n" + "".join(rows))


def tagging(path: Path) -> None:
    rows = [
        {"tokens": [f"w{i}", "x"], "tags": ["B-PER" if i % 2 else "O", "O"]}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (regression, {"task_type": "regression"}),
        (multilabel, {"task_type": "multilabel", "label_separator": ";"}),
        (tagging, {"task_type": "tagging"}),
    ],
)
def test_every_type_of_task_draws_exactly(
    tmp_path: Path, kind: Any, given: dict[str, Any]
) -> None:
    file = tmp_path / ("data.jsonl" if kind is tagging else "data.csv")
    kind(file)
    bounds: dict[str, Any] = {"max_train_samples": 20, "max_validation_samples": 9}
    found = read(file, **given, **bounds, max_test_samples=7)
    assert sizes(found) == {"train": 20, "test": 7, "validation": 9}
    places = [place for rows in found.rows.values() for place in rows.places]
    assert len(set(places)) == 36  # each in one part alone
