"""The guides' code runs, their pages keep one form, and what they name exists."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
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
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    pipeline,
)

import hypergrad
from bidora import _registry, defaults, magnitudes, train
from bidora.budget import budget_defaults
from bidora.cli.parser import make_parser
from bidora.data.catalog import CATALOG
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.methods import METHODS
from bidora.methods.base import Method
from bidora.models import ModelSource
from bidora.runs.settings import TrainSettings
from bidora.study import reading
from bidora.study.reading import read_grid
from bidora.tasks import TASKS, Task, make_task
from bidora.tasks.language import LANGUAGE_METRICS
from bidora.tasks.metrics import (
    CLASSIFICATION_METRICS,
    MULTILABEL_METRICS,
    REGRESSION_METRICS,
)
from bidora.tasks.tagging import METRICS as TAGGING_METRICS
from bidora.tasks.text_scores import TEXT_METRICS
from hypergrad import HypergradEstimator, estimator_names, make_estimator
from hypergrad.estimators import registry
from tests.bidora.conftest import spare

DOCS = Path(__file__).parent.parent / "docs"
ESTIMATORS = (
    "first-order",
    "darts",
    "sama",
    "unrolled",
    "forward",
    "zeroth-order",
    "neumann",
    "cg",
    "nystrom",
    "implicit",
    "penalty",
    "f2sa",
    "pbgd-free",
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
    "analysis.md",
    "tasks/your-own.md",
    "tasks/generation.md",
    "methods.md",
    "probe.md",
    "predict.md",
    "trainer.md",
    "examples/ridge.md",
    "examples/data-weights.md",
    "examples/imaml.md",
    "examples/looking-back.md",
    "examples/rates.md",
    "examples/whole-runs.md",
)
TASK_PAGES = (
    "classification",
    "regression",
    "multilabel",
    "images",
    "tagging",
    "generation",
    "instruction",
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
    for names in (TASKS, METHODS):
        monkeypatch.setattr(names, "_homes", dict(names._homes))


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
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != "extending.md"],  # which has its own test
)
def test_the_code_of_a_page_runs(
    page: str,
    module: types.ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert blocks(page, "python"), "a page without an example"
    monkeypatch.chdir(tmp_path)
    if page in (
        "trainer.md",
        "probe.md",
        "predict.md",
        "tasks/your-own.md",
        "tasks/generation.md",
    ):
        spare(monkeypatch)
        # The bundled encoder takes minutes of a core.
        folder = str(tiny_encoder(tmp_path / "encoder"))
        found = ModelSource("tiny", folder, is_local=True)
        monkeypatch.setattr("bidora.models.find_model", lambda name="": found)
        if page == "predict.md":
            vars(module)["base_model"] = folder
            write_a_run()
    names = run(page, module)
    if page == "predict.md":
        the_ways_of_loading_agree(names)


def write_a_run() -> None:
    """Train for a few steps into the folder that the page names."""
    rows = [f"{'good' if n % 2 else 'bad'} text {n},{n % 2}" for n in range(40)]
    Path("reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    Path("new.csv").write_text("text\na new text\n", "utf-8")
    settings = TrainSettings(
        task="reviews.csv",
        method="bidora",
        max_steps=16,
        learning_rate=0.1,
        output_dir="runs/mine",
    )
    train(settings)


def the_ways_of_loading_agree(names: dict[str, Any]) -> None:
    """Compare what the page's blocks left, and try what it says does not work."""
    probabilities = names["logits"].softmax(-1)[0].tolist()
    (answer,) = names["answer"]
    with Path("scored.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert [float(row["p(0)"]), float(row["p(1)"])] == pytest.approx(probabilities)
    assert answer["label"] == row["label"]
    assert answer["score"] == pytest.approx(max(probabilities), rel=1e-4)

    auto = AutoModelForSequenceClassification
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        auto.from_pretrained("runs/mine")
    with pytest.raises(ValueError, match="Could not load model"):
        pipeline("text-classification", model="runs/mine")
    # Without the configuration the magnitudes are those of the base.
    file = Path("runs/mine/adapter_config.json")
    config = json.loads(file.read_text("utf-8"))
    config["base_model_name_or_path"] = names["base_model"]
    file.write_text(json.dumps(config), "utf-8")
    Path("runs/mine/config.json").unlink()
    model = auto.from_pretrained("runs/mine")
    saved = load_file("runs/mine/adapter_model.safetensors")
    found = magnitudes(model)
    assert found
    for name, values in found.items():
        layer = name.split(".lora_magnitude_vector")[0]
        weight = model.get_parameter(f"{layer}.base_layer.weight")
        torch.testing.assert_close(values, weight.norm(dim=1))
        right = saved[f"base_model.model.{layer}.lora_magnitude_vector"]
        assert (values - right).abs().max() > 0.01


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
    text = text_of("bidora.md").split("## Settings that matter")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.M))
    settings: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(TrainSettings)
    }
    size = settings["per_device_train_batch_size"]
    derived = budget_defaults(
        settings["budget"],
        steps=settings["max_steps"],
        batch_size=size,
        validation_fraction=settings["validation_fraction"],
    )
    truth = {
        **settings,
        "estimator": derived["estimator"],
        "outer_every": derived["outer_every"],
        "outer_warmup_steps": defaults.OUTER_WARMUP,
        "learning_rate": defaults.LEARNING_RATE,
        "per_device_outer_batch_size": derived["outer_batch_size"],
        "retrain": derived["retrain"],
        "orthogonality": derived["orthogonality"],
    }
    assert set(rows) <= set(settings)
    left_open = {n for n, shown in rows.items() if not re.match(r"`|never|\d", shown)}
    assert all(settings[name] is None for name in left_open)
    for name in set(rows) - left_open:
        found = re.match(r"`?(?:never \()?([\w.-]+)", rows[name])
        assert found
        wanted = truth[name]
        shown = found[1] if isinstance(wanted, str) else float(found[1])
        assert shown == wanted, name
    assert (
        f"else {defaults.OTHER_LEARNING_RATE:.0e}".replace("e-0", "e-")
        in (rows["learning_rate"])
    )


def options(command: str) -> set[str]:
    """Return the options of a command, without those that switch one off."""
    parser = make_parser()
    (chosen,) = [
        a for a in parser._actions if isinstance(a, argparse._SubParsersAction)
    ]
    actions: Any = chosen.choices[command]._actions
    return {a.option_strings[0] for a in actions if a.option_strings}


def test_the_bidora_page_lists_every_option() -> None:
    text = text_of("bidora.md").split("### Three splits")[0]
    listed = set(re.findall(r"`(--[\w-]+)", text))
    known = options("train") - {"-h"}
    assert known <= listed
    assert listed <= known | options("estimators") | options("predict") | {"--help"}


@pytest.mark.parametrize(
    "page",
    [
        "analysis.md",
        "methods.md",
        "predict.md",
        "probe.md",
        *(f"tasks/{n}.md" for n in ("index", *TASK_PAGES)),
    ],
)
def test_options_that_a_page_names_exist(page: str) -> None:
    known = options("train") | options("predict") | options("export")
    known |= {f"--no-{name[2:]}" for name in known}
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]+)", text_of(page))) <= known


def test_the_page_of_predict_lists_its_options() -> None:
    listed = set(re.findall(r"(--[a-z][\w-]+)", text_of("predict.md")))
    assert (options("predict") | options("export")) - {"-h"} == listed


def test_the_page_on_comparing_lists_its_options_and_keys(tmp_path: Path) -> None:
    text = text_of("comparing-methods.md")
    listed = set(re.findall(r"(--[a-z][\w-]+)", text))
    assert {n for n in options("compare") if not n.startswith("--no-")} - {
        "-h"
    } == listed
    keys = re.findall(r"^\| `(\w+)` \|", text.split("## What is run")[0], re.M)
    assert set(keys) == set(reading.KEYS)
    whole, part, entries = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "grid.yaml").write_text(whole)
    assert set(yaml.safe_load(whole)) == set(reading.KEYS)
    first = read_grid(tmp_path / "grid.yaml")
    assert [method.name for method in first.methods] == ["probe", "lora", "dora"]
    (tmp_path / "part.yaml").write_text(f"tasks: {{a: {{}}}}\nreference: lora\n{part}")
    assert len(read_grid(tmp_path / "part.yaml").methods) == 2
    (tmp_path / "some.yaml").write_text(
        f"tasks: {{a: {{}}}}\nreference: bidora\n{entries}"
    )
    assert len(read_grid(tmp_path / "some.yaml").trials_of("bidora")) == 3


def test_the_table_of_methods_is_the_registry() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", text_of("methods.md"), re.M)
    ours = [(name, METHODS.get(name).summary) for name in METHODS.names()]
    assert rows[: len(ours)] == ours


def test_every_type_of_task_has_a_page_with_its_metrics() -> None:
    assert TASKS.names() == TASK_PAGES
    for name in TASK_PAGES:
        kind = TASKS.get(name)
        row = rf"\| \[`{name}`\]\({name}\.md\) \|.*\| `{kind.main_metric}`"
        assert re.search(row, text_of("tasks/index.md")), name
    for name, metrics in {
        "classification": CLASSIFICATION_METRICS,
        "regression": (*REGRESSION_METRICS, "mse"),
        "multilabel": MULTILABEL_METRICS,
        "images": CLASSIFICATION_METRICS,
        "tagging": TAGGING_METRICS,
        "generation": (*TEXT_METRICS, *LANGUAGE_METRICS),
        "instruction": LANGUAGE_METRICS,
    }.items():
        table = text_of(f"tasks/{name}.md").split("## Metrics")[1]
        assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == set(metrics)


def test_data_sets_known_by_name_are_on_the_page_of_tasks() -> None:
    table = text_of("tasks/index.md")
    for name in CATALOG:
        assert re.search(rf"`(?:glue/)?{name.removeprefix('glue/')}`", table), name


@pytest.mark.parametrize("page", PAGES)
def test_cited_keys_are_in_the_references(page: str) -> None:
    known = set(re.findall(r"^\*\*\[(\w+)\]\*\*", text_of("references.md"), re.M))
    cited = set(re.findall(r"\[([A-Z]{1,5}\d\d)[,\]]", text_of(page)))
    assert cited <= known


def its_estimators(names: dict[str, Any]) -> list[type[HypergradEstimator]]:
    return [
        value
        for value in names.values()
        if isinstance(value, type)
        and issubclass(value, HypergradEstimator)
        and value.__module__ == names["__name__"]
    ]


@pytest.mark.usefixtures("own_registry")
def test_the_extending_page_writes_an_estimator_in_thirty_lines(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = blocks("extending.md", "python")[0][1]
    # Thirty lines were needed before `needs` and defaults: shorter, not longer.
    assert len([line for line in first.splitlines() if line.strip()]) <= 15

    kind, *others = its_estimators(run("extending.md", module))  # the page checks them
    assert f"class {kind.__name__}" in first
    assert f"check_estimator({kind.__name__}()" in text_of("extending.md")
    # One that looks back, and one with a sequence of its own.
    assert [other.__name__ for other in others] == ["LooksBack", "ValueFunction"]
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


@pytest.mark.usefixtures("own_registry")
def test_the_page_on_tasks_writes_one_in_forty_lines(
    module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = blocks("tasks/your-own.md", "python")[0][1]
    assert len([line for line in first.splitlines() if line.strip()]) <= 40
    ((_, declared),) = blocks("tasks/your-own.md", "toml")
    by_an_entry_point(TASKS, Task, first, declared, module, monkeypatch)
    rows = tuple((f"text {n}", str(1 + n % 3)) for n in range(9))
    table = Table("t.csv", ("text", "label"), (*rows, ("bad", "x")), ("line",) * 10)
    task = make_task("ordinal")
    schema = task.schema(Source("t.csv", {"train": table}))
    assert schema.label_names == ("1", "2", "3")
    read = task.rows(table, schema)
    assert read.columns["labels"] == [0, 1, 2] * 3
    assert read.bad == ["t.csv, line: 'x' is no grade."]


@pytest.mark.usefixtures("own_registry")
def test_the_page_on_methods_declares_its_own(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, code),) = blocks("methods.md", "python")
    ((_, declared),) = blocks("methods.md", "toml")
    by_an_entry_point(METHODS, Method, code.split("METHODS.register")[0], declared,
                      module, monkeypatch)  # fmt: skip
    assert METHODS.get("lora-bias").phases == ("train",)


def by_an_entry_point(
    names: _registry.Registry,
    base: type,
    code: str,
    declared: str,
    module: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run a page's class, and find it as the page's pyproject.toml declares it."""
    exec(compile(code, "a page", "exec", dont_inherit=True), vars(module))
    ((group, points),) = tomllib.loads(declared)["project"]["entry-points"].items()
    assert group == names.group
    ((name, target),) = points.items()
    kind = vars(module)[target.partition(":")[2]]
    assert issubclass(kind, base)
    assert kind.name == name
    point = EntryPoint(name, f"{module.__name__}:{kind.__name__}", group)

    def installed(group: str, name: str = name) -> list[EntryPoint]:
        return [point] if (group, name) == (point.group, point.name) else []

    monkeypatch.setattr(_registry, "entry_points", installed)
    assert names.names()[-1] == name
    assert names.get(name) is kind
