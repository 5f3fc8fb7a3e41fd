"""`bidora estimators`: what it prints, what it leaves, and how it says no."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import bidora.runs.comparison
from bidora.cli import main
from bidora.runs.comparison import advice, compare
from bidora.runs.comparison_settings import (
    REFERENCES,
    CompareSettings,
    default_estimators,
)
from hypergrad import SecondOrderError, estimator_names, make_estimator
from hypergrad.compare import Comparison, Reference, Row
from hypergrad.reference import ReferenceName

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

Run = Callable[..., int]


@pytest.fixture
def run(tiny_encoder: Path, labelled_csv: Path, tmp_path: Path) -> Run:
    """Return a function that runs `bidora estimators` on the tiny encoder."""

    def run(*options: str, folder: str = "run") -> int:
        arguments = ["--model", str(tiny_encoder), "--task", str(labelled_csv)]
        arguments += ["--output-dir", str(tmp_path / folder), "--repeats", "1"]
        arguments += ["--target-modules", "query"]  # two layers of thirteen: less time
        return main(["estimators", *arguments, *options])

    return run


@pytest.mark.slow  # each of fourteen, on a real model
def test_all_estimators_end_in_a_table_a_picture_and_advice(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--target-modules", "value") == 0
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "compare" in shown.err  # the progress bar
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "settings.json",
        "split.json",
        "history.jsonl",
        "comparison.json",
        "comparison.csv",
        "comparison.png",
    }
    data = json.loads((folder / "comparison.json").read_text("utf-8"))
    rows = {row["label"]: row for row in data["rows"]}
    assert set(rows) == set(default_estimators())
    assert set(estimator_names()) - {"implicit"} <= set(rows)
    assert {
        label: row["failure"] for label, row in rows.items() if row["failure"]
    } == {}
    lines = shown.out.splitlines()
    own = [line for line in lines if not line.startswith(("Task", "Model", "Saved"))]
    assert all(len(line) <= 100 for line in own)
    for label, row in rows.items():
        starts = (f"{label} ", f"{label[:28]}…")
        (line,) = [one for one in lines if one[2:].startswith(starts)]
        assert f"{row['forwards']:.4g}" in line.split(), label
    assert "Reference: Unrolled(num_steps=10)" in shown.out
    assert "This holds for one batch" in shown.out
    assert str(folder) in shown.out
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "comparison.csv").open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert [one["label"] for one in listed] == [row["label"] for row in data["rows"]]
    history = [
        json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in history] == list(range(1, 41))
    # The exact product *is* unrolling one step, which is what `auto` takes.
    same = ("indirect_error", "indirect_cosine", "forwards")
    assert [rows["auto"][n] for n in same] == [
        rows["sama:product=exact"][n] for n in same
    ]
    # B is not 0 any more: the steps have an effect that one step sees the direction of.
    assert rows["sama"]["indirect_cosine"] > 0
    cosines = [rows[n]["indirect_cosine"] for n in ("sama", "sama:product=exact")]
    # The bar of finite differences in float32.
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-3)


def test_options_reach_the_comparison(run: Run, tmp_path: Path) -> None:
    options = "--estimators unrolled:num_steps=2,neumann:num_terms=3:damping=0.5"
    options += " --steps 7 --lookback 3 --reference cg --seed 4 --lora-r 2"
    options += " --per-device-train-batch-size 8 --per-device-outer-batch-size 4"
    options += " --learning-rate 0.01 --max-length 9"
    assert run(*options.split()) == 0
    folder = tmp_path / "run"
    settings = json.loads((folder / "settings.json").read_text())
    wanted = {
        "estimators": ["unrolled:num_steps=2", "neumann:num_terms=3:damping=0.5"],
        "steps": 7,
        "lookback": 3,
        "reference": "cg",
        "repeats": 1,
        "seed": 4,
        "lora_r": 2,
        "per_device_train_batch_size": 8,
        "per_device_outer_batch_size": 4,
        "learning_rate": 0.01,
        "max_length": 9,
    }
    assert {name: settings[name] for name in wanted} == wanted
    data = json.loads((folder / "comparison.json").read_text())
    assert data["reference"]["estimator"].startswith("ConjugateGradient(")
    rows = {row["label"]: row for row in data["rows"]}
    assert repr(make_estimator("neumann", num_terms=3, damping=0.5)) in {
        row["estimator"] for row in rows.values()
    }
    assert rows["unrolled:num_steps=2"]["n_hvp"] == 2
    assert data["settings"]["steps"] == 7


def test_an_estimator_that_fails_is_listed(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--steps", "5", "--lookback", "3")
    assert run("--estimators", "unrolled:num_steps=4,darts", *short) == 0
    assert "- unrolled:num_steps=4 failed: ValueError: " in capsys.readouterr().out
    data = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [bool(row["failure"]) for row in data["rows"]] == [False, True]


def test_same_seed_same_numbers(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    found = []
    for folder in ("a", "b"):
        settings = CompareSettings(
            model=str(tiny_encoder),
            task=str(labelled_csv),
            output_dir=str(tmp_path / folder),
            estimators={"darts": ("darts", {}), "cg": ("cg", {})},
            steps=5,
            lookback=3,
            repeats=1,
            target_modules=("query",),
        )
        found.append(compare(settings).comparison)
    assert torch.equal(state, torch.get_rng_state())
    for one, two in zip(found[0].rows, found[1].rows, strict=True):
        for name in ("indirect_error", "cosine", "forwards", "peak_bytes"):
            assert getattr(one, name) == getattr(two, name)


def test_earlier_run_is_replaced_only_when_asked(run: Run, capsys: Any) -> None:
    short = ("--steps", "4", "--lookback", "2")
    assert run("--estimators", "first-order", *short) == 0
    assert run("--estimators", "darts", *short) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--estimators", "darts", "--overwrite", *short) == 0


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--estimators", "magic"], ["--estimators magic", "'magic' is unknown"]),
        (["--estimators", "cg:sweets=1"], ["--estimators cg:sweets=1", "sweets"]),
        (["--estimators", "cg:max_iter"], ["--estimators", "NAME=VALUE"]),
        (["--estimators", "cg:max_iter=0"], ["--estimators cg:max_iter=0", "max_iter"]),
        (["--estimators", "cg,cg"], ["'cg' twice"]),
        (["--estimators", " , "], ["names none"]),
        (["--reference", "magic"], ["'magic'", "auto, dense, cg, unrolled"]),
        (["--repeats", "0"], ["--repeats is 0"]),
        (["--lookback", "0"], ["--lookback is 0"]),
        (["--steps", "5"], ["--steps 5", "--lookback 10", "12 steps"]),
        (
            ["--per-device-train-batch-size", "0"],
            ["--per-device-train-batch-size is 0"],
        ),
        (["--learning-rate", "nan"], ["--learning-rate is nan"]),
        (["--task", "missing.csv"], ["there is no file missing.csv"]),
        (["--model", "./missing"], ["no model folder ./missing"]),
        (["--device", "abacus"], ["--device abacus"]),
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


def test_a_step_that_diverges_names_the_rate(run: Run, capsys: Any) -> None:
    assert run("--learning-rate", "1e30", "--estimators", "first-order") == 2
    shown = capsys.readouterr().err
    assert "of the warm-up" in shown
    assert "lower --learning-rate" in shown


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            torch.OutOfMemoryError("tried to allocate"),
            2,
            "smaller --per-device-train-batch-size",
        ),
        (SecondOrderError("the reference needs it"), 2, "the reference needs it"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_known_failures_are_sentences(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(bidora.runs.comparison, "compare_estimators", fail)
    assert run("--estimators", "darts", "--steps", "4", "--lookback", "2") == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_help_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["estimators", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in CompareSettings.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown


def test_references_are_those_of_hypergrad() -> None:
    assert get_args(ReferenceName) == REFERENCES


def row(label: str, near: float | None, **more: Any) -> Row:
    more = {"answers": "steps", "forwards": 6.0, "indirect_error": 0.5, **more}
    return Row(label, "", indirect_cosine=near, **more)


@pytest.mark.parametrize(
    ("rows", "first"),
    [
        ([row("a", 0.995, forwards=9.0), row("b", 0.992)], "Cheapest with"),
        ([row("a", 0.7), row("b", 0.6)], "None reaches a cosine of 0.99"),
        ([row("a", None)], "No estimator gave an indirect term"),
    ],
)
def test_advice(rows: list[Row], first: str) -> None:
    against = Reference("Unrolled(num_steps=5)", "", "steps", 0.1)
    plain = row("first-order", None, answers="neither", cosine=0.9951, forwards=2.0)
    text = advice(Comparison((*rows, plain), against, 0.1))
    assert text[0].startswith(first)
    if first == "Cheapest with":
        assert "indirect term: b (cosine 0.9920, 6 forward passes)" in text[0]
    if first.startswith("None"):
        assert "nearest is a (cosine 0.7000" in text[0]
    assert "first-order has a cosine of 0.9951 in the total" in text[1]
    assert "one batch" in text[-1]
