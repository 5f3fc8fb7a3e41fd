"""Phase 0 of every job: the probe is fitted, scored, and becomes the head's start."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bidora.errors import UserError
from bidora.probing import Probe, StartFromProbe, constant_answer, extract, probe
from bidora.runs.recorder import Recorder, scores_of
from bidora.runs.results import Listener, PhaseResult
from bidora.trainer.upstream import collator_of

if TYPE_CHECKING:
    from bidora.runs.prepared import Prepared

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
    scored: Collection[str] | None,
) -> ProbePhase:
    """Fit the probe on all training examples, score it, and set up the training's start.

    Args:
        trainer: The Trainer of the method, whose model is still the pretrained one.
        recorder: What keeps the record.
        job: What the job works on.
        listener: Told the score.
        resume: Whether the training goes on from a checkpoint, so that the head is what
            it holds.
        scored: Names of the sets that are scored now, as far as they are there; None
            for no scores. Where the probe is the method, all sets are scored.

    Returns:
        What it came to; that of the run's beginning, where the run goes on.

    Raises:
        UserError: If the probe is the method, and the model has no linear head.
    """
    if not job.examples.task.has_probe:
        return ProbePhase()
    if resume:
        earlier = recorder.earlier(PHASE)
        possible = earlier is None or "impossible" not in earlier
        searches = hasattr(trainer, "outer_level")
        if searches and possible and job.settings.start == "probe":
            trainer.add_callback(StartFromProbe(trainer))
        return _as_recorded(earlier)
    is_method = job.settings.method == PHASE
    names = recorder.sets if is_method else scored
    if names is None and job.settings.start != "probe":
        return ProbePhase()
    is_random = job.settings.start == "random" and not is_method
    first = {n: p.detach().clone() for n, p in _trained(job)} if is_random else {}
    # A search fits the head again when it begins, on what its directions learn on.
    is_overwritten = names is None and hasattr(trainer, "outer_level")
    started = time.perf_counter()
    try:
        if is_overwritten:
            extract(trainer.model, _some(trainer), collator_of(trainer))
            trainer.add_callback(StartFromProbe(trainer))
            return ProbePhase()
        found = probe(trainer)
    except UserError as error:
        if is_method:
            raise
        listener.message(f"Probe  none: {error}")
        recorder.record({"phase": PHASE, "impossible": str(error)})
        return ProbePhase()
    seconds = time.perf_counter() - started
    phase = ProbePhase()
    if names is not None:
        sets = {name: data for name, data in recorder.sets.items() if name in names}
        # A loader draws a number, and the training shall not depend on who looked.
        with torch.random.fork_rng():
            result, baseline = _score(trainer, sets, job, found, seconds)
        phase = ProbePhase(result, baseline)
        recorder.record(
            {
                "phase": PHASE,
                "result": dataclasses.asdict(result),
                "baseline": baseline,
            }
        )
        _tell(result, baseline, job, listener)
    if is_random:
        trainer.remove_callback(StartFromProbe)
        for name, parameter in _trained(job):
            parameter.data.copy_(first[name])
    return phase


def _some(trainer: Any) -> Any:
    """Return enough examples to see whether the model has a head to fit."""
    data = trainer.train_dataset
    return data.select(range(min(len(data), 2)))


def _score(
    trainer: Any, sets: dict[str, Any], job: Prepared, found: Probe, seconds: float
) -> tuple[PhaseResult, dict[str, dict[str, float]]]:
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
    return PhaseResult(PHASE, 0, seconds, evaluating, scores), baseline


def _tell(
    result: PhaseResult,
    baseline: dict[str, dict[str, float]],
    job: Prepared,
    listener: Listener,
) -> None:
    metric = job.examples.schema.metric or job.examples.task.main_metric
    shown = [
        f"{scores[metric]:.3f} on {name.replace('_', ' ')}"
        for name, scores in result.scores.items()
    ]
    told = f"{metric.replace('_', ' ')} {', '.join(shown)}" if shown else "not scored"
    if "test" in baseline:
        told += f" (a constant answer: {baseline['test'][metric]:.3f})"
    listener.message(
        f"Probe  {told}: a linear head on the frozen model, fitted in "
        f"{result.seconds:.1f} s"
    )


def _as_recorded(entry: dict[str, Any] | None) -> ProbePhase:
    if entry is None or "result" not in entry:
        return ProbePhase()
    result = {**entry["result"], "skipped": tuple(entry["result"]["skipped"])}
    return ProbePhase(PhaseResult(**result), entry["baseline"])


def _trained(job: Prepared) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in job.model.named_parameters() if p.requires_grad]
