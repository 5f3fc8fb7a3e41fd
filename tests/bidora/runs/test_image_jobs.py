"""Jobs on images: every method trains, saves, predicts and exports."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTImageProcessor,
)

from bidora.cli import main
from bidora.errors import UserError
from bidora.runs.export import export
from bidora.runs.predict import load_run, predict
from bidora.tasks.base import Rows
from bidora.tasks.images import ImageClassification
from tests.bidora.conftest import Finished, finish
from tests.bidora.image_models import save_vit, write_pets

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

METHODS = ("bidora", "lora", "full", "bitfit", "probe")

Run = Callable[[str], Finished]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pets(tmp_path_factory.mktemp("pets"))


@pytest.fixture(scope="module")
def run_of(vit: Path, pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that gives the finished run of a method, trained once."""
    runs: dict[str, Finished] = {}
    place = tmp_path_factory.mktemp("runs")

    def run(method: str) -> Finished:
        if method not in runs:
            given: dict[str, Any] = {
                "model": str(vit),
                "task": str(pets),
                "method": method,
                "output_dir": str(place / method),
            }
            if method != "probe":
                given |= {"max_steps": 6, "learning_rate": 0.03, "eval_steps": 6}
                given |= {"per_device_train_batch_size": 8}
            if method in ("bidora", "lora"):
                given |= {"lora_r": 2, "lora_alpha": 4.0}
            if method == "bidora":
                given |= {"outer_every": 2, "outer_warmup_steps": 1}
            runs[method] = finish(**given)
        return runs[method]

    return run


def test_an_image_processor_of_another_size_is_told(
    vit: Path, pets: Path, tmp_path: Path
) -> None:
    other = tmp_path / "vit"
    shutil.copytree(vit, other)
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(other)
    with pytest.raises(UserError, match=r"to 12 × 12 pixels, .* `size` in its preproc"):
        finish(model=str(other), task=str(pets), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({"do_resize": False}, "8 × 10 and 17 × 10"),
        ({"size": {"shortest_edge": 8}}, "8 × 10 and 13 × 8"),
    ],
)
def test_an_image_processor_that_leaves_several_sizes_is_told(
    settings: dict[str, Any], made: str, vit: Path, pets: Path, tmp_path: Path
) -> None:
    other = tmp_path / "vit"
    shutil.copytree(vit, other)
    ViTImageProcessor(**settings).save_pretrained(other)
    with pytest.raises(
        UserError, match=f"makes {made} pixels .* set do_resize to true"
    ):
        finish(model=str(other), task=str(pets), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_image_processor_that_keeps_shapes_may_have_images_of_one_shape(
    vit: Path,
) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit)
    processor = ViTImageProcessor(size={"shortest_edge": 8})
    square = Rows({"size": [(8, 8), (30, 30)]}, ["", ""])
    ImageClassification().try_model(model, processor, {"train": square})
    wide = Rows({"size": [(16, 8)]}, [""])
    with pytest.raises(UserError, match=r"of 8 × 8 and 8 × 16, and a batch takes one"):
        ImageClassification().try_model(
            model, processor, {"train": square, "test": wide}
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_saved_and_loaded_again(method: str, run_of: Run) -> None:
    run = run_of(method)
    assert run.result.phases[-1].test.keys() >= {"loss", "accuracy"}
    assert run.read("task.json")["settings"]["image_column"] == "image"
    assert json.loads((run.folder / "preprocessor_config.json").read_text())
    model, processor = load_run(run.folder)
    # The run's own model on the run's own features, beside a loaded one on loaded images.
    files = run.job.examples.rows["test"].columns["image"]
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        loaded = model(**processor(images=images, return_tensors="pt")).logits
    expected = run.logits()
    # Other batches and a merged magnitude: some roundings of float32
    bound = 1000 * torch.finfo(torch.float32).eps * run.condition_of_the_head()
    assert (loaded - expected).abs().max() <= bound * expected.abs().max()
    assert expected.std(0).min() > 1e-3  # images are told apart


def test_the_probe_reads_what_stands_in_front_of_the_head(run_of: Run) -> None:
    run = run_of("probe")
    head = run.job.model.classifier
    # Colours tell these classes apart: a linear head on random features finds them.
    assert run.result.phases[-1].test["accuracy"] > 0.8
    assert head.weight.abs().sum() > 0
    full = run_of("full")
    assert full.result.probe is not None
    assert full.result.probe.test == run.result.phases[-1].test


def test_peft_knows_no_type_of_task_and_saves_the_head(run_of: Run) -> None:
    run = run_of("lora")
    config = run.read("adapter_config.json")
    assert config["task_type"] is None
    assert config["modules_to_save"] == ["classifier"]
    assert {t.rsplit(".", 1)[-1] for t in config["target_modules"]}.isdisjoint(
        {"classifier"}
    )
    before, after = run.values["train begins"], run.values["train ends"]
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert any("classifier" in n for n in changed)
    assert any("lora_A" in n for n in changed)


@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
def test_the_code_on_the_card_loads_the_model(
    method: str, run_of: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(method)
    card = ModelCard.load(run.folder / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    code = re.findall(r"```python\n(.*?)```", card.text, re.S)[0]
    monkeypatch.chdir(run.folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["processor"]) is type(run.job.tokenizer)
    got, expected = run.logits(names["model"]), run.logits()
    bound = 1000 * torch.finfo(torch.float32).eps * run.condition_of_the_head()
    assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_a_table_and_a_folder_are_scored_alike(
    run_of: Run, pets: Path, tmp_path: Path
) -> None:
    run = run_of("full")
    shutil.copytree(pets / "test", tmp_path / "new")
    assert predict(run.folder, tmp_path / "new", tmp_path / "folder.csv").rows == 12
    table = tmp_path / "new" / "some.jsonl"
    names = ["bee/1.png", "cat/3.png"]
    table.write_text("".join(json.dumps({"image": n, "id": 1}) + "\n" for n in names))
    predict(run.folder, table, tmp_path / "table.csv", on_bad_row="error")
    every = {r["image"]: r for r in csv.DictReader((tmp_path / "folder.csv").open())}
    assert list(every)[:2] == ["ant/0.png", "ant/1.png"]
    for row in csv.DictReader((tmp_path / "table.csv").open()):
        assert row["id"] == "1"
        assert row["label"] == every[row["image"]]["label"]
        chance = float(every[row["image"]]["p(bee)"])
        assert float(row["p(bee)"]) == pytest.approx(chance, rel=1e-4)
    hits = [row["label"] == row["image"].split("/")[0] for row in every.values()]
    # The scores of the run are those of its answers.
    assert np.mean(hits) == pytest.approx(run.result.phases[-1].test["accuracy"])


def test_images_that_can_not_be_scored_are_told(
    run_of: Run, pets: Path, tmp_path: Path
) -> None:
    run, new = run_of("full"), tmp_path / "new"
    shutil.copytree(pets / "test", new)
    (new / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"new, ant/0.png: column 'image' is no image"):
        predict(run.folder, new, tmp_path / "out.csv")
    done = predict(run.folder, new, tmp_path / "out.csv", on_bad_row="skip")
    assert (done.rows, len(done.skipped)) == (11, 1)


def test_new_images_of_several_sizes_are_told_by_a_run_that_had_one(
    run_of: Run, pets: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("full").folder, run)
    ViTImageProcessor(size={"shortest_edge": 8}).save_pretrained(run)
    with pytest.raises(UserError, match=r"8 × 10 .* and a batch takes one size"):
        predict(run, pets / "test", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("method", ["bidora", "full"])
def test_an_export_needs_neither_peft_nor_us(
    method: str, run_of: Run, tmp_path: Path
) -> None:
    run = run_of(method)
    done = export(run.folder, tmp_path / "whole")
    assert done.difference < 100 * torch.finfo(torch.float32).eps * max(
        1.0, run.condition_of_the_head()
    )
    names: dict[str, Any] = {}
    exec(done.loading_code, names)
    got, expected = run.logits(names["model"]), run.logits()
    bound = 1000 * torch.finfo(torch.float32).eps * run.condition_of_the_head()
    assert (got - expected).abs().max() <= bound * expected.abs().max()
    assert AutoImageProcessor.from_pretrained(tmp_path / "whole").size["height"] == 8


@pytest.mark.usefixtures("spared")
def test_digits_go_from_the_command_line_to_scores(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = "--max-train-samples 60 --max-test-samples 20 --max-validation-samples 10"
    options += " --max-steps 2 --per-device-train-batch-size 8 --lora-r 2"
    given = ["train", "--task", "digits", "--model", str(vit), "--method", "lora"]
    assert main([*given, *options.split(), "--output-dir", str(run)]) == 0
    assert "digits: images, 60 training" in capsys.readouterr().out
    assert json.loads((run / "metrics.json").read_text())["label_names"][9] == "9"


def test_the_command_names_a_model_for_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "--task", "digits", "--output-dir", str(tmp_path / "r")]) == 2
    told = capsys.readouterr().err
    assert "all-MiniLM-L6-v2 reads texts" in told
    assert "google/vit-base-patch16-224-in21k" in told
    assert not (tmp_path / "r").exists()


def test_a_model_of_texts_is_refused(
    tiny_encoder: Path, pets: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is a bert, which AutoModelForImageClass"):
        finish(model=str(tiny_encoder), task=str(pets), output_dir=str(tmp_path / "r"))


def test_a_model_without_its_image_processor_is_refused(
    vit: Path, pets: Path, tmp_path: Path
) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(
        UserError, match=r"for images with its preprocessor_config.json"
    ):
        finish(
            model=str(tmp_path / "vit"), task=str(pets), output_dir=str(tmp_path / "r")
        )


def test_features_are_made_once_and_kept_while_there_is_room(
    run_of: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bidora.runs import encoding

    run = run_of("full")
    task, made = run.job.examples.task, []

    class Counting:
        lazy = True

        def features(self, batch: Any, *rest: Any) -> Any:
            made.append(len(batch["image"]))
            return task.features(batch, *rest)

    rows: Any = run.job.examples.rows["test"]
    given: Any = (rows, Counting(), run.job.examples.schema, run.job.tokenizer, 0)
    one = 3 * 8 * 8 * 4 + 8  # pixels in float32, and a label
    for room, expected in ((2**30, [12]), (5 * one, [12, 7])):
        monkeypatch.setattr(encoding, "MOST_BYTES", room)
        made.clear()
        data = encoding.encode(*given)
        first, again = data[:], data.select(range(12))[:]
        assert made == expected
        assert np.array_equal(first["pixel_values"], again["pixel_values"])
        assert again["labels"] == rows.columns["labels"]


def loss_of(run: Finished, phase: str) -> tuple[float, float]:
    """Return the mean training loss of the first and of the last ten steps of a phase."""
    steps = [r["inner_loss"] for r in run.read("history.jsonl")
             if r["phase"] == phase and "inner_loss" in r]  # fmt: skip
    return float(np.mean(steps[:10])), float(np.mean(steps[-10:]))


@pytest.mark.slow
def test_a_vit_learns_digits_from_nothing_and_bidora_goes_on(tmp_path: Path) -> None:
    vit = save_vit(tmp_path / "vit", hidden_size=32, patch_size=2)
    common: dict[str, Any] = {"task": "digits", "per_device_train_batch_size": 32}
    run = finish(
        **common,
        model=str(vit),
        method="full",
        start="random",
        max_steps=400,
        learning_rate=2e-3,
        output_dir=str(tmp_path / "full"),
    )
    assert run.result.baseline["test"]["accuracy"] == pytest.approx(0.1, abs=0.01)
    assert run.result.phases[-1].test["accuracy"] > 0.8
    first, last = loss_of(run, "train")
    assert last < first / 3
    searched = finish(
        **common,
        model=str(vit),
        method="bidora",
        start="random",
        max_steps=120,
        learning_rate=5e-3,
        lora_r=4,
        lora_alpha=8.0,
        output_dir=str(tmp_path / "bidora"),
    )
    for phase in ("search", "retrain"):
        first, last = loss_of(searched, phase)
        assert last < 0.8 * first
    assert searched.result.phases[-1].test["accuracy"] > 0.3


def test_a_stock_class_is_what_an_export_is(run_of: Run, tmp_path: Path) -> None:
    export(run_of("lora").folder, tmp_path / "whole")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
