"""What a trainer can be told of BiDoRA, beside what every Trainer is told."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import SchedulerType, TrainingArguments

from bidora import defaults
from bidora.budget import (
    BUDGETS,
    RETRAININGS,
    budget_defaults,
    outer_schedule,
)
from bidora.outer import OuterLevel, make_outer_level
from hypergrad import HypergradEstimator, make_estimator

__all__ = ["BiDoRAArguments", "BiDoRATrainingArguments", "Phase", "arguments_of_phase"]

Phase = Literal["search", "retrain"]

SEARCH_FOLDER = "_search"
"""Where the search goes, below `output_dir`. The underscore keeps its checkpoints from the
Hub: the Trainer uploads its own folder but for such names."""


@dataclass
class BiDoRAArguments:
    """Settings of BiDoRA, to be mixed into a class of training arguments.

    `BiDoRATrainingArguments` is the plain combination; write
    `class Mine(BiDoRAArguments, Seq2SeqTrainingArguments)`, decorated as a dataclass,
    for another. The ordinary arguments (steps, rates, batch sizes, ...) are those of the
    search and of the directions; what differs for the magnitudes or for the retraining
    has its own name here. All defaults are those of `bidora.defaults`, which the command
    has too.

    Attributes:
        learning_rate: as in transformers, with another default: adapters learn at ten
            times the rate of whole models.
        weight_decay: as in transformers, with another default.
        warmup_steps: as in transformers, with another default: a part of the steps.
        budget: `economical` or `full` (the paper's), which decides what is left open
            below; see `bidora.budget`.
        estimator: a name of `hypergrad.estimator_names()`; None for the budget's.
        estimator_settings: its settings, a dictionary or JSON; None for the budget's,
            where the estimator is.
        outer_level: what is learned on the part held back, a name of `OUTER_LEVELS`.
        validation_fraction: part of the training set that is held back for the
            magnitudes; 0 for no outer steps, with which there is no search.
        outer_learning_rate: AdamW's rate of the magnitudes; None for `learning_rate`.
        outer_weight_decay: their weight decay; None for `weight_decay`.
        outer_lr_scheduler_type: schedule of their rate; None for that of the
            directions.
        outer_every: inner steps from one outer step to the next; None for the budget's,
            or as many as the estimator looks back at where these are more.
        outer_warmup_steps: inner steps before the first outer step; None for 10, at most
            a quarter of the search.
        per_device_outer_batch_size: examples of an outer batch; None for the budget's.
        orthogonality: weight of the orthogonality term in the inner loss; None for the
            budget's, and for 0 with Gauss-Newton curvature, which has no place for it.
        dora_dropout: what adapter dropout applies to; see `use_exact_dora`.
        audit_every: outer steps from one audit to the next; 0 for none.
        search_patience: evaluations without a lower loss on the held-back part after
            which the search ends; None for the full number of steps.
        retrain: `fresh`, from the first directions and head; `warm`, on from those of
            the search; `none`, for the search alone; None for the budget's.
        retrain_learning_rate: rate of the retraining; None for `learning_rate`.
        retrain_max_steps: its steps; None for the budget's part of `max_steps`.
        retrain_num_train_epochs: its epochs, where there are no steps; None for the
            budget's part of `num_train_epochs`.
        overwrite_earlier_run: whether checkpoints of an earlier run in `output_dir` may
            be deleted.

    Raises:
        ValueError: a setting out of range, an unknown name, or `fp16`.
    """

    learning_rate: float = field(
        default=defaults.OTHER_LEARNING_RATE,
        metadata={"help": "rate of directions and head"},
    )
    weight_decay: float = field(
        default=defaults.WEIGHT_DECAY, metadata={"help": "their weight decay"}
    )
    warmup_steps: float = field(
        default=defaults.WARMUP_RATIO,
        metadata={"help": "steps in which the rates rise; below 1, a part of all"},
    )
    budget: str = field(
        default=defaults.BUDGET,
        metadata={"help": "economical or full: what is left open below"},
    )
    estimator: str | None = field(
        default=None, metadata={"help": "how the magnitudes' gradient is estimated"}
    )
    estimator_settings: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "settings of the estimator, as JSON"}
    )
    outer_level: str = field(
        default="magnitudes", metadata={"help": "what is learned on the part held back"}
    )
    validation_fraction: float = field(
        default=defaults.VALIDATION_FRACTION,
        metadata={"help": "part held back for the magnitudes; 0 for none"},
    )
    outer_learning_rate: float | None = field(
        default=None, metadata={"help": "rate of the magnitudes"}
    )
    outer_weight_decay: float | None = field(
        default=None, metadata={"help": "weight decay of the magnitudes"}
    )
    outer_lr_scheduler_type: SchedulerType | str | None = field(
        default=None, metadata={"help": "schedule of the magnitudes' rate"}
    )
    outer_every: int | None = field(
        default=None, metadata={"help": "inner steps from one outer step to the next"}
    )
    outer_warmup_steps: int | None = field(
        default=None, metadata={"help": "inner steps before the first outer step"}
    )
    per_device_outer_batch_size: int | None = field(
        default=None, metadata={"help": "examples of an outer batch"}
    )
    orthogonality: float | None = field(
        default=None, metadata={"help": "weight of the orthogonality term"}
    )
    dora_dropout: str = field(
        default="lora", metadata={"help": "what adapter dropout applies to: lora, peft"}
    )
    audit_every: int = field(
        default=0, metadata={"help": "outer steps from one audit to the next"}
    )
    search_patience: int | None = field(
        default=None,
        metadata={"help": "evaluations without a lower held-back loss"},
    )
    retrain: str | None = field(
        default=None,
        metadata={"help": "fresh, warm or none: where the retraining starts"},
    )
    retrain_learning_rate: float | None = field(
        default=None, metadata={"help": "rate of the retraining"}
    )
    retrain_max_steps: int | None = field(
        default=None, metadata={"help": "steps of the retraining"}
    )
    retrain_num_train_epochs: float | None = field(
        default=None, metadata={"help": "epochs of the retraining"}
    )
    overwrite_earlier_run: bool = field(
        default=False, metadata={"help": "whether an earlier run may be deleted"}
    )

    def __post_init__(self) -> None:
        """Check every setting, after the other arguments have checked theirs."""
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.estimator_settings, str):
            self.estimator_settings = _read_settings(self.estimator_settings)
        _refuse_fp16(self)
        _check_ranges(self)
        self.make_estimator()  # names and settings are its own to check
        self.make_outer_level()

    def make_estimator(self) -> HypergradEstimator:
        """Return the estimator that the settings name.

        Raises:
            ValueError: there is none of that name, or a setting is out of range.
        """
        name, settings = self._estimator()
        try:
            return make_estimator(name, **settings)
        except TypeError as error:
            msg = f"estimator={name!r} with estimator_settings={settings!r}: {error}"
            raise ValueError(msg) from error

    def make_outer_level(self) -> OuterLevel:
        """Return the outer level that the settings name.

        Raises:
            UserError: there is none of that name.
        """
        return make_outer_level(self.outer_level)

    def bidora_settings(self) -> dict[str, Any]:
        """Return the settings with those filled in that were left open.

        What depends on the length of the search or on the model stays None where that
        is not known yet: `outer_warmup_steps` with epochs, and `orthogonality`.
        """
        budget = self._budget()
        args: Any = self
        name, estimator_settings = self._estimator()
        schedule = self.outer_lr_scheduler_type or args.lr_scheduler_type
        warmup = self.outer_warmup_steps
        if warmup is None and args.max_steps > 0:
            warmup = min(defaults.OUTER_WARMUP, budget["steps"] // 4)
        return {
            "budget": self.budget,
            "estimator": name,
            "estimator_settings": estimator_settings,
            "outer_level": self.outer_level,
            "validation_fraction": self.validation_fraction,
            "outer_learning_rate": _or(self.outer_learning_rate, args.learning_rate),
            "outer_weight_decay": _or(self.outer_weight_decay, args.weight_decay),
            "outer_lr_scheduler_type": SchedulerType(schedule).value,
            "outer_every": self.outer_every or self._usual_every(),
            "outer_warmup_steps": warmup,
            "per_device_outer_batch_size": self.per_device_outer_batch_size
            or budget["outer_batch_size"],
            "orthogonality": self.orthogonality,
            "dora_dropout": self.dora_dropout,
            "retrain": self.retrain or budget["retrain"],
            "search_patience": self.search_patience,
        }

    def outer_schedule(self, steps: int) -> tuple[int, int]:
        """Return `outer_every` and `outer_warmup_steps` in a search of so many steps.

        Args:
            steps: its steps.

        Raises:
            UserError: no outer step would be due.
        """
        return outer_schedule(
            steps,
            every=self.outer_every,
            warmup=self.outer_warmup_steps,
            usual_every=self._usual_every(),
            lookback=self.make_estimator().needs.lookback,
        )

    def _usual_every(self) -> int:
        return max(self._budget()["outer_every"], self.make_estimator().needs.lookback)

    def _estimator(self) -> tuple[str, dict[str, Any]]:
        """Return its name and settings; those of a budget go with its own alone."""
        budget = self._budget()
        name = self.estimator or budget["estimator"]
        settings: Any = self.estimator_settings
        if settings is None and name == budget["estimator"]:
            settings = budget["estimator_settings"]
        if not isinstance(settings, Mapping | None):
            msg = (
                f"estimator_settings is a {type(settings).__name__}, and settings have "
                "names. Pass a dictionary such as {'num_terms': 5}, or JSON of one."
            )
            raise ValueError(msg)
        return name, dict(settings or {})

    def _budget(self) -> dict[str, Any]:
        args: Any = self
        return budget_defaults(
            self.budget,
            steps=args.max_steps if args.max_steps > 0 else 1,
            batch_size=args.per_device_train_batch_size,
            # Without a held-back part there are no outer batches to size.
            validation_fraction=self.validation_fraction or 0.5,
        )


@dataclass
class BiDoRATrainingArguments(BiDoRAArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of BiDoRA.

    See `BiDoRAArguments` for what comes to those of transformers.

    Example:
        >>> args = BiDoRATrainingArguments("runs/here", max_steps=90)
        >>> args.budget, args.bidora_settings()["outer_every"]
        ('economical', 4)
    """


def arguments_of_phase(args: Any, phase: Phase) -> Any:
    """Return a copy of training arguments for one of the two phases.

    The search goes to a folder of its own below `output_dir`, so that the checkpoints
    and logs of the phases are apart and those of the whole job are where any Trainer
    leaves them.

    Args:
        args: the arguments of the whole job.
        phase: which phase.
    """
    own = copy.copy(args)
    economical = args.budget == "economical"
    if phase == "search":
        own.output_dir = os.path.join(args.output_dir, SEARCH_FOLDER)
        own.push_to_hub = False
        if getattr(args, "logging_dir", None):
            own.logging_dir = os.path.join(args.logging_dir, SEARCH_FOLDER)
        if economical and args.max_steps > 0:
            own.max_steps = args._budget()["steps"]
        elif economical:
            own.num_train_epochs = defaults.SEARCH_SHARE * args.num_train_epochs
        return own
    if args.retrain_learning_rate is not None:
        own.learning_rate = args.retrain_learning_rate
    if args.retrain_max_steps is not None:
        own.max_steps = args.retrain_max_steps
    elif args.retrain_num_train_epochs is not None:
        own.max_steps, own.num_train_epochs = -1, args.retrain_num_train_epochs
    elif economical and args.max_steps > 0:
        own.max_steps = args._budget()["retrain_steps"]
    elif economical:
        own.num_train_epochs = defaults.RETRAIN_SHARE * args.num_train_epochs
    return own


def _read_settings(text: str) -> dict[str, Any]:
    """Read settings of an estimator from JSON.

    Returns:
        The settings by name.

    Raises:
        ValueError: it is something else.
    """
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        msg = (
            f"estimator_settings={text!r} is no JSON of names and values: quotes are "
            "double, and a shell takes unprotected ones away. Pass for example "
            "'{\"num_steps\": 5}'."
        )
        raise ValueError(msg)
    return settings


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


def _refuse_fp16(args: Any) -> None:
    if args.fp16:
        msg = (
            "fp16=True scales the loss by a GradScaler, which cannot see the gradients "
            "of a bilevel optimizer: they are taken by autograd.grad and unscaled "
            "nowhere. Set bf16=True, or train in float32."
        )
        raise ValueError(msg)


def _check_ranges(args: BiDoRAArguments) -> None:
    for name, value, choices in (
        ("budget", args.budget, BUDGETS),
        ("retrain", args.retrain, (None, *RETRAININGS)),
        ("dora_dropout", args.dora_dropout, ("lora", "peft")),
    ):
        if value not in choices:
            known = ", ".join(filter(None, choices))
            msg = f"{name}={value!r} is unknown: choose one of {known}."
            raise ValueError(msg)
    if not 0 <= args.validation_fraction < 1:
        msg = (
            f"validation_fraction={args.validation_fraction} must be at least 0 and "
            "below 1: it is the part of the training set that is held back for the "
            "magnitudes. The paper takes 0.2; 0 is for no outer steps."
        )
        raise ValueError(msg)
    for name, least in (
        ("outer_every", 1),
        ("per_device_outer_batch_size", 1),
        ("search_patience", 1),
        ("retrain_max_steps", 1),
        ("outer_warmup_steps", 0),
        ("audit_every", 0),
    ):
        value = getattr(args, name)
        if value is not None and (not isinstance(value, int) or value < least):
            msg = f"{name}={value} must be a whole number of {least} or more."
            raise ValueError(msg)
    for name in (
        "outer_learning_rate",
        "outer_weight_decay",
        "retrain_learning_rate",
        "orthogonality",
    ):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            msg = f"{name}={value} must be a finite number of 0 or more."
            raise ValueError(msg)
