"""How settings are declared, read from mappings and checked, each naming its option."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bidora.errors import UserError

__all__ = ["Declared", "described", "option", "usual_value"]

KINDS: tuple[tuple[str, Any, str], ...] = (
    ("str", str, "a word"),
    ("bool", bool, "true or false"),
    ("tuple", tuple, "names"),
    ("dict", dict, "settings by name"),
    ("int", int | float, "a number"),
    ("float", int | float, "a number"),
)
"""How the type of a setting begins, what it may hold, and what a message calls it."""


def option(
    default: Any, help_text: str, group: str, *, shown: str = "", metavar: str = ""
) -> Any:
    """Declare a setting.

    Args:
        default: Its default; None for one that is derived.
        help_text: What it does, for `--help`.
        group: The heading that it stands under.
        shown: The default in words, where it is derived.
        metavar: What stands for its value.

    Returns:
        The field of a dataclass.
    """
    metadata = described(help_text, group, shown=shown, metavar=metavar)
    return field(default=default, metadata=metadata)


def usual_value(setting: dataclasses.Field[Any]) -> Any:
    """Return a setting's default.

    Args:
        setting: The field.
    """
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return setting.default


def described(
    help_text: str, group: str, *, shown: str = "", metavar: str = ""
) -> dict[str, str]:
    """Return what `option` keeps of a setting, for fields that are made otherwise.

    Args:
        help_text: What it does, for `--help`.
        group: The heading that it stands under.
        shown: The default in words, where it is derived.
        metavar: What stands for its value.
    """
    return {"help": help_text, "group": group, "shown": shown, "metavar": metavar}


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Settings that know their options; a subclass has them as fields."""

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """Return the settings of a mapping, such as a YAML or JSON file holds.

        Args:
            values: Settings by name.

        Raises:
            UserError: If there is no such setting, or one is out of range.

        Example:
            >>> from bidora.runs.settings import TrainSettings
            >>> TrainSettings.from_dict(
            ...     {"max_steps": 20, "target_modules": ["query"]}
            ... ).max_steps
            20
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            from difflib import get_close_matches

            near = get_close_matches(unknown[0], fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"there is no setting named {', '.join(unknown)}.{hint}")
        return cls(
            **{
                name: _names(value)
                if str(fields[name].type).startswith("tuple")
                else value
                for name, value in values.items()
            }
        )

    def check_kinds(self) -> None:
        """Refuse words where numbers belong and the like; numbers have their own checks.

        Raises:
            UserError: If a setting is of another kind.
        """
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if value is None and "None" in kind:
                continue
            for name, accepted, wanted in KINDS:
                if kind.startswith(name) and not isinstance(value, accepted):
                    raise UserError(f"{_option(f.name)} is {value!r}; give {wanted}.")

    def check_counts(self, *counts: tuple[Any, ...]) -> None:
        """Refuse what is no whole number, or a smaller one than makes sense.

        Args:
            counts: The least number, and the names of settings; one tuple for each.
        """
        for least, *names in counts:
            for name in names:
                self.check_number(
                    name,
                    lambda x, least=least: isinstance(x, int) and x >= least,
                    f"a whole number of {least} or more",
                )

    def check_number(
        self, name: str, holds: Callable[[Any], bool], wanted: str
    ) -> None:
        """Refuse a number out of range; None stands for what is derived later.

        Args:
            name: The setting.
            holds: Whether a number is in range.
            wanted: What is, for the message.

        Raises:
            UserError: If it is not.
        """
        value = getattr(self, name)
        if value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and holds(value)):
            raise UserError(f"{_option(name)} is {value}; give {wanted}.")

    def check_choice(self, name: str, known: tuple[str | None, ...]) -> None:
        """Refuse a word that is none of those known.

        Args:
            name: The setting.
            known: The words.

        Raises:
            UserError: If it is another.
        """
        if getattr(self, name) not in known:
            raise UserError(
                f"unknown {_option(name)} {getattr(self, name)!r}; choose one of "
                f"{', '.join(filter(None, known))}."
            )


def _names(value: Any) -> Any:
    """Return names as a tuple; a word may hold several, as on the command line."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
