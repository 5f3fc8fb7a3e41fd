"""SetFit on the examples of a job: a rival that is no method of fine-tuning with a head.

    pip install -e ".[bench]"

SetFit [TRE22] fine-tunes a sentence encoder on pairs of texts, whose cosine is to be 1
where they share a class and 0 elsewhere, and then fits a logistic regression on its
embeddings. It takes SetFit's own trainer, so it can't be a method of the job: `train` has
the place of `bidora.train` here. Examples, test part, seed, tokens that are kept and
metrics are those of the job; steps are SetFit's, of `per_device_train_batch_size` pairs
each; and every other setting of training is SetFit's default, the rate (2e-5) among
them. Each text of a pair is encoded, so that a step is twice the work of one of `full`.

    from benchmarks.setfit_rival import train
    from bidora import TrainSettings

    train(TrainSettings(method="setfit", max_steps=120))
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from bidora.errors import UserError
from bidora.methods import METHODS, make_method
from bidora.methods.base import (
    OF_ADAPTERS,
    OF_LORA_PLUS,
    OF_MAGNITUDES,
    SEARCH_ONLY,
    Method,
)
from bidora.models import Base, find_model
from bidora.runs.examples import read_examples
from bidora.runs.folder import RunFolder
from bidora.runs.job_settings import JobSettings
from bidora.runs.prepared import find_device
from bidora.runs.results import Listener, PhaseResult, RunResult, environment
from bidora.runs.settings import TrainSettings

__all__ = ["SetFit", "train"]

ELSEWHERE = (
    "--method setfit is trained by `benchmarks.setfit_rival.train` alone, which takes the "
    "place of `bidora.train` and keeps no model; choose another method here."
)


class SetFit(Method):
    """Name, settings and refusals of SetFit; `train` does the work."""

    name: ClassVar[str] = "setfit"
    summary: ClassVar[str] = (
        "SetFit: contrastive fine-tuning of a sentence encoder, then a logistic head"
    )
    usual_rates: ClassVar[tuple[float, float]] = (2e-5, 2e-5)
    ignores: ClassVar[tuple[str, ...]] = (
        *SEARCH_ONLY,
        *OF_MAGNITUDES,
        *OF_LORA_PLUS,
        *OF_ADAPTERS,
        "weight_decay",
        "max_grad_norm",
        "lr_scheduler_type",
        "gradient_accumulation_steps",
        "average_last",
        "early_stopping_patience",
        "bf16",
        "gradient_checkpointing",
        "trainer",
    )

    def adapt(self, base: Base, settings: JobSettings) -> Any:
        """Refuse: there is no model with a head to train."""
        raise UserError(ELSEWHERE)

    def save(self, model: Any, folder: Path) -> None:
        """Refuse: what is trained is scored and thrown away."""
        raise UserError(ELSEWHERE)

    def load(self, base: Base, folder: Path) -> Any:
        """Refuse: nothing was saved."""
        raise UserError(ELSEWHERE)

    def loading_code(self, names: Mapping[str, str]) -> str:
        """Refuse: nothing was saved."""
        raise UserError(ELSEWHERE)


METHODS.register("setfit", f"{__name__}:SetFit")


def train(
    settings: TrainSettings,
    listener: Listener | None = None,
    *,
    score_test: bool = True,
    score_probe: bool = False,
) -> RunResult:
    """Train SetFit on a task, score it, and leave a record like that of a run.

    Args:
        settings: Of the run; `method` is `setfit`.
        listener: Told what the data is.
        score_test: Whether the test part is scored; a sweep must not see it.
        score_probe: Not used: SetFit has no probe before its training.

    Returns:
        Scores and seconds, as from `bidora.train`.

    Raises:
        UserError: If SetFit can't be trained on the task.
    """
    from setfit import SetFitModel

    del score_probe
    started = time.perf_counter()
    method = make_method(settings.method)
    method.check(settings)
    examples = read_examples(settings, listener or Listener(), searches=False)
    task, schema = examples.task, examples.schema
    if task.name != "classification" or "text_pair" in examples.rows["train"].columns:
        raise UserError(
            f"SetFit embeds single texts and chooses one class; the task is {task.name}"
            + (" of pairs of texts." if task.name == "classification" else ".")
        )
    device = find_device(settings.device)
    folder = RunFolder(settings.folder, settings.overwrite)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model: Any = SetFitModel.from_pretrained(
            find_model(settings.model).location, device=str(device)
        )
        body = model.model_body
        usual = examples.source.hints.get("max_length")
        body.max_seq_length = settings.tokens_kept(body.max_seq_length, usual)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            steps = _fit(model, settings, examples, place)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        scores = {
            part: _scores(model, rows, task, schema)
            for part, rows in examples.rows.items()
            if part != "train" and (score_test or part == "validation")
        }
    phase = PhaseResult("train", steps, seconds, time.perf_counter() - begun, scores)
    result = RunResult(
        str(folder.path),
        (phase,),
        time.perf_counter() - started,
        schema.metric or task.main_metric,
    )
    _write(folder, settings, examples, result, device)
    return result


def _fit(model: Any, settings: TrainSettings, examples: Any, place: str) -> int:
    """Train encoder and head, and return the steps of the encoder."""
    from datasets import Dataset
    from setfit import Trainer, TrainingArguments

    rows = examples.rows["train"]
    labels = examples.task.targets(rows.columns["labels"], examples.schema)
    args = TrainingArguments(
        output_dir=place,
        batch_size=settings.per_device_train_batch_size,
        max_steps=settings.max_steps,
        body_learning_rate=settings.rate,
        warmup_proportion=settings.warmup_ratio,
        max_length=model.model_body.max_seq_length,
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        show_progress_bar=False,
    )
    data = Dataset.from_dict({"text": rows.columns["text"], "label": labels})
    trainer: Any = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    return int(trainer.st_trainer.state.global_step)


def _scores(model: Any, rows: Any, task: Any, schema: Any) -> dict[str, float]:
    """Return loss and metrics, by the job's own code."""
    labels = np.asarray(task.targets(rows.columns["labels"], schema))
    found = model.predict_proba(rows.columns["text"], as_numpy=True)
    chances = np.zeros((len(labels), len(schema.label_names)))
    # A class without training examples is never predicted.
    chances[:, model.model_head.classes_] = found
    logits = np.log(np.maximum(chances, np.finfo(np.float64).tiny))
    loss = -logits[np.arange(len(labels)), labels].mean()
    return {"loss": float(loss), **task.metrics(logits, labels, schema)}


def _write(
    folder: RunFolder,
    settings: TrainSettings,
    examples: Any,
    result: RunResult,
    device: torch.device,
) -> None:
    """Write what the record of a comparison reads."""
    folder.open()
    try:
        folder.write_json("settings.json", settings.as_dict())
        folder.write_json("split.json", examples.record())
        (phase,) = result.phases
        folder.append_history({"phase": "train", "result": dataclasses.asdict(phase)})
        folder.write_json(
            "metrics.json",
            {
                "phases": [dataclasses.asdict(phase)],
                "metric": result.metric,
                "seconds": result.seconds,
                "label_names": list(examples.schema.label_names),
                "environment": environment(device),
            },
        )
    finally:
        folder.close()
