"""What can be wrong with an input, and with a model that is being trained."""

from __future__ import annotations

__all__ = ["NoDirectionError", "UserError"]


class NoDirectionError(ValueError):
    """Report a row of an adapted weight whose norm is zero or not finite."""


class UserError(ValueError):
    """Report an input that the user can put right, as a sentence without a traceback.

    The message has three parts: what happened with the value, the likely cause, and
    the remedy. The command line prints it alone and exits with code 2.
    """
