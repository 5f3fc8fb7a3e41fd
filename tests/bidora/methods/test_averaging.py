"""The average of the last weights: by hand, what it leaves alone, and after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from bidora import load_run
from bidora.errors import UserError
from bidora.methods.averaging import FILE, AverageLast, averaged_steps
from bidora.runs.job import train
from bidora.runs.recorder import Recorder
from bidora.runs.results import Listener
from bidora.runs.resume import settings_of_run
from bidora.runs.settings import TrainSettings
from tests.bidora.conftest import Finished, finish
from tests.tolerances import error, tol

pytestmark = [
    pytest.mark.usefixtures("spared"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

STEPS = 8


class Net(nn.Module):
    """A frozen layer, statistics, dropout, and a layer that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.last(self.drop(self.norm(self.frozen(x)))).squeeze(-1)
        return {"loss": ((found - y) ** 2).mean(), "logits": found}


class Seen(TrainerCallback):
    """Keeps the weights after every step, and what comes after the average."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.after: list[dict[str, torch.Tensor]] = []
        self.buffers: dict[str, torch.Tensor] = {}
        self.mode: bool | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.after.append({n: p.double() for n, p in self.model.named_parameters()})
        self.buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        self.mode = self.model.training


def trained(folder: Path, share: float, *, dtype: torch.dtype = torch.float32) -> Seen:
    """Train for some steps at a rate that moves much; return what was seen."""
    model = Net().to(dtype)
    x = torch.randn(32, 3, dtype=dtype)
    rows: Any = [{"x": a, "y": b} for a, b in zip(x, x.sum(1), strict=True)]
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=0.3,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=8,
    )
    trainer = Trainer(model, args, train_dataset=rows)
    seen = Seen(model)
    trainer.add_callback(seen)
    if share:
        trainer.add_callback(AverageLast(trainer, share))
    trainer.train()
    return seen


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (1.0, 8), (0.01, 1), (0.4, 3)])
def test_the_end_is_the_mean_of_the_last_weights(
    tmp_path: Path, share: float, count: int
) -> None:
    seen = trained(tmp_path, share)
    assert len(seen.after) == STEPS
    assert averaged_steps(share, STEPS) == count
    names = [n for n, p in seen.model.named_parameters() if p.requires_grad]
    assert names == ["norm.weight", "norm.bias", "last.weight", "last.bias"]
    for name, now in seen.model.named_parameters():
        truth = torch.stack([w[name] for w in seen.after[-count:]]).mean(0)
        assert error(now.detach(), truth) <= tol(torch.float32), name
        if count > 1 and now.requires_grad:
            assert error(now.detach(), seen.after[-1][name]) > 1e-4, name


def test_buffers_mode_and_frozen_weights_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = trained(tmp_path / "plain", 0.0)
    torch.manual_seed(1)
    seen = trained(tmp_path / "mean", 0.5)
    for name, found in seen.model.named_buffers():
        assert torch.equal(found, seen.buffers[name])
        assert torch.equal(found, plain.buffers[name])
    assert seen.model.training == plain.model.training
    # It draws nothing and changes no step on the way.
    for one, other in zip(seen.after, plain.after, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)
    for name in ("frozen.weight", "frozen.bias"):
        found, kept = seen.model.get_parameter(name), seen.after[0][name]
        assert torch.equal(found.double(), kept)


def test_coarse_weights_have_a_fine_mean(tmp_path: Path) -> None:
    seen = trained(tmp_path, 1.0, dtype=torch.bfloat16)
    name = "last.weight"
    exact = torch.stack([w[name] for w in seen.after]).mean(0)
    # Rounded once, at the end: half of bfloat16's spacing.
    assert error(seen.model.get_parameter(name).detach(), exact) <= 2**-8


def test_checkpoints_hold_the_mean_where_there_is_one(tmp_path: Path) -> None:
    seen = trained(tmp_path, 0.5)
    assert not (tmp_path / "checkpoint-3" / FILE).exists()  # before the first of them
    for step in (6, STEPS):
        found = load_file(tmp_path / f"checkpoint-{step}" / FILE)
        for name, mean in found.items():
            truth = torch.stack([w[name] for w in seen.after[4:step]]).mean(0)
            assert error(mean, truth) <= tol(torch.float32)


# -- in a job --------------------------------------------------------------------------


@dataclass(frozen=True)
class Averaged:
    """A finished run, and its weights after each step of the phase that averages."""

    run: Finished
    after: list[dict[str, torch.Tensor]]


@pytest.fixture
def options(small_job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **small_job,
        "average_last": 0.5,
        "budget": "full",
        "eval_steps": 2,
        "lr_scheduler_type": "constant",  # a step too many would change the weights
        "output_dir": str(tmp_path / "run"),
    }


def only(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that mean something to the method."""
    left_out = () if method.startswith("bidora") else ("budget",)
    return {n: v for n, v in options.items() if n not in left_out} | {"method": method}


@pytest.fixture(scope="module")
def trained_whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, dict[str, Any]], Averaged]:
    """Return a function that gives the run of a method that nobody stopped, made once."""
    made: dict[str, Averaged] = {}
    real = AverageLast.on_step_end

    def run(method: str, options: dict[str, Any]) -> Averaged:
        if method in made:
            return made[method]
        after: list[dict[str, torch.Tensor]] = []

        def on_step_end(self: Any, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            if self._trained:
                after.append({n: p.double() for n, p in self._trained.items()})

        place = {"output_dir": str(tmp_path_factory.mktemp("whole") / method)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AverageLast, "on_step_end", on_step_end)
            made[method] = Averaged(finish(**only(method, {**options, **place})), after)
        return made[method]

    return run


Whole = Callable[[str, dict[str, Any]], Averaged]


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("lora", "train"),
        ("full", "train"),
        ("bidora", "retrain"),
        pytest.param("bidora-no-retraining", "search", marks=pytest.mark.slow),
    ],
)
def test_a_job_scores_and_saves_the_average(
    options: dict[str, Any], method: str, phase: str, trained_whole: Whole
) -> None:
    whole = trained_whole(method, options)
    run, after = whole.run, whole.after
    assert len(after) == 8
    now = run.values[f"{phase} ends"]
    assert any("magnitude" in n for n in after[-1]) == (phase == "search")
    for name, found in now.items():
        if name in after[-1]:
            truth = torch.stack([w[name] for w in after[4:]]).mean(0)
            assert error(found, truth) <= tol(torch.float32), name
    if method == "bidora":  # its search is that of a run without
        search = [r for r in run.read("history.jsonl") if r["phase"] == "search"]
        last = run.values["search ends"]
        assert search[-1]["result"]["steps"] == 8
        assert not all(torch.equal(last[n], now[n]) for n in now)
    loaded, _ = load_run(run.folder)
    # PEFT's forward of DoRA against the exact one: the head enlarges their rounding.
    allowed = tol(torch.float32, cond=run.condition_of_the_head())
    assert error(run.logits(loaded), run.logits()) <= allowed
    labels = torch.tensor(run.job.sets["test"]["labels"])
    loss = nn.functional.cross_entropy(run.logits(), labels)
    assert run.result.phases[-1].test["loss"] == pytest.approx(loss.item(), rel=1e-5)


class Stop(Listener):
    """Stops a run at the n-th step that is told of, before its checkpoint."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, step: int, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("lora", 3),  # before the first weights that count
        ("lora", 7),
        pytest.param("houlsby", 7, marks=pytest.mark.slow),
        ("bidora", 15),  # in the retraining
        pytest.param("bidora-no-retraining", 7, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(
    options: dict[str, Any],
    tmp_path: Path,
    method: str,
    stop: int,
    trained_whole: Whole,
) -> None:
    whole = trained_whole(method, options).run.folder
    given = only(method, options)
    with pytest.raises(KeyboardInterrupt):
        train(TrainSettings(**given), Stop(stop))
    train(settings_of_run(output_dir=given["output_dir"]), resume=True)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / file.name).read_bytes()
    assert list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("method", ["lora", "full", "bidora-no-retraining"])
def test_a_run_stopped_while_it_scored_takes_no_step_more(
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    trained_whole: Whole,
) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    whole = trained_whole(method, options).run.folder
    given, stopped = only(method, options), Path(options["output_dir"])
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_train_end", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TrainSettings(**given))
    train(settings_of_run(output_dir=str(stopped)), resume=True)
    (file,) = whole.glob("*.safetensors")
    assert file.read_bytes() == (stopped / file.name).read_bytes()
    lines = [(p / "history.jsonl").read_text().splitlines() for p in (whole, stopped)]
    first, second = ([json.loads(s).get("step") for s in found] for found in lines)
    assert first == second


def test_a_checkpoint_without_the_mean_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    given = only("lora", options)
    with pytest.raises(KeyboardInterrupt):
        train(TrainSettings(**given), Stop(7))
    (tmp_path / "run" / "checkpoints" / "checkpoint-6" / FILE).unlink()
    with pytest.raises(UserError, match=r"checkpoint-6 holds no average\.safetensors"):
        train(settings_of_run(output_dir=given["output_dir"]), resume=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"average_last": 1.5}, "--average-last is 1.5; give a number from 0 to 1"),
        ({"average_last": -0.1}, "--average-last is -0.1"),
        ({"average_last": float("nan")}, "--average-last is nan"),
        (
            {"average_last": 0.5, "trainer": {"load_best_model_at_end": True}},
            "trainer.load_best_model_at_end and --average-last both decide",
        ),
        (
            {"average_last": 0.5, "trainer": {"save_strategy": "best"}},
            "trainer.save_strategy and --average-last both decide",
        ),
        (
            {"average_last": 0.5, "early_stopping_patience": 2},
            "--average-last 0.5 ends with .* --early-stopping-patience 2 .* choose one",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TrainSettings(**given)
