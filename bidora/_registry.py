"""Things that are called by name: ours, and those that other packages bring."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from bidora.errors import UserError

__all__ = ["Registry"]


class Registry:
    """Classes by name, loaded when they are asked for.

    Another package adds one by an entry point:

        [project.entry-points."bidora.tasks"]
        my-task = "my_package.my_module:MyTask"

    Args:
        kind: What they are, for messages, such as `task type`.
        group: The group of entry points.
        ours: Where ours are, as `module:Class`, by name.
        base: What each must derive from, as `module:Class`.
        chosen_by: A word that users may give in place of a name, to have it chosen.

    Example:
        >>> kinds = Registry(
        ...     "task type",
        ...     "bidora.tasks",
        ...     {"one": "fractions:Fraction"},
        ...     base="numbers:Number",
        ... )
        >>> kinds.get("one").__name__
        'Fraction'
    """

    def __init__(
        self,
        kind: str,
        group: str,
        ours: dict[str, str],
        *,
        base: str,
        chosen_by: str | None = None,
    ) -> None:
        self.kind = kind
        self.group = group
        self._homes = dict(ours)
        self._base = base
        self._chosen_by = chosen_by

    def names(self) -> tuple[str, ...]:
        """Return the known names, ours first."""
        others = {e.name for e in entry_points(group=self.group)} - set(self._homes)
        return (*self._homes, *sorted(others))

    def __contains__(self, name: object) -> bool:
        """Return whether a name is known; ours are found without asking other packages."""
        return name in self._homes or name in self.names()

    def register(self, name: str, home: str) -> None:
        """Add one in this process.

        Args:
            name: What it is called.
            home: Where it is, as `module:Class`.

        Raises:
            ValueError: If the name is taken, or `home` has another form.
        """
        if name in self._homes:
            raise ValueError(f"the {self.kind} {name!r} is there already.")
        if ":" not in home:
            raise ValueError(f"home={home!r} is not of the form 'module:Class'.")
        self._homes[name] = home

    def get(self, name: str) -> Any:
        """Return the class of a name.

        Args:
            name: What it is called.

        Raises:
            UserError: If there is none; it names the nearest.
            TypeError: If what another package brings is of another kind.
        """
        base = _load(self._base)
        if name in self._homes:
            found = _load(self._homes[name])
        else:
            found = next(
                (e.load() for e in entry_points(group=self.group, name=name)), None
            )
        if found is None:
            known = (*([self._chosen_by] if self._chosen_by else []), *self.names())
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"unknown {self.kind} {name!r}; choose one of {', '.join(known)}.{hint}"
            )
        if not (isinstance(found, type) and issubclass(found, base)):
            wanted = base.__name__
            raise TypeError(f"the {self.kind} {name!r} is {found!r}, not a {wanted}.")
        return found


def _load(home: str) -> Any:
    module, _, attribute = home.partition(":")
    return getattr(import_module(module), attribute)
