"""The picture of `bidora analyze`: every curve in sight, and told by a legend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from bidora.runs.analyze import analyze
from bidora.runs.job import train
from bidora.runs.settings import TrainSettings
from tests.bidora.conftest import spare
from tests.bidora.language_models import save_language_model

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SETTINGS = {"max_steps": 4, "eval_steps": 2, "record_weights": True}


@pytest.fixture(scope="module")
def classified(
    tiny_encoder: Path, labelled_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run of LoRA on the labelled texts."""
    own = {"model": str(tiny_encoder), "task": str(labelled_csv), "method": "lora"}
    return trained(tmp_path_factory.mktemp("runs") / "lora", own)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that learnt to write."""
    folder = tmp_path_factory.mktemp("written")
    base = save_language_model(folder / "base", "llama")
    names = ("Aromi", "Wrestlers", "Cotto")
    rows = [f"name [ {n} ] {f},{n} serves {f}" for n in names for f in ("Thai", "food")]
    (folder / "pubs.csv").write_text("\n".join(["mr,ref", *rows, ""]), "utf-8")
    own = {"model": str(base), "task": str(folder / "pubs.csv"), "method": "lora"}
    texts = {"max_length": 40, "max_new_tokens": 4, "num_beams": 1}
    return trained(folder / "run", {**own, **texts})


def trained(folder: Path, own: dict[str, Any]) -> Path:
    given = {**SETTINGS, "learning_rate": 0.02, "output_dir": str(folder), **own}
    with pytest.MonkeyPatch.context() as patch:
        spare(patch)
        # METEOR is left out, whose program takes long to start.
        patch.setattr(shutil, "which", lambda name: None)
        train(TrainSettings.from_dict(given))
    return folder


def enlarged(run: Path, folder: Path, factor: float) -> Path:
    """Return a copy of a run, all of whose losses and scores are larger."""

    def larger(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: larger(v) for k, v in value.items()}
        return value * factor if isinstance(value, float) else value

    shutil.copytree(run, folder)
    file = folder / "history.jsonl"
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    file.write_text("".join(json.dumps(larger(r)) + "\n" for r in records), "utf-8")
    return folder


def drawn(runs: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the axes that were drawn: a row of ΔM, one of losses, one of scores."""
    figures: list[Any] = []

    def keep(self: Any, path: Path, **rest: Any) -> None:
        figures.append(self)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    analyze(runs, folder)
    return np.array(figures[0].axes).reshape(3, -1)


def heights(ax: Any) -> list[float]:
    return [float(y) for line in ax.get_lines() for y in line.get_ydata()]


def shown(ax: Any) -> set[str]:
    return {text.get_text() for text in ax.get_legend().get_texts()}


def test_larger_losses_and_scores_of_later_runs_are_in_sight(
    classified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = enlarged(classified, tmp_path / "larger", 3.0)
    for i, runs in enumerate([[classified, larger], [larger, classified]]):
        axes = drawn(runs, tmp_path / str(i), monkeypatch)
        for panels in axes[1:]:
            top = max(max(heights(ax)) for ax in panels)
            for ax in panels:
                assert ax.get_ylim() == panels[0].get_ylim()
                assert ax.get_ylim()[1] >= top
        for ax in axes[1]:
            assert ax.get_ylim()[0] == 0
        for loss, score in axes[1:].T:
            assert loss.get_xlim() == score.get_xlim()
            assert loss.get_xlim()[1] >= 4


def test_what_evaluations_judge_by_is_drawn_where_it_is_not_the_main_metric(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = json.loads((written / "metrics.json").read_text("utf-8"))
    assert metrics["metric"] == "bleu"
    ((_,), (loss,), (score,)) = drawn([written], tmp_path / "out", monkeypatch)
    assert score.get_ylabel() == "perplexity"
    curves = {line.get_label(): list(line.get_ydata()) for line in score.get_lines()}
    lines = (written / "history.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line).get("evaluation", {}) for line in lines]
    truth = [e["train"]["perplexity"] for e in found if "train" in e]
    assert len(truth) == 3  # before the first step, and after two and four
    assert curves.pop("train (all of it)") == truth
    # The test score is of the same metric.
    test = metrics["phases"][-1]["scores"]["test"]["perplexity"]
    assert curves == {f"this phase, test: {test:.3f}": [test]}
    assert shown(score) == {line.get_label() for line in loss.get_lines()} | {
        f"this phase, test: {test:.3f}"
    }


def test_every_line_of_both_panels_is_told_once(
    classified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(classified, folder)
    # A part whose score was not measured has a curve of its loss alone.
    part = {"phase": "train", "step": 2, "evaluation": {"held_back": {"loss": 1.0}}}
    with (folder / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(part) + "\n")
    ((_,), (loss,), (score,)) = drawn([folder], tmp_path / "out", monkeypatch)
    labels = {line.get_label() for ax in (loss, score) for line in ax.get_lines()}
    assert {"loss of each batch", "train (all of it)", "held_back (all of it)"} < labels
    assert shown(score) == labels
    assert len(score.get_legend().get_texts()) == len(labels)
