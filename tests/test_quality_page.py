"""Pages with figures of the comparison, held to the results they were written from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality" / "results.json"
PAGE = ROOT / "docs" / "quality.md"
NUMBER = r"([+−]?\d+\.\d)"
GAP = re.compile(rf"{NUMBER} \((?:95 % interval )?{NUMBER} to {NUMBER}")
IN_BRACKETS = re.compile(rf"\({NUMBER}, {NUMBER} to {NUMBER}")


def summary() -> dict[str, Any]:
    return json.loads(RESULTS.read_text("utf-8"))["summary"]


def differences(tables: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for table in tables:
        for row in (*table["averages"], *table.get("results", ())):
            for gap in (row["over_probe"], row["over_reference"]):
                if gap is not None and gap["low"] is not None:
                    yield gap


def first_section() -> str:
    return PAGE.read_text("utf-8").split("\n--8<--")[0]


def test_every_difference_on_the_page_is_in_the_results() -> None:
    found = summary()
    known = {
        tuple(f"{gap[name]:z.1f}" for name in ("mean", "low", "high"))
        for gap in differences([*found["tables"], *found["overall"]])
    }
    text = first_section()
    told = [*GAP.findall(text), *IN_BRACKETS.findall(text)]
    assert len(told) >= 8
    for triple in told:
        plain = tuple(x.replace("−", "-").replace("+", "") for x in triple)
        assert plain in known, triple


@pytest.mark.parametrize("method", ["lora", "bidora", "full"])
def test_the_page_tells_the_pairs_of_the_results(method: str) -> None:
    (steps,) = (t for t in summary()["overall"] if t["purpose"] == "steps")
    (average,) = (a for a in steps["averages"] if a["method"] == method)
    assert f"{average['over_probe']['n']} pairs" in first_section()


def means(study: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return what each method has on test examples, by task and size."""
    path = ROOT / "benchmarks" / "results" / study / "results.json"
    found: dict[tuple[str, str], dict[str, str]] = {}
    for table in json.loads(path.read_text("utf-8"))["summary"]["tables"]:
        if table["purpose"] != "steps":
            continue
        size = str(table["size"])
        for task, score in table["constant"].items():
            found[task, size] = {"constant answer": f"{score['mean']:.1f}"}
        for row in table["results"]:
            one = found.setdefault((row["task"], size), {})
            one[row["method"]] = f"{row['score']['mean']:.1f}"
    return found


@pytest.mark.parametrize(
    ("page", "study", "rows"),
    [
        ("classification", "quality", 4),
        ("regression", "quality", 1),
        ("tagging", "quality", 3),
        ("multilabel", "quality", 1),
        ("proteins", "families", 2),
        ("generation", "families", 1),
    ],
)
def test_the_figures_of_a_task_are_in_the_results(
    page: str, study: str, rows: int
) -> None:
    text = (ROOT / "docs" / "tasks" / f"{page}.md").read_text("utf-8")
    lines = text.split("\n## What to expect")[1].splitlines()
    cells = [[c.strip(" `") for c in x.split("|")[1:-1]] for x in lines if x[:1] == "|"]
    # Pairs in one input, where they are not run apart.
    names, known = cells[0], {**means("together"), **means(study)}
    ours = [c for c in cells[2:] if not c[0].startswith("*")]
    assert len(ours) == rows
    for first, *values in ours:
        data, size = first.split(", ")
        scores = known[data.lower().replace("-", ""), size]
        for name, value in zip(names[2:], values[1:], strict=True):
            assert not value or scores[name] == value, (first, name)


def test_the_accuracies_of_estimators_are_means_of_the_records() -> None:
    folder = ROOT / "benchmarks" / "results" / "variants" / "runs" / "docstrings"
    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("*/sweep-*.json"):
        record = json.loads(path.read_text("utf-8"))
        cell, settings = record["cell"], record["settings"]
        is_usual = settings["outer_learning_rate"] == 6e-3 and (
            settings["orthogonality"] == 1e-5
        )
        if cell["method"] == "estimator" or (
            cell["method"] == "rate-of-magnitudes" and is_usual
        ):
            # Where none is named, the budget takes darts.
            scores = found.setdefault(settings["estimator"] or "darts", {})
            scores[cell["seed"]] = 100 * record["validation"]["accuracy"]
    (row,) = (
        line for line in PAGE.read_text("utf-8").splitlines() if "| estimator," in line
    )
    setting, names, values, _ = (c.strip() for c in row.strip("|").split(" | "))
    seeds = [int(seed) for seed in re.findall(r"\d{3}", setting)]
    assert len(seeds) >= 2
    told = dict(zip(re.findall(r"`([\w-]+)`", names), values.split(", "), strict=True))
    assert set(told) == set(found)
    for name, value in told.items():
        mean = sum(found[name][seed] for seed in seeds) / len(seeds)
        assert f"{mean:.1f}" == value, name
