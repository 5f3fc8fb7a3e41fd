"""How long threads wait for each other: read by libraries when torch is loaded."""

from __future__ import annotations

import os

__all__ = ["brief_waiting"]

SPIN_COUNT = "10000"
"""Turns that a waiting thread of GNU's OpenMP spins for; decision 15 has the figures."""


def brief_waiting() -> dict[str, str]:
    """Return what lets waiting threads give up their core after a moment.

    torch's threads spin for milliseconds otherwise, and two trainings on the same cores
    wait for threads that wait.

    Returns:
        Variables of the environment; none where the user has set one of them.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return {}
    return {"GOMP_SPINCOUNT": SPIN_COUNT}
