"""Variants of a method that are settings alone: dropout, weight decay, another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bidora import load_run
from tests.bidora.conftest import finish
from tests.tolerances import error, tol

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def test_lora_with_dropout_decay_and_a_lower_rank(
    small_job: dict[str, Any], tmp_path: Path
) -> None:
    given = {"lora_dropout": 0.25, "weight_decay": 0.3, "lora_r": 1, "lora_alpha": 2.0}
    place = {"method": "lora", "max_steps": 2, "output_dir": str(tmp_path / "run")}
    run = finish(**{**small_job, **given, **place})
    layer = run.job.model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.lora_A["default"].weight.shape == (1, 16)
    assert layer.scaling["default"] == 2.0  # alpha over the rank
    decays = {
        name: decay
        for name, (_, decay) in run.groups["train"].items()
        if "lora_" in name
    }
    assert set(decays.values()) == {0.3}
    first, last = run.values["train begins"], run.values["train ends"]
    assert all((first[n] != last[n]).any() for n in first)
    loaded, _ = load_run(run.folder)
    assert error(run.logits(loaded), run.logits()) <= tol(run.logits().dtype)


def test_dropout_is_of_training_alone_and_changes_it(
    small_job: dict[str, Any], tmp_path: Path
) -> None:
    place = {"method": "lora", "max_steps": 2}
    plain, dropped = (
        finish(
            **{**small_job, **place, "lora_dropout": p, "output_dir": f"{tmp_path}/{p}"}
        )
        for p in (0.0, 0.5)
    )
    one, other = plain.values["train ends"], dropped.values["train ends"]
    assert any((one[n] != other[n]).any() for n in one)
    assert (dropped.logits() == dropped.logits()).all()
