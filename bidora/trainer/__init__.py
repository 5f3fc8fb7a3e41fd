"""BiDoRA inside of `transformers.Trainer` and what derives from it."""

from bidora.trainer.arguments import BiDoRAArguments, BiDoRATrainingArguments
from bidora.trainer.mixin import BiDoRAMixin, BiDoRATrainer

__all__ = [
    "BiDoRAArguments",
    "BiDoRAMixin",
    "BiDoRATrainer",
    "BiDoRATrainingArguments",
]
