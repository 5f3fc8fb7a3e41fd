"""Everything that training can be told, with its defaults: the one source of it.

The fields of the class here, and of `JobSettings`, are the options of the command line, the
keys of a YAML file and the arguments of Python alike; `bidora.cli.options` reads them. None
stands for what is derived from model, data, method or budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bidora import defaults
from bidora.budget import BUDGETS, RETRAININGS
from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.runs.declared import described, option, usual_value
from bidora.runs.job_settings import (
    ADAPTER,
    OUTPUT,
    SEARCH,
    TRAINING,
    WHAT,
    JobSettings,
)

__all__ = ["TrainSettings"]

OF_BEST_WEIGHTS = (
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "save_strategy",
    "eval_strategy",
)
"""Fields of `TrainingArguments` that decide which weights a Trainer ends with."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(JobSettings):
    """Settings of `bidora train`, named as the command line's options.

    Raises:
        UserError: If a setting is out of range.

    Example:
        >>> TrainSettings(task="reviews.csv", method="lora").folder
        'runs/lora-reviews.csv-seed0'
    """

    method: str = option(
        "auto",
        f"how to train; auto is {defaults.METHOD} for the bundled encoder, else "
        f"{defaults.OTHER_METHODS[0]}, or {defaults.OTHER_METHODS[-1]} where one of its "
        "own settings is given; help lists all",
        WHAT,
        metavar="NAME",
    )

    max_steps: int = option(
        120,
        "steps to spend: those of the one phase, or what the budget shares out between "
        "search and retraining",
        TRAINING,
    )
    loraplus_lr_ratio: float = option(
        16.0, "rate of B over that of A (method lora-plus)", ADAPTER
    )
    gradient_accumulation_steps: int = option(1, "batches that make one step", TRAINING)
    outer_learning_rate: float | None = option(
        None, "rate of the magnitudes", TRAINING, shown="as --learning-rate"
    )
    outer_weight_decay: float | None = option(
        None, "AdamW's decay of the magnitudes", TRAINING, shown="as --weight-decay"
    )
    warmup_ratio: float = option(
        defaults.WARMUP_RATIO, "part of each phase in which the rates rise", TRAINING
    )
    lr_scheduler_type: str = option(
        "linear", "how the rates fall after that, as transformers calls it", TRAINING
    )
    average_last: float = option(
        0.0,
        "end the last phase with the average of the weights after its last steps: their "
        "share of its steps, such as 0.5 (0: with the last weights)",
        TRAINING,
    )
    early_stopping_patience: int | None = option(
        None,
        "stop after so many evaluations (--eval-steps) without a better main metric, and "
        "keep the best weights; judged on the validation part, or on "
        "--validation-fraction of the training examples, which are not trained on then "
        "(methods of one phase)",
        TRAINING,
        shown="all steps, and the last weights",
    )
    bf16: bool = option(False, "compute in bfloat16 (autocast)", TRAINING)
    gradient_checkpointing: bool = option(
        False, "save memory: compute activations again for the gradient", TRAINING
    )

    start: str = option(
        defaults.STARTS[0],
        "what the head starts from: probe, a linear head fitted on the frozen model; or "
        "random values",
        TRAINING,
        metavar="{" + ",".join(defaults.STARTS) + "}",
    )

    budget: str = option(
        defaults.BUDGET,
        "economical: a small outer step after every fourth inner one, half of --max-steps "
        "for the search and two thirds for a warm retraining; full: the paper's, an outer "
        "step after every inner one and a fresh retraining of as many steps",
        SEARCH,
        metavar="{" + ",".join(BUDGETS) + "}",
    )
    estimator: str | None = option(
        None,
        "how the magnitudes' gradient looks through the training of the directions; a "
        "wrong name lists all",
        SEARCH,
        shown="by budget",
    )
    estimator_settings: dict[str, Any] = field(
        default_factory=dict,
        metadata=described(
            "settings of the estimator, such as num_terms=5",
            SEARCH,
            metavar="NAME=VALUE",
        ),
    )
    outer_every: int | None = option(
        None, "inner steps for each step of the magnitudes", SEARCH, shown="by budget"
    )
    outer_warmup_steps: int | None = option(
        None,
        "inner steps before the first step of the magnitudes",
        SEARCH,
        shown=f"{defaults.OUTER_WARMUP}, at most a quarter of the search",
    )
    retrain: str | None = option(
        None,
        "fresh: from the first directions and head again; warm: on from the search; none: "
        "keep those of the search",
        SEARCH,
        shown="by budget",
    )
    retrain_max_steps: int | None = option(
        None, "steps of the retraining", SEARCH, shown="by budget"
    )
    retrain_learning_rate: float | None = option(
        None, "rate of the retraining", SEARCH, shown="as --learning-rate"
    )
    audit_every: int = option(
        0,
        "compare each N-th step of the magnitudes with one unrolled through all steps "
        "since the last, in history.jsonl; what is trained stays the same (0: never)",
        SEARCH,
    )

    eval_steps: int | None = option(
        None,
        "steps between points of the curves, and between checkpoints",
        OUTPUT,
        shown="a sixth of --max-steps",
    )
    record_weights: bool = option(
        False,
        "keep how far each trained weight is from the base model's at the points of the "
        "curves, for `bidora analyze`; method full holds a second copy of the linear "
        "layers in memory for it",
        OUTPUT,
    )
    report_to: tuple[str, ...] = option(
        (), "where else to log, as transformers calls it, such as tensorboard", OUTPUT
    )
    push_to_hub: bool = option(False, "upload the result to the Hub", OUTPUT)
    hub_model_id: str | None = option(None, "where on the Hub, as OWNER/NAME", OUTPUT)
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata=described("other fields of transformers.TrainingArguments", OUTPUT),
    )

    def __post_init__(self) -> None:
        """Check every setting, naming its option."""
        super().__post_init__()
        if self.method == "auto":
            object.__setattr__(self, "method", self.usual_method)
        if self.method not in METHODS:
            METHODS.get(self.method)  # whose error names the nearest
        self.check_choice("budget", BUDGETS)
        self.check_choice("start", defaults.STARTS)
        self.check_choice("retrain", (None, *RETRAININGS))
        self.check_counts(
            (
                1,
                "max_steps",
                "gradient_accumulation_steps",
                "outer_every",
                "eval_steps",
            ),
            (1, "retrain_max_steps", "early_stopping_patience"),
            (0, "outer_warmup_steps", "audit_every"),
        )
        for name in ("outer_learning_rate", "retrain_learning_rate"):
            self.check_number(name, lambda x: x > 0, "a finite number above 0")
        self.check_number(
            "outer_weight_decay", lambda x: x >= 0, "a finite number of 0 or more"
        )
        self.check_number(
            "loraplus_lr_ratio", lambda x: x >= 1, "a number of 1 or more"
        )
        for name in ("warmup_ratio", "average_last"):
            self.check_number(name, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self._check_which_weights()
        if self.hub_model_id and not self.push_to_hub:
            raise UserError(
                "--hub-model-id says where to upload, and --push-to-hub, which uploads, "
                "is not given; add it."
            )

    def _check_which_weights(self) -> None:
        """Refuse two answers to which weights a run ends with."""
        average, patience = self.average_last, self.early_stopping_patience
        if average and patience:
            raise UserError(
                f"--average-last {average:g} ends with the average of the last weights, "
                f"and --early-stopping-patience {patience} with the best ones; choose one."
            )
        given = [n for n in OF_BEST_WEIGHTS if n in self.trainer]
        if given and (average or patience):
            option = "--average-last" if average else "--early-stopping-patience"
            raise UserError(
                f"trainer.{given[0]} and {option} both decide which weights a run ends "
                "with; leave one out."
            )

    @property
    def what(self) -> str:
        """The method, which names the folder."""
        return self.method

    @property
    def usual_rates(self) -> tuple[float, float]:
        """Those of the method."""
        return METHODS.get(self.method).usual_rates

    @property
    def usual_method(self) -> str:
        """The method where none is given: the first to which every given setting is of use.

        The first of all, for the bundled encoder, is not among those of other models.
        """
        names = (defaults.METHOD,) * self.is_bundled + defaults.OTHER_METHODS
        suit = (n for n in names if not METHODS.get(n).useless(self))
        return next(suit, names[-1])

    def differs(self) -> set[str]:
        """Return the names of the settings that are not at their defaults."""
        found = self.given()
        return found - {"method"} if self.method == self.usual_method else found

    def given(self) -> set[str]:
        """Return the names of the settings that are not what their fields begin with."""
        return {
            f.name
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != usual_value(f)
        }
