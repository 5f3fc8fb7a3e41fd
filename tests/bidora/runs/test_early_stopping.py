"""Early stopping: what it trains on, what decides, which weights are kept, and a stop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bidora import load_run
from bidora.dora import exact_dora_layers
from bidora.errors import UserError
from bidora.methods import make_method
from bidora.methods.early_stopping import EarlyStopping
from bidora.runs.job import train
from bidora.runs.recorder import Recorder
from bidora.runs.results import Listener
from bidora.runs.resume import settings_of_run
from bidora.runs.settings import TrainSettings
from bidora.tasks.classification import Classification
from tests.bidora.conftest import Finished, finish
from tests.tolerances import error, tol

pytestmark = [
    pytest.mark.usefixtures("spared"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

HELD_BACK = 10  # a fifth of 48, rounded up
ACCURACY = {0: 0.9, 2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.8, 12: 0.9}
"""On the held-back part after so many steps; what there is before training is no choice."""


@pytest.fixture
def options(small_job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **small_job,
        "method": "lora",
        "max_steps": 12,
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Let the accuracy on the held-back part be as above; return the weights by step."""
    found: dict[int, Any] = {}
    now = {"step": 0}
    scored, begin = Classification.metrics, EarlyStopping.on_train_begin
    judged = EarlyStopping.on_evaluate

    def metrics(self: Any, predictions: Any, labels: Any, schema: Any) -> Any:
        scores = scored(self, predictions, labels, schema)
        if len(labels) == HELD_BACK:
            scores["accuracy"] = ACCURACY[now["step"]]
        return scores

    def on_train_begin(
        self: Any, args: Any, state: Any, *rest: Any, **more: Any
    ) -> None:
        now["step"] = state.global_step
        begin(self, args, state, *rest, **more)

    def on_step_end(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        now["step"] = state.global_step

    def on_evaluate(
        self: Any, args: Any, state: Any, control: Any, metrics: Any, **more: Any
    ) -> None:
        model = more["model"]
        values = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found[state.global_step] = copy.deepcopy(values)
        judged(self, args, state, control, metrics, **more)

    monkeypatch.setattr(Classification, "metrics", metrics)
    monkeypatch.setattr(EarlyStopping, "on_train_begin", on_train_begin)
    monkeypatch.setattr(EarlyStopping, "on_step_end", on_step_end)
    monkeypatch.setattr(EarlyStopping, "on_evaluate", on_evaluate)
    return found


@pytest.mark.parametrize(
    "method", ["lora", "dora", "dora-peft", "houlsby", "bitfit", "full"]
)
def test_the_best_weights_are_kept_and_saved(
    options: dict[str, Any], weights: dict[int, Any], method: str
) -> None:
    run = finish(**{**options, "method": method})
    (phase,) = run.result.phases
    # 0.7 after 4; not better after 6 and 8, which are two evaluations.
    assert (phase.steps, phase.best_global_step) == (8, 4)
    assert run.read("metrics.json")["phases"][0]["best_global_step"] == 4
    assert any(
        "weights of step 4" in line for line in run.read("README.md").split("\n")
    )
    now = dict(run.job.model.named_parameters())
    for name, value in weights[4].items():
        assert torch.equal(now[name], value), name
    assert any(not torch.equal(now[n], value) for n, value in weights[8].items())
    loaded, _ = load_run(run.folder)
    # PEFT's forward of DoRA against the exact one: the head enlarges their rounding.
    allowed = tol(torch.float32, cond=run.condition_of_the_head())
    assert error(run.logits(loaded), run.logits()) <= allowed
    assert len(exact_dora_layers(run.job.model)) == (13 if method == "dora" else 0)
    labels = torch.tensor(run.job.sets["test"]["labels"])
    loss = torch.nn.functional.cross_entropy(run.logits(), labels)
    assert phase.test["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.fixture
def of_a_search(finished: Callable[[str], Finished]) -> list[int]:
    """Return what a search holds back; asked for before accuracies are changed."""
    return finished("bidora").read("split.json")["outer_indices"]


def test_nothing_is_trained_on_that_decides(
    of_a_search: list[int],
    options: dict[str, Any],
    weights: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bidora.runs.job.CURVE_EXAMPLES", 5)
    run = finish(**options)
    split = run.read("split.json")
    assert split["examples"] == {"train": 48, "test": 12}
    assert len(split["outer_indices"]) == HELD_BACK
    assert split["outer_indices"] == of_a_search
    assert sorted(split["inner_indices"] + split["outer_indices"]) == list(range(48))
    rows = run.job.sets["train"]
    trained = run.trainer.train_dataset
    assert trained["input_ids"] == rows.select(split["inner_indices"])["input_ids"]
    sets = run.trainer.eval_dataset
    assert {name: len(data) for name, data in sets.items()} == {
        "train": 5,
        "held_back": HELD_BACK,
    }
    decides = sorted(map(str, sets["held_back"]["input_ids"]))
    held = rows.select(split["outer_indices"])["input_ids"]
    assert decides == sorted(map(str, held))
    assert run.trainer.args.metric_for_best_model == "held_back_accuracy"
    assert run.trainer.args.greater_is_better
    assert set(run.result.phases[0].scores) == {"test", "held_back"}
    told = f"{HELD_BACK} training examples, held back, decide when to stop"
    assert any(told in line for line in run.told)


def test_more_patience_takes_all_steps_and_keeps_the_best_of_them(
    options: dict[str, Any], weights: dict[int, Any]
) -> None:
    run = finish(**{**options, "early_stopping_patience": 3})
    (phase,) = run.result.phases
    assert (phase.steps, phase.best_global_step) == (12, 12)


def test_a_validation_part_decides_where_there_is_one(
    options: dict[str, Any],
    labelled_rows: list[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bidora.runs.job.CURVE_EXAMPLES", 5)
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, first, end in (
        ("train", 0, 40),
        ("validation", 40, 52),
        ("test", 52, 60),
    ):
        lines = [f"{text},{label}\n" for text, label in labelled_rows[first:end]]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(lines))
    given = {**options, "task": str(folder)}
    run = finish(**given)
    split = run.read("split.json")
    assert split["inner_indices"] == list(range(40))
    assert split["outer_indices"] == []
    assert len(run.trainer.train_dataset) == 40
    sizes = {name: len(data) for name, data in run.trainer.eval_dataset.items()}
    assert sizes == {"train": 5, "validation": 12}
    assert run.trainer.args.metric_for_best_model == "validation_accuracy"
    (phase,) = run.result.phases
    curve = {
        r["step"]: r["evaluation"]["validation"]["accuracy"]
        for r in run.read("history.jsonl")
        if "validation" in r.get("evaluation", ()) and r["step"]
    }
    # The first of the best, and the whole part at the end as when it was chosen.
    best = max(curve, key=lambda step: curve[step])
    assert phase.best_global_step == best
    assert phase.scores["validation"]["accuracy"] == curve[best]
    assert "| validation |" not in run.read("README.md")  # it was chosen by
    assert "12 validation examples, decide when to stop" in "\n".join(run.told)
    with pytest.raises(UserError, match="validation part of 12 examples"):
        train(TrainSettings(**{**given, "validation_fraction": 0.3, "overwrite": True}))


# -- after a stop ----------------------------------------------------------------------


class Stop(Listener):
    """Stops a run at the n-th step that is told of, before its checkpoint."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, step: int, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def kept(folder: Path) -> tuple[bytes, list[Any]]:
    """Return a run's weights, and its history without times."""
    (file,) = folder.glob("*.safetensors")
    lines = (folder / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    for record in [*history, *(r["result"] for r in history if "result" in r)]:
        for name in ("seconds", "evaluation_seconds"):
            record.pop(name, None)
    return file.read_bytes(), history


Whole = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def trained_whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a function that gives the folder of a run nobody stopped, made once.

    Its accuracies are those of the fixture `weights`, which its callers have too.
    """
    made: dict[str, Path] = {}

    def run(options: dict[str, Any]) -> Path:
        method = options["method"]
        if method not in made:
            made[method] = tmp_path_factory.mktemp("whole") / method
            train(TrainSettings(**{**options, "output_dir": str(made[method])}))
        return made[method]

    return run


@pytest.mark.parametrize(
    ("method", "at"), [("lora", 5), ("lora", 7), ("lora", 8), ("houlsby", 7)]
)
def test_a_stopped_run_stops_at_the_same_step_with_the_same_bits(
    options: dict[str, Any],
    weights: dict[int, Any],
    tmp_path: Path,
    trained_whole: Whole,
    method: str,
    at: int,
) -> None:
    given = {**options, "method": method}
    whole = trained_whole(given)
    with pytest.raises(KeyboardInterrupt):
        train(TrainSettings(**given), Stop(at))
    # A folder that was moved is still the run.
    (tmp_path / "run").rename(tmp_path / "moved")
    train(settings_of_run(output_dir=str(tmp_path / "moved")), resume=True)
    assert kept(tmp_path / "moved") == kept(whole)


def test_a_run_stopped_while_it_scored_keeps_the_best(
    options: dict[str, Any],
    weights: dict[int, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained_whole: Whole,
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    whole = trained_whole(options)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_train_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TrainSettings(**options))
    (tmp_path / "run").rename(tmp_path / "moved")
    train(settings_of_run(output_dir=str(tmp_path / "moved")), resume=True)
    assert kept(tmp_path / "moved") == kept(whole)


def test_lost_weights_are_told(
    options: dict[str, Any], weights: dict[int, Any], tmp_path: Path
) -> None:
    import shutil

    with pytest.raises(KeyboardInterrupt):
        train(TrainSettings(**options), Stop(7))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-4 is gone, .* --overwrite"):
        train(settings_of_run(output_dir=options["output_dir"]), resume=True)


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["bidora", "bidora-no-retraining", "bidora-one-split"]
)
def test_a_search_is_not_stopped_early(method: str) -> None:
    settings = TrainSettings(method=method, early_stopping_patience=2)
    with pytest.raises(UserError) as refused:
        make_method(method).check(settings)
    for part in ("--early-stopping-patience", f"--method {method}", "--max-steps"):
        assert part in str(refused.value)


def test_a_fraction_means_nothing_without_patience() -> None:
    given = {"method": "lora", "validation_fraction": 0.3}
    with pytest.raises(UserError, match="--validation-fraction has no meaning"):
        make_method("lora").check(TrainSettings(**given))
    make_method("lora").check(TrainSettings(**given, early_stopping_patience=1))
    with pytest.raises(UserError, match="--retrain has no meaning"):
        make_method("lora").check(
            TrainSettings(**given, early_stopping_patience=1, retrain="warm")
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"early_stopping_patience": 0},
            "--early-stopping-patience is 0; give a whole",
        ),
        ({"early_stopping_patience": 1.5}, "--early-stopping-patience is 1.5"),
        ({"early_stopping_patience": "no"}, "--early-stopping-patience is 'no'"),
        (
            {"early_stopping_patience": 1, "trainer": {"greater_is_better": False}},
            "trainer.greater_is_better and --early-stopping-patience both decide",
        ),
    ],
)
def test_wrong_patience_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(**given)


def test_too_few_examples_are_told_with_the_purpose(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"held back for early stopping: .*too few"):
        train(TrainSettings(**{**options, "validation_fraction": 0.99}))
    assert not Path(options["output_dir"]).exists()
