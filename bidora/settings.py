"""Everything that `bidora train` can be told, with its defaults, checked at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bidora.errors import UserError
from bidora.recipe import RETRAININGS, recipe_defaults

__all__ = [
    "BUNDLED_MODEL",
    "METHODS",
    "TrainSettings",
    "default_folder",
]

BUNDLED_MODEL = "all-MiniLM-L6-v2"
"""Name of the encoder that the extra `demo` installs."""

METHODS = ("bidora", "dora", "lora")
OTHER_MODEL_LR = 5e-4
"""Learning rate for models that this one's default was not tried on."""

TASK_LENGTHS = {"docstrings": 32}
"""Tokens kept of a text, by task: nine of ten docstrings are shorter."""

OTHER_TASK_LENGTH = 128
"""Tokens kept of a text of any other task, where the model takes as many."""

SEARCH_ONLY = (
    "estimator",
    "estimator_settings",
    "outer_every",
    "outer_warmup",
    "outer_batch_size",
    "validation_fraction",
    "orthogonality",
    "retrain_steps",
    "retrain_lr",
    "retrain",
    "recipe",
    "audit_every",
)
"""Settings of the two-level search, meaningless to `dora` and `lora`."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one run, named as the command line's options.

    Where options are what a user typed, `from_options` builds the settings: it derives
    what was not given and refuses what does not apply.

    Raises:
        UserError: If a setting is out of range.
    """

    model: str = BUNDLED_MODEL
    task: str = "docstrings"
    method: str = "bidora"
    seed: int = 0

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    test_file: str | None = None
    column_names: tuple[str, ...] | None = None
    quoting: str = "auto"
    max_length: int | None = None

    rank: int = 4
    alpha: float = 8.0
    target_modules: tuple[str, ...] | None = None

    steps: int = 240
    batch_size: int = 16
    inner_lr: float = 5e-3
    inner_weight_decay: float = 0.1
    outer_lr: float = 5e-3
    outer_weight_decay: float = 0.1
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0

    recipe: str | None = None
    estimator: str = "neumann"
    estimator_settings: dict[str, Any] = field(default_factory=dict)
    outer_every: int = 4
    outer_warmup: int = 10
    outer_batch_size: int = 16
    validation_fraction: float = 0.2
    orthogonality: float = 1e-5
    retrain_steps: int = 240
    retrain_lr: float = 5e-3
    retrain: str = "fresh"
    audit_every: int = 0

    output_dir: str = "runs/bidora-docstrings-seed0"
    overwrite: bool = False
    eval_every: int = 40
    device: str = "auto"

    @classmethod
    def from_options(cls, **given: Any) -> TrainSettings:
        """Build settings from the options a user gave, and derive the others.

        Not given, the retraining takes as many steps as the search, at its rate; the
        magnitudes learn at the rate of the directions, from batches of the same size. A
        recipe changes that: `economical` shares `steps` out between the two phases. The
        class's own rates suit the bundled model; another one learns at
        `OTHER_MODEL_LR`.

        Args:
            given: Options by name; leave out what the user left out.

        Returns:
            The settings.

        Raises:
            UserError: If an option is out of range or has no meaning for the method.

        Example:
            >>> TrainSettings.from_options(steps=100).retrain_steps
            100
        """
        method = given.get("method", "bidora")
        _refuse_meaningless(method, given)
        batch_size = given.get("batch_size", cls.batch_size)
        recipe = recipe_defaults(
            given.get("recipe"),
            steps=given.get("steps", cls.steps),
            batch_size=batch_size,
            validation_fraction=given.get(
                "validation_fraction", cls.validation_fraction
            ),
        )
        if given.get("estimator", recipe.get("estimator")) != recipe.get("estimator"):
            recipe.pop("estimator_settings", None)  # those of another estimator
        steps = recipe.get("steps", given.get("steps", cls.steps))
        other_model = given.get("model", cls.model) != cls.model
        usual_lr = OTHER_MODEL_LR if other_model else cls.inner_lr
        inner_lr = given.get("inner_lr", usual_lr)
        derived = {
            "inner_lr": inner_lr,
            "outer_lr": inner_lr,
            "outer_batch_size": batch_size,
            "outer_warmup": max(0, min(cls.outer_warmup, steps // 4)),
            "retrain_steps": steps,
            "retrain_lr": inner_lr,
            "eval_every": max(1, steps // 6),
            "output_dir": default_folder(
                method, given.get("task", cls.task), given.get("seed", cls.seed)
            ),
        }
        # The steps that a recipe shares out are those that were given.
        return cls(**{**derived, **recipe, **given, "steps": steps})

    def __post_init__(self) -> None:
        """Check every setting, naming its option."""
        if self.method not in METHODS:
            raise UserError(
                f"unknown --method {self.method!r}; choose one of {', '.join(METHODS)}."
            )
        if self.retrain not in RETRAININGS:
            raise UserError(
                f"unknown --retrain {self.retrain!r}; choose one of "
                f"{', '.join(RETRAININGS)}."
            )
        counts = ("steps", "retrain_steps", "batch_size", "outer_batch_size", "rank")
        for name in (*counts, "outer_every", "eval_every"):
            self._check(name, lambda x: x >= 1, "a whole number of 1 or more")
        if self.max_length is not None:
            self._check("max_length", lambda x: x >= 4, "a whole number of 4 or more")
        for name in ("inner_lr", "outer_lr", "retrain_lr", "alpha", "max_grad_norm"):
            self._check(name, lambda x: x > 0, "a finite number above 0")
        for name in ("inner_weight_decay", "outer_weight_decay", "orthogonality"):
            self._check(name, lambda x: x >= 0, "a finite number of 0 or more")
        self._check("audit_every", lambda x: x >= 0, "a whole number of 0 or more")
        self._check("outer_warmup", lambda x: x >= 0, "a whole number of 0 or more")
        self._check("seed", lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32")
        self._check("warmup_ratio", lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self._check(
            "validation_fraction", lambda x: 0 < x < 1, "a number between 0 and 1"
        )
        if self.method == "bidora" and self.outer_steps == 0:
            raise UserError(
                f"--outer-every {self.outer_every} with --outer-warmup "
                f"{self.outer_warmup} leaves no outer step in --steps {self.steps}, so "
                "the magnitudes would never move; lower them or train longer."
            )

    def tokens_kept(self, longest: int | None) -> int:
        """Return how many tokens of a text are kept.

        Args:
            longest: What the model takes; None where it sets no bound.

        Returns:
            `max_length`, or where it is None, what suits the task and the model.

        Raises:
            UserError: If `max_length` is more than the model takes.

        Example:
            >>> TrainSettings(task="reviews.csv").tokens_kept(64)
            64
        """
        if self.max_length is None:
            usual = TASK_LENGTHS.get(self.task, OTHER_TASK_LENGTH)
            return usual if longest is None else min(usual, longest)
        if longest is not None and self.max_length > longest:
            raise UserError(
                f"--max-length {self.max_length} is more than the {longest} tokens "
                f"that {self.model!r} takes; choose {longest} or fewer."
            )
        return self.max_length

    @property
    def outer_steps(self) -> int:
        """The number of outer steps in the search.

        Example:
            >>> TrainSettings(steps=24, outer_every=4, outer_warmup=10).outer_steps
            4
        """
        first = max(self.outer_warmup, 1)
        return self.steps // self.outer_every - (first - 1) // self.outer_every

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        return dataclasses.asdict(self)

    def _check(self, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if not math.isfinite(value) or not holds(value):
            raise UserError(f"{_option(name)} is {value}; give {wanted}.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_meaningless(method: str, given: dict[str, Any]) -> None:
    if method not in ("dora", "lora"):
        return
    names = [name for name in SEARCH_ONLY if name in given]
    if method == "lora":  # which has no magnitudes
        names += [n for n in ("outer_lr", "outer_weight_decay") if n in given]
    if names:
        raise UserError(
            f"{', '.join(map(_option, names))} has no meaning with --method {method}, "
            "which trains in one phase on everything, with --steps and --inner-lr. "
            "Leave it out, or choose --method bidora."
        )


def default_folder(what: str, task: str, seed: int) -> str:
    """Return the folder that a run goes to where none is named.

    Args:
        what: The method or command.
        task: The task, as the user named it.
        seed: The seed.

    Returns:
        A path under `runs`.

    Example:
        >>> default_folder("lora", "data/reviews.csv", 1)
        'runs/lora-data-reviews.csv-seed1'
    """
    name = "".join(c if c.isalnum() or c in "_." else "-" for c in task).strip("-.")
    return f"runs/{what}-{name[-40:]}-seed{seed}"
