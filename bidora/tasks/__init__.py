"""What kinds of data mean: columns, heads, scores, answers."""

from __future__ import annotations

from bidora.tasks.base import Rows, Schema, Task
from bidora.tasks.registry import TASKS, make_task

__all__ = ["TASKS", "Rows", "Schema", "Task", "make_task"]
