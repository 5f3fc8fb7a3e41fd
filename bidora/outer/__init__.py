"""What is learned on held-back data: outer levels, by name."""

from bidora.outer.base import OuterLevel
from bidora.outer.registry import OUTER_LEVELS, make_outer_level

__all__ = ["OUTER_LEVELS", "OuterLevel", "make_outer_level"]
