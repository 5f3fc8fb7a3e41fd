"""From a dataclass of settings to options of a command."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from bidora.errors import UserError

__all__ = ["add_settings", "literal", "pairs"]

PLURAL = {"estimator_settings": "--estimator-setting"}
"""Settings whose option is given once for each of their parts."""

NOT_OPTIONS = ("trainer",)
"""Settings that have a way in of their own."""


def add_settings(
    parser: argparse.ArgumentParser,
    cls: type[Any],
    leave_out: Sequence[str] = (),
) -> None:
    """Add an option for each setting, under the heading that it names.

    Options that were not given leave no trace in what is parsed.

    Args:
        parser: The command's parser.
        cls: The dataclass.
        leave_out: Settings that the command has no use for.
    """
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.name in (*leave_out, *NOT_OPTIONS) or "group" not in f.metadata:
            continue
        heading = f.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(
            PLURAL.get(f.name, "--" + f.name.replace("_", "-")), **_words(f)
        )


def _words(f: Any) -> dict[str, Any]:
    """Return what argparse is told of a setting."""
    kind = str(f.type)
    text = f.metadata["help"].replace("%", "%%")
    words: dict[str, Any] = {"dest": f.name, "help": text, "default": argparse.SUPPRESS}
    if kind.startswith("bool"):
        return {**words, "action": argparse.BooleanOptionalAction}
    shown = f.metadata["shown"] or _shown(f.default)
    words["help"] += f" (default: {shown})".replace("%", "%%") if shown else ""
    for name, make, metavar in (
        ("dict", str, "NAME=VALUE"),
        ("tuple", _names, "A,B,..."),
        ("int", int, "N"),
        ("float", float, "X"),
        ("str", str, "WORD"),
        ("Mapping", str, "WORD"),
    ):
        if kind.startswith(name):
            words |= {"type": make, "metavar": f.metadata["metavar"] or metavar}
            if name == "dict":
                words["action"] = "append"
            return words
    raise TypeError(
        f"setting {f.name} has the type {kind}, which no option is made for."
    )


def _shown(default: Any) -> str:
    if default in (None, (), dataclasses.MISSING):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def literal(text: str) -> Any:
    """Return a Python literal, or the word itself.

    Example:
        >>> literal("5"), literal("auto")
        (5, 'auto')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError):
        return text


def pairs(
    words: Sequence[str], option: str, example: str = "num_terms=5"
) -> dict[str, Any]:
    """Turn `NAME=VALUE` words into a dict; values are Python literals or words.

    Args:
        words: The words.
        option: Where they stood, for messages.
        example: One that is right, for messages.

    Returns:
        Values by name.

    Raises:
        UserError: If a word has another form.

    Example:
        >>> pairs(["num_terms=5"], "--estimator-setting")
        {'num_terms': 5}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(
                f"{option}: {word!r} is not of the form NAME=VALUE; write for example "
                f"{example}."
            )
        found[name] = literal(value)
    return found
