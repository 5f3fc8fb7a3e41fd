"""A run that was killed and resumed ends as if it had never stopped, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import WeightedRandomSampler
from transformers import TrainerCallback

from bidora.dora import magnitudes
from bidora.trainer import BiDoRATrainer
from bidora.trainer.checkpoint import find_checkpoint
from tests.bidora.stopped_runs import (
    Kill,
    Killed,
    Sentences,
    differences,
    make_model,
    make_trainer,
    outcome,
)

pytestmark = pytest.mark.usefixtures("spared")

SEARCH, RETRAIN = "search", "retrain"

WINDOW: dict[str, Any] = {
    "estimator": "unrolled",
    "estimator_settings": {"num_steps": 5},
    "outer_every": 5,
    "max_steps": 11,
}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
# At this rate the best model is not the last, and a loss soon rises.
WILD: dict[str, Any] = {**EVALUATED, "learning_rate": 0.3}
EPOCHS: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "retrain_max_steps": None,
    "retrain_num_train_epochs": 1,
}


def case(
    name: str, *kills: tuple[str, int], slow: bool = False, **settings: Any
) -> Any:
    """Return a case: where the run is killed, and what it is."""
    marks = [pytest.mark.slow] if slow else []
    places = "+".join(f"{phase}{step}" for phase, step in kills)
    return pytest.param(kills, settings, id=f"{name}-{places}", marks=marks)


def estimator(name: str, slow: bool = True, **settings: Any) -> Any:
    """Return a case of an estimator, killed between outer steps 1 and 2."""
    label = "-".join([name, *settings])
    own: dict[str, Any] = {"estimator": name, "estimator_settings": settings}
    if "curvature" in settings:
        own["orthogonality"] = 0.0
    return case(label, (SEARCH, 4), slow=slow, **own)


class Weighted(BiDoRATrainer):
    """Draws examples by weight, from no generator of its own."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        count = len(train_dataset or self.train_dataset)
        return WeightedRandomSampler([1.0 + i % 3 for i in range(count)], count)


def plain_model() -> Any:
    """Return the model; `model_init` may have no optional arguments."""
    return make_model()


CASES = [
    case("window", (SEARCH, 8), **WINDOW),
    case("window", (SEARCH, 3), (SEARCH, 7), (RETRAIN, 2), **WINDOW),
    *(case("window", (SEARCH, n), slow=True, **WINDOW) for n in range(2, 12)),
    *(case("window", (RETRAIN, n), slow=True, **WINDOW) for n in range(1, 5)),
    case(
        "window-sums", (SEARCH, 8), slow=True, gradient_accumulation_steps=3, **WINDOW
    ),
    case("window-audits", (SEARCH, 8), slow=True, audit_every=1, **WINDOW),
    estimator("auto", slow=False),
    estimator("cg", slow=False, warm_start=True, preconditioner_rank=3),
    estimator("nystrom", rank=3, every=2),
    estimator("neumann"),
    estimator("neumann", product="finite-difference"),
    # A penalty of the inner loss is no part of what Gauss-Newton curvature scores.
    estimator("cg", curvature="gauss-newton", warm_start=True),
    estimator("sama"),
    estimator("darts"),
    estimator("darts", product_fraction=0.5),
    estimator("first-order"),
    estimator("penalty", num_steps=2),
    estimator("f2sa", num_points=2),
    estimator("pbgd-free"),
    estimator("unrolled", num_steps=2),
    # In the second epoch, in which the order of the groups is another.
    case(
        "groups",
        (SEARCH, 5),
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    ),
    case(
        "groups",
        (RETRAIN, 6),
        slow=True,
        train_sampling_strategy="group_by_length",
        retrain_max_steps=7,
    ),
    case("weighted", (SEARCH, 5), slow=True, cls=Weighted),
    case(
        "schedules",
        (SEARCH, 4),
        (RETRAIN, 2),
        lr_scheduler_type="cosine",
        outer_lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        retrain="warm",
        save_total_limit=1,
        max_grad_norm=0.1,
        **EPOCHS,
    ),
    case("epochs", (SEARCH, 5), slow=True, save_strategy="epoch", **EPOCHS),
    case("early", (RETRAIN, 1), max_steps=10, search_patience=1, **WILD),
    case("early", (SEARCH, 3), slow=True, max_steps=10, search_patience=1, **WILD),
    case(
        "early-between",
        (RETRAIN, 1),
        slow=True,
        max_steps=10,
        search_patience=1,
        save_steps=3,
        **WILD,
    ),
    case("best", (RETRAIN, 1), load_best_model_at_end=True, save_steps=2, **WILD),
    case(
        "best",
        (SEARCH, 4),
        (RETRAIN, 3),
        slow=True,
        load_best_model_at_end=True,
        save_steps=2,
        save_total_limit=1,
        **WILD,
    ),
    case("outer-dataset", (SEARCH, 4), parts={"outer_dataset": Sentences(9, seed=5)}),
    case("no-search", (RETRAIN, 3), validation_fraction=0.0),
    case("between", (SEARCH, 5), (RETRAIN, 3), slow=True, save_steps=2),
    case("model-init", (SEARCH, 4), slow=True, parts={"model_init": plain_model}),
    case("bf16", (SEARCH, 4), slow=True, bf16=True),
    case("checkpointing", (SEARCH, 4), slow=True, gradient_checkpointing=True),
    case("workers", (SEARCH, 4), slow=True, dataloader_num_workers=1),
    case("noise", (SEARCH, 4), slow=True, neftune_noise_alpha=1.0),
    case("smoothing", (SEARCH, 4), slow=True, label_smoothing_factor=0.1),
    case("sgd", (SEARCH, 4), slow=True, optim="sgd"),
    case(
        "plateau",
        (SEARCH, 4),
        slow=True,
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
    ),
]

whole: dict[str, Any] = {}
"""What runs came to that were not stopped, by their settings."""


@pytest.mark.parametrize(("kills", "settings"), CASES)
def test_a_killed_run_ends_as_if_never_stopped(
    kills: tuple[tuple[str, int], ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = whole.get(str(settings))
    if expected is None:
        trainer = make_trainer(tmp_path / "whole", **settings)
        trainer.train()
        expected = whole[str(settings)] = outcome(trainer)
    _kill(tmp_path / "killed", kills, **settings)
    trainer = make_trainer(tmp_path / "killed", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert differences(expected, outcome(trainer)) == []


def _kill(folder: Path, kills: Any, model: Any = make_model, **settings: Any) -> None:
    """Start a run and kill it, resume it and kill it, and so on."""
    for n, (phase, step) in enumerate(kills):
        own = {} if "model_init" in settings.get("parts", {}) else {"model": model()}
        trainer = make_trainer(folder, **own, **settings)
        Kill(trainer, phase, step)
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=n > 0)


@pytest.mark.parametrize(
    ("phase", "step"), [(SEARCH, 4), pytest.param(RETRAIN, 3, marks=pytest.mark.slow)]
)
def test_what_peft_does_not_save_is_restored(
    phase: str, step: int, tmp_path: Path
) -> None:
    """A head beside the adapter of `add_adapter`, and the statistics of its BatchNorm.

    The Trainer's own checkpoint of such a model has neither, nor could it be loaded.
    """

    def model() -> Any:
        return make_model(adapter="transformers", norm=True)

    expected = make_trainer(tmp_path / "whole", model=model())
    expected.train()
    moved = "classifier.0.running_mean", "classifier.1.weight"
    start = model().state_dict()
    assert not any(
        torch.equal(start[name], expected.model.state_dict()[name]) for name in moved
    )
    _kill(tmp_path / "killed", [(phase, step)], model)
    trainer = make_trainer(tmp_path / "killed", model=model())
    trainer.train(resume_from_checkpoint=True)
    assert differences(outcome(expected), outcome(trainer)) == []


# -- which checkpoint a run goes on from -----------------------------------------------


class Torn(BiDoRATrainer):
    """Dies in the middle of writing a checkpoint."""

    dies_at: int = 0

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == self.dies_at:
            raise Killed
        super()._save_rng_state(output_dir)


@pytest.mark.parametrize("dies_at", [2, 3])
def test_a_half_written_checkpoint_is_passed_over(
    dies_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "retrain_max_steps": 1}
    expected = make_trainer(tmp_path / "whole", **settings)
    expected.train()
    torn: Any = make_trainer(tmp_path / "torn", cls=Torn, **settings)
    torn.dies_at = dies_at
    with pytest.raises(Killed):
        torn.train()
    assert (tmp_path / f"torn/_search/checkpoint-{dies_at}").is_dir()
    trainer = make_trainer(tmp_path / "torn", **settings)
    with caplog.at_level(logging.WARNING, "bidora.trainer.checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-{dies_at} is not complete and is passed over" in caplog.text
    assert differences(outcome(expected), outcome(trainer)) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a folder with a finished run of few steps, and its trainer."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, max_steps=3, retrain_max_steps=2)
    trainer.train()
    return folder, trainer


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:
    """Return a copy of the folder of a finished run, to be spoilt."""
    return shutil.copytree(finished[0], tmp_path / "run")


def few(folder: Path, **settings: Any) -> BiDoRATrainer:
    """Return a trainer with the settings of the finished run."""
    return make_trainer(folder, **{"max_steps": 3, "retrain_max_steps": 2, **settings})


def test_a_finished_run_takes_no_step(finished: Any, run: Path) -> None:
    trainer = few(run)
    taken = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken.append(1)

    trainer.add_callback(Count())
    output = trainer.train(resume_from_checkpoint=True)
    expected = outcome(finished[1])
    assert taken == []
    assert output.global_step == 2
    assert differences(expected["values"], outcome(trainer)["values"]) == []


def test_the_search_of_a_resumed_retraining_is_known(
    finished: Any, run: Path, tmp_path: Path
) -> None:
    """Also where the run goes on in another folder."""
    expected = finished[1].search_state.log_history
    trainer = few(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert trainer.search_state is not None
    assert trainer.search_state.log_history == expected
    assert {line["phase"] for line in expected} == {"search"}
    other = few(tmp_path / "other")
    other.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert other.search_state is not None
    assert other.search_state.log_history == expected


def test_a_finished_run_gives_its_best_model_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**WILD, "eval_steps": 1, "load_best_model_at_end": True}
    trainer = few(tmp_path, **settings)
    trainer.train()
    best = str(trainer.state.best_model_checkpoint)
    last = load_file(tmp_path / "checkpoint-2" / "bidora_values.safetensors")
    expected = outcome(trainer)["values"]
    # Else the last model would do.
    assert best.endswith("checkpoint-1")
    assert any(
        not torch.equal(expected[n.removeprefix("now.")], t) for n, t in last.items()
    )
    trainer = few(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert differences(expected, outcome(trainer)["values"]) == []


def test_resume_from_a_named_checkpoint(finished: Any, run: Path) -> None:
    trainer = few(run)
    trainer.train(resume_from_checkpoint=str(run / "_search" / "checkpoint-2"))
    assert differences(outcome(finished[1]), outcome(trainer)) == []


def test_the_same_trainer_goes_on(finished: Any, tmp_path: Path) -> None:
    """In either phase; what `train` changed of the trainer is as before in between."""
    trainer = few(tmp_path)
    held = trainer.args, trainer.train_dataset, trainer.model_init
    for phase in (SEARCH, RETRAIN):
        kill = Kill(trainer, phase, 2)
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=phase == RETRAIN)
        trainer.remove_callback(kill)
        now = trainer.args, trainer.train_dataset, trainer.model_init
        assert all(a is b for a, b in zip(held, now, strict=True))
        assert trainer.phase is None
        assert trainer.last_report is None
        trainable = {p.requires_grad for p in magnitudes(trainer.model).values()}
        assert trainable == {phase == SEARCH}
    trainer.train(resume_from_checkpoint=True)
    assert differences(outcome(finished[1]), outcome(trainer)) == []


def test_the_same_trainer_searches_again_after_a_retraining(run: Path) -> None:
    """The retraining froze the magnitudes; the search of the next call moves them."""
    trainer = few(run, overwrite_earlier_run=True)
    trainer.train(resume_from_checkpoint=True)
    before = {n: p.clone() for n, p in magnitudes(trainer.model).items()}
    trainer.train()
    after = magnitudes(trainer.model)
    assert not any(torch.equal(before[n], after[n]) for n in before)


FILES = (
    "trainer_state.json",
    "bidora_progress.json",
    "bidora_values.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["missing", "half"])
def test_a_checkpoint_with_a_spoilt_file_is_not_complete(
    name: str, harm: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoint-2" / name
    content = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(
        content[: len(content) // 2]
    )
    with caplog.at_level(logging.WARNING, "bidora.trainer.checkpoint"):
        found = find_checkpoint(str(run), True)
    assert found is not None
    assert found.path == run / "checkpoint-1"
    assert "checkpoint-2 is not complete" in caplog.text
    stem = name.split(".")[0]
    assert stem in caplog.text
    with pytest.raises(ValueError, match=f"not a complete checkpoint.*{stem}"):
        find_checkpoint(str(run), str(path.parent))


HOSTILE: list[Any] = [
    [],
    "text",
    None,
    7,
    {},
    {"format": 2},
    {"phase": "../../elsewhere"},
    {"phase": ["search"]},
    {"settings": [1]},
    {"inner_indices": "0123"},
    {"inner_indices": [0, 1, 10**12]},
    {"inner_indices": [-1]},
    {"inner_indices": [0, 0]},
    {"inner_indices": [0.0]},
    {"inner_indices": [0, 1], "outer_indices": [2]},
    {"outer_indices": {"0": 1}},
    {"outer_drawn": "3"},
    {"outer_drawn": -1},
    {"outer_drawn": True},
    {"without_gain": None},
    {"best_held_back": "low"},
    {"unknown": 1},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_strange_progress_file_is_not_complete(change: Any, run: Path) -> None:
    path = run / "checkpoint-2" / "bidora_progress.json"
    content = json.loads(path.read_text())
    if isinstance(change, dict):
        content = {**content, **change} if change else {}
    else:
        content = change
    path.write_text(json.dumps(content))
    found = find_checkpoint(str(run), True)
    assert found is not None
    assert found.path.name == "checkpoint-1"


def test_json_nested_too_deep_is_not_complete(run: Path) -> None:
    (run / "checkpoint-2" / "bidora_progress.json").write_text("[" * 100_000)
    found = find_checkpoint(str(run), True)
    assert found is not None
    assert found.path.name == "checkpoint-1"


@pytest.mark.parametrize("harm", ["shape", "dtype", "missing", "unknown", "first"])
def test_values_of_another_model_change_nothing(harm: str, run: Path) -> None:
    path = run / "_search" / "checkpoint-2" / "bidora_values.safetensors"
    values = load_file(path)
    name = next(n for n in values if n.startswith("now.") and "lora_A" in n)
    if harm == "shape":
        values[name] = values[name][:1].clone()
    elif harm == "dtype":
        values[name] = values[name].bfloat16()
    elif harm == "missing":
        del values[name]
    else:
        mark = "first." if harm == "first" else "now."
        values[f"{mark}elsewhere"] = torch.zeros(1)
    save_file(values, path)
    trainer = few(run)
    start = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"other values than this model.*Build the"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert differences(start, trainer.model.state_dict()) == []
    assert files == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert torch.equal(random, torch.get_rng_state())


# -- a process that is killed for good -------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from tests.bidora.stopped_runs import make_trainer
make_trainer(Path(sys.argv[1]), max_steps=8, retrain_max_steps=6).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mark", ["_search/checkpoint-3", "_search/checkpoint-7", "checkpoint-3"]
)
def test_a_process_killed_by_a_signal(mark: str, tmp_path: Path) -> None:
    """Killed as soon as a folder is there, wherever the process is by then."""
    settings: dict[str, Any] = {"max_steps": 8, "retrain_max_steps": 6}
    expected = make_trainer(tmp_path / "whole", **settings)
    expected.train()
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(killed)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 200
    while not (killed / mark).is_dir() and process.poll() is None:
        if time.monotonic() > until:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    trainer = make_trainer(killed, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert differences(outcome(expected), outcome(trainer)) == []
