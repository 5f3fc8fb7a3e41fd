"""The picture of a run: curves that colour alone does not tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bidora.runs.plots import draw_curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what was drawn; nothing is written."""
    figures: list[Any] = []

    def keep(self: Any, *args: Any, **rest: Any) -> None:
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def history(phases: tuple[str, ...], searches: bool) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for phase in phases:
        names = ("train", "held_back", "validation") if searches else ("train",)
        for step in range(4):
            scores = {n: {"loss": 1.0 / (step + 1), "f1": 0.2 * step} for n in names}
            records.append({"phase": phase, "step": step, "evaluation": scores})
            outer = searches and phase == "search" and step % 2
            records.append(
                {
                    "phase": phase,
                    "step": step + 1,
                    "inner_loss": 1.0,
                    "hypergrad_norm": 0.5 if outer else None,
                    "direct_norm": 3.0 if outer else None,
                    "indirect_norm": 1.0 if outer else None,
                }
            )
    return records


def test_curves_differ_without_colour(drawn: list[Any], tmp_path: Path) -> None:
    draw_curves(history(("search", "retrain"), True), tmp_path / "c.png", "t", "f1")
    (figure,) = drawn
    assert len(figure.axes) == 6
    for ax in figure.axes[:4]:
        lines = [line for line in ax.get_lines() if "batch" not in line.get_label()]
        assert len(lines) == 3
        for style in ("get_linestyle", "get_marker", "get_color"):
            assert len({getattr(line, style)() for line in lines}) == 3
        assert ax.get_legend() is not None
    assert figure.axes[0].get_ylabel() == "loss"
    assert figure.axes[2].get_ylabel() == "f1"
    assert {ax.get_xlabel() for ax in figure.axes[4:]} == {"step"}


def test_the_last_panel_is_the_hypergradient(drawn: list[Any], tmp_path: Path) -> None:
    draw_curves(history(("search", "retrain"), True), tmp_path / "c.png", "t", "f1")
    norm, share = drawn[0].axes[4].get_lines()
    assert norm.get_xydata().tolist() == [[2.0, 0.5], [4.0, 0.5]]
    assert share.get_xydata().tolist() == [[2.0, 0.25], [4.0, 0.25]]  # 1 / (3 + 1)
    assert norm.get_linestyle() != share.get_linestyle()
    assert [t.get_text() for t in drawn[0].axes[5].texts] == ["magnitudes fixed"]


def test_without_a_search_there_is_no_such_panel(
    drawn: list[Any], tmp_path: Path
) -> None:
    draw_curves(history(("train",), False), tmp_path / "c.png", "t", "f1")
    labels = [ax.get_ylabel() for ax in drawn[0].axes]
    assert labels == ["loss", "f1"]


def probed(**scores: float) -> dict[str, Any]:
    result = {"name": "probe", "steps": 0, "scores": {"test": scores}}
    return {"phase": "probe", "result": result}


def test_what_is_to_be_beaten_is_a_line(drawn: list[Any], tmp_path: Path) -> None:
    end = {"phase": "train", "result": {"steps": 4, "scores": {"test": {"f1": 0.5}}}}
    records = [probed(f1=0.25), *history(("train",), False), end]
    draw_curves(records, tmp_path / "c.png", "t", "f1")
    assert len(drawn[0].axes) == 2  # it is no phase of its own
    found = {line.get_label(): line for line in drawn[0].axes[1].get_lines()}
    assert set(found["probe, test: 0.250"].get_ydata()) == {0.25}
    assert found["this phase, test: 0.500"].get_xydata().tolist() == [[4.0, 0.5]]


@pytest.mark.parametrize(
    "first",
    [
        {"phase": "probe", "result": {"scores": {}}},  # test examples were not scored
        {"phase": "probe", "impossible": "no linear head"},
    ],
)
def test_where_no_probe_was_scored_there_is_no_line(
    drawn: list[Any], tmp_path: Path, first: dict[str, Any]
) -> None:
    draw_curves([first, *history(("train",), False)], tmp_path / "c.png", "t", "f1")
    labels = [line.get_label() for line in drawn[0].axes[1].get_lines()]
    assert not any("probe" in str(label) for label in labels)


def test_a_probe_alone_has_a_picture_too(drawn: list[Any], tmp_path: Path) -> None:
    draw_curves([probed(f1=0.25)], tmp_path / "c.png", "t", "f1")
    assert len(drawn[0].axes) == 2


def test_a_run_has_its_picture(finished: Callable[[str], Any]) -> None:
    picture = (finished("bidora").folder / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
