"""The card of a run: what the Hub reads, and what a reader can do with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from bidora.errors import UserError
from bidora.models import ModelSource, find_model
from bidora.runs.card import _plain, write_card
from tests.bidora.conftest import Finished
from tests.tolerances import error, tol

Run = Callable[[str], Finished]

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


@pytest.mark.parametrize("method", ["bidora", "lora", "full", "houlsby", "probe"])
def test_card_has_what_the_hub_reads(finished: Run, method: str) -> None:
    run = finished(method)
    card = ModelCard.load(run.folder / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "text-classification"
    libraries = {"full": "transformers", "probe": "transformers"}
    assert data["library_name"] == libraries.get(method, "peft")
    assert {method, "bidora"} <= set(data["tags"])
    assert "base_model" not in data  # a folder of this machine
    for heading in ("## Scores", "## Use", "## Settings that were changed"):
        assert heading in card.text


def test_scores_on_the_card_are_those_of_the_run(finished: Run) -> None:
    run = finished("bidora")
    text = run.read("README.md")
    lines = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in lines}
    names, values = rows["examples"], rows["test"]
    assert names[-1] == "loss"
    test = run.result.phases[-1].test
    assert values == [f"{test[name]:.4f}" for name in names]
    assert "held_back" not in rows
    assert rows["max_steps"] == ["`8`"]
    assert "search 8 steps" in text
    assert "retrain 8 steps" in text


@pytest.mark.parametrize("method", ["lora", "full", "houlsby", "probe"])
def test_the_code_on_the_card_loads_the_model(
    finished: Run, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(method)
    found = re.search(r"```python\n(.*?)```", run.read("README.md"), re.DOTALL)
    assert found
    monkeypatch.chdir(run.folder)
    lines: dict[str, Any] = {}
    exec(found[1], lines)
    allowed = tol(torch.float32, cond=run.condition_of_the_head())
    assert error(run.logits(lines["model"]), run.logits()) <= allowed


def test_every_row_of_a_table_has_its_cells(finished: Run, tmp_path: Path) -> None:
    """Names of files, columns and classes may hold what tables are made of."""
    import dataclasses

    run = finished("lora")
    settings = dataclasses.replace(
        run.settings, text_column="a|b`c\nd", label_separator="|"
    )
    job = run.job
    schema = dataclasses.replace(job.examples.schema, label_names=("x|y", "`", "z\nw"))
    examples = dataclasses.replace(job.examples, schema=schema)
    write_card(tmp_path, settings, examples, job.source, run.result, job.pooling)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "`a/b'c d`" in text
    table = text[text.index("| setting | value |") :].strip().splitlines()
    assert all(line.count("|") == 3 for line in table)
    assert "`x/y`, `'`, `z w`" in text
    assert _plain("a|b\n`") == "a/b '"


@pytest.mark.parametrize(
    ("name", "base"),
    [("owner/model", "owner/model"), ("gpt2", "gpt2"), ("./models/mine", None)],
)
def test_the_base_is_named_where_the_hub_has_it(
    finished: Run, tmp_path: Path, name: str, base: str | None
) -> None:
    run = finished("lora")
    source = ModelSource(name, name, is_local=name.startswith("."))
    job = run.job
    write_card(tmp_path, run.settings, job.examples, source, run.result, job.pooling)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data.get("base_model") == base


def test_the_bundled_model_is_named_as_on_the_hub(
    finished: Run, tmp_path: Path
) -> None:
    try:
        source = find_model()
    except UserError as missing:
        pytest.skip(f"needs the bundled model, of the extra demo: {missing}")
    run = finished("lora")
    job = run.job
    write_card(tmp_path, run.settings, job.examples, source, run.result, job.pooling)
    text = (tmp_path / "README.md").read_text("utf-8")
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    assert ModelCard.load(tmp_path / "README.md").data.to_dict()["base_model"] == hub
    assert f"from_pretrained('{hub}', config=config" in text
    assert source.location not in text
