"""The history of a run: every step, the curves, and what each phase came to."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from bidora.errors import UserError
from bidora.runs.results import Listener, PhaseResult
from bidora.tasks.base import TextScores

__all__ = ["Record", "Recorder", "draw_as_if_scored", "scores_of", "too_high"]

NOT_SCORES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")

Record = dict[str, Any]


class Recorder(TrainerCallback):
    """Write down what a Trainer does, and stop it where it diverges.

    Needs `logging_steps=1`: a step is recorded with what is logged after it, and before
    a checkpoint of it is saved. The points of the curves are the Trainer's own
    evaluations.

    Args:
        trainer: The Trainer; in a `BiDoRATrainer`, its `phase` names the phase.
        sets: What the end of a phase is scored on, by name; `test` is among them.
        listener: Told of phases and steps.
        record: Called with each record as it comes.
        history: Records of the run that this one goes on from.
        written: Scores of texts that the model writes for a set after a phase, by the
            names of both.
        last_only: Whether a search is left unscored that a retraining follows.
        left_out: Sets that the curves leave out, and a plain run measures: whenever
            `validation` is evaluated, what that would have drawn is drawn.

    Attributes:
        phase: The phase that runs or ran last: `search`, `retrain`, or `train`.
        results: What each phase came to.
    """

    def __init__(
        self,
        trainer: Any,
        sets: dict[str, Any],
        listener: Listener,
        record: Callable[[Record], None],
        history: Sequence[Record] = (),
        written: Callable[[str, str], TextScores | None] = lambda phase, name: None,
        *,
        last_only: bool = False,
        left_out: Sequence[Any] = (),
    ) -> None:
        self.trainer = trainer
        self.sets = sets
        self.listener = listener
        self.record = record
        self.history = history
        self.written = written
        self.last_only = last_only
        self.left_out = left_out
        self.phase = "train"
        self.results = {
            r["phase"]: _result(r["result"]) for r in history if "result" in r
        }
        self._seen = {
            (r["phase"], r["step"], name)
            for r in history
            for name in r.get("evaluation", ())
        }
        self._started = self._seconds = self._evaluating = 0.0
        self._step_seconds = 0.0
        self._outer_steps = 0
        self._skipped: list[str] = []
        self._notes: list[str] = []

    def earlier(self, phase: str) -> Record | None:
        """Return the first record of a phase that the run goes on from, if any.

        Args:
            phase: Its name.
        """
        return next((r for r in self.history if r["phase"] == phase), None)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Begin a phase, or go on with it."""
        self.phase = getattr(self.trainer, "phase", None) or "train"
        earlier = [r for r in self.history if r["phase"] == self.phase]
        self._seconds = sum(r.get("seconds", 0.0) for r in earlier)
        self._evaluating = 0.0
        self._outer_steps = sum(r.get("outer_loss") is not None for r in earlier)
        self._skipped = [r["skipped"] for r in earlier if r.get("skipped")]
        self._notes = [r["note"] for r in earlier if r.get("note")]
        self.listener.phase(self.phase, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock; a phase ends with a point of the curves."""
        self._step_seconds = time.perf_counter() - self._started
        self._seconds += self._step_seconds
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Leave the random numbers where a run would that measures all curves."""
        if any(name.startswith("eval_validation_") for name in metrics or ()):
            for data in self.left_out:
                draw_as_if_scored(self.trainer, data)

    def on_steps_back(self, state: Any, done: int, of: int) -> None:
        """Show how far an outer step is that looks back over many.

        Args:
            state: The Trainer's.
            done: Steps that it walked back over.
            of: All of them.
        """
        told = f"back over {done} of {of} steps" if done < of else ""
        self.listener.working_on(state.global_step, told)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a step, or a point of the curves.

        Raises:
            UserError: If the loss or gradient of a step is not finite.
        """
        if logs is None:
            return
        step = state.global_step
        scores = {
            name: values
            for name, values in _evaluations(logs).items()
            if (self.phase, step, name) not in self._seen  # again, after a resume
        }
        if scores:
            self._seen |= {(self.phase, step, name) for name in scores}
            self.record({"phase": self.phase, "step": step, "evaluation": scores})
        if "loss" not in logs:
            return
        entry: Record = {
            "phase": self.phase,
            "step": step,
            "lr": logs["learning_rate"],
            "inner_loss": logs["loss"],
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            **self._of_the_search(),
            "seconds": self._step_seconds,
        }
        self._check_finite(entry)
        self.record(entry)
        shown = {"train": entry["inner_loss"], "held back": entry.get("outer_loss")}
        self.listener.step(step, {n: x for n, x in shown.items() if x is not None})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the phase on all examples of each part."""
        started = time.perf_counter()
        scores = {}
        missing: dict[str, str] = {}
        passed_over = (
            self.last_only
            and self.phase == "search"
            and args.bidora_settings()["retrain"] != "none"
        )
        for name, data in () if passed_over else self.sets.items():
            if name == "held_back" and self.phase == "retrain":
                continue  # it is trained on
            found = self.trainer.predict(data, metric_key_prefix=name).metrics
            scores[name] = scores_of(found, f"{name}_")
            written = self.written(self.phase, name)
            if written is not None:
                scores[name] |= written.scores
                missing |= written.missing
        self._evaluating += time.perf_counter() - started
        result = PhaseResult(
            self.phase,
            state.global_step,
            self._seconds,
            self._evaluating,
            scores,
            self._outer_steps,
            tuple(self._skipped),
            self._notes[-1] if self._notes else "",
            state.best_global_step if args.load_best_model_at_end else None,
            missing,
        )
        self.results[self.phase] = result
        self.record({"phase": self.phase, "result": dataclasses.asdict(result)})

    def _of_the_search(self) -> Record:
        """Return what the last step says of the outer level."""
        report = getattr(self.trainer, "last_report", None)
        if report is None:
            return {}
        self._outer_steps += report.outer_step
        if report.skipped:
            self._skipped.append(report.skipped)
        note = report.info.reason if report.info else None
        if note:
            self._notes.append(note)
        return {
            "outer_loss": report.outer_loss,
            "hypergrad_norm": report.hypergrad_norm,
            "direct_norm": report.direct_norm,
            "indirect_norm": report.indirect_norm,
            "skipped": report.skipped,
            "note": note,
            **({"audit": dataclasses.asdict(report.audit)} if report.audit else {}),
        }

    def _check_finite(self, entry: Record) -> None:
        if math.isfinite(entry["inner_loss"] + entry["grad_norm"]):
            return
        raise UserError(
            f"step {entry['step']} of the {self.phase} phase: the loss is "
            f"{entry['inner_loss']}, the norm of its gradient {entry['grad_norm']}. "
            f"{too_high(self.phase)}"
        )


def too_high(phase: str) -> str:
    """Return the remedy for a phase that diverges.

    Args:
        phase: Its name.
    """
    option = "--retrain-learning-rate" if phase == "retrain" else "--learning-rate"
    return f"The learning rate is probably too high; lower {option}."


def _evaluations(logs: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the scores of an evaluation by the set's name."""
    found: dict[str, dict[str, float]] = {}
    for key, value in logs.items():
        _, mark, rest = key.rpartition("eval_")
        if not mark:
            continue
        for name in ("train", "held_back", "validation"):
            if rest.startswith(f"{name}_"):
                found.setdefault(name, {})[rest.removeprefix(f"{name}_")] = value
    return {name: scores_of(values, "") for name, values in found.items()}


def draw_as_if_scored(trainer: Any, data: Any) -> None:
    """Draw the random numbers that scoring a set draws, and score nothing.

    A loader draws a seed when a pass begins, and a sampler perhaps an order. A training
    draws its dropout from the same numbers, so it would be another one without these.

    Args:
        trainer: The Trainer that would score.
        data: The set.
    """
    loader = trainer.get_eval_dataloader(data)
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    next(iter(loader.batch_sampler), None)


def scores_of(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Return the scores among what a Trainer measured, without their prefix.

    Args:
        metrics: What `Trainer.predict` or an evaluation returned.
        prefix: What stands before each of those that are wanted.

    Example:
        >>> scores_of({"test_loss": 1.0, "test_runtime": 2.0}, "test_")
        {'loss': 1.0}
    """
    own = {
        k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)
    }
    return {k: float(v) for k, v in own.items() if not k.endswith(NOT_SCORES)}


def _result(saved: Record) -> PhaseResult:
    """Return the result that a record holds."""
    return PhaseResult(**{**saved, "skipped": tuple(saved["skipped"])})
