"""Named sets of defaults for the search: what an outer step costs, and how often."""

from __future__ import annotations

import math
from typing import Any

from bidora.errors import UserError

__all__ = [
    "RECIPES",
    "RETRAININGS",
    "RETRAIN_SHARE",
    "SEARCH_SHARE",
    "recipe_defaults",
]

RECIPES = ("full", "economical")
"""`full` is the paper's; `economical` takes fewer and smaller outer steps, and goes on
from the search in place of starting anew."""

RETRAININGS = ("fresh", "warm")
"""From the first directions and head again, or on from those of the search."""

PRODUCT_FRACTION = 0.25
"""Part of the inner batch that the mixed product is taken on."""

SEARCH_SHARE = 1 / 2
"""Steps of the search over those that were asked for, in the economical recipe."""

RETRAIN_SHARE = 2 / 3
"""Likewise those of its retraining, which is warm."""


def recipe_defaults(
    recipe: str | None, *, steps: int, batch_size: int, validation_fraction: float
) -> dict[str, Any]:
    """Return the settings that a recipe stands for; what a user gives goes before them.

    `full`: an outer step after every inner one, on batches of equal size, by `darts`;
    the retraining starts from fresh directions and a fresh head and takes as many steps
    as the search. `economical`: an outer step after every fourth inner one, on a batch as
    much smaller as its split is, with the mixed product on a quarter of the inner batch;
    the search takes half of the steps, and the retraining two thirds of them, going on
    from the directions and the head that the search ended with.

    Args:
        recipe: One of `RECIPES`; None for none.
        steps: Steps that were asked for.
        batch_size: Examples of an inner step.
        validation_fraction: Part of the training examples that outer steps learn on.

    Returns:
        Settings by name.

    Raises:
        UserError: If there is no such recipe.

    Example:
        >>> quarter = recipe_defaults(
        ...     "economical", steps=100, batch_size=16, validation_fraction=0.2
        ... )
        >>> quarter["outer_batch_size"], quarter["steps"], quarter["retrain_steps"]
        (4, 50, 67)
    """
    if recipe is None:
        return {}
    if recipe not in RECIPES:
        raise UserError(
            f"unknown --recipe {recipe!r}; choose one of {', '.join(RECIPES)}, or leave "
            "it out."
        )
    if recipe == "full":
        return {"estimator": "darts", "outer_every": 1}
    share = validation_fraction / (1 - validation_fraction)
    return {
        "estimator": "darts",
        # A quarter of fewer than four examples could be none.
        "estimator_settings": {
            "product_fraction": max(PRODUCT_FRACTION, 1 / min(batch_size, 4))
        },
        "outer_every": 4,
        "outer_batch_size": max(1, round(share * batch_size)),
        "steps": max(1, math.ceil(SEARCH_SHARE * steps)),
        "retrain_steps": max(1, round(RETRAIN_SHARE * steps)),
        "retrain": "warm",
    }
