"""The job: read the data, train by a method, score once, save.

`train` is the whole of `bidora train`: it prepares data and model, hands them to the
Trainer of the method, and keeps the record. The command line only reads options and shows
what a `Listener` is told.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidora.errors import NoDirectionError, UserError
from bidora.methods import make_method
from bidora.runs.curves import curve_sets, read_curves
from bidora.runs.encoding import by_length
from bidora.runs.examples import read_examples
from bidora.runs.folder import RunFolder
from bidora.runs.prepared import Prepared, find_device, prepare
from bidora.runs.results import Listener, PhaseResult, RunResult
from bidora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from bidora.methods.base import Method
    from bidora.tasks.base import TextScores

__all__ = ["train"]

CURVE_EXAMPLES = 120
"""Examples of each set that the curves are measured on; the end takes all of them."""


def train(
    settings: TrainSettings,
    listener: Listener | None = None,
    *,
    resume: bool = False,
    dry_run: bool = False,
    score_test: bool = True,
    score_probe: bool = True,
    for_record: bool = False,
) -> RunResult:
    """Fine-tune a model on a task and save what was trained.

    The folder `settings.folder` then holds the adapter (or the model) as its library
    saves it, the tokenizer, the model's configuration, a model card, `settings.json`,
    `task.json`, `split.json`, `history.jsonl`, `curves.png`, `generated.jsonl` where the
    model writes texts, and, written last, `metrics.json`; while the run goes on, also
    `checkpoints`. The global random numbers are as before afterwards.

    Args:
        settings: What to train, on what and how.
        listener: Told what happens.
        resume: Whether to go on with the run that the folder holds, from its last
            checkpoint; it then ends as if it had never stopped.
        dry_run: Whether to stop before the training: settings, parameters, time and
            memory are told, and nothing is written.
        score_test: Whether test examples are scored; a run that is to choose settings
            must not see them.
        score_probe: Whether the probe is scored, where it is no more than the start.
        for_record: Whether nothing is measured but what the record of a comparison has:
            the last phase's scores on test and validation examples, the probe's on test
            examples, and the curve of validation. Those numbers are the same as without.

    Returns:
        Scores and seconds of each phase; `facts` alone after a dry run.

    Raises:
        UserError: If something the user gave can't be used.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    method: Method = make_method(settings.method)
    method.check(settings)
    folder = RunFolder(
        settings.folder, settings.overwrite or dry_run, resume=resume, look=dry_run
    )
    examples = read_examples(
        settings,
        listener,
        searches=method.holds_back,
        stops_early=settings.early_stopping_patience is not None,
    )
    examples.check_metric(settings.metric, listener)
    if not score_test:
        kept = {n: r for n, r in examples.rows.items() if not n.startswith("test")}
        examples.rows = kept

    import torch

    from bidora.models import find_model, without_bars

    device = find_device(settings.device)
    if device.type == "cuda" and device.index:
        raise UserError(
            f"--device {settings.device}: a Trainer uses the first GPU that it sees. Set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave out --device."
        )
    source = find_model(settings.model)
    _check_trainer_fields(settings.trainer)
    with torch.random.fork_rng(), without_bars():
        job = _Job(
            **vars(prepare(settings, method, source, examples, device, listener)),
            method=method,
            score_probe=score_probe,
            for_record=for_record,
        )
        if dry_run:
            return job.tell(listener)
        # What a Trainer refuses is refused before the folder is claimed.
        trainer = job.trainer(str(folder.checkpoints))
        folder.open()
        try:
            if not resume:
                folder.write_json(
                    "settings.json",
                    {
                        **settings.as_dict(),
                        "max_length": job.length,
                        "pooling": job.pooling,
                        "pairs": job.pairs,
                        "started_in": str(Path.cwd()),
                    },
                )
                folder.write_json("task.json", examples.schema.to_dict())
                folder.write_json("split.json", examples.record())
            phases = job.run(trainer, folder, listener, resume=resume)
            result = RunResult(
                folder=str(folder.path),
                phases=tuple(phases),
                seconds=time.perf_counter() - started,
                metric=job.metric,
                loading_code=job.loading_code(folder.path),
                probe=job.probe,
                baseline=job.baseline,
                trained_parameters=job.trained_parameters,
            )
            job.save(folder, result)
        finally:
            folder.close()
    return result


@dataclass
class _Job(Prepared):
    """One run, from the tokenised examples to what is saved."""

    method: Method = field(kw_only=True)
    score_probe: bool = field(default=True, kw_only=True)
    for_record: bool = field(default=False, kw_only=True)
    left_out: list[Any] = field(default_factory=list, kw_only=True)
    history: list[dict[str, Any]] = field(default_factory=list, kw_only=True)
    probe: PhaseResult | None = field(default=None, kw_only=True)
    baseline: dict[str, dict[str, float]] = field(default_factory=dict, kw_only=True)
    weights: dict[str, Any] = field(default_factory=dict, kw_only=True)
    written: list[dict[str, Any]] = field(default_factory=list, kw_only=True)

    @property
    def trained_parameters(self) -> int:
        """How many numbers the method trains."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def judge(self) -> str | None:
        """The set that decides when to stop; None where all steps are taken."""
        if self.settings.early_stopping_patience is None:
            return None
        return "held_back" if self.examples.outer else "validation"

    def loading_code(self, folder: Path) -> str:
        """Return lines that load what is saved there, on this machine."""
        return self.method.loading_code(
            {
                "folder": str(folder),
                "base": self.source.location,
                "auto_model": self.examples.task.auto_model,
                "auto_processor": self.examples.task.auto_processor,
                "pooling": self.pooling,
                "pairs": self.pairs,
                "gguf_file": self.source.gguf_file or "",
            }
        )

    def tell(self, listener: Listener) -> RunResult:
        """Say what a run would do, and return the facts."""
        import tempfile

        from bidora.runs.cost import duration, memory_in_use

        parameters = list(self.model.parameters())
        with tempfile.TemporaryDirectory() as place:  # a Trainer makes its folder
            seconds = self.expected_seconds(self.trainer(place))
        used = memory_in_use(self.device)
        facts = {
            "trained_parameters": self.trained_parameters,
            "parameters": sum(p.numel() for p in parameters),
            "expected_seconds": seconds,
            "bytes_after_four_steps": used,
        }
        listener.message(f"Time   about {duration(seconds)}")
        listener.message(
            f"Memory {used / 2**30:.1f} GiB in use at most so far, after four plain "
            "steps; an outer step takes up to 2.7 times the activations of one"
        )
        return RunResult(self.settings.folder, (), 0.0, self.metric, facts=facts)

    def expected_seconds(self, trainer: Any) -> float:
        """Time a few steps and return how long the phases will take, roughly."""
        from bidora.runs.cost import inner_step_cost, outer_step_cost, time_a_step
        from bidora.trainer.arguments import arguments_of_phase

        settings, args = self.settings, trainer.args
        data, collate = self.sets["train"], self.collate
        size = min(settings.per_device_train_batch_size, len(data))

        def batch() -> dict[str, Any]:
            made = collate([data[i] for i in range(size)])
            return {name: value.to(self.device) for name, value in made.items()}

        steps = float(settings.max_steps) * (self.method.phases != ("probe",))
        if self.method.searches:
            own = args.bidora_settings()
            search = arguments_of_phase(args, "search").max_steps
            outer = max(0, search - own["outer_warmup_steps"]) / own["outer_every"]
            small = own["per_device_outer_batch_size"] / size
            estimator = args.make_estimator()
            steps = search * inner_step_cost(estimator)
            steps += outer * outer_step_cost(estimator) * min(1, small)
            if "retrain" in self.method.phases and own["retrain"] != "none":
                steps += arguments_of_phase(args, "retrain").max_steps
        points = settings.max_steps / max(1, args.eval_steps) + 1
        scored = 1 if self.for_record else len(self.method.phases)
        evaluated = len(self.sets.get("test", ())) * (scored + 1)
        evaluated += sum(map(len, trainer.eval_dataset.values())) * points
        # A forward is about half of a step, and less with examples sorted by length.
        steps += 0.3 * evaluated / size
        steps *= settings.gradient_accumulation_steps
        return time_a_step(self.model, batch) * steps

    def run(
        self, trainer: Any, folder: RunFolder, listener: Listener, *, resume: bool
    ) -> list[Any]:
        """Run the method's phases and return what each came to."""
        from bidora.runs.cost import duration
        from bidora.runs.recorder import Recorder, too_high
        from hypergrad import NonFiniteError, NumericalWarning

        def record(entry: dict[str, Any]) -> None:
            self.history.append(entry)
            folder.append_history(entry)

        last = None
        if resume:
            last = _last_checkpoint(folder.checkpoints, searches=self.method.searches)
            self.history = folder.cut_history(last and last[1:])
            if last is None:
                folder.remove_checkpoints()  # none is complete
            else:
                listener.message(f"Resume step {last[2]} of the {last[1]} phase")
        # It costs four steps, and the workers of a comparison have nobody who listens.
        hears = getattr(listener.message, "__func__", None) is not Listener.message
        if not resume and hears:
            expected = self.expected_seconds(trainer)
            listener.message(f"Time   about {duration(expected)}")
        recorder = Recorder(
            trainer,
            self._final_sets(),
            listener,
            record,
            list(self.history),
            lambda phase, name: self._text_scores(phase, name, folder, listener),
            last_only=self.for_record,
            left_out=self.left_out,
        )
        trainer.add_callback(recorder)
        if self.settings.record_weights:
            from bidora.runs.weights import WeightRecorder

            trainer.add_callback(
                WeightRecorder(trainer, self.weights, record, list(self.history))
            )
        self._start(trainer, recorder, listener, resume=last is not None)
        if self.method.phases == ("probe",):
            return [self.probe]
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
        return [r for name, r in recorder.results.items() if name in self.method.phases]

    def _start(
        self, trainer: Any, recorder: Any, listener: Listener, *, resume: bool
    ) -> None:
        """Fit the probe, score it, and let the training start from its head."""
        from bidora.runs.probe_phase import run_probe

        names = ("test",) if self.for_record else tuple(recorder.sets)
        scored = names if self.score_probe else None
        found = run_probe(
            trainer, recorder, self, listener, resume=resume, scored=scored
        )
        self.probe, self.baseline = found.result, found.baseline

    def _train_set(self) -> Any:
        """Return what the Trainer trains on; that of a search divides it itself."""
        if self.judge == "held_back":
            return self.sets["train"].select(self.examples.inner)
        return self.sets["train"]

    def _final_sets(self) -> dict[str, Any]:
        """Return what the end of a phase is scored on, whole."""
        sets = {n: d for n, d in self.sets.items() if n != "train"}
        if self.for_record:
            sets = {n: d for n, d in sets.items() if n in ("test", "validation")}
        elif self.examples.outer:
            sets["held_back"] = self.sets["train"].select(self.examples.outer)
        return {name: by_length(data) for name, data in sets.items()}

    def _text_scores(
        self, phase: str, name: str, folder: RunFolder, listener: Listener
    ) -> TextScores | None:
        """Let the model write at the end of the run, keep it, and score it."""
        from bidora.runs.writing import written

        task, schema = self.examples.task, self.examples.schema
        rows = self.examples.rows.get(name)
        if not task.scores_texts or rows is None or phase != self.method.phases[-1]:
            return None
        texts = written(
            self.model, self.tokenizer, task, schema, rows, self.length, listener
        )
        kept = task.text_records(texts, rows, schema)
        self.written += [{"part": name, **record} for record in kept]
        if self.written:  # before a scorer can fail
            folder.write_lines("generated.jsonl", self.written)
        return task.text_scores(texts, rows, schema)

    def _curve_sets(self) -> dict[str, Any]:
        return curve_sets(self, self.judge, CURVE_EXAMPLES)

    def trainer(self, place: str) -> Any:
        """Return the Trainer of the method, over the prepared model and examples."""
        from transformers import PrinterCallback, ProgressCallback

        from bidora.methods.base import TrainerParts
        from bidora.trainer.upstream import group_by_length

        settings, examples = self.settings, self.examples
        task, schema = examples.task, examples.schema
        size = settings.per_device_train_batch_size
        smallest = min(len(examples.rows["train"]), len(examples.inner))
        every = settings.eval_steps or max(1, settings.max_steps // 6)
        arguments: dict[str, Any] = {
            "output_dir": place,
            "max_steps": settings.max_steps,
            "per_device_train_batch_size": size,
            "per_device_eval_batch_size": task.evaluation_batch,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "learning_rate": settings.rate,
            "weight_decay": settings.weight_decay,
            "warmup_steps": settings.warmup_ratio,
            "lr_scheduler_type": settings.lr_scheduler_type,
            "max_grad_norm": settings.max_grad_norm,
            "bf16": settings.bf16,
            "seed": settings.seed,
            "use_cpu": self.device.type == "cpu",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "eval_strategy": "steps",
            "eval_steps": every,
            "eval_on_start": True,
            "save_steps": every,
            "save_total_limit": 2,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,  # the recorder stops a run that diverges
            "report_to": list(settings.report_to),
            "disable_tqdm": True,
        }
        if "input_ids" in self.sets["train"].column_names:
            # Without this, a third of the work on short texts is padding.
            arguments |= group_by_length()
        if settings.gradient_checkpointing:  # its older name warns, whatever it is
            arguments["gradient_checkpointing"] = True
        if self.judge:
            arguments |= {
                "load_best_model_at_end": True,
                "metric_for_best_model": f"{self.judge}_{self.judging_metric}",
                "greater_is_better": task.greater_is_better and not task.judged_by,
            }
        arguments |= settings.trainer
        curves = self._curve_sets()
        if self.for_record:
            watched = str(settings.trainer.get("metric_for_best_model"))
            unread = curves.keys() - read_curves(curves, self.judge, watched)
            self.left_out = [curves.pop(name) for name in unread]
        given: dict[str, Any] = {
            "model": self.model,
            "train_dataset": self._train_set(),
            "eval_dataset": curves,
            "data_collator": self.collate,
            "preprocess_logits_for_metrics": task.kept,
            "compute_metrics": lambda p: task.metrics(
                p.predictions, p.label_ids, schema
            ),
        }
        parts = TrainerParts(
            settings,
            arguments,
            given,
            split=(examples.inner, examples.outer),
            # Batches of one size, unless there is no batch of that size.
            whole_batches=smallest >= size,
        )
        try:
            trainer = self.method.trainer(parts)
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # what a Trainer says of its arguments
            raise UserError(str(error)) from error
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if self.judge:
            from bidora.methods.early_stopping import EarlyStopping

            trainer.add_callback(EarlyStopping(settings.early_stopping_patience))
        if settings.record_weights:
            from bidora.runs.weights import trained_weights

            self.weights = trained_weights(
                self.model, self.linear_layers, self.method.name
            )
        if settings.average_last:
            from bidora.methods.averaging import AverageLast

            last = "search" if settings.retrain == "none" else self.method.phases[-1]
            trainer.add_callback(AverageLast(trainer, settings.average_last, last))
        return trainer

    def save(self, folder: RunFolder, result: RunResult) -> None:
        """Save what was trained and what is told of it; the metrics come last."""
        from bidora.runs.saving import save_run

        title = (
            f"{self.settings.method} on {self.examples.source.name}, "
            f"seed {self.settings.seed}\ncurves of up to {CURVE_EXAMPLES} examples"
        )
        save_run(self, self.method, folder, result, self.history, title)


def _check_trainer_fields(given: dict[str, Any]) -> None:
    """Check what is passed on to `TrainingArguments` by name."""
    from difflib import get_close_matches

    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean trainer.{near[0]}?" if near else ""
            raise UserError(f"TrainingArguments has no field named {name!r}.{hint}")
    kept = {"output_dir", "logging_steps", "disable_tqdm", "remove_unused_columns"}
    taken = sorted(kept & set(given))
    if taken:
        raise UserError(
            f"trainer.{taken[0]} is the job's own: its record depends on it. Leave it out."
        )
    settings = {
        f: f"--{f.replace('_', '-')}" for f in TrainSettings.__dataclass_fields__
    }
    double = sorted(n for n in given if n in settings)
    if double:
        raise UserError(f"trainer.{double[0]} is {settings[double[0]]} here; use that.")


def _last_checkpoint(place: Path, *, searches: bool) -> tuple[Path, str, int] | None:
    """Return the last complete checkpoint, its phase and its step; None without one."""
    from bidora.trainer.checkpoint import TRAINER_STATE, checkpoints_in, last_complete

    if searches:
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
