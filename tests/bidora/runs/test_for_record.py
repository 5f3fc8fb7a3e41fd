"""A run of a comparison: what its record does not have is not measured."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from bidora.runs import cost
from bidora.runs.curves import read_curves
from bidora.runs.job import train
from bidora.runs.recorder import draw_as_if_scored
from bidora.runs.settings import TrainSettings
from bidora.study.records import Cell, Record
from bidora.study.worker import record_of
from tests.bidora.conftest import Finished

pytestmark = [
    pytest.mark.usefixtures("spared"),
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture
def options(
    small_job: dict[str, Any], labelled_rows: list[tuple[str, str]], tmp_path: Path
) -> dict[str, Any]:
    """Return settings of a short run on train, validation and test examples."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (
        ("train", labelled_rows[:40]),
        ("validation", labelled_rows[40:52]),
        ("test", labelled_rows[52:]),
    ):
        lines = [f"{text},{label}\n" for text, label in rows]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(lines))
    return {**small_job, "task": str(folder), "max_steps": 4, "eval_steps": 2}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the sets that are scored, each with its phase, as runs go on."""
    found: list[str] = []
    loop = Trainer.evaluation_loop

    def evaluation_loop(self: Any, *args: Any, **given: Any) -> Any:
        phase = getattr(self, "phase", None) or "train"
        found.append(f"{phase} {given['metric_key_prefix']}")
        return loop(self, *args, **given)

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    return found


def recorded(settings: TrainSettings, purpose: Any = "steps", **given: Any) -> Record:
    """Run, and return the record without seconds, which no two runs share."""
    if purpose == "sweep":
        given |= {"score_test": False, "score_probe": False}
    result = train(settings, **given)
    folder = Path(result.folder)
    history = (folder / "history.jsonl").read_text("utf-8").splitlines()
    record = record_of(
        Cell("words", settings.method, 0, 0, purpose),
        settings,
        result,
        json.loads((folder / "metrics.json").read_text("utf-8")),
        [json.loads(line) for line in history],
    )
    curve = tuple(dataclasses.replace(point, seconds=0.0) for point in record.curve)
    return dataclasses.replace(record, curve=curve, seconds=0.0, total_seconds=0.0)


@pytest.mark.parametrize(
    ("method", "purpose", "truth"),
    [
        # The probe's test score and the last one; the beginning, the middle and the end.
        (
            "lora",
            "steps",
            {"train test": 2, "train eval_validation": 3, "train validation": 1},
        ),
        ("lora", "sweep", {"train eval_validation": 3, "train validation": 1}),
        (
            "bidora",
            "steps",
            {
                "train test": 1,
                "search eval_validation": 3,
                "retrain eval_validation": 3,
                "retrain test": 1,
                "retrain validation": 1,
            },
        ),
        (
            "bidora-no-retraining",
            "steps",
            {
                "train test": 1,
                "search eval_validation": 3,
                "search test": 1,
                "search validation": 1,
            },
        ),
        ("probe", "steps", {"train test": 1, "train validation": 1}),
    ],
)
def test_only_what_the_record_has_is_scored(
    options: dict[str, Any],
    scored: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    method: str,
    purpose: str,
    truth: dict[str, int],
) -> None:
    """And what it has is the same, under dropout too, as after a run that scores all."""
    timed: list[Any] = []
    monkeypatch.setattr(cost, "time_a_step", lambda *given: timed.append(given) or 1.0)
    if method == "probe":
        for name in ("max_steps", "learning_rate", "per_device_train_batch_size"):
            del options[name]
        del options["eval_steps"]
    else:
        options["lora_dropout"] = 0.3
    if method.startswith("bidora"):
        options |= {"budget": "full", "outer_every": 2, "outer_warmup_steps": 0}
    settings = TrainSettings(**options, method=method, output_dir=str(tmp_path / "run"))
    whole = recorded(settings, purpose)
    before = len(scored)
    again = dataclasses.replace(settings, output_dir=str(tmp_path / "again"))
    short = recorded(again, purpose, for_record=True)
    assert Counter(scored[before:]) == truth
    assert before > sum(truth.values()) or method == "probe"
    assert timed == []  # nobody listens
    same = {"settings": {}}
    assert dataclasses.replace(short, **same) == dataclasses.replace(whole, **same)
    assert short.validation
    assert bool(short.test) == bool(short.baseline) == (purpose != "sweep")


def test_what_is_drawn_is_what_scoring_draws(
    finished: Callable[[str], Finished],
) -> None:
    run = finished("lora")
    data = run.job.sets["test"]
    for _ in range(2):
        state = torch.random.get_rng_state()
        run.trainer.evaluate(data)
        truth = torch.random.get_rng_state()
        torch.random.set_rng_state(state)
        draw_as_if_scored(run.trainer, data)
        assert torch.equal(torch.random.get_rng_state(), truth)
        assert not torch.equal(state, truth)


@pytest.mark.parametrize(
    ("names", "judge", "watched", "truth"),
    [
        (["train", "validation"], None, "None", {"validation"}),
        (["train", "held_back", "validation"], "held_back", "", {"held_back"}),
        (["train", "validation"], "validation", "eval_train_loss", {"train"}),
        (["train", "held_back"], None, "", {"train", "held_back"}),
    ],
)
def test_what_decides_is_measured_too(
    names: list[str], judge: str | None, watched: str, truth: set[str]
) -> None:
    assert read_curves(names, judge, watched) == truth | ({"validation"} & {*names})
