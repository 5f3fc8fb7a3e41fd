"""Settings: one source for Python, YAML and the command, and what each of them may be."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import yaml

from bidora import defaults
from bidora.cli.options import NOT_OPTIONS
from bidora.cli.parser import make_parser
from bidora.defaults import BUNDLED_MODEL
from bidora.errors import UserError
from bidora.runs.comparison_settings import CompareSettings
from bidora.runs.settings import TrainSettings

CHANGED: dict[str, Any] = {
    "model": "x/y",
    "task": "data/My file.csv",
    "max_steps": 12,
    "learning_rate": 0.5,
    "target_modules": ("query", "key"),
    "column_names": ("a", "b"),
    "estimator": "neumann",
    "estimator_settings": {"num_terms": 5, "product": "exact"},
    "report_to": ("tensorboard",),
    "trainer": {"adam_beta2": 0.9},
    "bf16": True,
    "outer_warmup_steps": 0,
}


def test_settings_survive_dict_json_and_yaml() -> None:
    settings = TrainSettings(**CHANGED)
    plain = settings.as_dict()
    assert TrainSettings.from_dict(plain) == settings
    assert TrainSettings.from_dict(json.loads(json.dumps(plain))) == settings
    assert TrainSettings.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == settings
    assert TrainSettings.from_dict({}) == TrainSettings()
    assert settings.differs() == set(CHANGED)
    assert TrainSettings().differs() == set()


def test_names_may_be_one_word() -> None:
    text = "target_modules: query\nreport_to: a, b\ncolumn_names: [x, y]"
    found = TrainSettings.from_dict(yaml.safe_load(text))
    assert found.target_modules == ("query",)
    assert found.report_to == ("a", "b")
    assert found.column_names == ("x", "y")


@pytest.mark.parametrize(
    ("name", "near"),
    [("max_stesp", "max_steps"), ("lora_rank", "lora_"), ("batch_size", "")],
)
def test_unknown_names_get_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"no setting named {name}\..*{near}"):
        TrainSettings.from_dict({name: 1})


def destinations(command: str) -> dict[str, Any]:
    (commands,) = (a for a in make_parser()._actions if a.dest == "command")
    choices: Any = commands.choices
    return {a.dest: a for a in choices[command]._actions}


@pytest.mark.parametrize(
    ("command", "cls", "others"),
    [
        (
            "train",
            TrainSettings,
            {"help", "fields", "config", "recipe", "resume", "dry_run"},
        ),
        ("estimators", CompareSettings, {"help"}),
    ],
)
def test_every_field_is_an_option_and_every_option_a_field(
    command: str, cls: Any, others: set[str]
) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls) if "group" in f.metadata}
    found = destinations(command)
    assert set(found) - others == set(fields) - set(NOT_OPTIONS)
    for name in set(found) - others:
        (word, *_) = found[name].option_strings
        plural = {"estimator_settings": "--estimator-setting"}
        assert word == plural.get(name, "--" + name.replace("_", "-"))
        assert found[name].help


def test_help_tells_the_default_of_every_setting() -> None:
    found = destinations("train")
    for f in dataclasses.fields(TrainSettings):
        is_told = isinstance(f.default, int | float | str) and f.default is not False
        if f.name in found and is_told:
            number = isinstance(f.default, float)
            default = f"{f.default:g}" if number else str(f.default)
            wanted = f.metadata["shown"] or default
            assert f"default: {wanted}" in found[f.name].help, f.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "adora"}, "'adora'; choose one of auto, bidora, dora.*'dora'"),
        ({"budget": "cheap"}, "--budget 'cheap'; choose one of economical, full"),
        ({"retrain": "cold"}, "--retrain 'cold'; choose one of fresh, warm, none"),
        ({"quoting": "loud"}, "--quoting 'loud'; choose one of auto, csv, none"),
        ({"on_bad_row": "weep"}, "--on-bad-row 'weep'; choose one of error, skip"),
        ({"max_steps": 0}, "--max-steps is 0; give a whole number of 1 or more"),
        ({"max_steps": 2.5}, "--max-steps is 2.5"),
        ({"max_steps": True}, "--max-steps is True"),
        ({"max_steps": "many"}, "--max-steps is 'many'; give a number"),
        ({"max_steps": None}, "--max-steps is None"),
        ({"per_device_train_batch_size": -1}, "--per-device-train-batch-size is -1"),
        ({"lora_r": 0}, "--lora-r is 0"),
        ({"max_length": 3}, "--max-length is 3; give a whole number of 4 or more"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; give a finite number above"),
        ({"outer_learning_rate": float("nan")}, "--outer-learning-rate is nan"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio is 1.5"),
        ({"validation_fraction": 1.0}, "--validation-fraction is 1.0"),
        ({"audit_every": -1}, "--audit-every is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 1.5}, "--seed is 1.5; give a whole number"),
        ({"model": 5}, "--model is 5; give a word"),
        ({"bf16": "no"}, "--bf16 is 'no'; give true or false"),
        ({"target_modules": 3}, "--target-modules is 3; give names"),
        ({"estimator_settings": [1]}, "--estimator-settings? is .*; give settings by"),
        ({"hub_model_id": "a/b"}, "--push-to-hub, which uploads, is not given"),
    ],
)
def test_wrong_settings_name_their_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings.from_dict(given)


def test_open_settings_follow_the_model_and_the_given_ones() -> None:
    lora = TrainSettings(method="lora")
    assert lora.rate == defaults.LEARNING_RATE
    assert TrainSettings(method="lora", model=BUNDLED_MODEL) == lora
    assert TrainSettings(model="x/y").rate == defaults.OTHER_LEARNING_RATE
    assert TrainSettings(model="x/y", learning_rate=1e-3).rate == 1e-3
    full: dict[str, Any] = {"method": "full"}
    assert TrainSettings(**full).rate == defaults.FULL_LEARNING_RATE
    other = TrainSettings(model="x/y", **full).rate
    assert other == defaults.OTHER_FULL_LEARNING_RATE
    settings = TrainSettings(task="data/My file.csv", seed=3, method="bidora")
    assert settings.folder == "runs/bidora-data-My-file.csv-seed3"
    assert TrainSettings(output_dir="here").folder == "here"


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, "full"),
        ({"learning_rate": 1e-3, "weight_decay": 0.0, "seed": 3}, "full"),
        ({"early_stopping_patience": 2, "validation_fraction": 0.3}, "full"),
        ({"validation_fraction": 0.3}, "bidora"),
        ({"model": "x/y"}, "lora"),
        ({"lora_r": 4}, "lora"),
        ({"model": "x/y", "validation_fraction": 0.3}, "bidora"),
        ({"lora_r": 4, "estimator": "sama"}, "bidora"),
        ({"loraplus_lr_ratio": 8.0}, "lora-plus"),
        ({"loraplus_lr_ratio": 8.0, "lora_alpha": 8.0}, "lora-plus"),
        ({"budget": "full"}, "bidora"),
        ({"outer_learning_rate": 1e-2}, "bidora"),
        ({"method": "auto", "target_modules": ("query",)}, "lora"),
        ({"model": "x/y", "method": "full"}, "full"),
    ],
)
def test_the_method_follows_the_model_and_what_is_given(
    given: dict[str, Any], method: str
) -> None:
    settings = TrainSettings(**given)
    assert settings.method == method
    assert settings.differs() - {"method"} == given.keys() - {"method"}
    # What is saved with a run is read back as the run was.
    again = TrainSettings.from_dict(settings.as_dict())
    assert again == settings
    assert ("method" in settings.differs()) == (given.get("method") == "full")


def test_lengths_follow_the_data_and_the_model() -> None:
    settings = TrainSettings(task="x.csv")
    assert settings.tokens_kept(24) == 24
    assert settings.tokens_kept(512) == 128
    assert settings.tokens_kept(None, 32) == 32
    assert settings.tokens_kept(16, 32) == 16
    assert TrainSettings(max_length=9).tokens_kept(24, 32) == 9
    with pytest.raises(UserError, match="--max-length 25 is more than the 24 tokens"):
        TrainSettings(max_length=25).tokens_kept(24)
