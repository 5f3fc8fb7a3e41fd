"""A grid from a file: every key checked, with what is wrong named by key and file."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.runs.job_settings import DATA
from bidora.runs.settings import TrainSettings
from bidora.study.grid import Grid, GridMethod, GridTask

__all__ = ["grid_from_dict", "read_grid"]

KEYS = (
    "settings",
    "tasks",
    "methods",
    "sizes",
    "seeds",
    "sweep",
    "equal",
    "reference",
    "processes",
)
EQUAL = ("steps", "time")

ELSEWHERE = {
    "seed": "seeds are listed under `seeds`",
    "max_train_samples": "numbers of training examples are listed under `sizes`",
    "output_dir": "runs go into the folder of the study",
    "overwrite": "it is an option of the command",
    "push_to_hub": "nothing that a study trains is kept",
    "hub_model_id": "nothing that a study trains is kept",
    "report_to": "a study writes its own report",
}
"""Settings that a grid does not give, and why."""

READING = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "num_beams",
        "length_penalty",
        "no_repeat_ngram_size",
    }
)
"""Settings of the data that a method may have of its own: the examples stay the same."""

OF_TASKS = (
    "task",
    "task_type",
    *(
        f.name
        for f in dataclasses.fields(TrainSettings)
        if f.metadata["group"] == DATA and f.name not in READING
    ),
)
"""Settings that decide on examples or metric; a pair of runs has to share them."""

MOST_COMBINATIONS = 100_000
SAFE_NAME = re.compile(r"\w[\w.+-]{0,79}")
PATHS = ("data_dir", "validation_file", "test_file")
PERHAPS_PATHS = ("task", "model")


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file.

    Args:
        path: The file; relative paths in it are looked up from its folder.

    Returns:
        The grid; its settings fit its methods.

    Raises:
        UserError: If it can't be read, or something in it is wrong.
    """
    import yaml

    path = Path(path).expanduser()
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_loader())
    except FileNotFoundError as error:
        raise UserError(
            f"there is no grid {path}. Name a YAML file that lists tasks and methods; "
            "the page on comparing methods has one to begin with."
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the grid {path} cannot be read: {error}") from error
    return grid_from_dict(values, where=str(path), folder=path.parent)


def grid_from_dict(
    values: Any, *, where: str = "the grid", folder: Path | None = None
) -> Grid:
    """Return the grid that nested mappings describe, in the form of the YAML.

    Args:
        values: The mappings.
        where: What messages call them.
        folder: Where relative paths are looked up; by default the current folder.

    Returns:
        The grid; its settings fit its methods.

    Raises:
        UserError: If something is wrong; it names the key.

    Example:
        >>> grid = grid_from_dict(
        ...     {"tasks": {"docstrings": {}}, "methods": {"lora": {}}}
        ... )
        >>> grid.tasks[0].seeds, grid.methods[0].settings
        ((0,), {'method': 'lora'})
    """
    return _Reader(where, folder or Path.cwd()).grid(values)


class _Reader:
    """Read one grid.

    Args:
        where: What messages call the grid.
        folder: Where relative paths are looked up.
    """

    def __init__(self, where: str, folder: Path) -> None:
        self.where = where
        self.folder = folder.expanduser().absolute()
        self.fields = {f.name: f for f in dataclasses.fields(TrainSettings)}

    def grid(self, values: Any) -> Grid:
        """Return the grid."""
        values = self.mapping(values, "")
        self.known(values, KEYS, "")
        sizes = self.sizes(values.get("sizes"), "sizes")
        seeds = self.seeds(values.get("seeds", [0]), "seeds")
        settings = self.settings(values.get("settings"), "settings", ("task", "method"))
        tasks = tuple(
            self.task(name, entry, sizes, seeds)
            for name, entry in self.named(values, "tasks", "docstrings")
        )
        names = [task.name for task in tasks]
        methods = tuple(
            self.method(name, entry, names)
            for name, entry in self.named(values, "methods", "lora")
        )
        sweep = self.mapping(values.get("sweep"), "sweep")
        self.known(sweep, ("seeds", "trials"), "sweep")
        grid = Grid(
            tasks=tasks,
            methods=methods,
            settings=settings,
            sweep_seeds=self.seeds(sweep.get("seeds", [100]), "sweep.seeds"),
            trials=self.count(sweep.get("trials"), "sweep.trials"),
            equal=self.equal(values.get("equal", ["steps"]), "equal"),
            reference=self.reference(
                values.get("reference"), [m.name for m in methods]
            ),
            processes=self.count(values.get("processes"), "processes") or 1,
        )
        self.check_seeds(grid)
        self.check_trials(grid)
        try:
            grid.check()
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error
        return grid

    def task(
        self, name: str, entry: Any, sizes: tuple[int, ...], seeds: tuple[int, ...]
    ) -> GridTask:
        """Return a task; its own sizes, seeds and `equal` go before the grid's."""
        key = f"tasks.{name}"
        entry = dict(self.mapping(entry, key))
        beside = ("sizes", "seeds", "equal")
        own_sizes, own_seeds, own_equal = (entry.pop(name, None) for name in beside)
        settings = self.settings(entry, key, ("method",), beside=beside)
        settings = self.located({"task": name, **settings}, key)
        return GridTask(
            name,
            settings,
            sizes if own_sizes is None else self.sizes(own_sizes, f"{key}.sizes"),
            seeds if own_seeds is None else self.seeds(own_seeds, f"{key}.seeds"),
            None if own_equal is None else self.equal(own_equal, f"{key}.equal"),
        )

    def method(self, name: str, entry: Any, tasks: Sequence[str]) -> GridMethod:
        """Return a method with what is swept."""
        key = f"methods.{name}"
        entry = dict(self.mapping(entry, key))
        sweep, own = entry.pop("sweep", None), entry.pop("tasks", None)
        settings = self.settings(entry, key, OF_TASKS, beside=("sweep", "tasks"))
        settings = {"method": name, **settings}
        if settings["method"] not in METHODS:
            beside = "" if "method" in entry else " (or a name of yours with `method:`)"
            self.unknown(
                f"{key}{beside}", settings["method"], METHODS.names(), "method"
            )
        if own is not None:
            for task in self.listed(own, f"{key}.tasks"):
                if task not in tasks:
                    self.unknown(f"{key}.tasks", task, tasks, "task of this grid")
        swept = self.sweep(sweep, f"{key}.sweep")
        double = sorted({n for entry in swept for n in entry} & set(settings))
        if double:
            self.refuse(
                f"{key}.{double[0]}", "it is swept, and given too; leave one out."
            )
        method = GridMethod(name, settings, swept, None if own is None else tuple(own))
        if method.combinations > MOST_COMBINATIONS:
            self.refuse(
                f"{key}.sweep",
                f"it has {method.combinations:,} combinations, and {MOST_COMBINATIONS:,} "
                "are the most that are drawn from; list fewer values.",
            )
        trial, times = Counter(method.trials(None)).most_common(1)[0]
        if times > 1:
            same = ", ".join(f"{name} {value}" for name, value in trial)
            self.refuse(
                f"{key}.sweep", f"two entries have {same}; leave it out of one."
            )
        return method

    def sweep(self, entry: Any, key: str) -> tuple[dict[str, tuple[Any, ...]], ...]:
        """Return the values to choose from, of each entry; a mapping alone is one."""
        if not isinstance(entry, list | tuple):
            swept = self.swept(entry, key)
            return (swept,) if swept else ()
        entries = [self.swept(e, f"{key}[{i}]") for i, e in enumerate(entry)]
        for i, other in enumerate(entries):
            if set(other) != set(entries[0]) or not other:
                self.refuse(
                    f"{key}[{i}]",
                    f"it sweeps {', '.join(sorted(other)) or 'nothing'}, where the first "
                    f"entry sweeps {', '.join(sorted(entries[0])) or 'nothing'}; give "
                    "each entry values of the same settings.",
                )
        return tuple(entries)

    def swept(self, entry: Any, key: str) -> dict[str, tuple[Any, ...]]:
        """Return the values to choose from, by setting."""
        found: dict[str, tuple[Any, ...]] = {}
        for name, values in self.mapping(entry, key).items():
            self.check_setting(name, key, (*OF_TASKS, "method"))
            values = self.listed(values, f"{key}.{name}")
            settings = ({name: self.number(name, value)} for value in values)
            frozen = tuple(_frozen(self.located(s, key)[name]) for s in settings)
            if any(isinstance(value, dict) for value in values):
                self.refuse(
                    f"{key}.{name}",
                    "a mapping cannot be swept; make a method of each, by `method:`.",
                )
            if len(set(frozen)) < len(frozen):
                self.refuse(f"{key}.{name}", "a value is listed twice; leave one out.")
            found[name] = frozen
        return found

    def settings(
        self,
        entry: Any,
        key: str,
        not_here: Sequence[str],
        beside: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return settings of `TrainSettings`; ranges are checked with all of a run."""
        found = {}
        for name, value in self.mapping(entry, key).items():
            self.check_setting(name, key, not_here, beside)
            found[name] = self.number(name, value)
        return found if key.startswith("tasks") else self.located(found, key)

    def check_setting(
        self, name: str, key: str, not_here: Sequence[str], beside: Sequence[str] = ()
    ) -> None:
        """Refuse what is no setting, or not one of this place."""
        if name in ELSEWHERE:
            self.refuse(f"{key}.{name}", f"{ELSEWHERE[name]}; leave it out.")
        if name in not_here:
            own = "methods" if name == "method" else "tasks"
            why = (
                ""
                if name in ("task", "method")
                else " or to `settings`: methods are compared on the same examples, by "
                "the same metric"
            )
            self.refuse(f"{key}.{name}", f"it belongs to an entry of `{own}`{why}.")
        if name not in self.fields:
            known = [n for n in (*self.fields, *beside) if n not in ELSEWHERE]
            self.unknown(key, name, known, "setting", lists=False)

    def number(self, name: str, value: Any) -> Any:
        """Return a number for a word such as 3e-4, which YAML takes for text."""
        kind = str(self.fields[name].type)
        if isinstance(value, str) and kind.startswith(("float", "int")):
            try:
                return float(value) if kind.startswith("float") else int(value)
            except ValueError:
                return value  # which the settings refuse, naming the option
        return value

    def located(self, settings: dict[str, Any], key: str) -> dict[str, Any]:
        """Return settings whose paths do not depend on the current folder."""
        found = dict(settings)
        for name in (*PATHS, *PERHAPS_PATHS):
            value = found.get(name)
            if value is None or (name == "task" and value == "docstrings"):
                continue
            if not isinstance(value, str):
                self.refuse(f"{key}.{name}", f"it is {value!r}; give a word.")
            place = self.folder / Path(value).expanduser()
            if name in PATHS or place.exists():
                found[name] = str(place)
        return found

    def named(self, values: Mapping[str, Any], key: str, example: str) -> Any:
        """Return the entries of `tasks` or `methods`, which name folders."""
        entries = self.mapping(values.get(key), key)
        if not entries:
            self.refuse(
                key, f"it names none; write for example `{example}: {{}}` below."
            )
        lower: dict[str, str] = {}
        for name in entries:
            if not SAFE_NAME.fullmatch(name):
                self.refuse(
                    key,
                    f"{name!r} would name a folder, and cannot: take letters, digits and "
                    "._+- (80 at most), a letter or digit first. What the entry stands "
                    f"for is said by `{key[:-1]}:` in it.",
                )
            if name.lower() in lower:
                self.refuse(
                    key,
                    f"{lower[name.lower()]!r} and {name!r} differ by case alone, and "
                    "would share a folder on some disks; rename one.",
                )
            lower[name.lower()] = name
        return entries.items()

    def mapping(self, value: Any, key: str) -> Mapping[str, Any]:
        """Return a mapping with words as keys; nothing stands for an empty one."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.refuse(
                key,
                f"it is {value!r}; write names and what belongs to them, NAME: {{}}.",
            )
        for name in value:
            if not isinstance(name, str):
                self.refuse(
                    key, f"the name {name!r} is not a word; write it in quotes."
                )
        return value

    def listed(self, value: Any, key: str) -> list[Any]:
        """Return a list with something in it."""
        if not isinstance(value, list | tuple) or not value:
            self.refuse(key, f"it is {value!r}; give a list, such as [a, b].")
        return list(value)

    def sizes(self, value: Any, key: str) -> tuple[int, ...]:
        """Return numbers of training examples; 0 for all."""
        if value is None:
            return (0,)
        found = [
            0
            if size == "all"
            else self.whole(size, key, 1, "leave `sizes` out for all")
            for size in self.listed(value, key)
        ]
        return self.distinct(found, key)

    def seeds(self, value: Any, key: str) -> tuple[int, ...]:
        """Return seeds."""
        found = [self.whole(seed, key, 0) for seed in self.listed(value, key)]
        if max(found) >= 2**32:
            self.refuse(key, f"{max(found)} is too large; stay below 2**32.")
        return self.distinct(found, key)

    def count(self, value: Any, key: str) -> int | None:
        """Return a number of 1 or more, or None for nothing."""
        return None if value is None else self.whole(value, key, 1)

    def whole(self, value: Any, key: str, least: int, hint: str = "") -> int:
        """Return a whole number."""
        if type(value) is not int or value < least:
            self.refuse(
                key,
                f"it has {value!r}; give whole numbers of {least} or more"
                f"{f', or {hint}' if hint else ''}.",
            )
        return value

    def distinct(self, values: list[int], key: str) -> tuple[int, ...]:
        """Return them as a tuple; none may come twice."""
        if len(set(values)) < len(values):
            self.refuse(key, f"{values} lists one twice; leave it out.")
        return tuple(values)

    def equal(self, value: Any, key: str) -> Any:
        """Return what is held equal, steps first: equal time is measured on them."""
        given = [value] if isinstance(value, str) else self.listed(value, key)
        for name in given:
            if name not in EQUAL:
                self.unknown(key, name, EQUAL, "thing to hold equal")
        if "steps" not in given:
            self.refuse(
                key,
                "time alone cannot be held equal, because it is measured on the runs of "
                "equal steps; write [steps, time].",
            )
        return tuple(name for name in EQUAL if name in given)

    def reference(self, value: Any, methods: Sequence[str]) -> str:
        """Return the method that the others are tested against."""
        if value is None:
            if len(methods) > 1:
                self.refuse(
                    "reference",
                    "it is left out, and there are several methods; say which of "
                    f"{', '.join(methods)} the others are tested against.",
                )
            return methods[0]
        if value not in methods:
            self.unknown("reference", value, methods, "method of this grid")
        return value

    def check_seeds(self, grid: Grid) -> None:
        """Refuse a seed that is swept with and reported."""
        if not any(grid.sweeps(method.name) for method in grid.methods):
            return
        for task in grid.tasks:
            both = sorted(set(task.seeds) & set(grid.sweep_seeds))
            if both:
                self.refuse(
                    "sweep.seeds",
                    f"{both[0]} is among the seeds of tasks.{task.name} too; settings "
                    "would be chosen on runs that are reported. Take another.",
                )

    def check_trials(self, grid: Grid) -> None:
        """Refuse a single trial of several combinations: nothing would be chosen."""
        several = [m for m in grid.methods if m.combinations > 1]
        if grid.trials == 1 and several:
            self.refuse(
                "sweep.trials",
                f"it is 1, and methods.{several[0].name}.sweep has "
                f"{several[0].combinations} combinations: one would be drawn by lot and "
                "compared with no other. Give 2 or more, or list one value of each "
                "setting.",
            )

    def known(self, given: Iterable[str], known: Sequence[str], key: str) -> None:
        """Refuse a key that is not known."""
        for name in given:
            if name not in known:
                self.unknown(key, name, known, "key")

    def unknown(
        self,
        key: str,
        name: Any,
        known: Iterable[str],
        kind: str,
        *,
        lists: bool = True,
    ) -> NoReturn:
        """Refuse a name, and say which is nearest."""
        known = list(known)
        near = get_close_matches(str(name), known, n=1)
        text = f"there is no {kind} {name!r}"
        text += f"; choose one of {', '.join(known)}." if lists else "."
        self.refuse(key, text + (f" Did you mean {near[0]!r}?" if near else ""))

    def refuse(self, key: str, what: str) -> NoReturn:
        """Say what is wrong with a key.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{self.where}: {key + ': ' if key else ''}{what}")


def _frozen(value: Any) -> Any:
    """Return tuples for lists, and words for mappings, which are refused later."""
    if isinstance(value, dict):
        return str(value)
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _loader() -> Any:
    """Return a YAML loader that refuses a key written twice, of which YAML keeps one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                name = repr(self.construct_object(key, deep=True))
                if name in seen:
                    raise yaml.YAMLError(
                        f"the key {name} is there twice (the second time in line "
                        f"{key.start_mark.line + 1}); rename or remove one"
                    )
                seen.add(name)
            return super().construct_mapping(node, deep=deep)

    return Loader
