"""The job: search the magnitudes, retrain the directions, test, save.

`train` is the whole of `bidora train`; the command line only reads options and shows
what a `Listener` is told.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

import torch

from bidora.dora import use_exact_dora
from bidora.evaluation import outer_step_cost, time_a_step
from bidora.models import find_model
from bidora.phases import CURVE_EXAMPLES, Phases, Record
from bidora.plots import draw_curves
from bidora.preparation import Prepared, find_device, prepare
from bidora.report import Listener, PhaseResult, RunResult, environment
from bidora.rundir import RunFolder
from bidora.settings import TrainSettings
from bidora.tasks import BatchStream

__all__ = ["train"]


def train(settings: TrainSettings, listener: Listener | None = None) -> RunResult:
    """Fine-tune a model on a task and save the adapter.

    `bidora`: split the training examples 8:2, search the magnitudes on the smaller
    part while the directions learn on the larger, then fix the magnitudes, put
    directions and head back to their first values and train them on everything.
    `dora` and `lora`: one phase of AdamW on everything.

    The folder `settings.output_dir` then holds the adapter as PEFT saves it, the
    tokenizer, `settings.json`, `split.json`, `history.jsonl`, `curves.png` and, written
    last, `metrics.json`. The global random numbers are as before afterwards.

    Args:
        settings: What to train, on what and how.
        listener: Told what happens.

    Returns:
        Scores and seconds of each phase.

    Raises:
        UserError: If something the user gave can't be used.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    folder = RunFolder(settings.output_dir, settings.overwrite)
    device = find_device(settings.device)
    source = find_model(settings.model)
    with torch.random.fork_rng():
        job = _Job(**vars(prepare(settings, source, device, listener)))
        folder.open()
        try:
            folder.write_json("settings.json", settings.as_dict())
            folder.write_json("split.json", job.split())
            listener.message(f"Time   about {_duration(job.expected_seconds())}")
            phases = job.run(folder, listener)
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

    def run(self, folder: RunFolder, listener: Listener) -> list[PhaseResult]:
        """Run the method's phases."""

        def record(entry: Record) -> None:
            self.history.append(entry)
            folder.append_history(entry)

        phases = Phases(self.settings, self.model, self.test_set, listener, record)
        if self.estimator is None:
            if self.settings.method == "dora":
                use_exact_dora(self.model)
            return [phases.plain("train", self.train_set)]
        search = phases.search(
            self.train_set.select(self.inner_indices),
            self.train_set.select(self.outer_indices),
            self.estimator,
        )
        return [search, phases.plain("retrain", self.train_set)]

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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.1f} minutes"
