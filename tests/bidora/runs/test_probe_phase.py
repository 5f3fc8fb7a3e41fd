"""Phase 0 of a job: what it says, keeps and leaves alone."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from bidora.cli import _summary
from bidora.errors import UserError
from bidora.models import find_model, load_base, load_tokenizer
from bidora.probing import start
from bidora.runs.job import train
from bidora.runs.recorder import Recorder
from bidora.runs.settings import TrainSettings
from bidora.tasks.base import Schema
from bidora.tasks.registry import make_task
from tests.bidora.conftest import Finished, Heard, finish

Run = Callable[[str], Finished]

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture
def options(small_job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    few = {"max_steps": 2, "eval_steps": 8, "output_dir": str(tmp_path / "run")}
    return {**small_job, **few}


def told(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("Probe")]


# -- what it says ---------------------------------------------------------------------


def test_its_score_is_told_and_kept(finished: Run) -> None:
    run = finished("lora")
    metrics, result = run.read("metrics.json"), run.result.probe
    assert result is not None
    assert metrics["probe"]["scores"] == result.scores
    assert (result.name, result.steps, set(result.scores)) == ("probe", 0, {"test"})
    (line,) = told(run.told)
    score = result.test["accuracy"]
    assert line.startswith(f"Probe  accuracy {score:.3f} on test (a constant answer: ")
    assert [phase["name"] for phase in metrics["phases"]] == ["train"]
    assert metrics["trained_parameters"] == run.result.trained_parameters > 0
    records = [r for r in run.read("history.jsonl") if r["phase"] == "probe"]
    table = _summary(run.result).strip().splitlines()
    assert [row.split()[:2] for row in table[1:3]] == [["probe", "0"], ["train", "8"]]
    assert table[1].split()[3] == f"{score:.3f}"
    alone = _summary(finished("probe").result).strip().splitlines()
    assert [row.split()[0] for row in alone[:2]] == ["phase", "probe"]
    assert "probe" not in alone[2].split()[:1]
    assert [r["result"]["scores"] for r in records] == [result.scores]


def test_the_baseline_is_the_most_common_class(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """7 of 10 training and 2 of 5 test examples are birds."""
    rows = {
        "train": ["crow,bird\n"] * 7 + ["iron,metal\n"] * 3,
        "test": ["wren,bird\n"] * 2 + ["tin,metal\n"] * 3,
    }
    folder = tmp_path / "data"
    folder.mkdir()
    for part, lines in rows.items():
        (folder / f"{part}.csv").write_text("text,label\n" + "".join(lines))
    options.update(task=str(folder), method="probe", output_dir=str(tmp_path / "run"))
    for name in ("max_steps", "learning_rate", "per_device_train_batch_size"):
        del options[name]
    run = finish(**options)
    kept = run.read("metrics.json")["baseline"]
    assert kept == run.result.baseline
    assert kept["test"]["accuracy"] == pytest.approx(2 / 5)
    # F1 of birds, 2 of 5 right and both found: 4/7; of metal 0.
    assert kept["test"]["f1_macro"] == pytest.approx(2 / 7)
    assert "(a constant answer: 0.400)" in told(run.told)[0]


# -- the method -------------------------------------------------------------------------


def untouched(run: Finished, tiny_encoder: Path) -> dict[str, torch.Tensor]:
    """Return the values of the base model as it was loaded."""
    source = find_model(str(tiny_encoder))
    names = tuple(run.read("metrics.json")["label_names"])
    schema = Schema("classification", {}, names, "accuracy")
    task, tokenizer = make_task("classification"), load_tokenizer(source)
    return load_base(source, tokenizer, task, schema, seed=0).model.state_dict()


def test_the_method_trains_nothing(finished: Run, tiny_encoder: Path) -> None:
    run = finished("probe")
    own, base = run.job.model.state_dict(), untouched(run, tiny_encoder)
    changed = {name for name in base if not torch.equal(own[name], base[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert run.result.phases == (run.result.probe,)
    assert run.trainer is None  # which keeps the first that trains
    assert {r["phase"] for r in run.read("history.jsonl")} == {"probe"}
    assert not (run.folder / "checkpoints").exists()
    assert (run.folder / "curves.png").exists()
    right = run.logits().argmax(-1) == torch.tensor(run.job.sets["test"]["labels"])
    assert run.result.phases[0].test["accuracy"] == pytest.approx(
        right.double().mean().item()
    )


def test_the_method_takes_no_steps_to_try(options: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"--max-steps.* no meaning with --method probe"
    ):
        train(TrainSettings(**options, method="probe"))


# -- where training starts -----------------------------------------------------------------


def first_head(run: Finished) -> dict[str, torch.Tensor]:
    begins = run.values["train begins"]
    return {n.rsplit(".", 1)[1]: v for n, v in begins.items() if "classifier" in n}


def test_training_starts_from_the_probe(finished: Run, tiny_encoder: Path) -> None:
    run, fitted = finished("lora"), finished("probe").job.model.classifier
    head = first_head(run)
    assert torch.equal(head["weight"], fitted.weight)
    assert torch.equal(head["bias"], fitted.bias)
    assert not torch.equal(
        head["weight"], untouched(run, tiny_encoder)["classifier.weight"]
    )


def test_a_random_start_is_that_of_the_seed(
    options: dict[str, Any], tiny_encoder: Path
) -> None:
    run = finish(**options, method="lora", start="random")
    base = untouched(run, tiny_encoder)
    for name, value in first_head(run).items():
        assert torch.equal(value, base[f"classifier.{name}"])
    assert run.result.probe is not None  # and the probe was scored all the same


def test_a_random_start_stays_random_in_a_search(
    options: dict[str, Any], tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: dict[str, torch.Tensor] = {}

    def keep(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            model = self.trainer.model.get_base_model()
            weight = model.classifier.modules_to_save["default"].weight
            heads[self.phase] = weight.detach().clone()

    monkeypatch.setattr(Recorder, "on_step_begin", keep)
    monkeypatch.setattr(Recorder, "on_step_end", lambda *a, **k: None)
    options.update(max_steps=4, budget="full", outer_every=2, outer_warmup_steps=0)
    run = finish(**options, start="random")
    truth = untouched(run, tiny_encoder)["classifier.weight"]
    assert set(heads) == {"search", "retrain"}
    assert all(torch.equal(head, truth) for head in heads.values())


@pytest.mark.parametrize(("method", "fits"), [("lora", (1, 1)), ("bidora", (2, 1))])
def test_who_looks_changes_nothing(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    fits: tuple[int, int],
) -> None:
    """Scores of the probe draw no number that the training would have drawn.

    A search fits a head of its own; the probe on all is fitted for who looks.
    """
    files, fitted = [], []
    fit = start.fit_linear
    monkeypatch.setattr(start, "fit_linear", lambda f: fitted.append(f) or fit(f))
    if method == "bidora":
        options.update(budget="full", outer_every=2, outer_warmup_steps=0)
        options.update(retrain="warm")
    for looks, times in zip((True, False), fits, strict=True):
        fitted.clear()
        options.update(output_dir=str(tmp_path / str(looks)), method=method)
        settings = TrainSettings(**options, lora_dropout=0.3)
        result = train(settings, score_probe=looks)
        assert (result.probe is not None) == looks
        assert len(fitted) == times
        files.append((tmp_path / str(looks) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_where_no_probe_can_be_fitted_it_says_so(
    options: dict[str, Any], tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls: Any = type(AutoModelForSequenceClassification.from_pretrained(tiny_encoder))
    forward = cls.forward

    @functools.wraps(forward)
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits / 3
        return found

    monkeypatch.setattr(cls, "forward", scaled)
    options["max_steps"] = 4
    options.update(budget="full", outer_every=2, outer_warmup_steps=0)
    run = finish(**options)  # its fresh retraining would fit a probe too
    (line,) = told(run.told)
    assert line.startswith("Probe  none: no probe can be fitted: the outputs of Bert")
    assert run.read("metrics.json")["probe"] is None
    (record,) = (r for r in run.read("history.jsonl") if r["phase"] == "probe")
    assert "no probe can be fitted" in record["impossible"]
    head = {n: v for n, v in run.values["search begins"].items() if "classifier" in n}
    base = untouched(run, tiny_encoder)
    for name, value in head.items():
        assert torch.equal(value, base[f"classifier.{name.rsplit('.', 1)[1]}"])
    alone = {n: v for n, v in options.items() if n in ("model", "task", "max_length")}
    with pytest.raises(UserError, match="no probe can be fitted"):
        train(
            TrainSettings(
                **alone, method="probe", output_dir=options["output_dir"] + "2"
            )
        )


# -- what must not be seen, and what goes on -------------------------------------------


@pytest.mark.parametrize("method", ["lora", "probe"])
def test_test_examples_stay_unseen(
    options: dict[str, Any], method: str, labelled_rows: list[tuple[str, str]]
) -> None:
    if method == "probe":
        for name in ("max_steps", "learning_rate", "per_device_train_batch_size"):
            del options[name]
    heard = Heard()
    settings = TrainSettings(**options, method=method)
    result = train(settings, heard, score_test=False)
    assert all("test" not in phase.scores for phase in result.phases)
    assert result.probe is not None
    assert result.probe.scores == result.baseline == {}
    assert told(heard.lines)[0].startswith("Probe  not scored: a linear head")
    folder = Path(result.folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    for found in (*metrics["phases"], metrics["probe"]):
        assert "test" not in found["scores"]
    assert metrics["baseline"] == {}
    for line in (folder / "history.jsonl").read_text().splitlines():
        assert "test" not in json.loads(line).get("result", {}).get("scores", {})
        assert "test" not in json.loads(line).get("evaluation", {})
    assert "test" not in json.loads((folder / "split.json").read_text())["examples"]
    assert "| test |" not in (folder / "README.md").read_text()


def test_a_resumed_run_keeps_the_result(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    options.update(method="lora", max_steps=4, eval_steps=2)
    end = Recorder.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise Stopped
        end(self, args, state, control, **rest)

    settings = TrainSettings(**options)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", stop)
        with pytest.raises(Stopped):
            train(settings)
    folder = Path(options["output_dir"])
    history = [json.loads(r) for r in (folder / "history.jsonl").open()]
    (record,) = (r for r in history if r["phase"] == "probe")
    heard = Heard()
    result = train(settings, heard, resume=True)
    assert not told(heard.lines)  # it is not fitted again
    assert result.probe is not None
    assert (
        json.loads((folder / "metrics.json").read_text())["probe"] == record["result"]
    )
    assert result.baseline == record["baseline"]
    phases = Counter(
        json.loads(line)["phase"] for line in (folder / "history.jsonl").open()
    )
    assert phases["probe"] == 1
