"""Outer levels by name."""

from __future__ import annotations

from bidora._registry import Registry
from bidora.outer.base import OuterLevel

__all__ = ["OUTER_LEVELS", "make_outer_level"]

OUTER_LEVELS = Registry(
    "outer level",
    "bidora.outer_levels",
    {"magnitudes": "bidora.outer.magnitudes:Magnitudes"},
    base="bidora.outer.base:OuterLevel",
)


def make_outer_level(name: str) -> OuterLevel:
    """Return the outer level of a name.

    Args:
        name: What it is called in the registry.

    Raises:
        UserError: If there is none.

    Example:
        >>> make_outer_level("magnitudes").adapter
        'use_dora'
    """
    return OUTER_LEVELS.get(name)()
