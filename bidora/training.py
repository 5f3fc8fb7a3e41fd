"""The job: search the magnitudes, retrain the directions, test, save.

`train` is the whole of `bidora train`; the command line only reads options and shows
what a `Listener` is told.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from bidora.dora import use_exact_dora
from bidora.errors import UserError
from bidora.evaluation import outer_step_cost, time_a_step
from bidora.models import (
    ModelSource,
    build_model,
    find_model,
    load_tokenizer,
    longest_input,
)
from bidora.phases import CURVE_EXAMPLES, Phases, Record
from bidora.plots import draw_curves
from bidora.report import Listener, PhaseResult, RunResult, environment
from bidora.rundir import RunFolder
from bidora.settings import TrainSettings
from bidora.tasks import (
    BatchStream,
    Columns,
    Encoded,
    Task,
    encode,
    holdout_split,
    is_hub_task,
    load_task,
)
from hypergrad import HypergradEstimator, make_estimator

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
    device = _device(settings.device)
    source = find_model(settings.model)
    with torch.random.fork_rng():
        job = _prepare(settings, source, device, listener)
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
class _Job:
    """One run, from the tokenised examples to the saved adapter."""

    settings: TrainSettings
    task: Task
    tokenizer: Any
    model: Any
    train_set: Encoded
    test_set: Encoded
    inner_indices: list[int] = field(default_factory=list)
    outer_indices: list[int] = field(default_factory=list)
    estimator: HypergradEstimator | None = None
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

    def split(self) -> dict[str, Any]:
        """Return which training examples went where."""
        return {
            "task": self.task.name,
            "source": self.task.source,
            "seed": self.settings.seed,
            "label_names": self.task.label_names,
            "train_examples": len(self.task.train),
            "test_examples": len(self.task.test),
            "inner_indices": self.inner_indices,
            "outer_indices": self.outer_indices,
        }

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


def _prepare(
    settings: TrainSettings,
    source: ModelSource,
    device: torch.device,
    listener: Listener,
) -> _Job:
    """Load model and data, split and tokenise; nothing is written yet."""
    estimator = _estimator(settings) if settings.method == "bidora" else None
    remote = [] if source.is_local else [source.name]
    remote += [settings.task] if is_hub_task(settings.task) else []
    if remote:
        listener.message(
            f"Fetching {' and '.join(remote)} from the cache or the Hub ..."
        )
    tokenizer = load_tokenizer(source)
    task = load_task(
        settings.task,
        seed=settings.seed,
        columns=Columns(
            settings.text_column, settings.text_pair_column, settings.label_column
        ),
        test_file=settings.test_file,
        column_names=settings.column_names,
        quoting=settings.quoting,
    )
    listener.message(f"Task   {task.describe()}")
    inner, outer = list(range(len(task.train))), []
    if estimator is not None:
        inner, outer = holdout_split(
            task.train.labels,
            settings.validation_fraction,
            settings.seed,
            task.label_names,
        )
    model: Any = build_model(
        source,
        tokenizer,
        task.label_names,
        use_dora=settings.method != "lora",
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        seed=settings.seed,
    ).to(device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    listener.message(
        f"Model  {settings.model}: {settings.method} trains {trained:,} of its "
        f"{total:,} parameters, on {device}"
    )
    length = settings.tokens_kept(longest_input(model))
    return _Job(
        settings=settings,
        task=task,
        tokenizer=tokenizer,
        model=model,
        train_set=encode(task.train, tokenizer, length),
        test_set=encode(task.test, tokenizer, length),
        inner_indices=inner,
        outer_indices=outer,
        estimator=estimator,
    )


def _estimator(settings: TrainSettings) -> HypergradEstimator:
    """Make the estimator; its own errors list the known names and settings."""
    try:
        return make_estimator(settings.estimator, **settings.estimator_settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"--estimator {settings.estimator}: {error}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used ({str(error).splitlines()[0][:160]}); "
            "choose cpu, or leave it out."
        ) from error


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.1f} minutes"
