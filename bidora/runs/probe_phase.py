"""Phase 0 of every job: the probe is fitted, scored, and becomes the head's start."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bidora.errors import UserError
from bidora.probing import Probe, StartFromProbe, constant_answer, probe
from bidora.runs.recorder import Recorder, scores_of
from bidora.runs.results import Listener, PhaseResult

if TYPE_CHECKING:
    from bidora.runs.job import Prepared

__all__ = ["ProbePhase", "run_probe"]

PHASE = "probe"


@dataclass(frozen=True)
class ProbePhase:
    """What phase 0 came to.

    Args:
        result: Seconds and scores; None where no probe was fitted or scored.
        baseline: Scores of a constant answer by part.
    """

    result: PhaseResult | None = None
    baseline: dict[str, dict[str, float]] = field(default_factory=dict)


def run_probe(
    trainer: Any,
    recorder: Recorder,
    job: Prepared,
    listener: Listener,
    *,
    resume: bool,
    scored: bool,
) -> ProbePhase:
    """Fit the probe on all training examples, score it, and set up the training's start.

    Args:
        trainer: The Trainer of the method, whose model is still the pretrained one.
        recorder: What keeps the record.
        job: What the job works on.
        listener: Told the score.
        resume: Whether the training goes on from a checkpoint, so that the head is what
            it holds.
        scored: Whether test and validation examples are scored now.

    Returns:
        What it came to; that of the run's beginning, where the run goes on.

    Raises:
        UserError: If the probe is the method, and the model has no linear head.
    """
    earlier = recorder.earlier(PHASE)
    if resume:
        if hasattr(trainer, "outer_level") and job.settings.start == "probe":
            trainer.add_callback(StartFromProbe(trainer))
        return _as_recorded(earlier)
    is_method = job.settings.method == PHASE
    if not (is_method or scored or job.settings.start == "probe"):
        return ProbePhase()
    first = {n: p.detach().clone() for n, p in _head_parameters(job)}
    started = time.perf_counter()
    try:
        found = probe(trainer)
    except UserError as error:
        if is_method:
            raise
        listener.message(f"Probe  none: {error}")
        return ProbePhase()
    seconds = time.perf_counter() - started
    phase = ProbePhase()
    if is_method or scored:
        phase = _score(trainer, recorder.sets, job, found, seconds)
        recorder.record(
            {
                "phase": PHASE,
                "result": dataclasses.asdict(phase.result) if phase.result else None,
                "baseline": phase.baseline,
            }
        )
        _tell(phase, job, listener)
    if job.settings.start == "random" and not is_method:
        for name, parameter in _head_parameters(job):
            parameter.data.copy_(first[name])
    return phase


def _score(
    trainer: Any, sets: dict[str, Any], job: Prepared, found: Probe, seconds: float
) -> ProbePhase:
    """Score the model as it is now, and a constant answer beside it."""
    task, schema = job.examples.task, job.examples.schema
    constant = constant_answer(found.features)
    scores, baseline = {}, {}
    started = time.perf_counter()
    for name, data in sets.items():
        if name == "held_back":
            continue  # it was fitted on
        output = trainer.predict(data, metric_key_prefix=name)
        scores[name] = scores_of(output.metrics, f"{name}_")
        said = output.predictions
        shape = (said[0] if isinstance(said, tuple) else said).shape
        baseline[name] = task.metrics(
            np.broadcast_to(constant, shape), output.label_ids, schema
        )
    evaluating = time.perf_counter() - started
    result = PhaseResult(PHASE, 0, seconds, evaluating, scores)
    return ProbePhase(result, baseline)


def _tell(phase: ProbePhase, job: Prepared, listener: Listener) -> None:
    metric = job.examples.schema.metric or job.examples.task.main_metric
    if phase.result is None:
        return
    shown = [
        f"{scores[metric]:.3f} on {name.replace('_', ' ')}"
        for name, scores in phase.result.scores.items()
        if metric in scores
    ]
    constant = phase.baseline.get("test", {}).get(metric)
    beside = "" if constant is None else f" (a constant answer: {constant:.3f})"
    listener.message(
        f"Probe  {metric.replace('_', ' ')} {', '.join(shown)}{beside}: a linear head "
        f"on the frozen model, fitted in {phase.result.seconds:.1f} s"
    )


def _as_recorded(entry: dict[str, Any] | None) -> ProbePhase:
    if entry is None or entry.get("result") is None:
        return ProbePhase()
    result = {**entry["result"], "skipped": tuple(entry["result"]["skipped"])}
    return ProbePhase(PhaseResult(**result), entry["baseline"])


def _head_parameters(job: Prepared) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in job.model.named_parameters() if p.requires_grad]
