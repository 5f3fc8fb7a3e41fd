"""Two trainings never write into one folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from bidora.errors import UserError
from bidora.trainer.lock import LOCK_FILE, FolderLock
from tests.bidora.stopped_runs import Killed, make_trainer


def holder(folder: Path) -> dict[str, Any]:
    return json.loads((folder / LOCK_FILE).read_text("utf-8"))


def write(folder: Path, **changed: Any) -> None:
    with FolderLock(folder):
        own = holder(folder)
    (folder / LOCK_FILE).write_text(json.dumps({**own, **changed}), "utf-8")


def test_a_folder_is_held_once_and_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with FolderLock(folder):
        assert holder(folder)["pid"] == os.getpid()
        with pytest.raises(UserError, match=rf"in use by.*process {os.getpid()} on"):
            FolderLock(folder).__enter__()
        assert holder(folder)["pid"] == os.getpid()
    assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError), FolderLock(folder):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []


def test_a_process_that_does_not_write_holds_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path, wanted=False):
        assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path):
        FolderLock(tmp_path, wanted=False).__enter__()
        assert (tmp_path / LOCK_FILE).is_file()


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid = dead_process()
    write(tmp_path, pid=pid, started="1")
    with caplog.at_level(logging.WARNING, "bidora"), FolderLock(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    assert f"left by process {pid}, which is dead" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_number_that_another_process_has_by_now_is_stale(tmp_path: Path) -> None:
    """As in a container, where every run has the same one."""
    write(tmp_path, started="1")
    with FolderLock(tmp_path):
        assert holder(tmp_path)["started"] != "1"


@pytest.mark.parametrize(
    "change",
    [{"host": "elsewhere"}, {"pid": 1, "started": None}, {"pid": "x"}],
    ids=str,
)
def test_what_may_be_alive_is_not_taken_over(
    change: dict[str, Any], tmp_path: Path
) -> None:
    if change.get("pid") == 1:
        change = {"pid": 1, "started": started(1)}
    write(tmp_path, **change)
    with pytest.raises(UserError, match=r"in use by another training.* delete "):
        FolderLock(tmp_path).__enter__()
    assert holder(tmp_path).items() >= change.items()


def started(pid: int) -> str | None:
    from bidora.trainer.lock import _started

    return _started(pid)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_file_that_says_nothing_is_not_taken_over(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(UserError, match=r"process \? on \?"):
        FolderLock(tmp_path).__enter__()


def take(folder: str, ready: Any, results: Any) -> None:
    """Take a folder as soon as all do, and keep it."""
    lock = FolderLock(folder)
    ready.wait()
    try:
        lock.__enter__()
        results.put(True)
    except UserError:
        results.put(False)
    ready.wait()  # alive until all have tried


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_several_processes_gets_it(tmp_path: Path, stale: bool) -> None:
    if stale:
        write(tmp_path, pid=dead_process(), started="1")
    context = get_context("fork")
    ready, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=take, args=(str(tmp_path), ready, results))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(got) == [False, False, False, True]


def test_a_training_holds_its_folder(tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_steps": 2, "retrain_max_steps": 1}
    seen: list[bool] = []

    def collate(rows: Any) -> Any:
        from tests.bidora.stopped_runs import collate

        seen.append((tmp_path / LOCK_FILE).is_file())
        return collate(rows)

    make_trainer(tmp_path, parts={"data_collator": collate}, **few).train()
    assert any(seen)
    assert not (tmp_path / LOCK_FILE).exists()

    with FolderLock(tmp_path):
        other = make_trainer(tmp_path, overwrite_earlier_run=True, **few)
        with pytest.raises(ValueError, match=f"by another training.*{os.getpid()}"):
            other.train()
        with pytest.raises(ValueError, match="by another training"):
            other.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_training_that_ends_early_gives_its_folder_back(tmp_path: Path) -> None:
    def collate(rows: Any) -> Any:
        raise Killed

    trainer = make_trainer(tmp_path, parts={"data_collator": collate})
    with pytest.raises(Killed):
        trainer.train()
    assert not (tmp_path / LOCK_FILE).exists()


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.bidora.stopped_runs import make_trainer
few = {"max_steps": 2, "retrain_max_steps": 1, "per_device_outer_batch_size": 3}
trainer = make_trainer(Path(sys.argv[1]), **few)
trainer.train()
print("RANK", trainer.args.process_index, "of", trainer.args.world_size)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("held", [False, True])
def test_two_ranks_train_together_or_are_refused_together(
    tmp_path: Path, held: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "run"
    here = str(Path(__file__).parents[2])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", str(free_port()), str(script), str(folder)),
    ]
    with FolderLock(folder, wanted=held):
        found = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    if held:
        assert found.returncode != 0
        assert "in use by another training" in found.stderr
        assert not [*folder.glob("**/checkpoint-*")]
    else:
        assert found.returncode == 0, found.stderr[-3000:]
        assert {"RANK 0 of 2", "RANK 1 of 2"} <= set(found.stdout.splitlines())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
