"""The contract of a method: what is put into a model, how it is trained, and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bidora import defaults
from bidora.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from bidora.models import Base
    from bidora.runs.job_settings import JobSettings
    from bidora.runs.settings import TrainSettings

__all__ = ["Method", "TrainerParts"]

SEARCH_ONLY = (
    "budget",
    "estimator",
    "estimator_settings",
    "outer_every",
    "outer_warmup_steps",
    "per_device_outer_batch_size",
    "validation_fraction",
    "orthogonality",
    "retrain",
    "retrain_max_steps",
    "retrain_learning_rate",
    "audit_every",
)
"""Settings of the search, meaningless to methods of one phase."""

OF_MAGNITUDES = ("outer_learning_rate", "outer_weight_decay")
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules")
OF_LORA_PLUS = ("loraplus_lr_ratio",)
OF_WEIGHTS = ("record_weights",)
"""Settings that mean nothing to methods which leave the base model's weights alone."""


@dataclass(frozen=True)
class TrainerParts:
    """What a Trainer is made of, whatever the method.

    Args:
        settings: Of the run.
        arguments: Fields of `TrainingArguments` that follow from them.
        given: What every Trainer takes: model, datasets, collator, metrics.
        split: Indices of the training examples for the directions, and of those held
            back for the magnitudes.
        whole_batches: Whether the last, smaller batch of an epoch is left out.
    """

    settings: TrainSettings
    arguments: dict[str, Any]
    given: dict[str, Any]
    split: tuple[list[int], list[int]]
    whole_batches: bool


class Method(ABC):
    """How to train: a subclass has a name, one line that says what it is, and no state.

    Attributes:
        name: Name in the registry, and on the command line.
        summary: One line for `--method help`.
        phases: Names of the phases, in order.
        searches: Whether an outer level learns too.
        holds_back: Whether it does so on examples that are held back for it.
        saves_whole: Whether what `save` writes is loaded without the base model.
        preset: Settings that the method stands for; it refuses others for them.
        usual_rates: Learning rates where none is given: for the bundled encoder, on which
            it was chosen, and for other models.
        ignores: Settings that mean nothing to it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    phases: ClassVar[tuple[str, ...]] = ("train",)
    searches: ClassVar[bool] = False
    holds_back: ClassVar[bool] = False
    saves_whole: ClassVar[bool] = False
    preset: ClassVar[Mapping[str, Any]] = {}
    usual_rates: ClassVar[tuple[float, float]] = (
        defaults.LEARNING_RATE,
        defaults.OTHER_LEARNING_RATE,
    )
    ignores: ClassVar[tuple[str, ...]] = (*SEARCH_ONLY, *OF_MAGNITUDES, *OF_LORA_PLUS)

    @classmethod
    def unused(cls, settings: TrainSettings) -> set[str]:
        """Return the names of the settings that do nothing, given or not.

        Args:
            settings: Of the run.
        """
        names = set(cls.ignores)
        if settings.early_stopping_patience is not None and not cls.searches:
            names -= {"validation_fraction"}  # what is held back decides when to stop
        return names

    @classmethod
    def useless(cls, settings: TrainSettings) -> list[str]:
        """Return the given settings that would do nothing, in order.

        Args:
            settings: Of the run.
        """
        idle = cls.unused(settings) & settings.given()
        return [name for name in cls.ignores if name in idle]

    def check(self, settings: TrainSettings) -> None:
        """Refuse settings that would do nothing, or that the method fixes.

        Args:
            settings: Of the run.

        Raises:
            UserError: If one of them was changed.
        """
        changed = settings.given()
        useless = self.useless(settings)
        if useless:
            raise UserError(
                f"{_options(useless)} has no meaning with --method {self.name}, which is "
                f"{self.summary}. Leave it out{_or_a_method_with(useless)}."
            )
        fixed = [n for n, value in self.preset.items() if n in changed
                 and getattr(settings, n) != value]  # fmt: skip
        if fixed:
            raise UserError(
                f"--method {self.name} stands for a value of {_options(fixed)} of its "
                "own. Leave it out, or choose --method bidora."
            )

    @abstractmethod
    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the model to train, with what the method puts in.

        Args:
            base: The loaded model, and what is to be trained of its head.
            settings: Of the run.

        Raises:
            UserError: If the method does not fit the model.
        """

    def trainer(self, parts: TrainerParts) -> Trainer:
        """Return a Trainer over the prepared model and examples.

        Args:
            parts: What it is made of.
        """
        from transformers import TrainingArguments

        from bidora.methods.training import OneGrouping, use_one_device

        args = TrainingArguments(**parts.arguments)
        use_one_device(args)
        settings = parts.settings
        return OneGrouping(
            args=args,
            magnitude_rate=settings.outer_learning_rate,
            magnitude_decay=settings.outer_weight_decay,
            rates=self.rates(parts.given["model"], settings),
            whole_batches=parts.whole_batches,
            **parts.given,
        )

    def rates(self, model: nn.Module, settings: TrainSettings) -> Mapping[str, float]:
        """Return the rates of parameters that have one of their own, by name.

        Args:
            model: What `adapt` returned.
            settings: Of the run.
        """
        del model, settings
        return {}

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained.

        Args:
            model: What `adapt` returned, trained.
            folder: Where to.
        """

    @abstractmethod
    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the trained model again.

        Args:
            base: The model that `adapt` was given.
            folder: Where `save` wrote.
        """

    @abstractmethod
    def loading_code(self, names: Mapping[str, str]) -> str:
        """Return lines of Python that load what `save` wrote, without this package.

        Args:
            names: `folder`, `base`, `auto_model` and `pooling`, to be put in.
        """


def _or_a_method_with(names: list[str]) -> str:
    """Return which method these settings mean something to, as the end of a remedy."""
    from bidora.methods.registry import METHODS

    for name in METHODS.names():
        if not set(names) & set(METHODS.get(name).ignores):
            return f", or choose --method {name}"
    return ""


def _options(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


Loader = Callable[..., Any]
