"""Everything that `bidora compare` can be told, with its defaults, checked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidora.errors import UserError
from bidora.runs.declared import option
from bidora.study.grid import Grid
from bidora.study.reading import grid_from_dict, read_grid

__all__ = ["StudySettings"]

WHICH = "which runs"
HOW = "how"


@dataclass(frozen=True)
class StudySettings:
    """What `bidora compare` was asked for.

    Args:
        grid: A YAML file, or what it would hold.

    Raises:
        UserError: If a setting is out of range.

    Example:
        >>> StudySettings("mine/small.yaml").folder
        PosixPath('runs/compare-small')
    """

    grid: str | Path | Mapping[str, Any]
    output_dir: str | None = option(
        None, "folder of the comparison", HOW, shown="runs/compare-GRID"
    )
    processes: int | None = option(
        None, "runs at a time; the cores are shared out", HOW, shown="as the grid says"
    )
    time_limit: float | None = option(
        None, "start no run after so many minutes", HOW, metavar="MINUTES"
    )
    overwrite: bool = option(
        False, "delete the records of an earlier comparison in that folder", HOW
    )
    only_tasks: tuple[str, ...] | None = option(
        None, "run these tasks of the grid alone", WHICH, shown="all"
    )
    only_methods: tuple[str, ...] | None = option(
        None, "run these methods of the grid alone", WHICH, shown="all"
    )
    retry_failed: bool = option(
        False, "run again what failed in an earlier start", WHICH
    )

    def __post_init__(self) -> None:
        """Check the numbers, naming their options."""
        count, limit = self.processes, self.time_limit
        if count is not None and (type(count) is not int or count < 1):
            raise UserError(
                f"--processes is {count}; give a whole number of 1 or more."
            )
        if limit is not None and not (
            isinstance(limit, int | float) and math.isfinite(limit) and limit >= 0
        ):
            raise UserError(f"--time-limit is {limit}; give minutes, 0 or more.")

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        if self.output_dir is not None:
            return Path(self.output_dir).expanduser()
        named = isinstance(self.grid, str | Path)
        return (
            Path("runs") / f"compare-{Path(str(self.grid)).stem if named else 'grid'}"
        )

    def read(self) -> Grid:
        """Return the grid; what the options name is in it.

        Raises:
            UserError: If the grid is wrong, or has no such task or method.
        """
        if isinstance(self.grid, str | Path):
            grid = read_grid(self.grid)
        else:
            grid = grid_from_dict(self.grid)
        for option_name, given, known in (
            ("--only-tasks", self.only_tasks, [t.name for t in grid.tasks]),
            ("--only-methods", self.only_methods, [m.name for m in grid.methods]),
        ):
            wrong = [name for name in given or () if name not in known]
            if wrong:
                raise UserError(
                    f"{option_name} {wrong[0]}: the grid has no such name; choose among "
                    f"{', '.join(known)}."
                )
        return grid
