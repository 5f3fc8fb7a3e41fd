"""What the curves of a run are measured on: samples of what it learns from, and of more."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from bidora.runs.encoding import by_length
from bidora.runs.prepared import Prepared

__all__ = ["curve_sets", "read_curves"]


def curve_sets(job: Prepared, judge: str | None, most: int) -> dict[str, Any]:
    """Return what the curves are measured on; the test part is not among it.

    Args:
        job: What the job works on.
        judge: The set that decides when to stop, which is whole; None where none does.
        most: Examples that the others are samples of.

    Returns:
        The sets by name.
    """
    sets = {"train": job.sets["train"].select(job.examples.inner)}
    if job.examples.outer:
        sets["held_back"] = job.sets["train"].select(job.examples.outer)
    if "validation" in job.sets:
        sets["validation"] = job.sets["validation"]
    return {
        name: by_length(
            data.shuffle(seed=job.settings.seed).select(
                range(len(data) if name == judge else min(most, len(data)))
            )
        )
        for name, data in sets.items()
    }


def read_curves(names: Collection[str], judge: str | None, watched: str) -> set[str]:
    """Return the curves that a comparison needs: that of validation, and what decides.

    Args:
        names: Of all curves.
        judge: The set that decides when to stop, if one does.
        watched: The metric that a Trainer was told to choose its best weights by.

    Returns:
        Their names; all of them without validation examples, since a Trainer that
        evaluates at all evaluates something.

    Example:
        >>> sorted(read_curves(["train", "held_back", "validation"], "held_back", ""))
        ['held_back', 'validation']
    """
    if "validation" not in names:
        return set(names)
    decides = watched.removeprefix("eval_")
    return {
        name
        for name in names
        if name in ("validation", judge) or decides.startswith(f"{name}_")
    }
