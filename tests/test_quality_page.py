"""The page that says which method to take, held to the results it was written from."""

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
