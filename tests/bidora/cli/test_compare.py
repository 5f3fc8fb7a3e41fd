"""`bidora compare`: what it prints, what it leaves, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import bidora
from bidora.cli import main
from bidora.study.plan import Plan, Study
from bidora.study.records import read_records
from bidora.study.settings import StudySettings

ROOT = Path(__file__).parents[3]


@pytest.fixture
def grid_file(tmp_path: Path, tiny_encoder: Path, labelled_csv: Path) -> Path:
    """Return a grid of two methods on a file without validation examples."""
    grid = {
        "settings": {
            "model": str(tiny_encoder),
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "max_length": 12,
            "max_validation_samples": 10,
        },
        "tasks": {"words": {"task": str(labelled_csv)}},
        "methods": {"probe": {}, "lora": {"sweep": {"learning_rate": [0.003, 0.01]}}},
        "sizes": [20],
        "seeds": [0],
        "equal": ["steps", "time"],
        "reference": "lora",
    }
    path = tmp_path / "words.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def test_help_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from bidora.cli import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'scipy', 'transformers', 'yaml')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for option in ("--output-dir", "--dry-run", "--time-limit", "--retry-failed"):
        assert option in done.stdout
    assert "GRID.yaml" in done.stdout


def test_the_grid_of_the_help_is_one(tmp_path: Path) -> None:
    from bidora.cli.compare import EXAMPLES

    text = EXAMPLES.split("a grid:\n")[1].split("\nexamples:")[0]
    (tmp_path / "grid.yaml").write_text(text)
    grid = StudySettings(tmp_path / "grid.yaml").read()
    assert [method.name for method in grid.methods] == ["probe", "lora", "dora"]


def test_a_dry_run_lists_the_runs_and_writes_nothing(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(grid_file), "--output-dir", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("words ")]
    assert rows == [
        ["words", "probe", "20", "-", "1", "1", "2"],
        ["words", "lora", "20", "2", "1", "-", "3"],
    ]
    assert "5 runs to do, 1 at a time: about " in shown
    assert "probe has no use for" in shown
    assert shown.endswith("Nothing was trained or written.\n")
    assert not out.exists()


def test_options_reach_the_comparison(
    grid_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[StudySettings] = []

    def compare(settings: StudySettings, listener: Any) -> Study:
        seen.append(settings)
        listener.phase("compare", 1)
        return Plan(settings.read()).study(["A note that is told."])

    monkeypatch.setattr("bidora.study.runner.compare", compare)
    words = "--output-dir o --processes 3 --time-limit 1.5 --overwrite --retry-failed"
    words += " --only-tasks words --only-methods lora,probe"
    assert main(["compare", str(grid_file), *words.split()]) == 0
    assert seen == [
        StudySettings(
            str(grid_file),
            output_dir="o",
            processes=3,
            time_limit=1.5,
            overwrite=True,
            only_tasks=("words",),
            only_methods=("lora", "probe"),
            retry_failed=True,
        )
    ]
    assert "A note that is told.\n" in capsys.readouterr().out
    assert StudySettings(str(grid_file)).folder == Path("runs/compare-words")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "there is no grid nowhere.yaml. Name a YAML file"),
        (["GRID", "--only-methods", "lorra"], "the grid has no such name"),
        (["GRID", "--time-limit", "-3"], "--time-limit is -3.0; give minutes"),
        (["GRID", "--processes", "0"], "--processes is 0"),
        (["GRID", "--steps", "3"], "unrecognized arguments"),
        ([], "the following arguments are required: GRID.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(
    grid_file: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(grid_file) if word == "GRID" else word for word in words]
    try:
        code = main(["compare", *given])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith("bidora: error: ")
    assert shown.count("\n") == 1


def test_ctrl_c_tells_where_the_records_are(
    grid_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(settings: StudySettings, listener: Any) -> Study:
        raise KeyboardInterrupt

    monkeypatch.setattr("bidora.study.runner.compare", compare)
    assert main(["compare", str(grid_file)]) == 130
    shown = capsys.readouterr()
    assert "What was run is in runs/compare-words; the same command" in shown.out
    assert "stopped by Ctrl-C" in shown.err


def test_python_has_it_too() -> None:
    from bidora.study.runner import compare

    assert bidora.compare is compare
    assert bidora.StudySettings is StudySettings


@pytest.mark.slow
def test_a_real_comparison_from_the_command_to_the_records(
    grid_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stub = "import sys, types; m = types.ModuleType('bidora.study.report'); "
    stub += "m.write_report = lambda study, folder: ['report.html']; "
    stub += "sys.modules['bidora.study.report'] = m; "
    code = f"{stub}from bidora.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["compare", str(grid_file), "--output-dir", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"Report {out}: report.html" in done.stdout
    records, torn = read_records(out / "runs")
    assert torn == []
    assert {r.error for r in records} == {""}
    by_kind = {(r.cell.method, r.cell.purpose): r for r in records}
    # The probe takes no steps, so that its run serves for equal time too.
    assert set(by_kind) == {("probe", "steps"), ("lora", "sweep"), ("lora", "steps")}
    assert len(records) == 4
    lora, probe = by_kind["lora", "steps"], by_kind["probe", "steps"]
    swept = by_kind["lora", "sweep"]
    assert (swept.test, swept.probe, swept.baseline) == ({}, {}, {})
    assert swept.validation["accuracy"] == pytest.approx(
        round(10 * swept.validation["accuracy"]) / 10  # of ten examples
    )
    assert lora.settings["learning_rate"] in (0.003, 0.01)
    assert (lora.steps, lora.settings["max_train_samples"]) == (4, 20)
    assert lora.curve[-1].seconds == pytest.approx(lora.seconds, rel=0.02)
    assert lora.curve[-1].validation == lora.validation["accuracy"]
    assert probe.score == lora.probe["accuracy"]
    assert probe.baseline == lora.baseline
    assert probe.trained_parameters < lora.trained_parameters
    assert probe.steps == 0
    json.dumps([r.to_dict() for r in records], allow_nan=False)
