"""What stands in for a training where a test is about what comes around it.

The workers of a comparison import these by name, in processes of their own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from bidora.errors import UserError
from bidora.runs.results import PhaseResult, RunResult
from bidora.runs.settings import TrainSettings

LOCKS: list[Any] = []
"""Locks between processes that a library keeps, as tqdm does."""

SECONDS = {"lora": 4.0, "dora": 8.0, "rslora": 4.2}
"""Of training, by method, for ten steps."""


def quick(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Leave the files of a training within no time.

    The validation score is best at a learning rate of 0.01; the seed adds thousandths.
    """
    folder = Path(settings.folder)
    folder.mkdir(parents=True)
    seconds = SECONDS.get(settings.method, 4.0) * settings.max_steps / 10
    validation = 0.9 - abs((settings.learning_rate or 0.01) - 0.01)
    scores = {"validation": {"accuracy": validation, "loss": 1.0}}
    if score_test:
        test = 0.5 + settings.seed / 1000 + 0.1 * (settings.method == "dora")
        scores["test"] = {"accuracy": test, "loss": 1.0}
    history: list[dict[str, Any]] = [
        {"phase": "train", "step": 0, "evaluation": {"validation": {"accuracy": 0.25}}},
        {"phase": "train", "step": 1, "seconds": seconds / 2},
        {"phase": "train", "step": 2, "seconds": seconds / 2},
        {
            "phase": "train",
            "step": 2,
            "evaluation": {
                "train": {"accuracy": 1.0},
                "validation": {"accuracy": validation, "loss": 1.0},
            },
        },
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (folder / "history.jsonl").write_text(lines, "utf-8")
    metrics = {"environment": {"threads": os.environ["OMP_NUM_THREADS"]}}
    (folder / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    phase = PhaseResult("train", settings.max_steps, seconds, 0.1, scores)
    of_probe = {"test": {"accuracy": 0.4}, "validation": {"accuracy": 0.3}}
    probe = PhaseResult("probe", 0, 0.2, 0.1, of_probe) if score_probe else None
    return RunResult(
        settings.folder,
        (phase,),
        0.5,
        "accuracy",
        probe=probe,
        baseline={"test": {"accuracy": 0.25}},
        trained_parameters=7,
    )


def locking(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Make a lock that is kept until the process ends."""
    LOCKS.append(multiprocessing.RLock())
    return quick(settings, score_test=score_test, score_probe=score_probe)


def failing(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Fail with seed 1, and with every rate of 0.5."""
    if settings.seed == 1 or settings.learning_rate == 0.5:
        raise UserError("the loss is nan\nThe learning rate is probably too high.")
    return quick(settings, score_test=score_test, score_probe=score_probe)


def diverging(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Come to nothing finite with a rate of 0.02, the best but for that."""
    result = quick(settings, score_test=score_test, score_probe=score_probe)
    if settings.learning_rate == 0.02:
        result.phases[0].scores["validation"]["accuracy"] = float("nan")
    return result


def dying(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Be killed with seed 1, as by a system without memory."""
    if settings.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(settings, score_test=score_test, score_probe=score_probe)


def leaving(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Leave with seed 1, as a script does that calls `sys.exit`."""
    if settings.seed == 1:
        raise SystemExit(3)
    return quick(settings, score_test=score_test, score_probe=score_probe)


def slow(
    settings: TrainSettings, *, score_test: bool = True, score_probe: bool = True
) -> RunResult:
    """Take a long time with seed 1."""
    if settings.seed == 1:
        time.sleep(600)
    return quick(settings, score_test=score_test, score_probe=score_probe)
