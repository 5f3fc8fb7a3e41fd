"""BiDoRA: bi-level fine-tuning of DoRA adapters."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bidora.dora import (
        check_norms,
        exact_dora_layers,
        magnitudes,
        plain_dora_layers,
        use_exact_dora,
        use_peft_dora,
    )
    from bidora.optimizer import BiDoRAOptimizer
    from bidora.probing import probe
    from bidora.runs.job import train
    from bidora.runs.predict import load_run, predict
    from bidora.runs.settings import TrainSettings
    from bidora.study.runner import compare
    from bidora.study.settings import StudySettings
    from bidora.trainer import (
        BiDoRAArguments,
        BiDoRAMixin,
        BiDoRATrainer,
        BiDoRATrainingArguments,
    )

__all__ = [
    "BiDoRAArguments",
    "BiDoRAMixin",
    "BiDoRAOptimizer",
    "BiDoRATrainer",
    "BiDoRATrainingArguments",
    "StudySettings",
    "TrainSettings",
    "check_norms",
    "compare",
    "exact_dora_layers",
    "load_run",
    "magnitudes",
    "plain_dora_layers",
    "predict",
    "probe",
    "train",
    "use_exact_dora",
    "use_peft_dora",
]

# Loaded at first use: `bidora --help` needs neither torch nor peft.
_TRAINER = ("Arguments", "Mixin", "Trainer", "TrainingArguments")
_HOMES = {
    "TrainSettings": "bidora.runs.settings",
    "load_run": "bidora.runs.predict",
    "predict": "bidora.runs.predict",
    "probe": "bidora.probing",
    "train": "bidora.runs.job",
    "StudySettings": "bidora.study.settings",
    "compare": "bidora.study.runner",
    "BiDoRAOptimizer": "bidora.optimizer",
    **{f"BiDoRA{name}": "bidora.trainer" for name in _TRAINER},
}


def _refuse_foreign_hypergrad() -> None:
    spec = find_spec("hypergrad")
    place = Path(spec.origin) if spec and spec.origin else Path()
    if not (place.parent / "problem.py").is_file():
        raise ImportError(
            f"the package 'hypergrad' at {place} is another project's: its files shadow "
            "those of 'hypergrad-bidora'. Run: pip uninstall hypergrad, then pip install "
            "--force-reinstall --no-deps hypergrad-bidora."
        )


_refuse_foreign_hypergrad()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "bidora.dora")), name)
    raise AttributeError(f"module 'bidora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
