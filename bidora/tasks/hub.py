"""Tasks from the Hugging Face Hub, by name: `glue/cola` or `owner/dataset`."""

from __future__ import annotations

from typing import Any

from bidora.errors import UserError
from bidora.tasks.base import Task, holdout_split
from bidora.tasks.columns import Columns, Table, label_names_of, to_examples
from bidora.tasks.files import TEST_FRACTION

__all__ = ["GLUE_COLUMNS", "load_hub_task"]

GLUE_COLUMNS: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""Text columns of the classification tasks of GLUE."""

TEST_SPLITS = ("test", "validation", "validation_matched", "dev", "eval")
"""Parts that may serve as test set, the first with labels is taken.

GLUE's own test parts carry no labels (-1), so its validation parts serve, as in the
papers that report on it.
"""


def load_hub_task(name: str, *, seed: int = 0, columns: Columns | None = None) -> Task:
    """Fetch a data set, or find it in the local cache, and build a task.

    Args:
        name: `glue/TASK`, `owner/dataset`, or `owner/dataset:configuration`.
        seed: Seed of the test split, where the data set has no labelled test part.
        columns: Which columns hold text and label.

    Returns:
        The task.

    Raises:
        UserError: If the data set cannot be fetched or has no such columns.
    """
    columns = columns or Columns()
    repository, configuration = name, None
    if name.startswith("glue/"):
        configuration = _glue_task(name)
        repository = "nyu-mll/glue"
        if columns == Columns():
            columns = Columns(*GLUE_COLUMNS[configuration], "label")
    elif ":" in name:
        repository, configuration = name.split(":", maxsplit=1)
    parts = _fetch(name, repository, configuration)
    if "train" not in parts:
        raise UserError(
            f"the data set {name!r} has no part named train (it has "
            f"{', '.join(sorted(parts))}); save the rows you want as csv and pass "
            "--task FILE.csv."
        )
    train = _table(parts["train"], f"{name} (train)")
    columns = columns.resolve(train)
    label_names = label_names_of(train, str(columns.label))
    examples = to_examples(train, columns, label_names)
    for part in TEST_SPLITS:
        if part in parts and _is_labelled(parts[part], str(columns.label)):
            test_table = _table(parts[part], f"{name} ({part})")
            test = to_examples(test_table, columns.resolve(test_table), label_names)
            source = f"the Hub's {name}, tested on its part {part!r}"
            return Task(name, examples, test, label_names, source, columns.names)
    first, second = holdout_split(examples.labels, TEST_FRACTION, seed, label_names)
    return Task(
        name=name,
        train=examples.select(first),
        test=examples.select(second),
        label_names=label_names,
        source=(
            f"the Hub's {name}, a stratified {TEST_FRACTION:.0%} of its training part "
            f"(seed {seed}) held back for testing"
        ),
        columns=columns.names,
    )


def _glue_task(name: str) -> str:
    task = name.removeprefix("glue/").lower().replace("-", "")
    if task in GLUE_COLUMNS:
        return task
    known = ", ".join(f"glue/{known}" for known in GLUE_COLUMNS)
    why = (
        "is a regression, which is not in this version"
        if task == "stsb"
        else ("is not a classification task of GLUE")
    )
    raise UserError(f"{name!r} {why}; choose one of {known}.")


def _fetch(name: str, repository: str, configuration: str | None) -> dict[str, Any]:
    """Return the data set's parts by name."""
    import datasets

    try:
        parts: Any = datasets.load_dataset(repository, configuration)
        return {str(part): rows for part, rows in parts.items()}
    except Exception as error:  # many kinds: network, name, script, configuration
        first_line = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"the data set {name!r} cannot be fetched from the Hub ({first_line}). "
            "Check its name and the network connection, or work offline: --task "
            "docstrings needs no network, --task FILE.csv (or .tsv, .jsonl, or a "
            "folder with a train file) reads your own examples."
        ) from error


def _table(part: Any, origin: str) -> Table:
    """Turn a part of a data set into a table, class indices into class names."""
    names = tuple(part.column_names)
    values: list[list[Any]] = []
    for name in names:
        column = list(part[name])
        feature = part.features[name]
        if hasattr(feature, "int2str"):
            column = [
                feature.int2str(value) if value is not None and value >= 0 else None
                for value in column
            ]
        values.append(column)
    rows = tuple(zip(*values, strict=True))
    return Table(origin, names, rows, tuple(f"row {i}" for i in range(len(rows))))


def _is_labelled(part: Any, label_column: str) -> bool:
    """Return whether a part has labels: hidden ones are given as -1 or as nothing."""
    if label_column not in part.column_names or len(part) == 0:
        return False
    return all(value is not None and value != -1 for value in part[label_column])
