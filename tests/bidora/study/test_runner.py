"""A comparison as it runs: what it leaves, what it survives, and how it says no."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.runs.results import Listener
from bidora.study.folder import StudyFolder
from bidora.study.outlook import look_ahead
from bidora.study.plan import Study
from bidora.study.pool import cores
from bidora.study.records import Cell, Point, Record, read_records, write_record
from bidora.study.runner import compare
from bidora.study.settings import StudySettings
from bidora.trainer.lock import FolderLock
from tests.bidora.conftest import Heard
from tests.bidora.study import stand_ins

pytestmark = pytest.mark.usefixtures("reported")

Grid = Callable[..., dict[str, Any]]
SWEPT: dict[str, Any] = {"sweep": {"learning_rate": [0.02, 0.01]}}


class Counting(Listener):
    """Keeps how far a comparison said it was."""

    def __init__(self) -> None:
        self.total = 0
        self.done: list[int] = []
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def phase(self, name: str, steps: int) -> None:
        self.total = steps

    def working_on(self, step: int, what: str) -> None:
        self.done.append(step)


def files(folder: Path) -> dict[str, int]:
    """Return the records by path, with the time that each was written."""
    found = (folder / "runs").rglob("*.json")
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in found}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Study]:
    """Return a function that runs a grid with a stand-in for the training."""

    def run(
        grid: Any,
        train: Any = stand_ins.quick,
        listener: Listener | None = None,
        **options: Any,
    ) -> Study:
        options = {"output_dir": str(tmp_path / "out"), **options}
        return compare(StudySettings(grid, **options), listener, train=train)

    return run


# -- a whole one --------------------------------------------------------------------


def test_a_comparison_leaves_a_record_of_every_run_and_a_report(
    run: Callable[..., Study],
    small_grid: Grid,
    tmp_path: Path,
    reported: list[Study],
) -> None:
    methods = {"lora": SWEPT, "dora": {}, "rslora": {}}
    heard = Counting()
    study = run(
        small_grid(methods=methods, equal=["steps", "time"], processes=2),
        listener=heard,
    )
    out = tmp_path / "out"
    # Two trials; two seeds of three methods; two of dora, which takes twice the time.
    assert len(files(out)) == 2 + 6 + 2
    assert {p.name for p in out.iterdir()} == {
        "grid.yaml",
        "log.txt",
        "report.html",
        "runs",
    }
    assert reported == [study]
    assert heard.lines[-1] == f"Report {out}: report.html"
    assert heard.done[-1] == heard.total == 12
    assert heard.done == sorted(heard.done)
    group = ("words", "lora", 0)
    assert study.chosen[group] == (("learning_rate", 0.01),)
    assert study.served == {group, ("words", "rslora", 0)}
    by_cell = {record.cell: record for record in study.records}
    of_dora = by_cell[Cell("words", "dora", 0, 1, "time")]
    assert (of_dora.steps, of_dora.seconds) == (5, 4.0)
    one = by_cell[Cell("words", "lora", 0, 1, "steps", (("learning_rate", 0.01),))]
    assert one == Record(
        one.cell,
        one.settings,
        metric="accuracy",
        test={"accuracy": 0.501, "loss": 1.0},
        validation={"accuracy": 0.9, "loss": 1.0},
        probe={"accuracy": 0.4},
        baseline={"accuracy": 0.25},
        steps=10,
        seconds=4.0,
        total_seconds=0.5,
        trained_parameters=7,
        curve=(Point("train", 0, 0.0, 0.25), Point("train", 2, 4.0, 0.9)),
        environment=one.environment,
        data=one.data,
    )
    assert one.data.startswith("40 train, 12 validation, 8 test, sha256 ")
    assert {record.data for record in study.records} == {one.data}
    assert one.settings["learning_rate"] == 0.01
    assert one.settings["output_dir"] is None
    # What the environment asks for goes before: it may be set where tests run.
    share = os.environ.get("OMP_NUM_THREADS")
    assert one.environment == {"threads": share or str(max(1, cores() // 2))}
    assert multiprocessing.active_children() == []


def test_a_sweep_sees_no_test_examples(
    run: Callable[..., Study], small_grid: Grid
) -> None:
    study = run(small_grid(methods={"lora": SWEPT}))
    swept = [r for r in study.records if r.cell.purpose == "sweep"]
    assert len(swept) == 2
    assert all((r.test, r.probe, r.baseline) == ({}, {}, {}) for r in swept)
    assert all(r.validation for r in swept)


def test_a_run_that_is_not_finite_is_not_chosen(
    run: Callable[..., Study], small_grid: Grid
) -> None:
    methods = {"lora": {"sweep": {"learning_rate": [0.02, 0.05]}}}
    study = run(small_grid(methods=methods), stand_ins.diverging)
    assert study.chosen["words", "lora", 0] == (("learning_rate", 0.05),)


# -- what fails ---------------------------------------------------------------------


def test_a_run_that_fails_is_counted_and_the_others_go_on(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    heard = Heard()
    study = run(small_grid(seeds=[0, 1, 2]), stand_ins.failing, heard)
    errors = {(r.cell.method, r.cell.seed): r.error for r in study.records if r.failed}
    assert errors == {
        ("lora", 1): "UserError: the loss is nan",
        ("dora", 1): "UserError: the loss is nan",
    }
    assert len(study.records) == 6
    assert any(n.startswith("2 of 6 runs failed, such as") for n in study.notes)
    assert sum(line.startswith("Failed ") for line in heard.lines) == 2
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "The learning rate is probably too high" in log
    assert "Traceback" in log


def test_failed_runs_are_run_again_when_asked_for(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid(), stand_ins.failing)
    before = files(tmp_path / "out")
    heard = Heard()
    assert any(r.failed for r in run(small_grid(), listener=heard).records)
    assert files(tmp_path / "out") == before
    assert any("2 run(s) of an earlier start; --retry-failed" in x for x in heard.lines)
    study = run(small_grid(), retry_failed=True)
    assert not any(r.failed for r in study.records)
    after = files(tmp_path / "out")
    assert {p for p in after if after[p] != before[p]} == {
        "runs/words/lora/steps-all-seed1.json",
        "runs/words/dora/steps-all-seed1.json",
    }


def test_a_setting_of_failed_runs_alone_is_put_right_by_running_them_again(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid(methods={"lora": {}, "dora": {"learning_rate": 0.5}}),
        stand_ins.failing)  # fmt: skip
    right = small_grid(methods={"lora": {}, "dora": {"learning_rate": 0.01}})
    with pytest.raises(
        UserError,
        match=r"has a failed run of dora on words \(seed 0\) with learning_rate: 0\.5, "
        r"and the grid gives it 0\.01 now; .*Run again what failed with --retry-failed",
    ) as caught:
        run(right)
    assert "--overwrite" not in str(caught.value)
    before = files(tmp_path / "out")
    study = run(right, retry_failed=True)
    assert not any(record.failed for record in study.records)
    after = files(tmp_path / "out")
    kept = {path for path in after if after[path] == before[path]}
    assert kept == {"runs/words/lora/steps-all-seed0.json"}
    # Where a run that ended well differs too, that remedy would be none.
    run(right, stand_ins.failing, overwrite=True)
    wrong = small_grid(methods={"lora": {}, "dora": {"learning_rate": 0.02}})
    with pytest.raises(UserError, match=r"has a run of dora .*\(seed 0\).*--overwrite"):
        run(wrong)


def test_a_method_whose_every_trial_fails_is_shown(
    run: Callable[..., Study], small_grid: Grid
) -> None:
    methods = {"lora": {}, "dora": {"sweep": {"learning_rate": [0.5]}}}
    methods["rslora"] = {
        "sweep": {"learning_rate": [0.5, 0.5001], "weight_decay": [0.5]}
    }
    study = run(small_grid(methods=methods, sweep={"seeds": [1]}, seeds=[0]),
                stand_ins.failing)  # fmt: skip
    assert ("words", "rslora", 0) not in study.chosen
    last = [r for r in study.records if r.cell.method == "rslora"]
    assert [r.cell.purpose for r in last] == ["steps", "sweep", "sweep"]
    assert all(r.failed for r in last)


def test_a_process_that_dies_is_a_failed_run(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    study = run(small_grid(seeds=[0, 1, 2], processes=2), stand_ins.dying)
    errors = {(r.cell.method, r.cell.seed): r.error for r in study.records if r.failed}
    assert set(errors) == {("lora", 1), ("dora", 1)}
    assert all("ended by SIGKILL, as systems do" in error for error in errors.values())
    assert len(study.records) == 6
    found, torn = read_records(tmp_path / "out" / "runs")
    assert (len(found), torn) == (6, [])
    assert len({record.data for record in found}) == 1
    assert not (tmp_path / "out" / ".running").exists()


def test_a_run_that_leaves_by_sys_exit_is_a_failed_run(
    run: Callable[..., Study], small_grid: Grid
) -> None:
    study = run(small_grid(), stand_ins.leaving)
    errors = {(r.cell.method, r.cell.seed): r.error for r in study.records if r.failed}
    assert errors == {("lora", 1): "SystemExit: 3", ("dora", 1): "SystemExit: 3"}
    assert len(study.records) == 4


def test_a_record_that_cannot_be_written_is_told_in_a_sentence(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path, reported: list[Study]
) -> None:
    place = tmp_path / "out" / "runs" / "words"
    run(small_grid(methods={"lora": {}}))
    (place / "dora").write_text("in the way")
    with pytest.raises(
        UserError, match=r"steps-all-seed0\.json cannot be written \(.*Make room on"
    ):
        run(small_grid())
    assert len(reported) == 2
    (place / "dora").unlink()
    assert len(run(small_grid()).records) == 4


def test_a_report_that_cannot_be_written_is_told_in_a_sentence(
    run: Callable[..., Study],
    small_grid: Grid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_report(study: Study, folder: Path) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = sys.modules["bidora.study.report"]
    monkeypatch.setattr(module, "write_report", write_report)
    with pytest.raises(UserError, match=r"cannot be written .* \(No space left on"):
        run(small_grid())
    assert len(files(tmp_path / "out")) == 4


# -- going on -----------------------------------------------------------------------


def test_started_again_it_runs_only_what_is_missing_or_torn(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid(methods={"lora": SWEPT, "dora": {}}))
    out = tmp_path / "out"
    before = files(out)
    lost, torn, *_ = sorted(before)
    (out / lost).unlink()
    (out / torn).write_text((out / torn).read_text()[:-30])
    (out / ".running" / "tmp1").mkdir(parents=True)  # a killed run's
    heard = Heard()
    study = run(small_grid(methods={"lora": SWEPT, "dora": {}}), listener=heard)
    after = files(out)
    assert {p for p in after if after[p] != before[p]} == {lost, torn}
    (line,) = [line for line in heard.lines if line.startswith("Torn")]
    assert torn in line
    assert len(study.records) == 6
    assert not (out / ".running").exists()
    # With nothing to do, the data is checked, and nothing is said of it.
    silent = Heard()
    run(small_grid(methods={"lora": SWEPT, "dora": {}}), listener=silent)
    assert silent.lines == [f"Report {out}: report.html"]


def test_a_grid_may_grow(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path, parts: Path
) -> None:
    run(small_grid())
    before = files(tmp_path / "out")
    grown = small_grid(
        seeds=[0, 1, 2],
        methods={"lora": {}, "dora": {"tasks": ["words"]}, "rslora": {}},
        tasks={"words": {"task": str(parts)}, "more": {"task": str(parts)}},
        sizes=[20, "all"],
    )
    study = run(grown)
    assert len(study.records) == (3 + 2) * 3 * 2
    sizes = {r.cell.size: r.settings["max_train_samples"] for r in study.records}
    assert sizes == {0: None, 20: 20}
    after = files(tmp_path / "out")
    assert {p: after[p] for p in before} == before


def test_a_record_of_another_version_is_neither_deleted_nor_taken(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid())
    path = tmp_path / "out" / "runs" / "words" / "lora" / "steps-all-seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
    with pytest.raises(UserError, match=r"seed0\.json is whole and holds no record"):
        run(small_grid())
    assert "colour" in path.read_text()
    with pytest.raises(UserError, match=r"argument 'colour'\); another version may"):
        look_ahead(StudySettings(small_grid(), output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": 5}, "settings is '5', and no dict"),
        (
            {"test": {"accuracy": "high"}},
            r"test is .*high.*, and no dict\[str, float\]",
        ),
        ({"seconds": "4 s"}, "seconds is '4 s', and no float"),
        ({"steps": True}, "steps is 'True', and no int"),
        ({"curve": [{"phase": "train", "step": 1, "seconds": 1}]}, "'validation'"),
        (
            {"cell": {**vars(Cell("a", "b", 0, 0, "steps")), "purpose": "fun"}},
            "Purpose",
        ),
        (
            {"cell": {**vars(Cell("a", "b", 0, 0, "steps")), "trial": [["x", {}]]}},
            "hash",
        ),
        ({"cell": None}, "NoneType"),
    ],
)
def test_a_record_with_a_field_of_another_type_is_told_with_the_field(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    folder = StudyFolder(tmp_path)
    cell = Cell("a", "lora", 0, 3, "steps")
    write_record(folder.record_path(cell), Record(cell, {}))
    assert folder.read(Listener()) == ([Record(cell, {})], [])
    path = folder.record_path(cell)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    (tmp_path / "grid.yaml").write_text("")
    with pytest.raises(UserError, match=rf"whole and holds no record.*{said}"):
        folder.read(Listener())


def test_a_task_may_be_called_like_a_file(
    run: Callable[..., Study], small_grid: Grid, parts: Path
) -> None:
    grid = small_grid(tasks={"words.json": {"task": str(parts)}}, methods={"lora": {}})
    first = run(grid)
    assert [record.error for record in first.records] == ["", ""]
    assert run(grid).records == first.records


def test_a_dry_run_tells_of_torn_records_and_leaves_them(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid())
    path = tmp_path / "out" / "runs" / "words" / "lora" / "steps-all-seed0.json"
    path.write_text("{")
    heard = Heard()
    settings = StudySettings(small_grid(), output_dir=str(tmp_path / "out"))
    assert look_ahead(settings, heard).plan.remaining == 1
    assert heard.lines[0] == (
        f"Torn   1 record(s) half written, such as {path}: to be run again"
    )
    assert path.read_text() == "{"


def test_a_metric_that_cannot_be_computed_is_refused_before_the_first_run(
    small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"name: {i},it is called {i}\n" for i in range(12))
    (tmp_path / "data.csv").write_text(f"text,reference\n{rows}")
    task = {"task": str(tmp_path / "data.csv"), "task_type": "generation"}
    task |= {"text_column": "text", "label_column": "reference"}
    settings = StudySettings(
        small_grid(tasks={"names": task}), output_dir=str(tmp_path / "out")
    )
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(
        UserError, match=r"tasks\.names: the metric bleu, .*pip install"
    ):
        look_ahead(settings, Heard())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("study", ["quality", "variants"])
def test_committed_records_are_read(study: str) -> None:
    results = Path(__file__).parents[3] / "benchmarks" / "results"
    records, unread = read_records(results / study / "runs")
    assert unread == []
    assert len(records) > 20


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"settings": {"max_steps": 20}},
            r"with max_steps: 10, and the grid gives it 20",
        ),
        (
            {"methods": {"lora": {"lora_r": 2}, "dora": {}}},
            "run of lora on words .*lora_r",
        ),
    ],
)
def test_a_grid_that_changes_what_was_run_is_refused(
    run: Callable[..., Study],
    small_grid: Grid,
    tmp_path: Path,
    changed: dict[str, Any],
    said: str,
) -> None:
    run(small_grid())
    torn = tmp_path / "out" / "runs" / "words" / "dora" / "steps-all-seed1.json"
    torn.write_text("{")  # somebody may yet mend it
    before = files(tmp_path / "out")
    kept = (tmp_path / "out" / "grid.yaml").read_bytes()
    with pytest.raises(UserError, match=said):
        run(small_grid(**changed))
    assert files(tmp_path / "out") == before
    assert (tmp_path / "out" / "grid.yaml").read_bytes() == kept
    study = run(small_grid(**changed), overwrite=True)
    assert not any(r.failed for r in study.records)
    assert set(files(tmp_path / "out").values()).isdisjoint(before.values())


def test_a_setting_that_a_method_does_not_use_is_no_change_of_the_grid(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    grid = small_grid(methods={"full": {}, "lora": {}})
    first = run(grid)
    for path in (tmp_path / "out" / "runs" / "words" / "full").iterdir():
        record = json.loads(path.read_text())
        record["settings"]["lora_r"] += 1  # as written when the default was another
        path.write_text(json.dumps(record))
    before = files(tmp_path / "out")
    assert len(run(grid).records) == len(first.records)
    assert files(tmp_path / "out") == before


@pytest.fixture
def elsewhere(tmp_path: Path, parts: Path) -> Path:
    """Return a folder of the same name with a label in it that differs."""
    place = shutil.copytree(parts, tmp_path / "elsewhere" / parts.name)
    text = (place / "test.csv").read_text().rstrip("\n")
    label = text.rpartition(",")[2]
    other = "bird" if label == "fruit" else "fruit"
    (place / "test.csv").write_text(f"{text.removesuffix(label)}{other}\n")
    return place


@pytest.mark.parametrize("seeds", [[0, 1], [0, 1, 2]])  # nothing is due, or a run is
def test_runs_of_other_examples_are_not_taken(
    run: Callable[..., Study],
    small_grid: Grid,
    tmp_path: Path,
    elsewhere: Path,
    seeds: list[int],
) -> None:
    run(small_grid())
    before = files(tmp_path / "out")
    report = (tmp_path / "out" / "report.html").stat().st_mtime_ns
    other = small_grid(seeds=seeds, tasks={"words": {"task": str(elsewhere)}})
    counts = "40 train, 12 validation, 8 test, sha256"
    said = rf"^tasks\.words: 4 of its 4 recorded runs saw .*\({counts} .*\({counts} "
    with pytest.raises(UserError, match=said):
        run(other)
    with pytest.raises(UserError, match=said):
        look_ahead(StudySettings(other, output_dir=str(tmp_path / "out")))
    assert files(tmp_path / "out") == before
    assert (tmp_path / "out" / "report.html").stat().st_mtime_ns == report
    assert len(run(other, overwrite=True).records) == 2 * len(seeds)


def test_the_same_examples_elsewhere_go_on(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path, parts: Path
) -> None:
    run(small_grid())
    before = files(tmp_path / "out")
    place = shutil.copytree(parts, tmp_path / "elsewhere" / parts.name)
    moved = {"words": {"task": str(place)}}
    study = run(small_grid(tasks=moved, seeds=[0, 1, 2], sizes=["all", 20]))
    assert len(study.records) == 2 * 3 * 2
    assert len({record.data for record in study.records}) == 1
    after = files(tmp_path / "out")
    assert {path: after[path] for path in before} == before


def test_records_of_before_examples_were_recognised_are_taken(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path, elsewhere: Path
) -> None:
    run(small_grid())
    for path in (tmp_path / "out" / "runs").rglob("*.json"):
        record = json.loads(path.read_text())
        del record["data"]
        path.write_text(json.dumps(record))
    heard = Heard()
    study = run(small_grid(tasks={"words": {"task": str(elsewhere)}}), listener=heard)
    assert {record.data for record in study.records} == {""}
    assert heard.lines == [f"Report {tmp_path / 'out'}: report.html"]


def test_a_report_is_written_where_the_data_is_not(
    run: Callable[..., Study], small_grid: Grid, elsewhere: Path
) -> None:
    grid = small_grid(tasks={"words": {"task": str(elsewhere)}})
    first = run(grid)
    shutil.rmtree(elsewhere)
    heard = Heard()
    assert run(grid, listener=heard).records == first.records
    assert heard.lines[0].startswith(
        "Data   words cannot be read, and its records are taken as they are: "
    )
    # With a run to do, it is needed.
    with pytest.raises(UserError, match=r"^tasks\.words: "):
        run({**grid, "seeds": [0, 1, 2]})


def test_a_grid_of_other_tasks_does_not_take_a_folder_over(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path, parts: Path
) -> None:
    run(small_grid())
    before = (tmp_path / "out" / "grid.yaml").read_bytes()
    other = {"others": {"task": str(parts)}}
    said = (
        "has 4 recorded run.*, of dora on words, lora on words, and the grid has none"
    )
    with pytest.raises(UserError, match=said):
        run(small_grid(tasks=other))
    assert (tmp_path / "out" / "grid.yaml").read_bytes() == before
    # What is left out is told before the first run.
    heard = Heard()
    study = run(
        small_grid(methods={"lora": {}, "rslora": {}}, seeds=[0, 1]), listener=heard
    )
    assert {record.cell.method for record in study.records} == {"lora", "rslora"}
    assert heard.lines[0].startswith("Apart  2 recorded run(s), of dora on words, are")
    assert len(run(small_grid(tasks=other), overwrite=True).records) == 4


def test_steps_of_equal_time_are_no_change_of_the_grid(
    run: Callable[..., Study], small_grid: Grid
) -> None:
    first = run(small_grid(equal=["steps", "time"]))
    again = run(small_grid(equal=["steps", "time"]))
    assert again.records == first.records


def test_another_reference_has_its_time_taken_again(
    run: Callable[..., Study], small_grid: Grid
) -> None:
    methods = {"lora": {}, "dora": {}, "long": {"method": "dora", "max_steps": 20}}
    grid = small_grid(methods=methods, equal=["steps", "time"], seeds=[0])

    def at_equal_time(study: Study) -> dict[str, tuple[int, float]]:
        found = [r for r in study.records if r.cell.purpose == "time"]
        return {r.cell.method: (r.steps, r.seconds) for r in found}

    lora = {"lora": (10, 4.0), "dora": (5, 4.0), "long": (5, 4.0)}
    assert at_equal_time(run(grid)) == lora
    heard = Heard()
    study = run({**grid, "reference": "long"}, listener=heard)
    assert at_equal_time(study) == {
        "lora": (40, 16.0),
        "dora": (20, 16.0),
        "long": (20, 16.0),
    }
    assert heard.lines[0].startswith(
        "Time   1 recorded run(s) took the time of lora, and the reference is long now"
    )
    silent = Heard()
    assert run({**grid, "reference": "long"}, listener=silent).records == study.records
    assert not any(line.startswith("Time") for line in silent.lines)
    assert at_equal_time(run(grid)) == lora


def test_records_of_before_the_reference_was_kept_are_taken(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    grid = small_grid(equal=["steps", "time"])
    run(grid)
    for path in (tmp_path / "out" / "runs").rglob("time-*.json"):
        record = json.loads(path.read_text())
        assert record["settings"].pop("reference") == "lora"
        path.write_text(json.dumps(record))
    before = files(tmp_path / "out")
    study = run(grid)
    assert {r.steps for r in study.records if r.cell.method == "dora"} == {10, 5}
    assert files(tmp_path / "out") == before


def test_another_model_of_the_same_name_is_refused(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    for place in ("one", "two"):
        (tmp_path / place / "enc").mkdir(parents=True)
        (tmp_path / place / "enc" / "config.json").write_text("{}")
        weights = tmp_path / place / "enc" / "model.safetensors"
        weights.write_bytes(place.encode())

    def grid(place: str) -> dict[str, Any]:
        model = str(tmp_path / place / "enc")
        return small_grid(settings={"max_steps": 10, "model": model})

    run(grid("one"))
    with pytest.raises(
        UserError,
        match=r"with model_files: sha256 \w+, and the grid gives it sha256 \w",
    ):
        run(grid("two"))
    # One that is not there can be none of another; the report is written all the same.
    shutil.rmtree(tmp_path / "one")
    before = files(tmp_path / "out")
    run(grid("one"))
    # Nor are records of before a model's files were looked at.
    for path in (tmp_path / "out" / "runs").rglob("*.json"):
        record = json.loads(path.read_text())
        del record["settings"]["model_files"]
        path.write_text(json.dumps(record))
    assert len(run(grid("two")).records) == len(before) == 4


def test_time_tasks_and_methods_can_be_limited(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    heard = Heard()
    study = run(small_grid(), listener=heard, time_limit=0)
    assert study.records == ()
    assert study.notes[-1] == "4 of 4 runs are still to do."
    assert any("limit is reached with 4 run(s) to do" in line for line in heard.lines)
    study = run(small_grid(), only_methods=("dora",), only_tasks=("words",))
    assert {r.cell.method for r in study.records} == {"dora"}
    with pytest.raises(UserError, match="--only-methods dorra: the grid has no such"):
        run(small_grid(), only_methods=("dorra",))
    with pytest.raises(UserError, match="--time-limit is -1"):
        run(small_grid(), time_limit=-1)
    with pytest.raises(UserError, match="--processes is 0"):
        run(small_grid(), processes=0)


# -- what cannot be -----------------------------------------------------------------


def test_a_task_without_validation_examples_is_not_swept(
    run: Callable[..., Study],
    small_grid: Grid,
    labelled_csv: Path,
    parts: Path,
    tmp_path: Path,
) -> None:
    grid = small_grid(
        methods={"lora": SWEPT},
        tasks={"words": {"task": str(parts)}, "bare": {"task": str(labelled_csv)}},
    )
    heard = Heard()
    study = run(grid, listener=heard)
    assert {r.cell.task for r in study.records} == {"words"}
    assert study.notes[0].startswith(
        "Nothing is run on bare: the sweep of lora chooses"
    )
    assert "give `max_validation_samples`, such as 50, which takes" in study.notes[0]
    # Who shows messages and notes shows the sentence once.
    (line,) = [line for line in heard.lines if "bare" in line]
    assert line.startswith("Apart  bare: swept, and without validation examples")
    ahead = Heard()
    found = look_ahead(StudySettings(grid, output_dir=str(tmp_path / "ahead")), ahead)
    assert study.notes[0] in found.notes
    assert not any("bare:" in line for line in ahead.lines)
    alone = Heard()
    with pytest.raises(UserError, match="Nothing is run on bare"):
        run(grid, only_tasks=("bare",), listener=alone)
    assert not any("bare:" in line for line in alone.lines)
    # Each remedy is one, and `sizes` alone is none.
    few = small_grid(
        methods={"lora": SWEPT}, tasks={"bare": {"task": str(labelled_csv)}}, sizes=[20]
    )
    with pytest.raises(UserError, match="Nothing is run on bare"):
        run(few, output_dir=str(tmp_path / "few"))
    few["settings"] = {"max_steps": 10, "max_validation_samples": 12}
    study = run(few, output_dir=str(tmp_path / "few"))
    assert len(study.records) == 2 + 2
    # Without a sweep there is nothing to choose.
    bare = small_grid(tasks={"bare": {"task": str(labelled_csv)}})
    study = run(bare, output_dir=str(labelled_csv.parent / "study"))
    assert {r.cell.task for r in study.records} == {"bare"}


def test_data_that_cannot_be_read_stops_before_anything_is_run(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^tasks\.gone: "):
        run(small_grid(tasks={"gone": {"task": str(tmp_path / "gone.csv")}}))
    with pytest.raises(UserError, match=r"words: `sizes` asks for 41 .* there are 40"):
        run(small_grid(sizes=[20, 41]))
    assert files(tmp_path / "out") == {}
    run(small_grid())  # the folder is as good as new


def test_what_is_wrong_with_a_task_is_said_in_the_words_of_a_grid(
    run: Callable[..., Study], small_grid: Grid, labelled_csv: Path
) -> None:
    grid = small_grid(
        settings={"max_steps": 10, "max_validation_samples": 5},
        tasks={"bare": {"task": str(labelled_csv)}},
        sizes=["all"],
    )
    with pytest.raises(
        UserError,
        match=r"^tasks\.bare: `max_validation_samples` 5: the data has no validation "
        r".*`sizes` leaves out 0\. Ask for fewer of either, or give `validation_file`\.$",
    ):
        run(grid)


def test_what_overwrite_deletes_is_there_until_the_new_grid_is_known_to_be_good(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid())
    out = tmp_path / "out"
    before = files(out)
    there = {path.name for path in out.iterdir()}
    with pytest.raises(UserError, match=r"^tasks\.gone: "):
        run(small_grid(tasks={"gone": {"task": "gone.csv"}}), overwrite=True)
    assert files(out) == before
    assert {path.name for path in out.iterdir()} == there
    # A record that cannot be read is no obstacle, since it is to be deleted.
    (out / sorted(before)[0]).write_text('{"colour": "red"}')
    study = run(small_grid(seeds=[5]), overwrite=True)
    assert {record.cell.seed for record in study.records} == {5}
    assert len(files(out)) == 2


def test_a_folder_that_was_cleared_and_no_more_is_one_of_a_comparison_still(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    run(small_grid())
    StudyFolder(tmp_path / "out").clear()
    assert files(tmp_path / "out") == {}
    assert len(run(small_grid()).records) == 4


def test_two_comparisons_never_write_into_one_folder(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (
        FolderLock(out),
        pytest.raises(
            UserError, match=rf"in use by another comparison \(process {os.getpid()} on"
        ) as caught,
    ):
        run(small_grid())
    assert "two would train the same runs twice" in str(caught.value)
    assert "checkpoints" not in str(caught.value)
    assert len(run(small_grid()).records) == 4


def test_a_folder_of_something_else_is_left_alone(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not from a comparison"):
        run(small_grid(), overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"thesis\.tex is a file"):
        run(small_grid(), output_dir=str(tmp_path / "out" / "thesis.tex"))


@pytest.mark.parametrize("name", [".grid.yaml.partial", ".DS_Store"])
def test_a_folder_with_hidden_files_alone_is_as_good_as_empty(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("settings: {")  # of a start that was killed
    assert len(run(small_grid()).records) == 4


def test_two_trials_of_a_cell_have_files_of_their_own() -> None:
    folder = StudyFolder(Path("somewhere") / "new")
    cell = Cell("a", "lora", 100, 3, "sweep", (("lora_r", 2),))
    others = [
        replace(cell, trial=(("lora_r", 4),)),
        replace(cell, seed=4),
        replace(cell, size=0),
        replace(cell, purpose="steps"),
        replace(cell, trial=(("target_modules", ("query", "value")),)),
    ]
    paths = {folder.record_path(one) for one in (cell, *others)}
    assert len(paths) == 6
    assert {path.parent for path in paths} == {folder.runs / "a" / "lora"}


def test_a_record_comes_back_with_lists_in_its_trial(tmp_path: Path) -> None:
    cell = Cell("a", "lora", 0, 3, "sweep", (("target_modules", ("query", "value")),))
    write_record(tmp_path / "one.json", Record(cell, {}))
    assert read_records(tmp_path)[0][0].cell == cell


# -- being stopped ------------------------------------------------------------------

SCRIPT = """\
import sys
import types

module = types.ModuleType("bidora.study.report")
module.write_report = lambda study, folder: (folder / "report.html").touch() or []
sys.modules["bidora.study.report"] = module

import bidora
from tests.bidora.study import stand_ins

if __name__ == "__main__":
    settings = bidora.StudySettings({grid!r}, output_dir={out!r})
    bidora.compare(settings, train=stand_ins.{train})
"""


def begin(script: Path, grid: dict[str, Any], out: Path) -> subprocess.Popen[str]:
    """Start a comparison in a process of its own, and wait until it hangs at seed 1."""
    script.write_text(SCRIPT.format(grid=grid, out=str(out), train="slow"))
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a terminal's foreground job
    )
    until = time.monotonic() + 120
    while len(files(out)) < 2 or not any((out / ".running").iterdir()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def others_of(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def wait_for_none(session: int) -> None:
    until = time.monotonic() + 30
    while others_of(session):
        assert time.monotonic() < until, others_of(session)
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"
)


def test_a_finished_comparison_says_nothing_of_semaphores(
    small_grid: Grid, tmp_path: Path
) -> None:
    """Idle processes that are terminated leave theirs, and Python warns of them."""
    grid = small_grid(methods={"lora": {}}, processes=2)
    script = tmp_path / "script.py"
    text = SCRIPT.format(grid=grid, out=str(tmp_path / "out"), train="locking")
    script.write_text(text)
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(files(tmp_path / "out")) == 2


@needs_proc
@pytest.mark.slow
def test_ctrl_c_ends_the_runs_keeps_the_records_and_reports(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = begin(tmp_path / "script.py", small_grid(processes=2), out)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "seed0" in " ".join(files(out))
    wait_for_none(process.pid)
    assert {p.name for p in out.iterdir()} == {
        "grid.yaml",
        "log.txt",
        "report.html",
        "runs",
    }
    before = files(out)
    assert len(before) == 2
    assert len(run(small_grid()).records) == 4
    assert {p: t for p, t in files(out).items() if p in before} == before


@needs_proc
@pytest.mark.slow
def test_killed_it_loses_nothing_that_was_finished_and_leaves_no_process(
    run: Callable[..., Study], small_grid: Grid, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = begin(tmp_path / "script.py", small_grid(processes=2), out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for_none(process.pid)
    before = files(out)
    assert len(before) == 2
    torn = out / "runs" / "words" / "lora" / "steps-all-seed1.json"
    torn.write_text('{"cell": {"task": "wo')
    partial = torn.with_name(f".{torn.name}.partial")
    partial.write_text("{")
    heard = Heard()
    assert len(run(small_grid(), listener=heard).records) == 4
    assert any(line.startswith("Torn   1 record") for line in heard.lines)
    assert not partial.exists()
    assert {p: t for p, t in files(out).items() if p in before} == before
    assert not (out / ".running").exists()
