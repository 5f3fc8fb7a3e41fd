"""New rows scored by a finished run."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidora.data.files import read_file
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.methods import make_method
from bidora.packaged import PACKAGED
from bidora.runs.encoding import encode
from bidora.runs.results import Listener
from bidora.runs.resume import as_found
from bidora.runs.settings import TrainSettings
from bidora.runs.writing import written
from bidora.tasks.base import Rows, Schema, Task
from bidora.tasks.registry import make_task

if TYPE_CHECKING:
    from bidora.models import ModelSource

__all__ = ["Scored", "find_base", "load_run", "predict", "read_run"]

BATCH = 32


@dataclass(frozen=True)
class Scored:
    """What `predict` did.

    Args:
        output: The file that was written.
        rows: Rows that were scored.
        skipped: Rows that could not be, each with its place.
    """

    output: str
    rows: int
    skipped: tuple[str, ...]


def predict(
    run: str | Path,
    input_file: str | Path,
    output_file: str | Path,
    *,
    on_bad_row: str = "error",
    column_names: Sequence[str] | None = None,
    quoting: str = "auto",
    encoding: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Scored:
    """Score the rows of a file with the model that a run saved.

    The output has the columns of the input and, beside them, what the task answers:
    labels and probabilities, numbers, tags and spans. Labels in the input are ignored;
    an answer whose name a column has already is called `predicted_NAME`.

    Args:
        run: Folder of a finished run.
        input_file: A csv, tsv or jsonl file with the columns of the training data; for
            a run on images, also a folder of images.
        output_file: A csv, tsv or jsonl file to write.
        on_bad_row: `error`, or `skip` to leave such rows out.
        column_names: Names of the columns of a csv or tsv without a header line.
        quoting: As for training data.
        encoding: As for training data.
        device: Where to compute.
        overwrite: Whether the output may be there already.
        listener: Told what happens.

    Returns:
        What was written.

    Raises:
        UserError: If the run is not finished, or a row can't be scored.
    """
    listener = listener or Listener()
    folder, output = Path(run).expanduser(), Path(output_file).expanduser()
    settings, schema = read_run(folder)
    if output.exists() and not overwrite:
        raise UserError(f"--output {output} is there already; add --overwrite.")
    if output.suffix not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"--output {output} must end in .csv, .tsv or .jsonl.")
    task = make_task(schema.task, **schema.settings)
    place, column = Path(input_file).expanduser(), schema.settings.get("image_column")
    if place.is_dir() and column is not None:
        from bidora.data.image_folder import read_images

        table, note = read_images(place, column), ""
    else:
        table, note = read_file(
            place, column_names=column_names, quoting=quoting, encoding=encoding
        )
    if note:
        listener.message(note)
    rows = task.rows(table, schema, labelled=False)
    bad = [*table.bad, *rows.bad]
    if bad and on_bad_row == "error":
        raise UserError(
            f"{len(bad)} row(s) of {input_file} can't be scored:\n"
            + "\n".join(f"  {line}" for line in bad[:10])
            + "\nPut them right, or leave them out with --on-bad-row skip."
        )
    if not len(rows):
        raise UserError(f"{input_file} has no row that can be scored.")
    model, tokenizer, task = _load(folder, settings, task, schema, device)
    task.try_model(model, tokenizer, {"input": rows})
    if on_bad_row == "skip":
        rows, unfit = _fitting(model, tokenizer, task, schema, rows, settings)
        bad += unfit
        if not len(rows):
            raise UserError(
                f"{input_file} has no row that can be scored, such as: {bad[0]}"
            )
    answers = _answers(model, tokenizer, task, schema, rows, settings, listener)
    records = _beside(table, rows, answers)
    _write(output, records)
    return Scored(str(output), len(records), tuple(bad))


def _fitting(
    model: Any,
    tokenizer: Any,
    task: Task,
    schema: Schema,
    rows: Rows,
    settings: TrainSettings,
) -> tuple[Rows, list[str]]:
    """Return the rows that the model can be given, and what is wrong with the others."""
    from bidora.models import longest_input

    length = settings.tokens_kept(None)  # as it was in the training
    unfit = task.check_lengths(
        rows, tokenizer, schema, length, longest_input(model), skip=True
    )
    kept = [i for i in range(len(rows)) if i not in unfit]
    return rows.select(kept), list(unfit.values())


def _beside(
    table: Table, rows: Rows, answers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows that were scored, each with its answers beside its own columns."""
    numbers = {table.place(i): i for i in range(len(table))}
    names = {
        name: f"predicted_{name}" if name in table.columns else name
        for name in answers[0]
    }
    return [
        {
            **dict(zip(table.columns, table.rows[numbers[place]], strict=True)),
            **{names[name]: value for name, value in answer.items()},
        }
        for place, answer in zip(rows.places, answers, strict=True)
    ]


def load_run(run: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """Load the model and the tokenizer, or image processor, that a run saved.

    Args:
        run: Folder of a finished run.
        device: Where the model goes.

    Returns:
        The model, in eval mode, and what makes its inputs.

    Raises:
        UserError: If the run is not finished or its base model is not there.
    """
    folder = Path(run).expanduser()
    settings, schema = read_run(folder)
    task = make_task(schema.task, **schema.settings)
    return _load(folder, settings, task, schema, device)[:2]


def read_run(folder: Path) -> tuple[TrainSettings, Schema]:
    """Return the settings of a finished run, and what its task found out.

    Args:
        folder: Of the run.

    Raises:
        UserError: If it holds no run, or one that is not finished.
    """
    try:
        values = json.loads((folder / "settings.json").read_text("utf-8"))
        schema = json.loads((folder / "task.json").read_text("utf-8"))
        started_in = values.pop("started_in", None)
        values["model"] = as_found(values["model"], started_in)
        found = TrainSettings.from_dict(values), Schema.from_dict(schema)
    except OSError as error:
        raise UserError(
            f"{folder} holds no run of bidora ({error.strerror}: {error.filename}); name "
            "the folder that `bidora train` wrote."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder}: its settings cannot be read ({error}); they were changed, or "
            "written by another version."
        ) from error
    if not (folder / "metrics.json").is_file():
        raise UserError(
            f"the run in {folder} is not finished; go on with it: bidora train --resume "
            f"--output-dir {folder}"
        )
    return found


def find_base(folder: Path, settings: TrainSettings) -> ModelSource:
    """Find the base model of a run, which may have moved since.

    Args:
        folder: Of the run.
        settings: Of the run.

    Returns:
        Where it is.

    Raises:
        UserError: If it is not there any more; no option names it, but a file of the run.
    """
    from bidora.models import find_model, load_config

    name, file = settings.model, folder / "settings.json"
    try:
        source = find_model(name)
    except UserError as error:
        if name in PACKAGED:
            raise
        raise UserError(
            f"the run in {folder} was trained on the model {name}, and there is none any "
            f"more (looked from {Path.cwd()}). Put it back, or set `model` in {file} to "
            "where it is now."
        ) from error
    if not source.is_local:
        try:
            load_config(source)
        except UserError as error:
            raise UserError(
                f"{error} If the run was trained on a folder of that name, set `model` in "
                f"{file} to where it is now."
            ) from error
    return source


def _load(
    folder: Path, settings: TrainSettings, task: Task, schema: Schema, device: str
) -> tuple[Any, Any, Task]:
    """Return model and tokenizer, and the task as that model does it."""
    from bidora.models import ModelSource, load_base, load_config, load_processor
    from bidora.runs.prepared import find_device

    method = make_method(settings.method)
    own = ModelSource(settings.model, str(folder), is_local=True)
    source = own if method.saves_whole else find_base(folder, settings)
    tokenizer = load_processor(own, task)
    task = task.for_model(load_config(source))
    base = load_base(
        source,
        tokenizer,
        task,
        schema,
        seed=settings.seed,
        pooling=settings.pooling,
        pairs=settings.pairs,
    )
    task = task.for_model(base.model.config)
    model: Any = method.load(base, folder)
    return model.to(find_device(device)).eval(), tokenizer, task


def _answers(
    model: Any,
    tokenizer: Any,
    task: Task,
    schema: Schema,
    rows: Rows,
    settings: TrainSettings,
    listener: Listener,
) -> list[dict[str, Any]]:
    """Return the task's answers: what the model writes, or by the Trainer's own loop."""
    import tempfile

    from transformers import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainingArguments,
    )

    from bidora.methods.training import use_one_device

    length = settings.tokens_kept(None)  # as it was in the training
    if task.generation() is not None:
        texts = written(model, tokenizer, task, schema, rows, length, listener)
        return task.answers(texts, rows, schema)
    listener.phase("predict", len(rows))
    features = encode(rows, task, schema, tokenizer, length)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch,
            per_device_eval_batch_size=BATCH,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        use_one_device(args)
        trainer = Trainer(model, args, data_collator=task.collator(tokenizer))
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        found: Any = trainer.predict(features)
    listener.working_on(len(rows), "")
    return task.answers(found.predictions, rows, schema, found.label_ids)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write whole, by way of a temporary file beside it."""
    import io
    import os

    text = io.StringIO(newline="")
    if path.suffix == ".jsonl":
        for record in records:
            text.write(json.dumps(record, ensure_ascii=False) + "\n")
    else:
        writer = csv.DictWriter(
            text,
            list(records[0]),
            delimiter="\t" if path.suffix == ".tsv" else ",",
        )
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v
             for k, v in record.items()}
            for record in records
        )  # fmt: skip
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text.getvalue(), "utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written ({error.strerror})."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
