"""The data of a job: where its examples come from and how they are scored.

`load_task` takes the name that `--task` takes: `docstrings`, a local file or folder,
or a data set of the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bidora.errors import UserError
from bidora.tasks.base import Examples, Task, classification_scores, holdout_split
from bidora.tasks.columns import Columns
from bidora.tasks.docstrings import collect_docstrings, load_docstrings_task
from bidora.tasks.encoding import BatchStream, Encoded, encode
from bidora.tasks.files import is_table_file, load_file_task
from bidora.tasks.hub import load_hub_task

__all__ = [
    "BatchStream",
    "Columns",
    "Encoded",
    "Examples",
    "Task",
    "classification_scores",
    "collect_docstrings",
    "encode",
    "holdout_split",
    "is_hub_task",
    "load_task",
]


def load_task(
    name: str = "docstrings",
    *,
    seed: int = 0,
    columns: Columns | None = None,
    test_file: str | None = None,
    column_names: Sequence[str] | None = None,
    quoting: str = "auto",
) -> Task:
    """Load a task by name.

    Args:
        name: `docstrings`; a csv, tsv or jsonl file (also `.gz`); a folder with a
            `train` file; or a data set of the Hub, such as `glue/cola`.
        seed: Seed of the splits.
        columns: Which columns hold text and label.
        test_file: File with the test examples, for tasks from files.
        column_names: Names of the columns of a csv or tsv without a header line.
        quoting: How a csv or tsv quotes its fields: `auto`, `csv` or `none`.

    Returns:
        The task.

    Raises:
        UserError: If there is no such task, or its data cannot be used.
    """
    columns = columns or Columns()
    if name != "docstrings" and not is_hub_task(name):
        return load_file_task(
            Path(name).expanduser(),
            seed=seed,
            test_path=None if test_file is None else Path(test_file).expanduser(),
            columns=columns,
            column_names=column_names,
            quoting=quoting,
        )
    _refuse_file_options(name, test_file, column_names, quoting)
    if name == "docstrings":
        if columns != Columns():
            raise UserError(
                "--text-column, --text-pair-column and --label-column do not apply to "
                "--task docstrings; they choose the columns of a file or a Hub task."
            )
        return load_docstrings_task(seed)
    return load_hub_task(name, seed=seed, columns=columns)


def is_hub_task(name: str) -> bool:
    """Return whether a task's name is that of a data set of the Hub.

    Args:
        name: As `load_task` takes it.

    Returns:
        True unless it is `docstrings`, or a file or folder, there or not.
    """
    is_file = is_table_file(name) or Path(name).expanduser().exists()
    looks_local = name.startswith((".", "/", "~"))
    return not (name == "docstrings" or is_file or looks_local)


def _refuse_file_options(
    name: str, test_file: str | None, column_names: Sequence[str] | None, quoting: str
) -> None:
    given = {
        "--test-file": test_file is not None,
        "--column-names": bool(column_names),
        "--quoting": quoting != "auto",
    }
    unused = [option for option, is_given in given.items() if is_given]
    if unused:
        raise UserError(
            f"{', '.join(unused)} belongs to tasks from local files, and {name!r} is "
            "none; pass --task FILE.csv, or leave the option out."
        )
