"""Named sets of defaults for the search: what an outer step costs, and how often."""

from __future__ import annotations

import math
from typing import Any

from bidora import defaults
from bidora.errors import UserError

__all__ = [
    "BUDGETS",
    "RETRAININGS",
    "budget_defaults",
    "outer_schedule",
    "outer_steps_due",
]

BUDGETS = ("economical", "full")
"""`full` is the paper's; `economical` takes fewer and smaller outer steps, and goes on
from the search in place of starting anew."""

RETRAININGS = ("fresh", "warm", "none")
"""From the first directions and head again; on from those of the search; not at all."""


def budget_defaults(
    budget: str, *, steps: int, batch_size: int, validation_fraction: float
) -> dict[str, Any]:
    """Return the settings that a budget stands for; explicit settings override them.

    `full`: an outer step after every inner one, on batches of equal size, by `darts`;
    the retraining starts from fresh directions and a fresh head and takes as many steps
    as the search; the paper's orthogonality term is in the loss. `economical`: an outer
    step after every fourth inner one, on a batch scaled to its split, with the mixed
    product on a quarter of the inner batch; the search takes half of the steps, and the
    retraining two thirds of them, going on from the directions and the head that the
    search ended with; no such term, which on short texts takes three quarters of a
    step of LoRA, and brought nothing.

    Args:
        budget: One of `BUDGETS`.
        steps: Steps that were asked for.
        batch_size: Examples of an inner step.
        validation_fraction: Part of the training examples that outer steps learn on.

    Returns:
        Settings by name: `estimator`, `estimator_settings`, `outer_every`,
        `outer_batch_size`, `steps`, `retrain_steps`, `retrain` and `orthogonality`.

    Raises:
        UserError: If there is no such budget.

    Example:
        >>> quarter = budget_defaults(
        ...     "economical", steps=100, batch_size=16, validation_fraction=0.2
        ... )
        >>> quarter["outer_batch_size"], quarter["steps"], quarter["retrain_steps"]
        (4, 50, 67)
    """
    if budget not in BUDGETS:
        raise UserError(
            f"unknown --budget {budget!r}; choose one of {', '.join(BUDGETS)}."
        )
    if budget == "full":
        return {
            "estimator": defaults.ESTIMATOR,
            "estimator_settings": {},
            "outer_every": 1,
            "outer_batch_size": batch_size,
            "steps": steps,
            "retrain_steps": steps,
            "retrain": "fresh",
            "orthogonality": defaults.ORTHOGONALITY,
        }
    share = validation_fraction / (1 - validation_fraction)
    return {
        "estimator": defaults.ESTIMATOR,
        # A quarter of fewer than four examples could be none.
        "estimator_settings": {
            "product_fraction": max(defaults.PRODUCT_FRACTION, 1 / min(batch_size, 4))
        },
        "outer_every": defaults.OUTER_EVERY,
        "outer_batch_size": max(1, round(share * batch_size)),
        "steps": max(1, math.ceil(defaults.SEARCH_SHARE * steps)),
        "retrain_steps": max(1, round(defaults.RETRAIN_SHARE * steps)),
        "retrain": "warm",
        "orthogonality": 0.0,
    }


def outer_steps_due(steps: int, *, every: int, warmup: int, lookback: int = 0) -> int:
    """Return how many outer steps a search takes.

    One follows each inner step whose number is a multiple of `every`, from step
    `max(1, warmup, lookback)` on.

    Args:
        steps: Inner steps of the search.
        every: Inner steps from one outer step to the next.
        warmup: Inner steps before the first one.
        lookback: Inner steps that the estimator looks back at.

    Returns:
        Their number.

    Example:
        After steps 12, 16, 20 and 24:

        >>> outer_steps_due(24, every=4, warmup=10)
        4
    """
    first = max(1, warmup, lookback)
    return max(0, steps // every - (first - 1) // every)


def outer_schedule(
    steps: int,
    *,
    every: int | None,
    warmup: int | None,
    usual_every: int,
    lookback: int = 0,
) -> tuple[int, int]:
    """Return after which steps of a search the outer level moves.

    What is left open is scaled to the search: the warm-up is `defaults.OUTER_WARMUP`
    steps and at most a quarter of them, and outer steps are no farther apart than the
    search is long.

    Args:
        steps: Inner steps of the search.
        every: Inner steps from one outer step to the next; None for the usual number.
        warmup: Inner steps before the first outer step; None for the usual number.
        usual_every: What the budget and the estimator suggest.
        lookback: Inner steps that the estimator looks back at.

    Returns:
        `every` and `warmup`.

    Raises:
        UserError: If no outer step would be due.

    Example:
        >>> outer_schedule(24, every=None, warmup=None, usual_every=4)
        (4, 6)
        >>> outer_schedule(3, every=None, warmup=None, usual_every=4)
        (3, 0)
    """
    chosen = max(1, min(usual_every, steps)) if every is None else every
    wait = min(defaults.OUTER_WARMUP, steps // 4) if warmup is None else warmup
    if not outer_steps_due(steps, every=chosen, warmup=wait, lookback=lookback):
        sees = ""
        if lookback > max(1, wait):
            sees = f", by an estimator that looks back at {lookback} steps,"
        raise UserError(
            f"outer_every={chosen} with outer_warmup_steps={wait}{sees} leaves no outer "
            f"step in the {steps} steps of the search, so the magnitudes would never "
            "move. Lower them, or raise max_steps (the economical budget gives half of "
            "them to the search)."
        )
    return chosen, wait
