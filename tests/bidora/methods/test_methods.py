"""Every method: it trains, saves, loads again, and refuses what means nothing to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel

from bidora import load_run, train
from bidora.dora import exact_dora_layers
from bidora.errors import UserError
from bidora.methods import METHODS, make_method
from bidora.methods.base import (
    OF_ADAPTERS,
    OF_LORA_PLUS,
    OF_MAGNITUDES,
    OF_WEIGHTS,
    SEARCH_ONLY,
)
from bidora.runs.settings import TrainSettings
from tests.tolerances import error, tol

Run = Callable[[str], Any]

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

ALL = METHODS.names()
SEARCHES = tuple(name for name in ALL if name.startswith("bidora"))
HEAD = 16 * 3 + 3  # hidden size times classes, and a bias
RANK = 32
# Four layers of 16 × 16 in attention, one of 16 × 32 and one of 32 × 16, twice, and the
# pooler's 16 × 16: A and B of each, and a magnitude for each output.
LORA = (2 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 + 16) * RANK
MAGNITUDES = 2 * (4 * 16 + 32 + 16) + 16
ADAPTED = 2 * 6 + 1
HOULSBY = 4 * (16 * RANK + RANK + RANK * 16 + 16)  # two bottlenecks a layer


@pytest.mark.parametrize("name", ALL)
def test_what_was_trained_is_what_is_loaded(finished: Run, name: str) -> None:
    run = finished(name)
    truth = run.logits()
    loaded, tokenizer = load_run(run.folder)
    assert not loaded.training
    allowed = tol(torch.float32, cond=run.condition_of_the_head())
    assert error(run.logits(loaded), truth) <= allowed
    lines: dict[str, Any] = {}
    exec(run.result.loading_code, lines)
    assert not lines["model"].training
    assert error(run.logits(lines["model"]), truth) <= allowed
    for found in (tokenizer, lines["tokenizer"]):
        assert found("apple")["input_ids"] == run.job.tokenizer("apple")["input_ids"]


@pytest.mark.parametrize("name", ALL)
def test_phases_are_those_of_the_method(finished: Run, name: str) -> None:
    run = finished(name)
    names = [phase.name for phase in run.result.phases]
    assert names == list(METHODS.get(name).phases)
    outer_steps = [phase.outer_steps for phase in run.result.phases]
    assert (outer_steps[0] > 0) == (name in SEARCHES)
    assert not any(outer_steps[1:])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lora", LORA + HEAD),
        ("rslora", LORA + HEAD),
        ("lora-plus", LORA + HEAD),
        ("dora-peft", LORA + MAGNITUDES + HEAD),
        ("dora", LORA + MAGNITUDES + HEAD),
        ("houlsby", HOULSBY + HEAD),
        ("probe", HEAD),
    ],
)
def test_trained_parameters_are_counted(finished: Run, name: str, count: int) -> None:
    run = finished(name)
    trained = [p.numel() for p in run.job.model.parameters() if p.requires_grad]
    assert sum(trained) == count
    assert any(f"{name} trains {count:,} of its" in line for line in run.told)


def test_full_trains_and_saves_all_of_the_model(finished: Run) -> None:
    run = finished("full")
    assert all(p.requires_grad for p in run.job.model.parameters())
    saved = BertForSequenceClassification.from_pretrained(run.folder)
    assert saved.num_parameters() == run.job.model.num_parameters()


def test_only_the_exact_forward_is_exact(finished: Run) -> None:
    for name in ("dora", "bidora"):
        assert len(exact_dora_layers(finished(name).job.model)) == ADAPTED
    for name in ("dora-peft", "lora"):
        assert not exact_dora_layers(finished(name).job.model)


def test_pefts_forward_is_refused_where_it_gives_nan(
    tiny_encoder: Path, small_job: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "zero")
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        query = model.get_submodule("encoder.layer.0.attention.self.query")
        query.get_parameter("weight")[3:5] = 0
    model.save_pretrained(folder)
    given = {**small_job, "model": str(folder), "max_steps": 2, "lora_r": 2}
    given["output_dir"] = str(tmp_path / "run")
    with pytest.raises(UserError, match=r"such as 2 of .*query, .*Take --method dora,"):
        train(TrainSettings(**given, method="dora-peft"))
    with pytest.warns(UserWarning, match="rows of zeros"):
        train(TrainSettings(**given, method="dora"))


def test_rank_stabilised_scale_is_alpha_over_the_root(finished: Run) -> None:
    for name, scale in (("lora", 64 / 32), ("rslora", 64 / 32**0.5)):
        layer = finished(name).job.model.base_model.model.bert.encoder.layer[0]
        assert layer.attention.self.query.scaling == {"default": scale}


@pytest.mark.parametrize("name", ["lora", "dora", "bidora"])
def test_adapters_are_plain_peft(finished: Run, name: str, tiny_encoder: Path) -> None:
    run = finished(name)
    config = json.loads((run.folder / "adapter_config.json").read_text("utf-8"))
    assert config["use_dora"] is (name != "lora")
    assert config["base_model_name_or_path"] == str(tiny_encoder)
    assert "classifier" in config["modules_to_save"]
    assert config["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("bidora-first-order", {"estimator": "first-order"}),
        ("bidora-no-orthogonality", {"orthogonality": 0.0}),
        ("bidora-no-retraining", {"retrain": "none"}),
        ("bidora-one-split", {}),
    ],
)
def test_ablations_differ_from_bidora_in_one_thing(
    finished: Run, name: str, changed: dict[str, Any]
) -> None:
    assert METHODS.get(name).preset == changed
    args, whole = finished(name).trainer.args, finished("bidora").trainer.args
    for field in SEARCH_ONLY:
        wanted = changed.get(field, getattr(whole, field))
        assert getattr(args, field) == wanted, field


def useless(method: str) -> list[str]:
    return sorted(METHODS.get(method).ignores)


OTHER_VALUES: dict[str, Any] = {
    "budget": "full",
    "estimator": "cg",
    "estimator_settings": {"num_terms": 2},
    "outer_every": 2,
    "outer_warmup_steps": 3,
    "per_device_outer_batch_size": 2,
    "validation_fraction": 0.5,
    "orthogonality": 0.5,
    "retrain": "fresh",
    "retrain_max_steps": 2,
    "retrain_learning_rate": 0.5,
    "audit_every": 2,
    "outer_learning_rate": 0.5,
    "outer_weight_decay": 0.5,
    "lora_r": 2,
    "lora_alpha": 3.0,
    "lora_dropout": 0.5,
    "target_modules": ("query",),
    "loraplus_lr_ratio": 2.0,
    "average_last": 0.5,
    "early_stopping_patience": 2,
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), 0.5),
    "max_steps": 7,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "warmup_ratio": 0.5,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": True,
    "start": "random",
    "record_weights": True,
}


@pytest.mark.parametrize(
    ("method", "name"), [(m, name) for m in ALL for name in useless(m)]
)
def test_settings_without_a_meaning_are_refused(method: str, name: str) -> None:
    settings = TrainSettings(method=method, **{name: OTHER_VALUES[name]})
    option = "--" + name.replace("_", "-")
    with pytest.raises(
        UserError, match=f"{option} has no meaning with --method {method}"
    ):
        make_method(method).check(settings)


def test_what_each_method_ignores() -> None:
    others = {*SEARCH_ONLY, *OF_MAGNITUDES, *OF_ADAPTERS, *OF_LORA_PLUS}
    assert set(useless("full")) == others
    assert set(useless("bitfit")) == {*others, *OF_WEIGHTS}
    assert set(useless("probe")) == set(OTHER_VALUES) > others  # takes no step
    for name in ("lora", "rslora", "dora-peft"):
        assert set(useless(name)) == {*SEARCH_ONLY, *OF_MAGNITUDES, *OF_LORA_PLUS}
    assert set(useless("lora-plus")) == {*SEARCH_ONLY, *OF_MAGNITUDES}
    assert set(useless("dora")) == {*SEARCH_ONLY, *OF_LORA_PLUS}  # a rate of magnitudes
    assert set(useless("houlsby")) == {*others, *OF_WEIGHTS} - {"lora_r"}
    assert set(useless("bidora")) == set(OF_LORA_PLUS)
    # Nothing is held back, and nothing is retrained.
    assert set(useless("bidora-one-split")) == {*OF_LORA_PLUS, "validation_fraction"}
    assert set(useless("bidora-no-retraining")) == {
        *OF_LORA_PLUS,
        "retrain_learning_rate",
        "retrain_max_steps",
    }


@pytest.mark.parametrize(
    ("method", "given", "remedy"),
    [
        ("lora", ("estimator",), "or choose --method bidora."),
        ("full", ("lora_r",), "or choose --method bidora."),
        ("full", ("loraplus_lr_ratio", "lora_r"), "or choose --method lora-plus."),
        ("full", ("loraplus_lr_ratio", "estimator"), "Leave it out."),
    ],
)
def test_the_remedy_is_a_method_that_takes_the_settings(
    method: str, given: tuple[str, ...], remedy: str
) -> None:
    values = {name: OTHER_VALUES[name] for name in given}
    with pytest.raises(UserError) as refused:
        make_method(method).check(TrainSettings(method=method, **values))
    assert str(refused.value).endswith(remedy)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("bidora-first-order", {"estimator": "darts"}),
        ("bidora-no-orthogonality", {"orthogonality": 0.1}),
        ("bidora-no-retraining", {"retrain": "warm"}),
    ],
)
def test_what_an_ablation_stands_for_is_not_changed(
    method: str, given: dict[str, Any]
) -> None:
    (name,) = given
    with pytest.raises(UserError, match=f"--method {method} stands for .* --{name}"):
        make_method(method).check(TrainSettings(method=method, **given))
    same = METHODS.get(method).preset
    make_method(method).check(TrainSettings(method=method, **same))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": "magic"}, "--estimator magic: .*darts"),
        ({"estimator": "neumann", "estimator_settings": {"sweets": 1}}, "sweets"),
        ({"estimator_settings": {"sweets": 1}}, "sweets"),
    ],
)
def test_estimators_are_checked_before_anything_is_loaded(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_method("bidora").check(TrainSettings(**given))


def test_unknown_methods_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'qlora'; choose one of .* mean 'lora'"):
        make_method("qlora")
