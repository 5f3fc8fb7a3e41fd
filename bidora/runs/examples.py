"""The examples of a job: found, read, checked and split, before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bidora.data.load import load_source
from bidora.data.source import Source
from bidora.errors import UserError
from bidora.runs.job_settings import JobSettings
from bidora.runs.results import Listener
from bidora.tasks.base import Rows, Schema, Task
from bidora.tasks.guess import guess_task_type
from bidora.tasks.registry import TASKS, make_task

__all__ = ["Examples", "read_examples"]

TEST_FRACTION = 0.2
"""Share of the examples held back for testing where there is no test part."""

SHOWN = 10
"""Bad rows that a message shows; it counts the others."""


@dataclass
class Examples:
    """What a job learns from and is scored on.

    Attributes:
        source: Where they come from.
        task: What they mean.
        schema: What the task found out about them.
        rows: Clean examples by part; `train` and `test` are always there.
        skipped: Bad rows that were left out.
        inner: Indices of the training examples that directions learn on in a search, or
            that a run which may stop early learns on.
        outer: Indices of those held back, for an outer level or for early stopping; empty
            without either.
    """

    source: Source
    task: Task
    schema: Schema
    rows: dict[str, Rows]
    skipped: list[str] = field(default_factory=list)
    inner: list[int] = field(default_factory=list)
    outer: list[int] = field(default_factory=list)

    def check_metric(self, chosen: str | None, listener: Listener) -> None:
        """Say before the training that its main metric can't be computed here.

        Whoever named the metric wants it; who named none can have the others.

        Args:
            chosen: The metric that was named; None for the task's own.
            listener: Told where none was named.

        Raises:
            UserError: If one was named.
        """
        try:
            self.task.check_metric(self.schema)
        except UserError as error:
            if chosen is not None:
                raise
            listener.message(f"Note   {error} The run goes on, and tells it as n/a.")

    def joined(self) -> Rows:
        """Return the examples of all parts, one part after the other."""
        parts = list(self.rows.values())
        return Rows(
            {
                name: [value for part in parts for value in part.columns[name]]
                for name in parts[0].columns
            },
            [place for part in parts for place in part.places],
        )

    def leave_out(self, bad: Mapping[int, str]) -> None:
        """Leave out examples that the model can't be given; the split of the rest stays.

        Args:
            bad: What is wrong with them, by their indices in `joined`.

        Raises:
            UserError: If nothing is left of a part, or of a side of the split.
        """
        start = 0
        found: dict[str, Rows] = {}
        sides = {"training": self.inner, "held-back": self.outer}
        for part, rows in self.rows.items():
            kept = [i for i in range(len(rows)) if start + i not in bad]
            found[part] = rows.select(kept)
            start += len(rows)
            if part == "train":
                new = {old: i for i, old in enumerate(kept)}
                self.inner = [new[i] for i in self.inner if i in new]
                self.outer = [new[i] for i in self.outer if i in new]
        left = {
            _words(part): (len(rows), found[part]) for part, rows in self.rows.items()
        }
        left |= {
            side: (len(before), now)
            for (side, before), now in zip(
                sides.items(), (self.inner, self.outer), strict=True
            )
        }
        for name, (count, now) in left.items():
            if count and not len(now):
                raise UserError(
                    f"none of the {count} {name} examples can be used with this model, "
                    f"such as: {next(iter(bad.values()))}"
                )
        self.rows = found
        self.skipped = [*self.skipped, *bad.values()]

    def record(self) -> dict[str, Any]:
        """Return which examples went where, as JSON can hold it."""
        return {
            "task": self.source.name,
            "source": self.source.note,
            "examples": {part: len(rows) for part, rows in self.rows.items()},
            "skipped": self.skipped,
            "inner_indices": self.inner,
            "outer_indices": self.outer,
        }


def read_examples(
    settings: JobSettings,
    listener: Listener,
    *,
    searches: bool,
    stops_early: bool = False,
) -> Examples:
    """Read, check and split the examples of a job, and say what was understood.

    Args:
        settings: Of the job.
        listener: Told what the data is.
        searches: Whether part of the training examples is held back for the magnitudes.
        stops_early: Whether it is for early stopping, where there is no validation part.

    Returns:
        The examples.

    Raises:
        UserError: If the data can't be used; it names all bad rows at once.
    """
    source = load_source(
        settings.task,
        seed=settings.seed,
        data_dir=settings.data_dir,
        validation_file=settings.validation_file,
        test_file=settings.test_file,
        column_names=settings.column_names,
        quoting=settings.quoting,
        encoding=settings.encoding,
        label_column=settings.label_column,
    )
    task = _task(settings, source, listener)
    schema = task.schema(source)
    rows = {part: task.rows(table, schema) for part, table in source.parts.items()}
    skipped = _bad_rows(source, rows, settings)
    note = source.note
    if not rows.get("test"):
        # Whatever the run's seed: settings that one seed chose are scored with others, and
        # what chose them must not be what tests them.
        first, second = task.split(rows["train"], schema, TEST_FRACTION, seed=0)
        rows["test"] = rows["train"].select(second)
        rows["train"] = rows["train"].select(first)
        note += (
            f" {TEST_FRACTION:.0%} of it held back for testing, for every seed alike."
        )
    note += _draw(rows, task, schema, settings)
    source = replace(source, note=note)
    found = Examples(source, task, schema, rows, skipped)
    found.inner = list(range(len(rows["train"])))
    if stops_early and rows.get("validation"):
        _refuse_a_fraction_of_nothing(settings, rows)
    elif searches or stops_early:
        try:
            found.inner, found.outer = task.split(
                rows["train"], schema, settings.validation_fraction, settings.seed
            )
        except UserError as error:
            left = len(rows["train"])
            raise UserError(
                f"of the {left} examples that are left for training, some are to be held "
                f"back for {'early stopping' if stops_early else 'the magnitudes'}: "
                f"{error}"
            ) from error
    sizes = ", ".join(f"{len(r)} {_words(part)}" for part, r in rows.items())
    listener.message(f"Task   {source.name}: {task.name}, {sizes} examples")
    for line in task.describe(rows, schema):
        listener.message(f"       {line}")
    if stops_early:
        count = len(found.outer) or len(rows["validation"])
        what = "training examples, held back" if found.outer else "validation examples"
        listener.message(f"       {count} {what}, decide when to stop")
    if skipped:
        listener.message(
            f"       {len(skipped)} bad row(s) left out, such as: {skipped[0]}"
        )
    return found


def _draw(
    rows: dict[str, Rows], task: Task, schema: Schema, settings: JobSettings
) -> str:
    """Draw the examples that are asked for, in place, and say so in a sentence.

    Test and validation examples depend on no seed, so that runs of several seeds are
    scored on the same ones.

    Args:
        rows: Examples by part; those that are drawn take their place.
        task: What they mean.
        schema: What the task found out about them.
        settings: How many are asked for.

    Returns:
        What was drawn, for the source's note; nothing where all are used.

    Raises:
        UserError: If there are too few.
    """
    told: list[str] = []

    def drawn(part: str, most: int, seed: int, of: str) -> list[int]:
        try:
            return task.draw(rows[of], schema, most, seed)
        except UserError as error:
            raise UserError(f"--max-{part}-samples {most}: {error}") from error

    most = settings.max_train_samples
    wanted = settings.max_validation_samples
    if wanted is not None and "validation" not in rows:
        left = 0 if most is None else max(0, len(rows["train"]) - most)
        if left < wanted:
            raise UserError(
                f"--max-validation-samples {wanted}: the data has no validation examples, "
                f"and of its {len(rows['train'])} training examples --max-train-samples "
                f"leaves out {left}. Ask for fewer of either, or give "
                "--validation-file."
            )
        found = set(drawn("validation", wanted, 0, "train"))
        others = [i for i in range(len(rows["train"])) if i not in found]
        rows["validation"] = rows["train"].select(sorted(found))
        rows["train"] = rows["train"].select(others)
        told.append(f"{len(found)} training examples are for validation.")
    for part, count, seed in (
        ("test", settings.max_test_samples, 0),
        ("validation", wanted, 0),
        ("train", most, settings.seed),
    ):
        if count is not None and count < len(rows[part]):
            before = len(rows[part])
            rows[part] = rows[part].select(drawn(part, count, seed, part))
            told.append(
                f"{len(rows[part])} of {before} {_words(part)} examples are used."
            )
    return "".join(f" {sentence}" for sentence in told)


def _task(settings: JobSettings, source: Source, listener: Listener) -> Task:
    """Make the task with the settings that its type has; the user's go before hints."""
    name = settings.task_type or source.hints.get("task_type")
    if name is None:
        name, why = guess_task_type(source, settings.as_dict())
        listener.message(f"Type   {name}: {why}")
    fields = TASKS.get(name).__dataclass_fields__
    hinted = {k: v for k, v in source.hints.items() if k in fields}
    given = {
        k: getattr(settings, k)
        for k in fields
        if getattr(settings, k, None) is not None
    }
    unused = [
        k
        for k in (
            "text_column",
            "text_pair_column",
            "image_column",
            "label_separator",
            "label_columns",
            "allow_empty",
            "min_examples_per_class",
            "scheme",
            "max_new_tokens",
            "num_beams",
            "length_penalty",
            "no_repeat_ngram_size",
            "proteins",
        )
        if getattr(settings, k) is not None and k not in fields
    ]
    if unused:
        raise UserError(
            f"--{', --'.join(k.replace('_', '-') for k in unused)} has no meaning for "
            f"{name}; leave it out, or choose another --task-type."
        )
    task = make_task(name, **{**hinted, **given})
    task.check(settings)
    return task


def _bad_rows(
    source: Source, rows: dict[str, Rows], settings: JobSettings
) -> list[str]:
    """Return the bad rows of all parts, or refuse them."""
    bad = [line for table in source.parts.values() for line in table.bad]
    bad += [line for part in rows.values() for line in part.bad]
    if bad and settings.on_bad_row == "error":
        shown = "\n".join(f"  {line}" for line in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise UserError(
            f"{len(bad)} row(s) of the data can't be used:\n{shown}{more}\nPut them "
            "right, or leave them out with --on-bad-row skip."
        )
    if not rows["train"]:
        raise UserError(
            f"{source.train.origin}: none of its {len(bad)} row(s) can be used, such as: "
            f"{bad[0] if bad else 'none'}"
        )
    return bad


def _refuse_a_fraction_of_nothing(settings: JobSettings, rows: dict[str, Rows]) -> None:
    usual = type(settings)().validation_fraction
    if settings.validation_fraction != usual:
        raise UserError(
            f"--validation-fraction {settings.validation_fraction:g} would hold nothing "
            f"back: the data has a validation part of {len(rows['validation'])} examples, "
            "which decides when to stop. Leave it out."
        )


def _words(part: str) -> str:
    return {"train": "training"}.get(part, part.replace("_", " "))
