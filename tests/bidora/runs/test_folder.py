"""The folder of a run: claimed once, never half written, nobody else's files touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.runs.folder import RunFolder


def run_in(path: Path, **metrics: Any) -> Path:
    """Leave the files of a run, finished if there are metrics."""
    folder = RunFolder(path)
    folder.open()
    folder.write_json("settings.json", {"seed": 0})
    folder.append_history({"phase": "train", "step": 1})
    (folder.staging() / "adapter.bin").write_bytes(b"x")
    files = folder.publish()
    if metrics:
        folder.write_json("metrics.json", {**metrics, "files": files})
    folder.close()
    return path


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    RunFolder(tmp_path, look=True)  # which writes nothing
    with pytest.raises(UserError, match="not from a run of bidora"):
        RunFolder(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "README.md")
    assert names(tmp_path) == {"README.md"}


def test_overwriting_removes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", seconds=1.0)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        RunFolder(folder)
    again = RunFolder(folder, overwrite=True)
    assert (folder / "metrics.json").exists()  # until it is opened
    again.open()
    again.close()
    assert names(folder) == {"history.jsonl", "notes.txt"}


def test_texts_of_an_earlier_run_do_not_stay_and_lines_are_written_whole(
    tmp_path: Path,
) -> None:
    folder = RunFolder(run_in(tmp_path / "run"), overwrite=True)
    path = folder.path / "generated.jsonl"
    folder.write_lines("generated.jsonl", [{"generated": "a\nb"}, {"generated": "é"}])
    assert path.read_text("utf-8") == '{"generated": "a\\nb"}\n{"generated": "é"}\n'
    with pytest.raises(TypeError):
        folder.write_lines("generated.jsonl", [{"generated": "c"}, {"generated": {1}}])
    assert len(path.read_text("utf-8").splitlines()) == 2
    folder.open()
    folder.close()
    assert not path.exists()


def test_files_of_others_are_not_removed_by_a_forged_list(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", seconds=1.0)
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    metrics = {"files": ["../outside.txt", str(outside)]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    RunFolder(folder, overwrite=True).open()
    assert outside.read_text() == "mine"


def test_only_a_run_that_is_not_finished_goes_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run of bidora"):
        RunFolder(tmp_path / "none", resume=True)
    with pytest.raises(UserError, match="is finished"):
        RunFolder(run_in(tmp_path / "over", seconds=1.0), resume=True)
    folder = RunFolder(run_in(tmp_path / "run"), resume=True)
    folder.open()
    folder.append_history({"phase": "train", "step": 2})
    folder.close()
    lines = (folder.path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize(
    ("reached", "kept"),
    [
        (None, []),
        (("search", 1), [("search", 1)]),
        # The end of a phase is reached again, and told again.
        (("search", 2), [("search", 1), ("search", 2)]),
        (
            ("retrain", 1),
            [("search", 1), ("search", 2), ("search", None), ("retrain", 1)],
        ),
    ],
)
def test_history_is_cut_at_the_checkpoint(
    tmp_path: Path, reached: tuple[str, int] | None, kept: list[Any]
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    for phase in ("search", "retrain"):
        for step in (1, 2):
            folder.append_history({"phase": phase, "step": step})
        folder.append_history({"phase": phase, "result": {}})
    folder.close()
    with (folder.path / "history.jsonl").open("a") as file:
        file.write('{"phase": "retr')  # the line that was being written
    found = folder.cut_history(reached)
    folder.close()
    assert [(r["phase"], r.get("step")) for r in found] == kept


def test_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    folder.write_json("metrics.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("metrics.json", {"a": object()})
    folder.close()
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
    assert names(tmp_path) == {"metrics.json", "history.jsonl"}


def test_metrics_come_last(finished: Callable[[str], Any]) -> None:
    """A folder with them holds all that a run leaves."""
    folder = finished("bidora").folder
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert max(times, key=lambda n: times[n]) == "metrics.json"
