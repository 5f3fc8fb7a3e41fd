"""Errors and warnings, each with a message of three parts: what, why, what to try."""

from __future__ import annotations

__all__ = [
    "BatchError",
    "HypergradError",
    "NonFiniteError",
    "NumericalWarning",
    "RankError",
    "SecondOrderError",
    "SolveError",
]


class HypergradError(RuntimeError):
    """Report that a hypergradient could not be computed rightly."""


class BatchError(HypergradError, ValueError):
    """Report a batch of which a part was asked for, and that cannot be divided."""


class NonFiniteError(HypergradError, ArithmeticError):
    """Report a loss, gradient or result that is NaN or infinite.

    Optimizers catch this error alone, skip the step it came from and count it.
    """


class RankError(HypergradError):
    """Report, on every rank, an error that one of them met."""


class SecondOrderError(HypergradError):
    """Report a model that cannot be differentiated twice as it stands."""


class SolveError(HypergradError):
    """Report a linear solve that did not succeed, where `on_failure="raise"`."""


class NumericalWarning(UserWarning):
    """Warn about a number that is returned but should not be trusted blindly."""
