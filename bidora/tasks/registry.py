"""Task types by name."""

from __future__ import annotations

from typing import Any

from bidora._registry import Registry
from bidora.tasks.base import Task

__all__ = ["TASKS", "make_task"]

TASKS = Registry(
    "task type",
    "bidora.tasks",
    {
        "classification": "bidora.tasks.classification:Classification",
        "regression": "bidora.tasks.regression:Regression",
        "multilabel": "bidora.tasks.multilabel:MultiLabel",
        "images": "bidora.tasks.images:ImageClassification",
        "tagging": "bidora.tasks.tagging:Tagging",
        "generation": "bidora.tasks.generation:Generation",
        "instruction": "bidora.tasks.instruction:Instruction",
    },
    base="bidora.tasks.base:Task",
)


def make_task(name: str, **settings: Any) -> Task:
    """Return a task of that type.

    Args:
        name: One of `TASKS.names()`.
        settings: Its settings; those left out take their defaults.

    Raises:
        UserError: If there is no such type.
        TypeError: If the type has no such setting.

    Example:
        >>> make_task("classification", text_column="review").text_column
        'review'
    """
    return TASKS.get(name)(**settings)
