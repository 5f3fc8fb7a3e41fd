"""From a recipe's name to its settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

from bidora.errors import UserError

__all__ = ["Recipe", "load_recipe", "recipe_names"]


@dataclass(frozen=True)
class Recipe:
    """Settings of a published run.

    Args:
        name: The table and the run in it, such as `glue-roberta-base/cola`.
        source: Where the settings were published.
        settings: By the names of `bidora.runs.settings.TrainSettings`.
        ours: Names of those that the source does not give.
        data: What to pass as the task; nothing where the recipe names one.
    """

    name: str
    source: str
    settings: dict[str, Any]
    ours: tuple[str, ...] = ()
    data: str = ""

    def with_given(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe's settings, with those that were given before them.

        Settings that mean nothing to a method that was given are left out.

        Args:
            given: Settings by name.

        Raises:
            UserError: If the recipe has no data of its own, and none is given.
        """
        if "task" not in {**self.settings, **given}:
            raise UserError(
                f"the recipe {self.name} has no data of its own; pass --task with "
                f"{self.data}."
            )
        known = self.settings
        if given.get("method", known["method"]) != known["method"]:
            from bidora.methods.registry import METHODS

            unused = METHODS.get(given["method"]).ignores
            known = {key: v for key, v in known.items() if key not in unused}
        return {**known, **given}


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(
        f"{table}/{name}"
        for table, found in _tables().items()
        for name in found["recipes"]
    )


def load_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Args:
        name: One of `recipe_names()`.

    Raises:
        UserError: If there is none; it tells the nearest.

    Example:
        >>> load_recipe("glue-roberta-base/cola").settings["max_steps"]
        20000
    """
    table, _, run = name.partition("/")
    found = _tables().get(table, {"recipes": {}})
    if run not in found["recipes"]:
        known = recipe_names()
        # Whoever says `cola` has a part in mind, and whole names differ from it by more.
        part = [k for k in known if name and name.lower() in re.split(r"[/-]", k)]
        near = part[:3] or get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"there is no recipe {name!r}. {hint}`--recipe help` lists all "
            f"{len(known)} of them."
        )
    settings = {**found["settings"], **found["recipes"][run]}
    return Recipe(
        name,
        found["source"],
        settings,
        tuple(key for key in found.get("ours", ()) if key in settings),
        found.get("data", {}).get(run, ""),
    )


@cache
def _tables() -> dict[str, Any]:
    import yaml

    files = resources.files("bidora.recipes").iterdir()
    return {
        file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text("utf-8"))
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }
