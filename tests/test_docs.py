"""The guides' code runs, their pages keep one form, and what they name exists."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import tomllib
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
from transformers import BertConfig, BertModel, BertTokenizer

import hypergrad
from bidora import BiDoRAOptimizer
from bidora.models import ModelSource
from bidora.settings import TrainSettings
from hypergrad import HypergradEstimator, estimator_names, make_estimator
from hypergrad.estimators import registry
from hypergrad.testing import check_estimator

DOCS = Path(__file__).parent.parent / "docs"
ESTIMATORS = (
    "first-order",
    "darts",
    "sama",
    "unrolled",
    "neumann",
    "cg",
    "nystrom",
    "implicit",
    "auto",
)
PAGES = (
    "estimators/index.md",
    *(f"estimators/{name}.md" for name in ESTIMATORS),
    "how-to-choose.md",
    "comparing.md",
    "extending.md",
    "precision-and-ranks.md",
    "compared.md",
    "bidora.md",
    "trainer.md",
)
HEADINGS = (
    "Idea",
    "Equation",
    "Exact when",
    "Use when, avoid when",
    "Cost",
    "Settings that matter",
    "Signs of failure",
    "Example",
    "References",
)


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a page, each with the line it starts on."""
    text = text_of(page)
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
    return [(text[: m.start(1)].count("\n") + 1, m[1]) for m in found]


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a page register what it likes."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Yield an importable module for a page's code to run in, as dataclasses need."""
    made = types.ModuleType("a_page_of_the_docs")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    yield made
    vars(made).clear()


def run(page: str, module: types.ModuleType) -> dict[str, Any]:
    """Run a page's Python blocks in order, in one namespace."""
    names = vars(module)
    for line, code in blocks(page, "python"):
        # Leading blank lines make tracebacks point into the page itself. This file's
        # own __future__ imports are not the reader's.
        padded = "\n" * (line - 1) + code
        exec(compile(padded, str(DOCS / page), "exec", dont_inherit=True), names)
    return names


@pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning")
@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(
    page: str,
    module: types.ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert blocks(page, "python"), "a page without an example"
    monkeypatch.chdir(tmp_path)
    if page == "trainer.md":  # its encoder takes minutes of a core
        folder = str(tiny_encoder(tmp_path))
        found = ModelSource("tiny", folder, is_local=True)
        monkeypatch.setattr("bidora.models.find_model", lambda: found)
    run(page, module)


def tiny_encoder(folder: Path) -> Path:
    """Write a BERT with random weights, and a tokenizer that knows letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase]
    words += [f"##{letter}" for letter in ascii_lowercase]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_the_diff_of_the_trainer_page_leads_from_one_script_to_the_other() -> None:
    scripts = [code for _, code in blocks("trainer.md", "python")]
    ((_, diff),) = blocks("trainer.md", "diff")
    lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert before == scripts[1]
    assert after == scripts[2]
    assert sum(line[:1] == "+" for line in lines) == 4


def test_every_registered_estimator_has_a_page() -> None:
    assert set(ESTIMATORS) == set(estimator_names())


@pytest.mark.parametrize("page", ["index.md", "estimators/index.md", "../README.md"])
def test_tables_of_estimators_are_complete(page: str) -> None:
    rows = re.findall(r"^\| \[?`([\w-]+)`", text_of(page), re.M)
    assert set(ESTIMATORS) <= set(rows)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator_pages_have_the_same_headings(name: str) -> None:
    page = f"estimators/{name}.md"
    headings = re.findall(r"^## (.+)$", text_of(page), re.M)
    assert tuple(headings) == HEADINGS
    examples = text_of(page).split("## Example\n")[1]
    assert "assert " in examples
    assert "n_hvp" in examples, "the cost table is not checked by the example"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_settings_of_an_estimator_are_on_its_page(name: str) -> None:
    estimator: Any = make_estimator(name)
    page = text_of(f"estimators/{name}.md")
    for setting in {f.name for f in dataclasses.fields(estimator)}:
        assert f"`{setting}" in page, f"{setting} is not on the page of {name}"


def test_every_field_of_info_is_explained() -> None:
    page = text_of("estimators/index.md")
    for field in dataclasses.fields(hypergrad.Info):
        assert f"`{field.name}`" in page, field.name


def test_defaults_of_the_bidora_page_are_the_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text_of("bidora.md"), re.M)
    ours = inspect.signature(BiDoRAOptimizer).parameters
    number = r"\d[\d.e-]*"
    seen = 0
    for name, text in rows:
        if found := re.match(rf"`?({number}|[a-z]\w+`)", text):
            shown = found[1].rstrip("`")
            assert shown == f"{getattr(TrainSettings, name)}" or (
                float(shown) == getattr(TrainSettings, name)
            ), name
            seen += 1
        if found := re.search(rf"\(({number})\)", text):
            assert float(found[1]) == ours[name].default, name
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("page", PAGES)
def test_cited_keys_are_in_the_references(page: str) -> None:
    known = set(re.findall(r"^\*\*\[(\w+)\]\*\*", text_of("references.md"), re.M))
    cited = set(re.findall(r"\[([A-Z]{1,5}\d\d)[,\]]", text_of(page)))
    assert cited <= known


def the_estimator(names: dict[str, Any]) -> type[HypergradEstimator]:
    (kind,) = [
        value
        for value in names.values()
        if isinstance(value, type)
        and issubclass(value, HypergradEstimator)
        and value.__module__ == names["__name__"]
    ]
    return kind


@pytest.mark.usefixtures("own_registry")
def test_the_extending_page_writes_an_estimator_in_thirty_lines(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = blocks("extending.md", "python")[0][1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 30

    kind = the_estimator(run("extending.md", module))
    assert f"class {kind.__name__}" in first
    check_estimator(kind())
    assert isinstance(make_estimator(kind.name), kind), "the page registers it"

    # By entry point, as the page's pyproject.toml declares it.
    ((_, declared),) = blocks("extending.md", "toml")
    ((group, points),) = tomllib.loads(declared)["project"]["entry-points"].items()
    assert group == registry._ENTRY_POINTS
    ((name, target),) = points.items()
    assert target.endswith(f":{kind.__name__}")
    point = EntryPoint(name, f"{module.__name__}:{kind.__name__}", group)

    def installed(group: str, name: str = name) -> list[EntryPoint]:
        return [point] if (group, name) == (point.group, point.name) else []

    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.setattr(registry, "entry_points", installed)
    assert estimator_names() == [name]
    assert isinstance(make_estimator(name), kind)
