"""Everything that `bidora estimators` can be told, with its defaults, checked at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bidora.errors import UserError
from bidora.runs.declared import option
from bidora.runs.job_settings import SEARCH, JobSettings

if TYPE_CHECKING:
    from hypergrad import HypergradEstimator

__all__ = ["REFERENCES", "Choice", "CompareSettings", "default_estimators"]

BOTH_PRODUCTS = {
    "darts": {"product": "exact"},
    "sama": {"product": "exact"},
    "neumann": {"product": "finite-difference"},
}
"""The other product than the estimator's default, where that does not take long."""

SAME_AS_ANOTHER = ("implicit",)
"""Registered names that mean another estimator until they are given settings."""

REFERENCES = ("auto", "dense", "cg", "unrolled")
"""As `hypergrad.reference` has them; named here so that `--help` loads no torch."""

Choice = tuple[str, dict[str, Any]]

COMPARISON = "what to compare"


def default_estimators() -> dict[str, Choice]:
    """Return every registered estimator, some with either product, by label.

    Example:
        >>> default_estimators()["sama:product=exact"]
        ('sama', {'product': 'exact'})
    """
    from hypergrad import estimator_names

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
class CompareSettings(JobSettings):
    """What `bidora estimators` was asked for; model, data and rates as for a training.

    Raises:
        UserError: If a setting is out of range.

    Example:
        >>> CompareSettings(seed=3).folder
        'runs/estimators-docstrings-seed3'
    """

    estimators: Mapping[str, Choice] | str | None = option(
        None,
        "names, each with settings after colons, such as neumann:num_terms=10",
        COMPARISON,
        shown="all, some with either product",
        metavar="A,B:X=1,...",
    )
    reference: str = option(
        "auto",
        "what they are measured against; auto unrolls the last --lookback steps. dense "
        "and cg differentiate the minimum of the inner loss, which is another question",
        COMPARISON,
        metavar="{" + ",".join(REFERENCES) + "}",
    )
    per_device_outer_batch_size: int | None = option(
        None,
        "held-back examples of the outer batch",
        SEARCH,
        shown="as --per-device-train-batch-size",
    )
    steps: int = option(40, "steps of the directions before the comparison", COMPARISON)
    lookback: int = option(
        10,
        "how many of them are looked back at, at most; unrolled:num_steps=K needs K",
        COMPARISON,
    )
    repeats: int = option(2, "timed runs of each", COMPARISON)

    def __post_init__(self) -> None:
        """Check the counts and the reference, naming their options."""
        super().__post_init__()
        self.check_counts((1, "lookback", "repeats", "steps"))
        if self.steps < self.lookback + 2:
            raise UserError(
                f"--steps {self.steps} with --lookback {self.lookback} would look back "
                "at the first steps, where B is 0 and Adam's derivative degenerate; "
                f"take {self.lookback + 2} steps or more."
            )
        self.check_choice("reference", REFERENCES)

    @property
    def what(self) -> str:
        """The command, which names the folder."""
        return "estimators"

    @property
    def chosen(self) -> Mapping[str, Choice]:
        """The estimators by label: those that were named, or all."""
        if self.estimators is None:
            return default_estimators()
        if isinstance(self.estimators, str):
            names = [name.strip() for name in self.estimators.split(",")]
            return {name: (name, {}) for name in names if name}
        return self.estimators

    def make(self) -> dict[str, HypergradEstimator]:
        """Make the estimators.

        Returns:
            The estimators by label.

        Raises:
            UserError: If a name is unknown or a setting is refused.
        """
        from hypergrad import make_estimator

        made = {}
        for label, (name, settings) in self.chosen.items():
            try:
                made[label] = make_estimator(name, **settings)
            except (TypeError, ValueError) as error:
                raise UserError(f"--estimators {label}: {error}") from error
        return made

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        return {**super().as_dict(), "estimators": [*self.chosen]}
