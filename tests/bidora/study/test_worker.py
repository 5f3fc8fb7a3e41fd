"""A worker of a comparison: what it asks a run for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bidora.runs.job
from bidora.runs.results import RunResult
from bidora.runs.settings import TrainSettings
from bidora.study.records import Cell, Purpose, read_records
from bidora.study.worker import Order, as_recorded, first_line, work
from tests.bidora.study import stand_ins


@pytest.mark.parametrize("purpose", ["steps", "sweep"])
def test_a_run_is_told_to_measure_what_the_record_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, purpose: Purpose
) -> None:
    asked: list[dict[str, Any]] = []

    def train(settings: TrainSettings, **given: Any) -> RunResult:
        asked.append(given)
        return stand_ins.quick(settings)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(bidora.runs.job, "train", train)
    cell = Cell("words", "lora", 0, 0, purpose)
    settings = TrainSettings(method="lora", max_steps=10)
    record = work(Order(cell, settings, tmp_path / "one.json", tmp_path))
    assert record.error == ""
    scores = purpose == "steps"
    assert asked == [{"for_record": True, "score_test": scores, "score_probe": scores}]
    # Another function in its place need not know of it.
    other = Order(cell, settings, tmp_path / "two.json", tmp_path, stand_ins.quick)
    assert work(other).error == ""


def test_an_error_that_names_a_file_of_another_encoding_is_recorded(
    tmp_path: Path,
) -> None:
    name = os.fsdecode(b"caf\xe9.csv")

    def fails(settings: TrainSettings, **given: Any) -> RunResult:
        raise FileNotFoundError(f"there is no {name}")

    cell = Cell("words", "lora", 0, 0, "steps")
    order = Order(
        cell, TrainSettings(method="lora"), tmp_path / "1.json", tmp_path, fails
    )
    assert work(order).error == r"FileNotFoundError: there is no caf\udce9.csv"
    records, unread = read_records(tmp_path)
    assert (records[0].error, unread) == (work(order).error, [])
    assert first_line(ValueError("the café")) == "ValueError: the café"


def model(folder: Path, weights: bytes, config: str = "{}") -> TrainSettings:
    """Write what a model's folder holds; return settings with it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return TrainSettings(model=str(folder), method="lora")


def test_a_model_is_recognised_by_its_files_wherever_it_is(tmp_path: Path) -> None:
    weights = bytes(300_000)
    first = as_recorded(model(tmp_path / "a" / "enc", weights))
    assert first["model"] == "enc"
    assert first["model_files"].startswith("sha256 ")
    assert as_recorded(model(tmp_path / "b" / "enc", weights)) == first
    other_values = weights[:-1] + b"1"
    for name, settings in (
        ("c", model(tmp_path / "c" / "enc", weights + b"0")),
        ("d", model(tmp_path / "d" / "enc", weights, config='{"a": 1}')),
        ("e", model(tmp_path / "e" / "enc", bytes(100_000) + b"1" * 200_000)),
        ("f", model(tmp_path / "f" / "enc", b"1" + weights[1:])),
        ("g", model(tmp_path / "g" / "enc", other_values)),
    ):
        found = as_recorded(settings)
        assert found["model"] == "enc"
        assert found["model_files"] != first["model_files"], name
    assert "model_files" not in as_recorded(TrainSettings())
    gone = TrainSettings(model=str(tmp_path / "gone"), method="lora")
    assert "model_files" not in as_recorded(gone)


@pytest.mark.parametrize(("purpose", "kept"), [("steps", {}), ("time", {"lora"})])
def test_a_run_of_equal_time_is_recorded_with_whose_time_it_is(
    tmp_path: Path, purpose: Purpose, kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = TrainSettings(method="dora", max_steps=10)
    for train in (stand_ins.quick, stand_ins.failing):
        order = Order(
            Cell("words", "dora", 0, 1, purpose),
            settings if train is stand_ins.quick else replace(settings, seed=1),
            tmp_path / "one.json",
            tmp_path,
            train,
            reference="lora",
        )
        found = work(order).settings
        assert {found[name] for name in ("reference",) if name in found} == set(kept)
        assert found["max_steps"] == 10
