"""Everything that `bidora estimators` can be told, with its defaults, checked at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from bidora.errors import UserError
from bidora.settings import TrainSettings, default_folder
from hypergrad import HypergradEstimator, estimator_names, make_estimator
from hypergrad.reference import ReferenceName

__all__ = ["CompareSettings", "default_estimators"]

BOTH_PRODUCTS = {
    "darts": {"product": "exact"},
    "sama": {"product": "exact"},
    "neumann": {"product": "finite-difference"},
}
"""The other product than the estimator's default, where that does not take long."""

SAME_AS_ANOTHER = ("implicit",)
"""Registered names that mean another estimator until they are given settings."""

Choice = tuple[str, dict[str, Any]]


def default_estimators() -> dict[str, Choice]:
    """Return every registered estimator, some with either product, by label.

    Example:
        >>> default_estimators()["sama:product=exact"]
        ('sama', {'product': 'exact'})
    """
    chosen: dict[str, Choice] = {}
    for name in estimator_names():
        if name in SAME_AS_ANOTHER:
            continue
        chosen[name] = name, {}
        other = BOTH_PRODUCTS.get(name)
        if other is not None:
            chosen[f"{name}:product={other['product']}"] = name, dict(other)
    return chosen


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What `bidora estimators` was asked for.

    Args:
        train: Model, task, adapter, batches and rates, as for a run of `bidora train`.
        estimators: Name and settings of each estimator, by label.
        steps: Inner steps taken before the comparison.
        lookback: How many of them are recorded; the reference unrolls all of those.
        reference: What the estimators are measured against.
        repeats: Timed runs of each.

    Raises:
        UserError: If a setting is out of range.
    """

    train: TrainSettings = field(default_factory=TrainSettings)
    estimators: Mapping[str, Choice] = field(default_factory=default_estimators)
    steps: int = 40
    lookback: int = 10
    reference: str = "auto"
    repeats: int = 2

    @classmethod
    def from_options(cls, **given: Any) -> CompareSettings:
        """Build settings from the options a user gave, and derive the others.

        Args:
            given: Options by name; those of `TrainSettings` that apply, too.

        Returns:
            The settings.

        Raises:
            UserError: If an option is out of range.

        Example:
            >>> CompareSettings.from_options(seed=3).train.output_dir
            'runs/estimators-docstrings-seed3'
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"train"}
        own = {name: given.pop(name) for name in names & set(given)}
        task, seed = given.get("task", "docstrings"), given.get("seed", 0)
        folder = default_folder("estimators", task, seed)
        train = TrainSettings.from_options(**{"output_dir": folder, **given})
        return cls(train=train, **own)

    def __post_init__(self) -> None:
        """Check the counts and the reference, naming their options."""
        for name in ("lookback", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name} is {getattr(self, name)}; give a whole number of 1 or "
                    "more."
                )
        if self.steps < self.lookback + 2:
            raise UserError(
                f"--steps {self.steps} with --lookback {self.lookback} would look back "
                "at the first steps, where B is 0 and Adam's derivative degenerate; "
                f"take {self.lookback + 2} steps or more."
            )
        known = get_args(ReferenceName)
        if self.reference not in known:
            raise UserError(
                f"unknown --reference {self.reference!r}; choose one of "
                f"{', '.join(known)}."
            )

    def make(self) -> dict[str, HypergradEstimator]:
        """Make the estimators.

        Returns:
            The estimators by label.

        Raises:
            UserError: If a name is unknown or a setting is refused.
        """
        made = {}
        for label, (name, settings) in self.estimators.items():
            try:
                made[label] = make_estimator(name, **settings)
            except (TypeError, ValueError) as error:
                raise UserError(f"--estimators {label}: {error}") from error
        return made

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        used = (*_FROM_TRAIN, *(f.name for f in dataclasses.fields(self)))
        every = {**self.train.as_dict(), **vars(self), "estimators": [*self.estimators]}
        return {name: every[name] for name in used if name != "train"}


# What of the settings of a training run applies here.
_FROM_TRAIN = (
    "model", "task", "seed", "text_column", "text_pair_column", "label_column",
    "test_file", "column_names", "quoting", "max_length", "rank", "alpha",
    "target_modules", "batch_size", "outer_batch_size", "inner_lr",
    "inner_weight_decay", "max_grad_norm", "orthogonality", "validation_fraction",
    "output_dir", "device",
)  # fmt: skip
