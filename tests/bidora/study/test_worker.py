"""A worker of a comparison: what it asks a run for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bidora.runs.job
from bidora.runs.results import RunResult
from bidora.runs.settings import TrainSettings
from bidora.study.records import Cell, Purpose
from bidora.study.worker import Order, work
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
