"""The rival SetFit: on the examples of a job, scored by its metrics; with `bench` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("setfit", reason="needs the extra bench")

from sklearn.metrics import accuracy_score, log_loss

from benchmarks import setfit_rival
from bidora import train as train_method
from bidora.errors import UserError
from bidora.methods import METHODS
from bidora.runs.settings import TrainSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# Other tests read the registry, which the import has added to.
HOME = METHODS._homes.pop("setfit")


@pytest.fixture(autouse=True)
def _is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._homes, "setfit", HOME)


@pytest.fixture
def settings(small_job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    left_out = ("learning_rate", "eval_steps")
    own = {n: v for n, v in small_job.items() if n not in left_out}
    place = {"output_dir": str(tmp_path / "run"), "max_steps": 3}
    return {**own, "method": "setfit", **place}


def test_scores_are_of_the_same_test_part_by_the_same_metrics(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = setfit_rival._scores

    def scores(model: Any, rows: Any, task: Any, schema: Any) -> Any:
        seen.update(model=model, rows=rows)
        return real(model, rows, task, schema)

    monkeypatch.setattr(setfit_rival, "_scores", scores)
    result = setfit_rival.train(TrainSettings(**settings))
    (phase,) = result.phases
    rows = seen["rows"]
    truth = np.array(rows.columns["labels"])
    chances = seen["model"].predict_proba(rows.columns["text"], as_numpy=True)
    assert phase.steps == 3
    assert phase.test["accuracy"] == accuracy_score(truth, chances.argmax(1))
    assert phase.test["loss"] == pytest.approx(log_loss(truth, chances), rel=1e-6)
    assert result.metric == "accuracy"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["phases"][0]["scores"] == phase.scores
    other = {**settings, "method": "lora", "output_dir": str(tmp_path / "lora")}
    train_method(TrainSettings(**other))
    ours, theirs = (
        json.loads((tmp_path / name / "split.json").read_text())
        for name in ("run", "lora")
    )
    assert ours == theirs
    assert ours["examples"] == {"train": 48, "test": 12}


def test_equal_seeds_give_equal_scores(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    first, second, other = (
        setfit_rival.train(
            TrainSettings(**{**settings, "seed": seed, "output_dir": f"{tmp_path}/{i}"})
        ).phases[0]
        for i, seed in enumerate((0, 0, 1))
    )
    assert first.scores == second.scores
    assert first.scores != other.scores


def test_a_sweep_does_not_see_the_test_part(settings: dict[str, Any]) -> None:
    result = setfit_rival.train(TrainSettings(**settings), score_test=False)
    assert result.phases[0].scores == {}


def test_what_setfit_cannot_do_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = [f"apple,pear {i},{'ab'[i % 2]}\n" for i in range(20)]
    pairs.write_text("sentence1,sentence2,label\n" + "".join(rows))
    with pytest.raises(UserError, match="classification of pairs of texts"):
        setfit_rival.train(TrainSettings(**{**settings, "task": str(pairs)}))
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,label\n" + "".join(f"a {i},{i}.5\n" for i in range(20)))
    with pytest.raises(UserError, match="the task is regression"):
        setfit_rival.train(TrainSettings(**{**settings, "task": str(numbers)}))
    with pytest.raises(UserError, match="--lora-r has no meaning with --method setfit"):
        setfit_rival.train(TrainSettings(**settings, lora_r=2))
    with pytest.raises(UserError, match=r"takes the place of `bidora\.train`"):
        train_method(TrainSettings(**settings))
