"""The grid: what the YAML means, and how it says no."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.study.grid import GridMethod
from bidora.study.reading import grid_from_dict, read_grid
from bidora.study.records import Cell

WHOLE = """\
settings: {max_steps: 12, lora_r: 3}
tasks:
  docstrings: {}
  reviews:
    task: data/reviews.csv
    validation_file: more.csv
    max_steps: 30
    seeds: [7]
    equal: steps
  glue: {task: glue/sst2, data_dir: ~/glue}
methods:
  bidora: {tasks: [docstrings]}
  lora: {sweep: {learning_rate: [3e-4, 1.0e-3], lora_r: [2, 4]}}
  careful: {method: lora, lora_dropout: 0.1}
  full: {}
seeds: [0, 1]
sweep: {seeds: [100, 101], trials: 3}
equal: [time, steps]
reference: lora
processes: 2
"""


def grid_of(**changed: Any) -> Any:
    return grid_from_dict(
        {
            "tasks": {"docstrings": {}},
            "methods": {"lora": {}, "dora": {}},
            "reference": "lora",
            **changed,
        },
        where="small.yaml",
    )


def test_a_file_becomes_the_grid_it_describes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "reviews.csv").touch()
    (tmp_path / "grid.yaml").write_text(WHOLE)
    grid = read_grid(tmp_path / "grid.yaml")
    assert [task.name for task in grid.tasks] == ["docstrings", "reviews", "glue"]
    assert [task.seeds for task in grid.tasks] == [(0, 1), (7,), (0, 1)]
    assert [task.sizes for task in grid.tasks] == [(0,)] * 3
    assert (grid.sweep_seeds, grid.trials, grid.processes) == ((100, 101), 3, 2)
    assert (grid.equal, grid.reference) == (("steps", "time"), "lora")
    assert grid.equal_on("docstrings") == ("steps", "time")
    assert grid.equal_on("reviews") == ("steps",)
    assert [t.name for t in grid.tasks if grid.is_timed(t.name, "full")] == [
        "docstrings",
        "glue",
    ]
    assert not grid.is_timed("docstrings", "lora")
    # What is a path depends on the file's folder, and on no other.
    reviews, glue = grid.task("reviews").settings, grid.task("glue").settings
    assert reviews["task"] == str(tmp_path / "data" / "reviews.csv")
    assert reviews["validation_file"] == str(tmp_path / "more.csv")
    assert (glue["task"], glue["data_dir"]) == (
        "glue/sst2",
        str(Path("~/glue").expanduser()),
    )
    assert [(t, m) for t, m, _ in grid.groups() if m == "bidora"] == [
        ("docstrings", "bidora")
    ]
    assert grid.has("glue", "full")
    assert not grid.has("glue", "bidora")
    # 3e-4 is text to YAML.
    swept = {"learning_rate": (0.0003, 0.001), "lora_r": (2, 4)}
    assert grid.method("lora").sweep == (swept,)
    assert grid.sweeps("lora")
    assert not grid.sweeps("careful")


def test_settings_of_method_task_and_grid_go_before_each_other(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(WHOLE)
    grid = read_grid(tmp_path / "grid.yaml")
    trial = (("learning_rate", 0.001), ("lora_r", 2))
    settings = grid.settings_of(Cell("reviews", "lora", 0, 7, "steps", trial))
    assert (settings.method, settings.seed, settings.max_steps) == ("lora", 7, 30)
    assert (settings.learning_rate, settings.lora_r) == (0.001, 2)
    careful = grid.settings_of(Cell("docstrings", "careful", 0, 1, "steps"))
    assert (careful.method, careful.lora_dropout, careful.lora_r) == ("lora", 0.1, 3)
    assert careful.max_steps == 12
    assert careful.output_dir is None
    # Full fine-tuning has no rank: what is given for all is left out for it.
    assert grid.unused("docstrings", "full") == ["lora_r"]
    assert grid.settings_of(Cell("docstrings", "full", 0, 1, "steps")).lora_r == 32
    assert grid.settings_of(Cell("glue", "full", 0, 1, "time"), 77).max_steps == 77


def test_what_is_written_down_is_read_as_the_same_grid(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(WHOLE)
    grid = read_grid(tmp_path / "grid.yaml")
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "grid.yaml").write_text(yaml.safe_dump(grid.to_dict(), sort_keys=False))
    assert read_grid(again / "grid.yaml") == grid


def test_trials_are_the_product_or_a_part_of_it_that_only_grows() -> None:
    method = GridMethod(
        "lora", {}, ({"lora_r": (2, 4), "learning_rate": (0.1, 0.2, 0.3)},)
    )
    every = method.trials(None)
    assert len(every) == len(set(every)) == method.combinations == 6
    assert every[0] == (("learning_rate", 0.1), ("lora_r", 2))
    some = [method.trials(n) for n in range(1, 8)]
    assert [len(trials) for trials in some] == [1, 2, 3, 4, 5, 6, 6]
    assert all(set(a) < set(b) for a, b in pairwise(some[:6]))
    assert [t for t in every if t in some[3]] == list(some[3])
    assert some[2] == method.trials(3)


def test_a_sweep_of_several_entries_tries_the_combinations_of_each(
    tmp_path: Path,
) -> None:
    text = """
tasks: {docstrings: {}}
methods:
  bidora:
    sweep:
      - {learning_rate: [3.0e-4, 6.0e-4], outer_learning_rate: [6.0e-4]}
      - {outer_learning_rate: [6e-3], learning_rate: [1.2e-3]}
"""
    (tmp_path / "grid.yaml").write_text(text)
    grid = read_grid(tmp_path / "grid.yaml")
    rates = [tuple(value for _, value in t) for t in grid.trials_of("bidora")]
    assert rates == [(3e-4, 6e-4), (6e-4, 6e-4), (1.2e-3, 6e-3)]
    assert grid.method("bidora").combinations == 3
    assert grid.sweeps("bidora")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(grid.to_dict()))
    assert read_grid(tmp_path / "again.yaml") == grid


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metods": {}}, "there is no key 'metods'; .* Did you mean 'methods'"),
        ({"tasks": None}, "tasks: it names none"),
        ({"tasks": ["docstrings"]}, "tasks: it is .* write names"),
        ({"tasks": {"../out": {}}}, "tasks: '../out' would name a folder, and cannot"),
        ({"tasks": {"..": {}}}, "'..' would name a folder"),
        ({"tasks": {".hidden": {}}}, "'.hidden' would name a folder"),
        ({"tasks": {"a/b": {}}}, "'a/b' would name a folder"),
        ({"tasks": {"x" * 90: {}}}, "would name a folder"),
        ({"tasks": {False: {}}}, "tasks: the name False is not a word; write it in quotes"),
        ({"tasks": {"words": {"max_step": 3}}}, "tasks.words: .*Did you mean 'max_steps'"),
        ({"tasks": {"words": {"sead": [1]}}}, "Did you mean 'seeds'"),
        ({"tasks": {"words": {"seed": 1}}}, "tasks.words.seed: seeds are listed under"),
        ({"tasks": {"words": {"method": "lora"}}}, "it belongs to an entry of `methods`"),
        ({"tasks": {"words": {"task": 3}}}, "tasks.words.task: it is 3; give a word"),
        ({"methods": {"lorra": {}}, "reference": "lorra"}, "no method 'lorra'.*'lora'"),
        ({"methods": {"mine": {"method": "dorra"}}}, "methods.mine: .*'dora'"),
        ({"methods": {"lora": {}, "LoRA": {"method": "lora"}}}, "differ by case alone"),
        ({"methods": {"lora": {"tasks": ["docstring"]}}}, "Did you mean 'docstrings'"),
        ({"methods": {"lora": {"task": "x"}}}, "it belongs to an entry of `tasks`"),
        (
            {"methods": {"lora": {"metric": "f1_macro"}}},
            "methods.lora.metric: it belongs to an entry of `tasks` or to `settings`: "
            "methods are compared on the same examples, by the same metric",
        ),
        ({"methods": {"lora": {"test_file": "x.csv"}}}, "lora.test_file: it belongs to"),
        ({"methods": {"lora": {"task_type": "regression"}}}, "lora.task_type: it belongs"),
        ({"methods": {"lora": {"sweep": {"on_bad_row": ["skip", "error"]}}}},
         "methods.lora.sweep.on_bad_row: it belongs to an entry of `tasks`"),
        ({"methods": {"lora": {"sweep": {"max_validation_samples": [5, 9]}}}},
         "sweep.max_validation_samples: it belongs to an entry of `tasks`"),
        ({"methods": {"lora": {"output_dir": "x"}}}, "output_dir: runs go into"),
        ({"methods": {"lora": {"learning_rate": -1}}}, "small.yaml: methods.lora on"),
        ({"methods": {"lora": {"learning_rate": "fast"}}}, "'fast'; give a number"),
        ({"methods": {"lora": {"orthogonality": 0.3}}}, "has no meaning with --method"),
        ({"methods": {"lora": {"sweep": {"learning_rat": [1]}}}}, "'learning_rate'"),
        ({"methods": {"lora": {"sweep": {"learning_rate": 1}}}}, "give a list"),
        ({"methods": {"lora": {"sweep": {"learning_rate": []}}}}, "give a list"),
        ({"methods": {"lora": {"sweep": {"lora_r": [2, 2]}}}}, "listed twice"),
        (
            {"methods": {"lora": {"sweep": [{"lora_r": [2]}, {"max_steps": [3]}]}}},
            r"sweep\[1\]: it sweeps max_steps, where the first entry sweeps lora_r",
        ),
        ({"methods": {"lora": {"sweep": [{}]}}}, r"sweep\[0\]: it sweeps nothing"),
        (
            {"methods": {"lora": {"sweep": [{"lora_r": [2, 4]}, {"lora_r": [4]}]}}},
            "two entries have lora_r 4; leave it out of one",
        ),
        ({"methods": {"lora": {"sweep": [3]}}}, r"sweep\[0\]: it is 3; write names"),
        ({"methods": {"lora": {"sweep": {"lora_r": [2, 0]}}}}, "with lora_r=0: --lora-r"),
        (
            {"methods": {"lora": {"lora_r": 2, "sweep": {"lora_r": [2, 4]}}}},
            "methods.lora.lora_r: it is swept, and given too",
        ),
        (
            {"methods": {"bidora": {"sweep": {"estimator_settings": [{"a": 1}]}}}},
            "a mapping cannot be swept",
        ),
        (
            {"methods": {"lora": {"sweep": {"lora_r": list(range(1, 400)),
                                            "max_steps": list(range(1, 400))}}}},
            "159,201 combinations",
        ),
        ({"sizes": [0]}, "sizes: it has 0; give whole numbers of 1 or more, or leave"),
        ({"sizes": [5, 5]}, r"sizes: \[5, 5\] lists one twice"),
        ({"seeds": []}, r"seeds: it is \[\]; give a list"),
        ({"seeds": [True]}, "seeds: it has True"),
        ({"seeds": [2**32]}, "too large"),
        ({"sweep": {"trial": 2}}, "sweep: there is no key 'trial'.*'trials'"),
        ({"sweep": {"trials": 0}}, "sweep.trials: it has 0"),
        (
            {"methods": {"lora": {"sweep": {"lora_r": [2, 4, 8]}}}, "sweep": {"trials": 1}},
            "sweep.trials: it is 1, and methods.lora.sweep has 3 combinations: .*Give 2",
        ),
        ({"methods": {"lora": {"sweep": {"model": ["x", 3]}}}},
         "sweep.model: it is 3; give a word"),
        ({"equal": ["time"]}, "time alone cannot"),
        ({"equal": ["tme"]}, "Did you mean 'time'"),
        ({"tasks": {"docstrings": {"equal": "time"}}}, "tasks.docstrings.equal"),
        ({"reference": "lorra"}, "reference: .*Did you mean 'lora'"),
        ({"reference": None}, "reference: it is left out"),
        ({"processes": 0}, "processes: it has 0"),
        ({"settings": {"task": "x"}}, "settings.task: it belongs to an entry of `tasks`"),
        ({"settings": {"push_to_hub": True}}, "nothing that a study trains is kept"),
        (
            {"methods": {"lora": {"sweep": {"lora_r": [2, 4]}}}, "sweep": {"seeds": [0]}},
            "sweep.seeds: 0 is among the seeds of tasks.docstrings too",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_key_and_file(
    changed: dict[str, Any], said: str
) -> None:
    if set(changed.get("methods", {"dora"})) != {"dora"} and "reference" not in changed:
        changed = {**changed, "reference": next(iter(changed["methods"]))}
    with pytest.raises(UserError, match=said) as caught:
        grid_of(**changed)
    assert str(caught.value).startswith("small.yaml: ")


def test_a_file_that_is_no_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    with pytest.raises(UserError, match=r"there is no grid .*Name a YAML file"):
        read_grid(path)
    for text, said in (
        ("a: [", "cannot be read"),
        ("just words", "write names"),
        ("tasks: {a: {}, b: {}, a: {}}", "the key 'a' is there twice .*line 1"),
        ("", "tasks: it names none"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_grid(path)


def test_one_method_needs_no_reference_and_seeds_of_a_sweep_may_be_used_without() -> (
    None
):
    grid = grid_of(methods={"lora": {}}, reference=None, seeds=[100])
    assert grid.reference == "lora"


def test_a_method_may_read_the_examples_in_a_way_of_its_own() -> None:
    sweep = {"max_length": [16, 32], "validation_fraction": [0.1, 0.3]}
    grid = grid_of(methods={"lora": {"max_length": 16}, "bidora": {"sweep": sweep}})
    assert grid.method("lora").settings["max_length"] == 16
    assert grid.method("bidora").sweep[0]["max_length"] == (16, 32)


def test_one_trial_of_one_combination_is_no_choice() -> None:
    grid = grid_of(
        methods={"lora": {"sweep": {"lora_r": [2]}}}, sweep={"trials": 1}, seeds=[100]
    )
    assert grid.trials == 1


def test_models_that_are_swept_are_looked_up_from_the_folder_of_the_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "enc").mkdir()
    (tmp_path / "grid.yaml").write_text(
        "tasks: {docstrings: {}}\n"
        "methods: {lora: {sweep: {model: [enc, OWNER/NAME]}}}\n"
    )
    grid = read_grid(tmp_path / "grid.yaml")
    assert grid.method("lora").sweep[0]["model"] == (
        str(tmp_path / "enc"),
        "OWNER/NAME",
    )


STUDIES = Path(__file__).parents[3] / "benchmarks" / "studies"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_grids_of_our_own_comparisons_are_right(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What `python -m benchmarks.quality` adds to the methods of the command.
    monkeypatch.setattr(METHODS, "_homes", dict(METHODS._homes))
    importlib.import_module("benchmarks.setfit_rival")  # registers it, the first time
    METHODS._homes.setdefault("setfit", "benchmarks.setfit_rival:SetFit")
    grid = read_grid(path)
    grid.check()
    assert len(grid.methods) > 2
    assert grid.reference in {method.name for method in grid.methods}
