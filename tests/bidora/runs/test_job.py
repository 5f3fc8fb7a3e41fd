"""The job: its phases, what they change, what they are scored on, and what is left."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from bidora.dora import magnitudes
from bidora.errors import UserError
from bidora.runs.job import train
from bidora.runs.settings import TrainSettings
from hypergrad import estimator_names, make_estimator
from tests.bidora.conftest import Finished, Heard, finish

Run = Callable[[str], Finished]

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture
def options(small_job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**small_job, "eval_steps": 8, "output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def three_parts(
    tmp_path_factory: pytest.TempPathFactory, labelled_rows: list[tuple[str, str]]
) -> Path:
    """Return a folder with a train, a validation and a test file."""
    folder = tmp_path_factory.mktemp("three-parts")
    for name, rows in (
        ("train", labelled_rows[:40]),
        ("validation", labelled_rows[40:52]),
        ("test", labelled_rows[52:]),
    ):
        lines = [f"{text},{label}\n" for text, label in rows]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(lines))
    return folder


@pytest.fixture(scope="session")
def parted(
    small_job: dict[str, Any],
    three_parts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """Return a finished search and retraining on three parts, by the default budget."""
    given = {**small_job, "task": str(three_parts), "outer_warmup_steps": 0}
    given["audit_every"] = 1
    return finish(**given, output_dir=str(tmp_path_factory.mktemp("parted") / "run"))


# -- the folder ---------------------------------------------------------------------


def test_run_leaves_a_complete_folder(finished: Run) -> None:
    run = finished("bidora")
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "curves.png",
        "history.jsonl",
        "metrics.json",
        "settings.json",
        "split.json",
        "task.json",
        "tokenizer.json",
    }
    assert "checkpoints" not in names
    assert not [name for name in names if name.startswith(".")]
    metrics = run.read("metrics.json")
    assert [phase["steps"] for phase in metrics["phases"]] == [8, 8]
    assert metrics["phases"][0]["outer_steps"] == 4  # after steps 2, 4, 6 and 8
    assert metrics["metric"] == run.result.metric == "accuracy"
    assert metrics["label_names"] == ["bird", "fruit", "metal"]
    assert metrics["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(metrics["files"]) < names
    for phase, told in zip(metrics["phases"], run.result.phases, strict=True):
        assert phase["scores"] == told.scores


def test_settings_are_kept_with_what_was_derived(finished: Run) -> None:
    kept = finished("bidora").read("settings.json")
    assert kept.pop("started_in") == str(Path.cwd())
    assert kept.pop("pooling") == "head"  # what auto came to: the encoder says nothing
    assert kept.pop("pairs") == "together"
    assert TrainSettings.from_dict(kept) == finished("bidora").settings


def test_split_is_that_of_the_trainer(finished: Run) -> None:
    run = finished("bidora")
    split = run.read("split.json")
    assert split["examples"] == {"train": 48, "test": 12}
    both = split["inner_indices"] + split["outer_indices"]
    assert sorted(both) == list(range(48))
    assert len(split["outer_indices"]) == 10  # a fifth of 48, rounded up
    for name in ("inner_indices", "outer_indices"):
        assert split[name] == run.trainer._split_file[name]


@pytest.mark.parametrize("method", ["lora", "bidora-one-split"])
def test_nothing_is_held_back_where_nothing_learns_from_it(
    finished: Run, method: str
) -> None:
    split = finished(method).read("split.json")
    assert split["inner_indices"] == list(range(48))
    assert split["outer_indices"] == []


# -- three parts --------------------------------------------------------------------


def curves(run: Finished) -> list[dict[str, Any]]:
    return [r for r in run.read("history.jsonl") if "evaluation" in r]


def test_curves_are_of_what_may_be_looked_at(parted: Finished) -> None:
    names = {
        phase: {
            n for r in curves(parted) if r["phase"] == phase for n in r["evaluation"]
        }
        for phase in ("search", "retrain")
    }
    for found in names.values():
        assert found == {"train", "held_back", "validation"}
    for record in curves(parted):
        for scores in record["evaluation"].values():
            assert {"loss", "accuracy", "f1_macro"} <= set(scores)


def test_the_test_part_is_scored_once_at_the_end_of_a_phase(parted: Finished) -> None:
    history = parted.read("history.jsonl")
    scored = [r for r in history if "test" in str(r)]
    assert [r["phase"] for r in scored] == ["probe", "search", "retrain"]
    assert all("result" in r for r in scored)
    probe, search, retrain = (r["result"]["scores"] for r in scored)
    assert set(probe) == {"test", "validation"}  # fitted on what is held back later
    assert set(search) == {"test", "validation", "held_back"}
    assert set(retrain) == {"test", "validation"}  # what was held back is learnt from
    assert parted.read("split.json")["examples"] == {
        "train": 40,
        "validation": 12,
        "test": 8,
    }


def test_scores_are_those_of_the_saved_model_on_all_examples(finished: Run) -> None:
    for method in ("bidora", "lora"):
        run = finished(method)
        labels = torch.tensor(run.job.sets["test"]["labels"])
        logits = run.logits()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels).double().mean()
        test = run.result.phases[-1].test
        assert test["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert test["accuracy"] == pytest.approx(right.item())


def test_a_second_test_part_is_scored_too(
    small_job: dict[str, Any], tmp_path: Path
) -> None:
    """MNLI has two development sets, of matched and of mismatched genres."""
    names = ("entailment", "neutral", "contradiction")
    header = "index\tsentence1\tsentence2\tgold_label\n"
    for part, count in (("train", 24), ("dev_matched", 6), ("dev_mismatched", 9)):
        rows = [f"{i}\tapple pear\tplum\t{names[i % 3]}\n" for i in range(count)]
        (tmp_path / f"{part}.tsv").write_text(header + "".join(rows))
    given = {**small_job, "task": "glue/mnli", "data_dir": str(tmp_path)}
    given |= {"max_steps": 1, "method": "lora", "output_dir": str(tmp_path / "run")}
    run = finish(**given)
    assert run.read("split.json")["examples"] == {
        "train": 24,
        "test": 6,
        "test_mismatched": 9,
    }
    scores = run.result.phases[-1].scores
    assert set(scores) == {"test", "test_mismatched"}
    # Equal texts get equal answers: a third of each part is right.
    assert scores["test_mismatched"]["accuracy"] == pytest.approx(1 / 3)
    assert run.read("task.json")["label_names"] == list(names)
    assert "| test mismatched |" in run.read("README.md") or (
        "| test_mismatched |" in run.read("README.md")
    )


# -- history ------------------------------------------------------------------------


def test_history_holds_steps_and_curves(finished: Run) -> None:
    run = finished("bidora")
    history = run.read("history.jsonl")
    steps = [r for r in history if "inner_loss" in r and r["phase"] == "search"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    outer = [r["step"] for r in steps if r["outer_loss"] is not None]
    assert outer == [2, 4, 6, 8]
    for record in steps:
        assert (record["hypergrad_norm"] is not None) == (record["step"] in outer)
    assert [r["step"] for r in curves(run)] == sorted(
        r["step"] for r in curves(run) if r["phase"] == "search"
    ) + [r["step"] for r in curves(run) if r["phase"] == "retrain"]
    for phase in ("search", "retrain"):
        points = {r["step"] for r in curves(run) if r["phase"] == phase}
        assert points == {0, 3, 6, 8}
    rates = [r["lr"] for r in steps]
    assert max(rates) <= 1e-2
    assert rates[-1] < rates[1]


def test_audits_are_in_the_history(finished: Run, parted: Finished) -> None:
    (audit,) = (r["audit"] for r in parted.read("history.jsonl") if "audit" in r)
    assert audit["reference"] == "unrolled"
    assert -1 <= audit["cosine"] <= 1
    assert not [r for r in finished("bidora").read("history.jsonl") if "audit" in r]


def test_longer_training_learns_the_task(options: dict[str, Any]) -> None:
    # From random values: the probe's head knows most of it before the first step.
    options.update(method="full", max_steps=80, learning_rate=5e-3, eval_steps=80)
    options.update(start="random")
    assert finish(**options).result.phases[-1].test["accuracy"] >= 0.75


# -- what each phase changes ----------------------------------------------------------


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_what_each_phase_moves(finished: Run) -> None:
    values = finished("bidora").values
    first, searched = values["search begins"], values["search ends"]
    second, last = values["retrain begins"], values["retrain ends"]
    outer = {name for name in first if "magnitude" in name}
    assert len(outer) == 13  # six of each of two layers, and the pooler's
    assert moved(first, searched) == set(first)
    assert moved(first, second) == outer  # the rest starts anew
    assert moved(searched, last) == set(first) - outer


def test_a_warm_retraining_goes_on_where_the_search_ended(parted: Finished) -> None:
    assert not moved(parted.values["search ends"], parted.values["retrain begins"])


@pytest.mark.parametrize("method", ["dora", "dora-peft", "lora", "houlsby", "full"])
def test_methods_of_one_phase_move_all_they_train(finished: Run, method: str) -> None:
    values = finished(method).values
    first = values["train begins"]
    assert first
    assert any("magnitude" in n for n in first) == method.startswith("dora")
    assert moved(first, values["train ends"]) == set(first)


def test_budgets_share_the_steps_out(finished: Run, parted: Finished) -> None:
    full, lean = finished("bidora").result.phases, parted.result.phases
    assert [p.steps for p in full] == [8, 8]
    assert [p.steps for p in lean] == [4, 5]  # a half, two thirds
    assert lean[0].outer_steps == 1  # every fourth


def test_equal_seeds_give_equal_runs(options: dict[str, Any], tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    options.update(max_steps=2, eval_steps=4)
    weights: list[bytes] = []
    for folder in ("a", "b"):
        options.update(output_dir=str(tmp_path / folder))
        run = finish(**options)
        weights.append((run.folder / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert torch.equal(torch.random.get_rng_state(), state)


# -- estimators ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in estimator_names()), ("neumann", {"num_terms": 2})],
)
def test_estimators_and_their_settings_reach_the_trainer(
    finished: Run, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    job = finished("bidora").job
    model = copy.deepcopy(job.model)
    for parameter in magnitudes(model).values():
        parameter.requires_grad_(True)
    given = {"estimator": name, "estimator_settings": settings}
    asked = dataclasses.replace(job.settings, **given, outer_every=None)
    trainer = dataclasses.replace(job, model=model, settings=asked).trainer(
        str(tmp_path)
    )
    assert trainer.args.make_estimator() == make_estimator(name, **settings)


# -- refusals and the dry run ---------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "bidora"])
def test_a_dry_run_writes_nothing(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    heard = Heard()
    result = train(TrainSettings(**options, method=method), heard, dry_run=True)
    assert not list(tmp_path.iterdir())
    assert result.phases == ()
    assert result.facts["trained_parameters"] < result.facts["parameters"]
    assert result.facts["expected_seconds"] > 0
    assert [line.split()[0] for line in heard.lines if line[0] != " "][-2:] == [
        "Time",
        "Memory",
    ]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lora", r"step \d+ of the train phase: .* lower --learning-rate"),
        ("bidora", r"step \d+ of the search phase: .* lower --learning-rate"),
    ],
)
def test_diverging_run_is_explained_and_keeps_its_history(
    options: dict[str, Any], method: str, message: str
) -> None:
    options.update(learning_rate=1e30, max_steps=24, eval_steps=24)
    with pytest.raises(UserError, match=message):
        train(TrainSettings(**options, method=method))
    folder = Path(options["output_dir"])
    assert (folder / "history.jsonl").read_text()
    assert not (folder / "metrics.json").exists()


def test_another_gpu_is_chosen_from_outside(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = torch.device("cuda", 1)
    monkeypatch.setattr("bidora.runs.job.find_device", lambda name: second)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        train(TrainSettings(**options, method="lora"))
    assert not Path(options["output_dir"]).exists()


def test_no_bar_but_ours_is_shown(
    options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers draws one for each file of weights that it loads or writes."""
    train(TrainSettings(**options, method="full"))
    assert "%|" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"no_such": 1}, "'no_such'"),
        ({"adam_beta": 1}, "Did you mean trainer.adam_beta"),
        ({"logging_steps": 5}, "trainer.logging_steps is the job's own"),
        ({"learning_rate": 1}, "trainer.learning_rate is --learning-rate here"),
        ({"fp16": True}, "fp16"),
    ],
)
def test_fields_of_the_trainer_are_checked(
    options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(TrainSettings(**options, method="bidora", trainer=given), dry_run=True)


def test_a_search_too_short_for_its_warm_up_is_refused(options: dict[str, Any]) -> None:
    options.update(outer_warmup_steps=9)
    with pytest.raises(UserError, match="leaves no outer step in the 4 steps"):
        train(TrainSettings(**options))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("method", "size", "said"),
    [
        (
            "bidora",
            32,
            "32 is more than the 10 of 48 training examples held back for it.*size 10 or "
            "less, or hold more back with --validation-fraction",
        ),
        ("bidora", 48, r"Pass --per-device-outer-batch-size 10 or less\.$"),
        ("bidora-one-split", 64, r"the 48 training examples, .*size 48 or less\.$"),
    ],
)
def test_an_outer_batch_of_more_examples_than_there_are_is_refused(
    options: dict[str, Any], method: str, size: int, said: str, dry_run: bool
) -> None:
    given = {**options, "method": method, "per_device_outer_batch_size": size}
    with pytest.raises(UserError, match=said):
        train(TrainSettings(**given), dry_run=dry_run)
    assert not Path(options["output_dir"]).exists()


def test_a_batch_too_small_to_divide_is_refused(options: dict[str, Any]) -> None:
    options.update(estimator="darts", estimator_settings={"product_fraction": 0.01})
    with pytest.raises(UserError, match="product_fraction"):
        train(TrainSettings(**options))
