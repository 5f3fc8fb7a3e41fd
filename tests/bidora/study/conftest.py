"""A small task in three parts, a grid over it, and a report that takes no time."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bidora.study.plan import Study

Grid = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def parts(
    tmp_path_factory: pytest.TempPathFactory, labelled_rows: list[tuple[str, str]]
) -> Path:
    """Return a folder with a train, a validation and a test file."""
    folder = tmp_path_factory.mktemp("parts")
    for name, rows in (
        ("train", labelled_rows[:40]),
        ("validation", labelled_rows[40:52]),
        ("test", labelled_rows[52:]),
    ):
        lines = [f"{text},{label}\n" for text, label in rows]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(lines))
    return folder


@pytest.fixture
def small_grid(parts: Path) -> Grid:
    """Return a function that gives a grid of two methods and two seeds, with changes."""

    def make(**changed: Any) -> dict[str, Any]:
        return {
            "settings": {"max_steps": 10},
            "tasks": {"words": {"task": str(parts)}},
            "methods": {"lora": {}, "dora": {}},
            "seeds": [0, 1],
            "reference": "lora",
            **changed,
        }

    return make


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[Study]:
    """Keep what would be reported, in place of a report."""
    kept: list[Study] = []

    def write_report(study: Study, folder: Path) -> list[str]:
        kept.append(study)
        (folder / "report.html").write_text("<p>in short</p>")
        return ["report.html"]

    module: Any = types.ModuleType("bidora.study.report")
    module.write_report = write_report
    monkeypatch.setitem(sys.modules, "bidora.study.report", module)
    return kept
