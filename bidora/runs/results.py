"""What a run tells while it goes on, and what it reports at its end."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

__all__ = ["Listener", "PhaseResult", "RunResult", "environment"]

RECORDED_PACKAGES = (
    "hypergrad-bidora",
    "torch",
    "transformers",
    "peft",
    "numpy",
    "scikit-learn",
)


class Listener:
    """What a run tells; this one hears it and does nothing."""

    def message(self, text: str) -> None:
        """Hear one line about the run.

        Args:
            text: The line, without its end.
        """

    def phase(self, name: str, steps: int) -> None:
        """Hear that a phase begins.

        Args:
            name: `search`, `retrain` or `train`.
            steps: How many steps it will take.
        """

    def step(self, step: int, losses: dict[str, float]) -> None:
        """Hear the losses of a step.

        Args:
            step: Its number in the phase, from 1.
            losses: Loss by the name of the set that its batch came from.
        """

    def working_on(self, step: int, what: str) -> None:
        """Hear what is being done, in a phase whose steps differ.

        Args:
            step: How many steps of the phase are done.
            what: What comes now.
        """


@dataclass(frozen=True)
class PhaseResult:
    """What one phase cost and reached.

    Args:
        name: `search`, `retrain`, or `train` for the methods of one phase.
        steps: Optimizer steps.
        seconds: Seconds of training, without evaluation.
        evaluation_seconds: Seconds of evaluation.
        scores: Loss and metrics on all examples of each part, by the part's name:
            `test`, and where they exist `test_mismatched`, `validation` and, in a
            search, `held_back`.
        outer_steps: Steps of the magnitudes.
        skipped: Why an outer step was skipped, once for each that was.
        note: What the estimator last said about the trustworthiness of its result.
        best_global_step: The step whose weights the phase ends with, where these are the
            best ones and not the last.
        missing: Why a metric is in no scores, by its name: a library is not there.
    """

    name: str
    steps: int
    seconds: float
    evaluation_seconds: float
    scores: dict[str, dict[str, float]]
    outer_steps: int = 0
    skipped: tuple[str, ...] = ()
    note: str = ""
    best_global_step: int | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def test(self) -> dict[str, float]:
        """Scores on all test examples after the phase; empty where none were scored."""
        return self.scores.get("test", {})


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: The run's folder.
        phases: One result a phase, the last being that of what was saved.
        seconds: Seconds of the whole run.
        metric: The main metric, a key of `PhaseResult.test`.
        loading_code: Lines of Python that load what was saved.
        probe: What a linear head on the frozen model comes to, fitted before the first
            phase; None where it could not be, or was not asked for.
        baseline: Scores of a constant answer by part: the most common class, the mean
            number, the labels that most examples have.
        trained_parameters: How many numbers the method trains.
        facts: What a dry run found out: parameters, seconds, bytes.
    """

    folder: str
    phases: tuple[PhaseResult, ...]
    seconds: float
    metric: str
    loading_code: str = ""
    probe: PhaseResult | None = None
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)
    trained_parameters: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def environment(device: Any) -> dict[str, Any]:
    """Return versions, platform and threads, for the record.

    Args:
        device: Where the run took place.

    Returns:
        What JSON can hold; the version of a package that is not installed is None.
    """
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **{name: _version(name) for name in RECORDED_PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
