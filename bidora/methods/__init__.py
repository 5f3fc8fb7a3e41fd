"""How a model is trained: each method is an adapter, a Trainer and a way to save."""

from __future__ import annotations

from bidora.methods.registry import METHODS, make_method

__all__ = ["METHODS", "make_method"]
