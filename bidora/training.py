"""The job: search the magnitudes, retrain the directions, test, save.

`train` is the whole of `bidora train`: it prepares data and model, hands them to a
`BiDoRATrainer` (or, for the methods of one phase, to a Trainer), and keeps the record.
The command line only reads options and shows what a `Listener` is told.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bidora._transformers import use_one_device
from bidora.dora import magnitudes, use_exact_dora
from bidora.errors import NoDirectionError, UserError
from bidora.evaluation import outer_step_cost, time_a_step
from bidora.models import find_model
from bidora.plots import draw_curves
from bidora.preparation import Prepared, find_device, prepare
from bidora.recorder import CURVE_EXAMPLES, Record, Recorder, too_high
from bidora.report import Listener, RunResult, environment
from bidora.rundir import RunFolder
from bidora.settings import TrainSettings
from bidora.tasks import BatchStream
from hypergrad import NonFiniteError, NumericalWarning

__all__ = ["train"]


def train(
    settings: TrainSettings, listener: Listener | None = None, *, resume: bool = False
) -> RunResult:
    """Fine-tune a model on a task and save the adapter.

    `bidora`: split the training examples 8:2, search the magnitudes on the smaller
    part while the directions learn on the larger, then fix the magnitudes and train
    directions and head on everything. `dora` and `lora`: one phase of AdamW on
    everything.

    The folder `settings.output_dir` then holds the adapter as PEFT saves it, the
    tokenizer, `settings.json`, `split.json`, `history.jsonl`, `curves.png` and, written
    last, `metrics.json`; while the run goes on, also `checkpoints`. The global random
    numbers are as before afterwards.

    Args:
        settings: What to train, on what and how.
        listener: Told what happens.
        resume: Whether to go on with the run that the folder holds, from its last
            checkpoint; it then ends as if it had never stopped.

    Returns:
        Scores and seconds of each phase.

    Raises:
        UserError: If something the user gave can't be used.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    folder = RunFolder(settings.output_dir, settings.overwrite, resume=resume)
    device = find_device(settings.device)
    if device.type == "cuda" and device.index:
        raise UserError(
            f"--device {settings.device}: a Trainer uses the first GPU that it sees. Set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave out --device."
        )
    source = find_model(settings.model)
    with torch.random.fork_rng():
        job = _Job(**vars(prepare(settings, source, device, listener)))
        folder.open()
        try:
            if not resume:
                folder.write_json("settings.json", settings.as_dict())
                folder.write_json("split.json", job.split())
                listener.message(f"Time   about {_duration(job.expected_seconds())}")
            phases = job.run(folder, listener, resume=resume)
            result = RunResult(
                folder=str(folder.path),
                phases=tuple(phases),
                num_labels=len(job.task.label_names),
                seconds=time.perf_counter() - started,
            )
            job.save(folder, result)
        finally:
            folder.close()
    return result


@dataclass
class _Job(Prepared):
    """One run, from the tokenised examples to the saved adapter."""

    history: list[Record] = field(default_factory=list)

    def expected_seconds(self) -> float:
        """Time a few steps and return how long the phases will take, roughly."""
        settings = self.settings
        stream = BatchStream(
            self.train_set,
            settings.batch_size,
            settings.seed,
            next(self.model.parameters()).device,
        )
        phases, steps = 1, float(settings.steps)
        if self.estimator is not None:
            phases = 2
            outer = settings.outer_steps * outer_step_cost(self.estimator)
            steps += outer + settings.retrain_steps
        points = settings.steps // settings.eval_every + 1
        evaluated = phases * (len(self.test_set) + 2 * CURVE_EXAMPLES * points)
        # A forward is about half of a step, and less with examples sorted by length.
        steps += 0.3 * evaluated / settings.batch_size
        return time_a_step(self.model, stream) * steps

    def run(self, folder: RunFolder, listener: Listener, *, resume: bool) -> list[Any]:
        """Run the method's phases and return what each came to."""

        def record(entry: Record) -> None:
            self.history.append(entry)
            folder.append_history(entry)

        two_phases = self.estimator is not None
        last = None
        if resume:
            last = _last_checkpoint(folder.checkpoints, two_phases=two_phases)
            self.history = folder.cut_history(last and last[1:])
            if last is None:
                folder.remove_checkpoints()  # none is complete
            else:
                listener.message(f"Resume step {last[2]} of the {last[1]} phase")
        trainer = self._trainer(str(folder.checkpoints))
        recorder = Recorder(
            self.settings, trainer, self._sets(), listener, record, list(self.history)
        )
        trainer.add_callback(recorder)
        try:
            with warnings.catch_warnings():
                # Kept in the history instead, for each step and not for the first.
                warnings.simplefilter("ignore", NumericalWarning)
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
        except (NonFiniteError, NoDirectionError) as error:
            # Norms were right when training began.
            step = trainer.state.global_step + 1
            raise UserError(
                f"step {step} of the {recorder.phase} phase: {error} "
                f"{too_high(recorder.phase)}"
            ) from error
        names = ("search", "retrain") if two_phases else ("train",)
        return [recorder.results[name] for name in names]

    def _sets(self) -> dict[str, dict[str, Any]]:
        """Return what the curves of each phase are measured on."""
        everything = {"train": self.train_set, "test": self.test_set}
        if self.estimator is None:
            return {"train": everything}
        parts = {
            "train": self.train_set.select(self.inner_indices),
            "validation": self.train_set.select(self.outer_indices),
            "test": self.test_set,
        }
        return {"search": parts, "retrain": everything}

    def _trainer(self, place: str) -> Any:
        """Return the Trainer of the method, over the prepared model and examples."""
        from transformers import (
            DataCollatorWithPadding,
            PrinterCallback,
            ProgressCallback,
            Trainer,
            TrainingArguments,
        )

        from bidora.trainer import BiDoRATrainer, BiDoRATrainingArguments

        settings = self.settings
        smallest = min(
            len(part) for part in (self.train_set, self.inner_indices) if part
        )
        common: dict[str, Any] = {
            "output_dir": place,
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.inner_lr,
            "weight_decay": settings.inner_weight_decay,
            "warmup_steps": settings.warmup_ratio,
            "max_grad_norm": settings.max_grad_norm,
            "seed": settings.seed,
            "use_cpu": find_device(settings.device).type == "cpu",
            # Batches of one size, unless there is no batch of that size.
            "dataloader_drop_last": smallest >= settings.batch_size,
            "remove_unused_columns": False,
            "save_steps": settings.eval_every,
            "save_total_limit": 2,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,  # the recorder stops a run that diverges
            "report_to": [],
            "disable_tqdm": True,
        }
        given: dict[str, Any] = {
            "model": self.model,
            "train_dataset": self.train_set,
            "data_collator": DataCollatorWithPadding(self.tokenizer),
        }
        if self.estimator is None:
            if settings.method == "dora":
                use_exact_dora(self.model)
            args = TrainingArguments(**common)
            use_one_device(args)
            trainer = Trainer(args=args, optimizers=(self._plain(), None), **given)
        else:
            args = BiDoRATrainingArguments(
                **common,
                estimator=settings.estimator,
                estimator_settings=settings.estimator_settings,
                validation_fraction=settings.validation_fraction,
                outer_learning_rate=settings.outer_lr,
                outer_weight_decay=settings.outer_weight_decay,
                outer_every=settings.outer_every,
                outer_warmup_steps=settings.outer_warmup,
                per_device_outer_batch_size=min(
                    settings.outer_batch_size, len(self.outer_indices)
                ),
                orthogonality=settings.orthogonality,
                audit_every=settings.audit_every,
                retrain=settings.retrain,
                retrain_learning_rate=settings.retrain_lr,
                retrain_max_steps=settings.retrain_steps,
            )
            use_one_device(args)
            trainer = BiDoRATrainer(args=args, **given)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def _plain(self) -> torch.optim.Optimizer:
        """Return AdamW for a method of one phase; magnitudes have a rate of their own."""
        settings = self.settings
        outer = magnitudes(self.model)
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for n, p in trained if n not in outer],
                "lr": settings.inner_lr,
                "weight_decay": settings.inner_weight_decay,
            },
            {
                "params": [p for n, p in trained if n in outer],
                "lr": settings.outer_lr,
                "weight_decay": settings.outer_weight_decay,
            },
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]])

    def save(self, folder: RunFolder, result: RunResult) -> None:
        """Save the adapter, the tokenizer, the picture and, last, the metrics."""
        staging = folder.staging()
        # "auto" would ask the Hub about embeddings, which are never adapted here.
        self.model.save_pretrained(str(staging), save_embedding_layers=False)
        self.tokenizer.save_pretrained(str(staging))
        title = (
            f"{self.settings.method} on {self.task.name}, seed {self.settings.seed}\n"
            f"curves of up to {CURVE_EXAMPLES} examples of each set"
        )
        draw_curves(self.history, staging / "curves.png", title)
        files = folder.publish()
        parameters = list(self.model.parameters())
        folder.write_json(
            "metrics.json",
            {
                "phases": [dataclasses.asdict(phase) for phase in result.phases],
                "seconds": result.seconds,
                "label_names": self.task.label_names,
                "parameters": sum(p.numel() for p in parameters),
                "environment": environment(parameters[0].device),
                "files": files,
            },
        )
        folder.remove_checkpoints()


def _last_checkpoint(place: Path, *, two_phases: bool) -> tuple[Path, str, int] | None:
    """Return the last complete checkpoint, its phase and its step; None without one."""
    from bidora.trainer.checkpoint import TRAINER_STATE, checkpoints_in, last_complete

    if two_phases:
        found = last_complete(place)
        if found is None:
            return None
        return found.path, found.progress.phase, found.step
    for path in checkpoints_in(place):
        try:
            state = json.loads((path / TRAINER_STATE).read_text("utf-8"))
            return path, "train", state["global_step"]
        except (OSError, ValueError, KeyError):
            continue  # it was being written when the run was stopped
    return None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.1f} minutes"
