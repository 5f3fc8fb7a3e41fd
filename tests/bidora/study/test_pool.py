"""Processes for runs: what they are told, and what is said when they do not start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bidora.study.pool import THREADS, cores, worker_environment


def test_cores_are_shared_out_and_what_the_user_set_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*THREADS, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    before = dict(os.environ)
    with worker_environment(cores() * 2):
        assert [os.environ[name] for name in THREADS] == ["1", "3", "1", "1"]
        assert os.environ["GOMP_SPINCOUNT"] == "10000"
    with worker_environment(1):
        assert os.environ["OMP_NUM_THREADS"] == str(cores())
    assert dict(os.environ) == before
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with worker_environment(1):
        assert "GOMP_SPINCOUNT" not in os.environ


def test_a_script_without_its_guard_is_told_of_it(tmp_path: Path, parts: Path) -> None:
    grid = {"tasks": {"words": {"task": str(parts)}}, "methods": {"lora": {}}}
    script = tmp_path / "script.py"
    out = str(tmp_path / "out")
    script.write_text(
        "import sys, types\n"
        "module = types.ModuleType('bidora.study.report')\n"
        "module.write_report = lambda study, folder: []\n"
        "sys.modules['bidora.study.report'] = module\n"
        "import bidora\n"
        f"bidora.compare(bidora.StudySettings({grid!r}, output_dir={out!r}))\n"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert 'call bidora.compare under `if __name__ == "__main__":`' in done.stderr
    assert list((tmp_path / "out" / "runs").rglob("*.json")) == []
    assert not (tmp_path / "out" / ".running").exists()
