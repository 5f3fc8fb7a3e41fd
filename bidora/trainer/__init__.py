"""BiDoRA inside of `transformers.Trainer` and what derives from it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bidora.trainer.arguments import BiDoRAArguments, BiDoRATrainingArguments
    from bidora.trainer.mixin import BiDoRAMixin, BiDoRATrainer

__all__ = [
    "BiDoRAArguments",
    "BiDoRAMixin",
    "BiDoRATrainer",
    "BiDoRATrainingArguments",
]

# Loaded at first use: the optimizer needs `upstream` alone, and no Trainer.
_HOMES = {
    "BiDoRAArguments": "arguments",
    "BiDoRATrainingArguments": "arguments",
    "BiDoRAMixin": "mixin",
    "BiDoRATrainer": "mixin",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"bidora.trainer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'bidora.trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
