"""The one error that `bidora` shows to a user as a sentence, without a traceback."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """Report an input that the user can put right.

    The message has three parts: what happened with the value, the likely cause, and
    the remedy. The command line prints it alone and exits with code 2.
    """
