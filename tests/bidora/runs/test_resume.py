"""A stopped run: which settings it goes on with, and where its data is now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.runs.resume import settings_of_run
from bidora.runs.settings import TrainSettings


def stopped(folder: Path, started_in: Path, **given: Any) -> TrainSettings:
    """Leave what a run that was stopped has written of its settings."""
    settings = TrainSettings(output_dir=str(folder), **given)
    folder.mkdir(parents=True, exist_ok=True)
    record = {**settings.as_dict(), "max_length": 32, "started_in": str(started_in)}
    (folder / "settings.json").write_text(json.dumps(record), "utf-8")
    return settings


def test_settings_are_those_of_the_run(tmp_path: Path) -> None:
    settings = stopped(tmp_path / "run", tmp_path, max_steps=7, target_modules=("key",))
    found = settings_of_run(output_dir=str(tmp_path / "run"))
    assert found == TrainSettings.from_dict({**settings.as_dict(), "max_length": 32})
    again = settings_of_run(
        output_dir=str(tmp_path / "run"), max_steps=7, target_modules=["key"]
    )
    assert again == found  # given again, as YAML has them


def test_a_folder_that_was_moved_is_still_the_run(tmp_path: Path) -> None:
    stopped(tmp_path / "run", tmp_path)
    (tmp_path / "run").rename(tmp_path / "other")
    found = settings_of_run(output_dir=str(tmp_path / "other"))
    assert found.folder == str(tmp_path / "other")


@pytest.mark.parametrize("name", ["task", "validation_file", "data_dir", "model"])
def test_data_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "data").mkdir(parents=True)
    second.mkdir()
    (first / "data" / "x.csv").touch()
    stopped(tmp_path / "run", first, **{name: "data/x.csv"})
    monkeypatch.chdir(second)
    found = settings_of_run(output_dir=str(tmp_path / "run"))
    assert getattr(found, name) == str(first / "data" / "x.csv")
    monkeypatch.chdir(first)
    found = settings_of_run(output_dir=str(tmp_path / "run"))
    assert getattr(found, name) == "data/x.csv"


def test_data_that_is_nowhere_is_named_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    stopped(tmp_path / "run", first, task="x.csv")
    monkeypatch.chdir(second)
    with pytest.raises(UserError) as refused:
        settings_of_run(output_dir=str(tmp_path / "run"))
    for part in (str(first / "x.csv"), str(second / "x.csv"), "--task PATH"):
        assert part in str(refused.value)
    (tmp_path / "moved.csv").touch()
    new = str(tmp_path / "moved.csv")
    assert settings_of_run(output_dir=str(tmp_path / "run"), task=new).task == new


def test_names_of_the_hub_may_have_dots(tmp_path: Path) -> None:
    stopped(tmp_path / "run", tmp_path, model="Qwen/Qwen2.5-0.5B", task="owner/data.v1")
    found = settings_of_run(output_dir=str(tmp_path / "run"))
    assert (found.model, found.task) == ("Qwen/Qwen2.5-0.5B", "owner/data.v1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overwrite": True}, "leave one out"),
        ({"max_steps": 9}, "--max-steps was 7, not 9"),
        ({"seed": 1, "max_steps": 7}, "--seed was 0, not 1"),
        ({"max_stesp": 9}, "no setting named max_stesp. Did you mean max_steps"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    stopped(tmp_path / "run", tmp_path, max_steps=7)
    with pytest.raises(UserError, match=message):
        settings_of_run(output_dir=str(tmp_path / "run"), **given)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run of bidora"):
        settings_of_run(output_dir=str(tmp_path))
    for text in ("{", "[]", '{"max_stesp": 1}', '{"max_steps": "x"}'):
        (tmp_path / "settings.json").write_text(text, "utf-8")
        with pytest.raises(
            UserError, match=r"settings\.json cannot be read as the set"
        ):
            settings_of_run(output_dir=str(tmp_path))


def test_without_a_name_the_folder_is_that_of_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/lora-docstrings-seed2 holds no run"):
        settings_of_run(method="lora", seed=2)
