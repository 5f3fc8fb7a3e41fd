"""Recipes, the two kinds of retraining, and audits in the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bidora.cli import main
from bidora.errors import UserError
from bidora.settings import TrainSettings
from bidora.training import train


@pytest.fixture
def options(tiny_encoder: Path, labelled_csv: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_encoder),
        "task": str(labelled_csv),
        "steps": 12,
        "batch_size": 8,
        "outer_warmup": 2,
        "max_length": 12,
        "inner_lr": 1e-2,
        "output_dir": str(tmp_path / "run"),
    }


def history(folder: str) -> list[dict[str, Any]]:
    text = Path(folder, "history.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_the_recipes_stand_for() -> None:
    full = TrainSettings.from_options(recipe="full", steps=90, batch_size=12)
    assert (full.estimator, full.outer_every, full.retrain) == ("darts", 1, "fresh")
    assert (full.steps, full.retrain_steps) == (90, 90)
    assert (full.outer_batch_size, full.estimator_settings) == (12, {})
    lean = TrainSettings.from_options(recipe="economical", steps=91, batch_size=12)
    assert (lean.estimator, lean.outer_every, lean.retrain) == ("darts", 4, "warm")
    assert (lean.steps, lean.retrain_steps) == (46, 61)  # a half, two thirds
    # A fifth is held back: a quarter of what the directions learn on.
    assert lean.outer_batch_size == 3
    assert lean.estimator_settings == {"product_fraction": 0.25}


def test_what_is_given_goes_before_a_recipe() -> None:
    settings = TrainSettings.from_options(
        recipe="economical",
        outer_every=2,
        retrain="fresh",
        retrain_steps=7,
        estimator="cg",
        validation_fraction=0.5,
    )
    assert (settings.outer_every, settings.retrain) == (2, "fresh")
    assert (settings.steps, settings.retrain_steps) == (120, 7)
    assert settings.outer_batch_size == settings.batch_size  # halves of equal size
    # product_fraction is none of cg's settings.
    assert (settings.estimator, settings.estimator_settings) == ("cg", {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"recipe": "cheap"},
            "unknown --recipe 'cheap'; choose one of full, economical",
        ),
        ({"retrain": "cold"}, "unknown --retrain 'cold'; choose one of fresh, warm"),
        ({"audit_every": -1}, "--audit-every is -1"),
        ({"method": "dora", "recipe": "full"}, "--recipe has no meaning"),
        ({"method": "lora", "retrain": "warm"}, "--retrain has no meaning"),
        ({"method": "lora", "audit_every": 2}, "--audit-every has no meaning"),
    ],
)
def test_settings_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings.from_options(**given)


@pytest.mark.parametrize("recipe", ["full", "economical"])
def test_a_recipe_trains(options: dict[str, Any], recipe: str) -> None:
    settings = TrainSettings.from_options(recipe=recipe, **options)
    result = train(settings)
    search, retrain = result.phases
    assert (search.steps, retrain.steps) == (settings.steps, settings.retrain_steps)
    assert search.outer_steps == settings.outer_steps > 0
    assert not search.skipped
    kept = json.loads(Path(result.folder, "settings.json").read_text("utf-8"))
    assert kept["recipe"] == recipe


def test_a_batch_too_small_to_divide_is_one_line(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    setting = "--estimator-setting=product_fraction=0.01"
    assert main(["train", *words, "--recipe=economical", setting]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "bidora: error: 0.01 of a batch of 8 examples is less than one" in shown
    assert "or a fraction of at least 0.125" in shown


def test_a_warm_retraining_goes_on_where_the_search_ended(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """One step at a rate of next to nothing: what is saved is where it started."""
    saved = {}
    for retrain in ("fresh", "warm"):
        options.update(output_dir=str(tmp_path / retrain), retrain=retrain)
        train(TrainSettings.from_options(retrain_steps=1, retrain_lr=1e-12, **options))
        saved[retrain] = load_file(tmp_path / retrain / "adapter_model.safetensors")
    magnitudes = [n for n in saved["warm"] if "magnitude" in n]
    moved = [n for n in saved["warm"] if "lora_B" in n or "classifier" in n]
    assert magnitudes
    assert moved
    for name in magnitudes:  # the search is the same
        assert torch.equal(saved["warm"][name], saved["fresh"][name])
    for name in moved:
        if "lora_B" in name:  # B starts at 0
            assert saved["fresh"][name].abs().max() < 1e-10
            assert saved["warm"][name].abs().max() > 1e-3
        assert (saved["warm"][name] - saved["fresh"][name]).abs().max() > 1e-3


def test_an_audit_is_in_the_history_and_changes_nothing(
    options: dict[str, Any], tmp_path: Path
) -> None:
    weights = {}
    for every in (0, 2):
        folder = tmp_path / f"audit-{every}"
        options.update(output_dir=str(folder), outer_every=2, audit_every=every)
        train(TrainSettings.from_options(estimator="darts", **options))
        weights[every] = load_file(folder / "adapter_model.safetensors")
        audits = [r["audit"] for r in history(str(folder)) if "audit" in r]
        assert len(audits) == (3 if every else 0)  # of six outer steps each second
        for audit in audits:
            assert audit["reference"] == "unrolled"
            assert "the last 2 inner steps" in audit["why"]
            assert -1 <= audit["cosine"] <= 1
    assert all(torch.equal(t, weights[2][n]) for n, t in weights[0].items())
