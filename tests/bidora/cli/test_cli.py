"""The command line: what it prints, what it leaves, and how it says no."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification

from bidora.cli import main
from bidora.cli.progress import ProgressListener
from bidora.runs.settings import TrainSettings
from hypergrad import SecondOrderError, estimator_names

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

Run = Callable[..., int]


@pytest.fixture
def run(tiny_encoder: Path, labelled_csv: Path, tmp_path: Path) -> Run:
    """Return a function that runs `bidora train` on the tiny encoder, with options."""

    def run(*options: str, folder: str = "run") -> int:
        arguments = ["train", "--model", str(tiny_encoder), "--task", str(labelled_csv)]
        arguments += ["--output-dir", str(tmp_path / folder), "--max-steps", "8"]
        arguments += ["--target-modules", "query"]  # two layers of thirteen: less time
        return main([*arguments, *options])

    return run


@pytest.mark.parametrize("method", ["bidora", "dora", "lora"])
def test_methods_end_with_a_table_and_an_adapter(
    run: Run, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--method", method) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("Type   classification: ")
    assert lines[1].startswith("Task ")
    assert "48 training, 12 test examples" in lines[1]
    assert any(line.startswith("Model ") for line in lines)
    assert any(line.startswith("Time ") for line in lines)
    words = {line.split()[0] for line in lines if line.strip()}
    phases = {"search", "retrain"} if method == "bidora" else {"train"}
    assert phases <= words
    assert "PeftModel.from_pretrained(base, " in shown.out
    assert "loss: train" in shown.err  # the progress bar
    assert "Traceback" not in shown.err
    assert "LOAD REPORT" not in shown.err
    assert AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "run", num_labels=3
    )


def test_printed_scores_are_those_of_the_metrics(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--retrain-max-steps", "3") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for phase in metrics["phases"]:
        row = next(row for row in rows if row and row[0] == phase["name"])
        assert row[1] == str(phase["steps"])
        assert row[3] == f"{phase['scores']['test']['accuracy']:.3f}"
        assert row[4] == f"{phase['scores']['test']['f1_macro']:.3f}"


def test_options_reach_the_settings(run: Run, tmp_path: Path) -> None:
    options = "--lora-r 2 --lora-alpha 3 --target-modules query,key --outer-every 2"
    options += " --seed 5 --outer-learning-rate 0.001 --estimator neumann"
    options += " --estimator-setting num_terms=2 --estimator-setting product=exact"
    options += " --per-device-train-batch-size 4 --max-length 9"
    assert run(*options.split()) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    wanted = {
        "lora_r": 2,
        "lora_alpha": 3.0,
        "target_modules": ["query", "key"],
        "outer_every": 2,
        "seed": 5,
        "outer_learning_rate": 0.001,
        "estimator_settings": {"num_terms": 2, "product": "exact"},
        "per_device_train_batch_size": 4,
        "max_length": 9,
    }
    assert {name: settings[name] for name in wanted} == wanted


def test_help_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "plain PEFT adapter" in shown
    for option in ("--model", "--task", "--method", "--estimator", "--outer-every"):
        assert option in shown
    undocumented = set(TrainSettings.__dataclass_fields__) - {
        "estimator_settings",  # --estimator-setting, one at a time
        "trainer",  # trainer.FIELD=VALUE
    }
    for name in undocumented:
        assert "--" + name.replace("_", "-") in shown


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "train" in capsys.readouterr().err


def test_module_runs_and_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bidora", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("bidora", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("bidora ")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--no-such-option"], ["unrecognized arguments", "bidora train --help"]),
        (["--estimater=sama"], ["--estimater=sama (did you mean --estimator?)"]),
        (["--max-steps", "many"], ["--max-steps", "invalid int value: 'many'"]),
    ],
)
def test_misspelt_options_get_one_line(
    run: Run, options: list[str], messages: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert all(message in shown for message in messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--method", "qlora"], ["'qlora'", "'lora'", "houlsby"]),
        (["--estimator", "magic"], ["'magic'", *estimator_names()]),
        (["--estimator-setting", "num_terms"], ["NAME=VALUE"]),
        (
            ["--estimator", "neumann", "--estimator-setting", "num_terms=x"],
            ["--estimator neumann", "num_terms"],
        ),
        (["--estimator-setting", "sweets=1"], ["sweets"]),
        (["--max-steps", "0"], ["--max-steps is 0"]),
        (["--learning-rate", "-1"], ["--learning-rate is -1.0"]),
        (["--quoting", "loud"], ["--quoting 'loud'", "choose one of auto, csv, none"]),
        (["trainer.no_such=1"], ["'no_such'"]),
        (["trainer.output_dir=x"], ["trainer.output_dir is the job's own"]),
        (["trainer.learning_rate=1"], ["--learning-rate"]),
        (["what=1"], ["trainer.FIELD=VALUE"]),
        (["--config", "missing.yaml"], ["--config missing.yaml"]),
        (["--seed", "-1"], ["--seed is -1"]),
        (["--method", "lora", "--estimator", "cg"], ["no meaning with --method lora"]),
        (["--text-column", "words"], ["'words'", "'text', 'label'"]),
        (["--label-column", "words"], ["'words'", "'text', 'label'"]),
        (["--task", "missing.csv"], ["there is no file missing.csv"]),
        (["--task", "glue/sst3"], ["glue/sst2"]),
        (["--task", "docstrings", "--test-file", "x.csv"], ["--test-file"]),
        (["--test-file", "missing.csv"], ["there is no file missing.csv"]),
        (["--model", "./missing"], ["no model folder ./missing"]),
        (["--model", "someone/missing"], ["cannot be fetched", "--model FOLDER"]),
        (["--target-modules", "wings"], ["wings", "query"]),
        (["--max-length", "500"], ["--max-length 500", "24"]),
        (["--validation-fraction", "0.99"], ["too few"]),
        (["--device", "abacus"], ["--device abacus", "choose cpu"]),
    ],
)
def test_wrong_input_gets_a_sentence_and_code_2(
    run: Run,
    options: list[str],
    messages: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*options) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("bidora: error: ")
    assert shown.count("\n") == 1
    assert all(message in shown for message in messages), shown
    assert not (tmp_path / "run").exists()


def test_earlier_run_is_replaced_only_when_asked(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--method", "lora") == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert run("--method", "lora") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert run("--method", "lora", "--overwrite", "--seed", "1") == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["seed"] == 1


def stop_at_step(monkeypatch: pytest.MonkeyPatch, number: int, error: Any) -> None:
    """Let the progress of a run raise at a step."""
    progress = ProgressListener.step

    def step(self: Any, step: int, losses: dict[str, float]) -> None:
        if step == number:
            raise error
        progress(self, step, losses)

    monkeypatch.setattr("bidora.cli.progress.ProgressListener.step", step)


def test_ctrl_c_keeps_the_history_and_nothing_broken(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3, KeyboardInterrupt())
        assert run("--method", "bidora") == 130
    shown = capsys.readouterr().err
    assert "stopped by Ctrl-C at step" in shown
    assert "of the search phase" in shown
    assert "bidora train --resume --output-dir" in shown
    assert "Traceback" not in shown
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "settings.json",
        "task.json",
        "split.json",
        "history.jsonl",
        "checkpoints",
    }
    history = [
        json.loads(s) for s in (folder / "history.jsonl").read_text().splitlines()
    ]
    assert history[-1]["step"] == 3
    assert run("--method", "bidora") == 2
    assert run("--method", "bidora", "--overwrite") == 0
    assert (folder / "metrics.json").exists()


def artefacts(folder: Path) -> tuple[bytes, list[Any], list[Any]]:
    """Return a run's adapter, its history and its phases, without what took how long."""
    lines = (folder / "history.jsonl").read_text("utf-8").splitlines()
    phases = json.loads((folder / "metrics.json").read_text("utf-8"))["phases"]
    history = [json.loads(line) for line in lines]
    for entry in [*history, *phases, *(r["result"] for r in history if "result" in r)]:
        for name in ("seconds", "evaluation_seconds"):
            entry.pop(name, None)
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    return adapter, history, phases


@pytest.mark.parametrize(
    ("method", "stops"),
    [
        # Before the first checkpoint; at step 6, begun anew; at step 3 of the retraining.
        ("bidora", [3, 9, 16]),
        ("lora", [5]),
        ("dora", [7]),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    stops: list[int],
) -> None:
    options = ["--method", method, "--eval-steps", "4"]
    options += ["--budget", "full"] if method == "bidora" else []
    assert run(*options, folder="whole") == 0
    steps, step = iter(range(1, 99)), ProgressListener.step

    def stop(self: Any, number: int, losses: dict[str, float]) -> None:
        if next(steps) in stops:
            raise KeyboardInterrupt
        step(self, number, losses)

    monkeypatch.setattr(ProgressListener, "step", stop)
    assert run(*options, folder="run") == 130
    words = ["train", "--resume", "--output-dir", str(tmp_path / "run")]
    for _ in stops[1:]:
        assert main(words) == 130
    assert main(words) == 0
    assert artefacts(tmp_path / "run") == artefacts(tmp_path / "whole")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_cannot_be_resumed_is_said(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def complaint(*options: str) -> str:
        folder = str(tmp_path / "run")
        assert main(["train", "--resume", "--output-dir", folder, *options]) == 2
        return capsys.readouterr().err

    assert "holds no run of bidora" in complaint()
    with monkeypatch.context() as patch:
        stop_at_step(patch, 5, KeyboardInterrupt())
        assert run() == 130
    capsys.readouterr()
    assert "--max-steps was 8, not 9" in complaint("--max-steps", "9")
    assert "leave one out" in complaint("--overwrite")
    settings = tmp_path / "run" / "settings.json"
    text = settings.read_text("utf-8")
    settings.write_text(text.replace('"max_steps"', '"max_stops"'), "utf-8")
    assert "cannot be read as the settings of a run" in complaint()
    settings.write_text(text, "utf-8")
    assert main(["train", "--resume", "--output-dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert "is finished" in complaint()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("tried to allocate"),
            "smaller --per-device-train-batch-size",
        ),
        (SecondOrderError("needs a second derivative"), "needs a second derivative"),
    ],
)
def test_known_failures_are_sentences(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    message: str,
) -> None:
    stop_at_step(monkeypatch, 2, error)
    assert run() == 2
    shown = capsys.readouterr().err
    assert "bidora: error: " in shown
    assert message in shown


def test_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_step(monkeypatch, 2, AttributeError("a bug"))
    with pytest.raises(AttributeError, match="a bug"):
        run()


def test_libraries_are_as_talkative_as_before(run: Run) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert run("--method", "lora") == 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_threads_wait_briefly_unless_told_otherwise() -> None:
    code = "\n".join(
        (
            "import os, sys",
            "from bidora.cli import main",
            "main(['train', '--max-steps', '0'])",
            "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)",
        )
    )

    def shown(**given: str) -> str:
        kept = {n: v for n, v in os.environ.items() if n != "GOMP_SPINCOUNT"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**kept, **given},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert shown() == "10000 False"
    assert shown(GOMP_SPINCOUNT="7") == "7 False"
    assert shown(OMP_WAIT_POLICY="PASSIVE") == "None False"
