"""The table of all estimators, held to the results that it was written from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hypergrad.estimators.registry import estimator_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "estimators" / "index.md"
ROW = re.compile(r"^\| \[`([a-z0-9-]+)`\]\([a-z0-9-]+\.md\) \| (.*) \|$", re.MULTILINE)
ON_A_BLOCK = {
    "darts": "darts, exact product",
    "sama": "sama, exact product",
    "unrolled": "unrolled, K = 5",
    "forward": "forward, K = 5",
    "zeroth-order": "zeroth-order, K = 5, m = 1",
}
ON_THE_PROBLEM = {"darts": "darts, sama", "sama": "darts, sama"}


def results(name: str) -> Any:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["results"]


def table() -> dict[str, list[str]]:
    text = PAGE.read_text("utf-8").split("## Measured side by side")[1]
    text = text.split("\n## ")[0]
    return {name: cells.split(" | ") for name, cells in ROW.findall(text)}


def is_rounded(said: str, true: float) -> bool:
    """Return whether a number is another one, to the digits that are written."""
    digits = len(re.sub(r"e.*|^0\.0*|\.", "", said))
    return f"{true:.{digits - 1}e}" == f"{float(said):.{digits - 1}e}"


def test_it_has_a_row_for_every_estimator() -> None:
    # `implicit` is the family's; `auto` takes one of the others.
    assert set(table()) == set(estimator_names()) - {"implicit", "auto"}


@pytest.mark.parametrize("name", sorted(table()))
def test_errors_costs_and_memory_are_those_of_the_results(name: str) -> None:
    error, passes, gradients, memory, batches, everything, place = table()[name]
    found = re.fullmatch(r"(\S+) \((.*)\)", error)
    if found is None:
        assert error == "has no indirect term"
    else:
        said, setting = found.groups()
        label = f"{name}, {setting}"
        (truth,) = (
            row["float64"]["worst"]
            for row in results("estimator_accuracy")
            if row["name"] == label
            and "eigenvalues" not in row["differentiates"]
            and "momentum" not in row["differentiates"]
        )
        assert is_rounded(said, truth)
    row = results("estimator_cost")[-1]["rows"][ON_A_BLOCK.get(name, name)]
    assert passes == f"{row['forwards']:.0f}"
    assert gradients == f"{row['inner_gradients']:.0f}"
    assert memory == f"{row['peak_bytes'] / 2**20:.0f} MiB"
    label = ON_THE_PROBLEM.get(name, name)
    for said, noise in ((batches, "batches of 64"), (everything, "all samples")):
        (end,) = (r for r in results("convergence")[noise] if r["label"] == label)
        if said == "diverges":
            assert end["diverged"] > 0
        else:
            assert is_rounded(said, end["median_end"])
    assert place
