"""The job: search the magnitudes, retrain the directions, test, save.

`train` is the whole of `bidora train`; the command line only reads options and shows
what a `Listener` is told.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from bidora.errors import UserError
from bidora.evaluation import (
    Scores,
    evaluate,
    outer_step_cost,
    probe,
    time_a_step,
)
from bidora.models import build_model, find_model, is_magnitude, load_tokenizer
from bidora.rundir import RunFolder
from bidora.settings import TrainSettings
from bidora.tasks import (
    BatchStream,
    Columns,
    Encoded,
    Task,
    encode,
    holdout_split,
    load_task,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["Listener", "PhaseResult", "RunResult", "train"]

CURVE_EXAMPLES = 240
"""Examples of each set that the curves are measured on; the end takes all of them."""


class Listener:
    """What a run tells; by default nobody listens."""

    def message(self, text: str) -> None:
        """Hear one line about the run."""

    def phase(self, name: str, steps: int) -> None:
        """Hear that a phase begins."""

    def step(self, step: int, losses: dict[str, float]) -> None:
        """Hear the newest losses after a step."""


@dataclass(frozen=True)
class PhaseResult:
    """What one phase cost and reached.

    Args:
        name: `search`, `retrain`, or `train` for the methods of one phase.
        steps: Optimizer steps.
        seconds: Seconds of training, without evaluation.
        evaluation_seconds: Seconds of evaluation.
        test: Scores on all test examples after the phase.
        validation: Scores on the part held back from the directions, if any.
        outer_steps: Steps of the magnitudes.
        skipped: Outer steps that were skipped, each with its reason.
    """

    name: str
    steps: int
    seconds: float
    evaluation_seconds: float
    test: Scores
    validation: Scores | None = None
    outer_steps: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: The run's folder, as a string.
        phases: One result a phase, the last being that of the saved adapter.
        base_model: Where the base model was loaded from.
        num_labels: Number of classes.
        seconds: Seconds of the whole run.
    """

    folder: str
    phases: tuple[PhaseResult, ...]
    base_model: str
    num_labels: int
    seconds: float


def train(settings: TrainSettings, listener: Listener | None = None) -> RunResult:
    """Fine-tune a model on a task and save the adapter.

    `bidora`: split the training examples 8:2, search the magnitudes on the smaller
    part while the directions learn on the larger, then fix the magnitudes, put
    directions and head back to their first values and train them on everything.
    `dora` and `lora`: one phase of AdamW on everything.

    The global random numbers are as before afterwards.

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
    if not source.is_local:
        listener.message(f"Loading {source.name} from the Hub or its cache ...")
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
    with torch.random.fork_rng():
        model: Any = build_model(
            source,
            tokenizer,
            task.label_names,
            use_dora=settings.method != "lora",
            rank=settings.rank,
            alpha=settings.alpha,
            target_modules=settings.target_modules,
            max_length=settings.max_length,
            seed=settings.seed,
        ).to(device)
        job = _Job(settings, task, tokenizer, model, folder, listener)
        listener.message(f"Model  {job.describe_model()}")
        folder.open()
        try:
            job.write_settings()
            listener.message(job.expected_time())
            phases = job.run()
            result = RunResult(
                folder=str(folder.path),
                phases=tuple(phases),
                base_model=source.location,
                num_labels=len(task.label_names),
                seconds=time.perf_counter() - started,
            )
            job.save(result)
        finally:
            folder.close()
    return result


@dataclass
class _Job:
    """One run, from the tokenised examples to the saved adapter."""

    settings: TrainSettings
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    folder: RunFolder
    listener: Listener
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        self.device = next(self.model.parameters()).device
        self.train_set = encode(self.task.train, self.tokenizer, settings.max_length)
        self.test_set = encode(self.task.test, self.tokenizer, settings.max_length)
        self.inner_indices = list(range(len(self.train_set)))
        self.outer_indices: list[int] = []
        if settings.method == "bidora":
            self.inner_indices, self.outer_indices = holdout_split(
                self.task.train.labels,
                settings.validation_fraction,
                settings.seed,
                self.task.label_names,
            )
            self.estimator = _estimator(settings)
        self.inner_set = self.train_set.select(self.inner_indices)
        self.outer_set = self.train_set.select(self.outer_indices)

    def describe_model(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.settings.model}: {trained:,} of {total:,} parameters are trained "
            f"({self.settings.method}, rank {self.settings.rank}), on {self.device}"
        )

    def expected_time(self) -> str:
        """Time a few steps and say how long the run will take."""
        settings = self.settings
        step = time_a_step(self.model, self._stream(self.train_set))
        count = float(settings.steps)
        if settings.method == "bidora":
            outer = (settings.steps - settings.outer_warmup) / settings.outer_every
            count += outer * outer_step_cost(self.estimator) + settings.retrain_steps
        phases = 2 if settings.method == "bidora" else 1
        curve = settings.steps / settings.eval_every * CURVE_EXAMPLES * 2
        examples = phases * (len(self.test_set) + curve)
        # A forward is about half of a step, and sorted by length half of that again.
        seconds = step * (count + 0.25 * examples / settings.batch_size)
        return f"Expected time: about {_duration(seconds)} ({step:.2f} s a plain step)"

    def run(self) -> list[PhaseResult]:
        if self.settings.method != "bidora":
            if self.settings.method == "dora":
                from bidora.dora import use_exact_dora

                use_exact_dora(self.model)
            return [self._plain_phase("train", self.settings.steps)]
        first_values, search = self._search()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in first_values:
                    parameter.copy_(first_values[name])
        return [search, self._plain_phase("retrain", self.settings.retrain_steps)]

    def _search(self) -> tuple[dict[str, torch.Tensor], PhaseResult]:
        """Search the magnitudes; return the directions' and the head's first values."""
        from bidora.optimizer import BiDoRAOptimizer

        settings = self.settings
        optimizer = BiDoRAOptimizer(
            self.model,
            estimator=self.estimator,
            inner_lr=settings.inner_lr,
            outer_lr=settings.outer_lr,
            inner_weight_decay=settings.inner_weight_decay,
            outer_weight_decay=settings.outer_weight_decay,
            outer_every=settings.outer_every,
            outer_warmup=settings.outer_warmup,
            max_grad_norm=settings.max_grad_norm,
            orthogonality=settings.orthogonality,
        )
        magnitudes = {
            id(parameter)
            for group in optimizer.param_groups
            if group["level"] == "outer"
            for parameter in group["params"]
        }
        first_values = {
            name: parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in magnitudes
        }
        inner = self._stream(self.inner_set)
        outer = BatchStream(
            self.outer_set, settings.outer_batch_size, settings.seed + 1, self.device
        )
        skipped: list[str] = []
        outer_steps = 0

        def step() -> dict[str, Any]:
            nonlocal outer_steps
            report = optimizer.step(inner(), outer)
            outer_steps += report.outer_step
            if report.skipped:
                skipped.append(str(report.skipped))
            return {
                "inner_loss": report.inner_loss,
                "outer_loss": report.outer_loss,
                "grad_norm": _number(report.grad_norm),
                "hypergrad_norm": _number(report.hypergrad_norm),
                "skipped": report.skipped,
            }

        sets = {"train": self.inner_set, "validation": self.outer_set}
        result = self._phase("search", settings.steps, optimizer, step, sets)
        optimizer.freeze_magnitudes()
        result = dataclasses.replace(
            result, outer_steps=outer_steps, skipped=tuple(skipped)
        )
        return first_values, result

    def _plain_phase(self, name: str, steps: int) -> PhaseResult:
        """Train everything that is trainable with AdamW on all training examples."""
        settings = self.settings
        parameters = dict(self.model.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        rate = settings.retrain_lr if name == "retrain" else settings.inner_lr
        groups: list[dict[str, Any]] = [
            {
                "params": [p for n, p in trained.items() if not is_magnitude(n)],
                "lr": rate,
                "weight_decay": settings.inner_weight_decay,
            },
            {
                "params": [p for n, p in trained.items() if is_magnitude(n)],
                "lr": settings.outer_lr,
                "weight_decay": settings.outer_weight_decay,
            },
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        batches = self._stream(self.train_set)

        def step() -> dict[str, Any]:
            loss = self.model(**batches()).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(
                trained.values(), settings.max_grad_norm
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return {"inner_loss": loss.item(), "grad_norm": _number(norm)}

        return self._phase(name, steps, optimizer, step, {"train": self.train_set})

    def _phase(
        self,
        name: str,
        steps: int,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], dict[str, Any]],
        sets: dict[str, Encoded],
    ) -> PhaseResult:
        """Step, schedule, record and evaluate; the same for every method."""
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
        evaluating = self._evaluate_curves(name, 0, curves)
        for number in range(1, steps + 1):
            started = time.perf_counter()
            record = step()
            schedule.step()
            seconds += time.perf_counter() - started
            if not math.isfinite(record["inner_loss"]):
                raise UserError(
                    f"the training loss is {record['inner_loss']} at step {number} of "
                    f"the {name} phase; the learning rate is probably too high. Lower "
                    f"{'--retrain-lr' if name == 'retrain' else '--inner-lr'}."
                )
            rate = optimizer.param_groups[0]["lr"]
            self._record({"phase": name, "step": number, "lr": rate, **record})
            self.listener.step(number, _losses(record))
            if number % settings.eval_every == 0 or number == steps:
                evaluating += self._evaluate_curves(name, number, curves)
        started = time.perf_counter()
        test = evaluate(self.model, self.test_set)
        held = sets.get("validation")
        validation = None if held is None else evaluate(self.model, held)
        evaluating += time.perf_counter() - started
        return PhaseResult(name, steps, seconds, evaluating, test, validation)

    def _evaluate_curves(
        self, phase: str, step: int, curves: dict[str, Encoded]
    ) -> float:
        """Record the scores of the curves' examples; return the seconds it took."""
        started = time.perf_counter()
        scores = {
            key: dataclasses.asdict(evaluate(self.model, data))
            for key, data in curves.items()
        }
        self._record({"phase": phase, "step": step, "evaluation": scores})
        return time.perf_counter() - started

    def _record(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        self.folder.append_history(record)

    def _stream(self, data: Encoded) -> BatchStream:
        return BatchStream(
            data, self.settings.batch_size, self.settings.seed, self.device
        )

    def write_settings(self) -> None:
        settings = self.settings.as_dict()
        self.folder.write_json("settings.json", settings)
        self.folder.write_json(
            "split.json",
            {
                "task": self.task.name,
                "source": self.task.source,
                "label_names": self.task.label_names,
                "train_examples": len(self.task.train),
                "test_examples": len(self.task.test),
                "seed": self.settings.seed,
                "inner_indices": self.inner_indices,
                "outer_indices": self.outer_indices,
            },
        )

    def save(self, result: RunResult) -> None:
        """Save the adapter, the tokenizer, the picture and, last, the metrics."""
        staging = self.folder.staging()
        # Nothing is asked of the Hub: embeddings are never adapted here.
        self.model.save_pretrained(str(staging), save_embedding_layers=False)
        self.tokenizer.save_pretrained(str(staging))
        try:
            from bidora.plots import draw_curves
        except ImportError:
            self.listener.message(
                "No curves.png: matplotlib is missing (pip install matplotlib)."
            )
        else:
            draw_curves(self.history, staging / "curves.png", _title(self.settings))
        files = self.folder.publish()
        self.folder.write_json(
            "metrics.json",
            {
                "phases": [dataclasses.asdict(phase) for phase in result.phases],
                "seconds": result.seconds,
                "label_names": self.task.label_names,
                "trained_parameters": sum(
                    p.numel() for p in self.model.parameters() if p.requires_grad
                ),
                "environment": _environment(self.device),
                "files": files,
            },
        )


def _estimator(settings: TrainSettings) -> Any:
    """Make the estimator; its own errors list the known names and settings."""
    from hypergrad import make_estimator

    try:
        return make_estimator(settings.estimator, **settings.estimator_settings)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


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


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _losses(record: dict[str, Any]) -> dict[str, float]:
    names = {"inner_loss": "train", "outer_loss": "validation"}
    return {
        shown: record[name]
        for name, shown in names.items()
        if record.get(name) is not None
    }


def _title(settings: TrainSettings) -> str:
    return f"{settings.method} on {settings.task}, seed {settings.seed}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.1f} min"


def _environment(device: torch.device) -> dict[str, Any]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names: Iterable[str] = (
        "hypergrad-bidora",
        "torch",
        "transformers",
        "peft",
        "numpy",
        "scikit-learn",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **{name: version(name) for name in names},
    }
