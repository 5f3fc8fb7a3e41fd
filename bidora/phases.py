"""The phases of a run: the search on two levels, and plain training on one."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bidora.dora import magnitudes
from bidora.errors import NoDirectionError, UserError
from bidora.evaluation import evaluate, probe
from bidora.optimizer import BiDoRAOptimizer
from bidora.orthogonality import orthogonality
from bidora.report import Listener, PhaseResult
from bidora.settings import TrainSettings
from bidora.tasks import BatchStream, Encoded
from hypergrad import HypergradEstimator, NonFiniteError, NumericalWarning

__all__ = ["Phases"]

CURVE_EXAMPLES = 120
"""Examples of each set that the curves are measured on; the end takes all of them."""

Record = dict[str, Any]


class Phases:
    """Run phases one after the other on one model.

    Args:
        settings: Steps, rates and sizes.
        model: A PEFT model; its parameters are trained in place.
        test_set: Examples that the curves and the end are scored on.
        listener: Told of phases and steps.
        record: Called with each record of the history as it comes.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: nn.Module,
        test_set: Encoded,
        listener: Listener,
        record: Callable[[Record], None],
    ) -> None:
        self.settings = settings
        self.model = model
        self.test_set = test_set
        self.listener = listener
        self.record = record

    def search(
        self, inner_set: Encoded, outer_set: Encoded, estimator: HypergradEstimator
    ) -> PhaseResult:
        """Search the magnitudes on one set while the directions learn on another.

        Afterwards the magnitudes keep the values found and are frozen. For a `fresh`
        retraining the other trainable parameters are as they were before; for a `warm`
        one they keep what they learned.

        Args:
            inner_set: Examples for directions and head.
            outer_set: Examples for the magnitudes.
            estimator: How the magnitudes' gradient is estimated.

        Returns:
            What the search cost, and the scores at its end.
        """
        settings = self.settings
        optimizer = BiDoRAOptimizer(
            self.model,
            estimator,
            inner_lr=settings.inner_lr,
            outer_lr=settings.outer_lr,
            inner_weight_decay=settings.inner_weight_decay,
            outer_weight_decay=settings.outer_weight_decay,
            outer_every=settings.outer_every,
            outer_warmup=settings.outer_warmup,
            max_grad_norm=settings.max_grad_norm,
            orthogonality=settings.orthogonality,
            audit_every=settings.audit_every or None,
        )
        outer_names = magnitudes(self.model)
        first_values = {
            name: parameter.detach().clone()
            for name, parameter in self._trained().items()
            if name not in outer_names
        }
        inner = self._stream(inner_set, settings.batch_size, settings.seed)
        outer = self._stream(outer_set, settings.outer_batch_size, settings.seed + 1)
        skipped: list[str] = []
        notes: list[str] = []

        def step() -> Record:
            with warnings.catch_warnings():
                # Kept in the history instead, for each step and not for the first.
                warnings.simplefilter("ignore", NumericalWarning)
                report = optimizer.step(inner(), outer)
            if report.skipped:
                skipped.append(report.skipped)
            if report.info and report.info.reason:
                notes.append(report.info.reason)
            return {
                "inner_loss": report.inner_loss,
                "grad_norm": report.grad_norm,
                "outer_loss": report.outer_loss,
                "hypergrad_norm": report.hypergrad_norm,
                "direct_norm": report.direct_norm,
                "indirect_norm": report.indirect_norm,
                "skipped": report.skipped,
                "note": report.info.reason if report.info else None,
                **({"audit": dataclasses.asdict(report.audit)} if report.audit else {}),
            }

        sets = {"train": inner_set, "validation": outer_set}
        result = self._run("search", settings.steps, optimizer, step, sets)
        optimizer.freeze_magnitudes()
        if settings.retrain == "fresh":
            with torch.no_grad():
                for name, parameter in self._trained().items():
                    parameter.copy_(first_values[name])
        return dataclasses.replace(
            result,
            outer_steps=optimizer.n_outer_steps,
            skipped=tuple(skipped),
            note=notes[-1] if notes else "",
        )

    def plain(self, name: str, train_set: Encoded) -> PhaseResult:
        """Train everything that is trainable with AdamW.

        Args:
            name: `retrain` after a search, whose inner loss it shares, or `train`.
            train_set: Examples to train on.

        Returns:
            What the phase cost, and the scores at its end.
        """
        settings = self.settings
        is_retraining = name == "retrain"
        trained = self._trained()
        outer = magnitudes(self.model)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for n, p in trained.items() if n not in outer],
                    "lr": settings.retrain_lr if is_retraining else settings.inner_lr,
                    "weight_decay": settings.inner_weight_decay,
                },
                {
                    "params": [p for n, p in trained.items() if n in outer],
                    "lr": settings.outer_lr,
                    "weight_decay": settings.outer_weight_decay,
                },
            ]
        )
        batches = self._stream(train_set, settings.batch_size, settings.seed)

        def step() -> Record:
            loss: Tensor = self.model(**batches()).loss
            if is_retraining and settings.orthogonality:
                loss = loss + settings.orthogonality * orthogonality(self.model)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return {"inner_loss": loss.item(), "grad_norm": norm.item()}

        steps = settings.retrain_steps if is_retraining else settings.steps
        return self._run(name, steps, optimizer, step, {"train": train_set})

    def _run(
        self,
        name: str,
        steps: int,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], Record],
        sets: dict[str, Encoded],
    ) -> PhaseResult:
        """Step, schedule, record and evaluate; the same for every phase."""
        from transformers import get_linear_schedule_with_warmup

        settings = self.settings
        torch.manual_seed(settings.seed)  # a phase's dropout depends on no other phase
        warmup = math.ceil(settings.warmup_ratio * steps)
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        curves = {
            key: probe(data, CURVE_EXAMPLES, settings.seed)
            for key, data in {**sets, "test": self.test_set}.items()
        }
        self.listener.phase(name, steps)
        self.model.train()
        seconds = 0.0
        evaluating = self._record_scores(name, 0, curves)
        for number in range(1, steps + 1):
            started = time.perf_counter()
            rate = optimizer.param_groups[0]["lr"]
            record = self._finite(step, name, number)
            schedule.step()
            seconds += time.perf_counter() - started
            self.record({"phase": name, "step": number, "lr": rate, **record})
            self.listener.step(number, _losses(record))
            if number % settings.eval_every == 0 or number == steps:
                evaluating += self._record_scores(name, number, curves)
        started = time.perf_counter()
        test = evaluate(self.model, self.test_set)
        held = sets.get("validation")
        validation = None if held is None else evaluate(self.model, held)
        evaluating += time.perf_counter() - started
        return PhaseResult(name, steps, seconds, evaluating, test, validation)

    def _finite(self, step: Callable[[], Record], phase: str, number: int) -> Record:
        """Take a step and return its record; say what to do where it diverged."""
        option = "--retrain-lr" if phase == "retrain" else "--inner-lr"
        advice = f"The learning rate is probably too high; lower {option}."
        where = f"step {number} of the {phase} phase"
        try:
            record = step()
        except (NonFiniteError, NoDirectionError) as error:
            # Norms were right when training began.
            raise UserError(f"{where}: {error} {advice}") from error
        if not math.isfinite(record["inner_loss"] + record["grad_norm"]):
            raise UserError(
                f"{where}: the loss is {record['inner_loss']}, the norm of its gradient "
                f"{record['grad_norm']}. {advice}"
            )
        return record

    def _record_scores(
        self, phase: str, step: int, curves: dict[str, Encoded]
    ) -> float:
        """Record a point of the curves; return the seconds it took."""
        started = time.perf_counter()
        scores = {
            key: dataclasses.asdict(evaluate(self.model, data))
            for key, data in curves.items()
        }
        self.record({"phase": phase, "step": step, "evaluation": scores})
        return time.perf_counter() - started

    def _trained(self) -> dict[str, nn.Parameter]:
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    def _stream(self, data: Encoded, batch_size: int, seed: int) -> BatchStream:
        device = next(self.model.parameters()).device
        return BatchStream(data, batch_size, seed, device)


def _losses(record: Record) -> dict[str, float]:
    shown = {"train": record["inner_loss"], "validation": record.get("outer_loss")}
    return {name: loss for name, loss in shown.items() if loss is not None}
