"""From what a user calls a data set to its rows: a file, a folder, the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from bidora.data.catalog import Entry, find_entry
from bidora.data.digits import digits_source
from bidora.data.docstrings import docstrings_source
from bidora.data.files import is_table_file, read_file
from bidora.data.folder import (
    find_class_files,
    own_file,
    read_folder,
    read_official,
    recognise,
)
from bidora.data.hub import read_hub
from bidora.data.image_folder import has_class_folders, read_class_folders
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["choose_parts", "is_hub_name", "load_source"]

LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "score",
    "tags",
    "ner_tags",
    "topics",
)
"""Usual names of the column that a hidden part lacks."""

_MADE = {"docstrings": docstrings_source, "digits": digits_source}
"""Data sets that come with what is installed, by name."""

_FILE_OPTIONS = ("--validation-file", "--test-file", "--column-names", "--quoting")


def load_source(
    name: str = "docstrings",
    *,
    seed: int = 0,
    data_dir: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    column_names: Sequence[str] | None = None,
    quoting: str = "auto",
    encoding: str = "auto",
    label_column: str | None = None,
) -> Source:
    """Load the examples of a job.

    Args:
        name: `docstrings` or `digits`; a file (csv, tsv, jsonl, FASTA, column file,
            SGML, also `.gz`); a folder with a train file, with a FASTA file or a folder
            of images for each class, or with the official files of a known data set; or
            a data set of the Hub, such as `glue/cola` or `owner/data:config`.
        seed: Seed of the split of docstrings and digits; nothing else here is random.
        data_dir: Folder with the files of the data set `name`; with it, nothing is
            fetched from the network.
        validation_file: File with the validation examples, for files and folders.
        test_file: File with the test examples, for files and folders.
        column_names: Names of the columns of a csv or tsv without a header line.
        quoting: How a csv or tsv quotes its fields: `auto`, `csv` or `none`.
        encoding: Python's name of the files' encoding, or `auto`.
        label_column: Column that a part whose labels are hidden has no values in.

    Returns:
        The parts that have labels, by `choose_parts`.

    Raises:
        UserError: If there is no such data set, or its files cannot be read.
    """
    given = {
        "--data-dir": data_dir is not None,
        "--validation-file": validation_file is not None,
        "--test-file": test_file is not None,
        "--column-names": bool(column_names),
        "--quoting": quoting != "auto",
        "--encoding": encoding != "auto",
    }
    if name in _MADE:
        _refuse(name, given, tuple(given))
        return _MADE[name](seed)
    place = None if data_dir is None else Path(data_dir).expanduser()
    if is_hub_name(name):
        entry = find_entry(name)
        if place is not None and entry is None and not place.is_dir():
            raise UserError(
                f"there is no folder {place} (--data-dir, looked from {Path.cwd()})."
            )
    elif place is None:
        place = Path(name).expanduser()
        entry = recognise(place) if place.is_dir() else None
    else:
        raise UserError(
            f"--data-dir goes with the name of a data set, and {name} is a file or "
            "folder; leave --data-dir out."
        )

    if place is not None and _is_reuters(place, entry):
        from bidora.data.formats.sgml import reuters_source

        _refuse(name, given, _FILE_OPTIONS)
        split = "modapte" if entry is None else entry.name.removeprefix("reuters/")
        source = reuters_source(place, split)
        return replace(source, name=name, note=f"{source.note}.")

    reading: dict[str, Any] = {
        "column_names": column_names,
        "quoting": quoting,
        "encoding": encoding,
    }
    hints = {} if entry is None else entry.settings
    if place is None:
        _refuse(name, given, tuple(given))
        tables, notes = _from_hub(name, entry)
    elif entry is not None and entry.layouts:
        _refuse(name, given, ("--column-names", "--quoting"))
        tables, notes = read_official(entry, place, encoding=encoding)
        notes = [f"the files of {entry.name} in {place}", *notes]
    elif class_files := find_class_files(place, entry):
        from bidora.data.formats.fasta import fasta_source

        _refuse(name, given, ("--column-names", "--quoting"))
        source = fasta_source(class_files, encoding=encoding, **hints)
        tables, notes, hints = source.parts, [source.note], source.hints
    elif _is_column_folder(place):
        from bidora.data.formats.conll import conll_source

        _refuse(name, given, ("--column-names", "--quoting"))
        source = conll_source(place, encoding=encoding)
        tables = {p.replace("validation", "dev"): t for p, t in source.parts.items()}
        notes = [source.note]
    elif _is_image_folder(place):
        _refuse(name, given, _FILE_OPTIONS)
        tables, note = read_class_folders(place)
        notes, hints = [note], {"task_type": "images", "label_column": "label"}
    elif place.is_dir() or entry is not None:
        usual = (c for c in LABEL_COLUMNS if c in (column_names or ()))
        label = label_column or next(usual, None)
        tables, notes = read_folder(place, **reading, label_column=label, entry=entry)
    else:
        table, note = read_file(place, **reading)
        tables, notes = {"train": table}, [note] if note else []
    given_parts: dict[str, Table] = {}
    for part, file in (("dev", validation_file), ("test", test_file)):
        if file is not None:
            given_parts[part], note = read_file(Path(file).expanduser(), **reading)
            notes += [note] if note else []
    if not hints and _is_tagged(tables["train"]):
        hints = {"task_type": "tagging"}
    label = label_column or hints.get("label_column")
    parts, told = choose_parts({**tables, **given_parts}, label, given_parts)
    _refuse_equal(parts)
    return Source(name, parts, "; ".join([*notes, *told]) + ".", hints)


def choose_parts(
    tables: Mapping[str, Table],
    label_column: str | None = None,
    named: Sequence[str] | Mapping[str, Any] = (),
) -> tuple[dict[str, Table], list[str]]:
    """Say which table serves for what, wherever the tables come from.

    A part whose labels are hidden is passed over. Where `test` has labels, `dev` is for
    choosing by and becomes `validation`; otherwise `dev` is what scores are told on and
    becomes `test`, as in the papers that report on GLUE.

    Args:
        tables: `train`, and perhaps `dev` and `test`, each perhaps with a second table
            `dev_mismatched`, `test_mismatched`.
        label_column: Column of the labels; by default the first usual name that
            `train` has.
        named: Tables that the user chose by name, which are never passed over.

    Returns:
        Tables by the names of a `Source`, and what was chosen, in words.

    Raises:
        UserError: If a table that the user named has no labels.

    Example:
        >>> def table(labels):
        ...     rows = tuple((label,) for label in labels)
        ...     return Table("t", ("label",), rows, ("",) * len(rows))
        >>> glue = {"train": table("01"), "dev": table("01"), "test": table(["-1"])}
        >>> list(choose_parts(glue)[0])
        ['train', 'test']
    """
    train = tables["train"]
    if label_column is None:
        label_column = next((c for c in LABEL_COLUMNS if c in train.columns), None)
    hidden = [part for part in tables if _is_hidden(tables[part], train, label_column)]
    for part in named:
        if part in hidden:
            option = "--validation-file" if part == "dev" else "--test-file"
            raise UserError(
                f"{tables[part].origin} ({option}) has no labels"
                + (f" in column {label_column!r}" if label_column else "")
                + ". Give a file with labels; one without is what `bidora predict` reads."
            )
    shown = {part: table for part, table in tables.items() if part not in hidden}
    names = {"train": "train", "dev": "validation", "test": "test"}
    if "test" not in shown and "dev" not in named:
        names["dev"] = "test"
    parts: dict[str, Table] = {}
    for part in ("train", "dev", "test"):
        if part in shown:
            parts[names[part]] = shown[part]
    for part in ("dev", "test"):
        if f"{part}_mismatched" in shown:
            parts[f"{names[part]}_mismatched"] = shown[f"{part}_mismatched"]
    told = [f"{part}: {table.origin}" for part, table in parts.items()]
    told += [f"{tables[part].origin} has no labels and is not used" for part in hidden]
    return parts, told


def is_hub_name(name: str) -> bool:
    """Return whether a name is that of a data set of the Hub.

    Args:
        name: As `load_source` takes it.

    Returns:
        True unless it is made here, or a file or folder, there or not.
    """
    is_file = is_table_file(name) or _is_sgml(name) or _exists(name)
    looks_local = name.startswith((".", "/", "~"))
    return not (name in _MADE or is_file or looks_local)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError):  # too long a name, a zero byte
        return False


def _is_reuters(place: Path, entry: Entry | None) -> bool:
    """Return whether it is Reuters-21578: by its name, or by the files' names."""
    if entry is not None:
        return entry.name.startswith("reuters/")
    if not place.is_dir():
        return _is_sgml(place.name)
    from bidora.data.formats.sgml import is_reuters

    return is_reuters(place)


def _is_sgml(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(".sgm")


def _is_column_folder(place: Path) -> bool:
    if not place.is_dir():
        return False
    from bidora.data.formats.conll import is_conll

    try:
        return is_conll(place)
    except UserError:
        return False  # told when the file is read


def _is_image_folder(place: Path) -> bool:
    """Return whether it holds folders of images, and no file of training rows."""
    return has_class_folders(place) and own_file(place, "train") is None


def _is_tagged(table: Table) -> bool:
    """Return whether the rows are lists of words, each with its tag."""
    if not {"tokens", "tags"} <= set(table.columns):
        return False
    return isinstance(table.values("tags")[0], list)


def _from_hub(name: str, entry: Entry | None) -> tuple[dict[str, Table], list[str]]:
    if entry is None:
        repository, _, configuration = name.partition(":")
        tables, notes = read_hub(name, repository, configuration or None)
    elif entry.hub is None:
        raise UserError(
            f"{entry.name} is read from its files; fetch them and say --data-dir FOLDER. "
            f"{entry.fetching}"
        )
    else:
        tables, notes = read_hub(name, *entry.hub, renamed=entry.hub_renamed)
    return tables, [f"the Hub's {name}", *notes]


def _is_hidden(table: Table, train: Table, column: str | None) -> bool:
    """Return whether a table has no labels though the training examples have."""
    if column is None:  # perhaps one column for each label
        lacking = set(train.columns) - set(table.columns)
        return any({str(v) for v in train.values(c)} <= {"0", "1"} for c in lacking)
    if table is train or column not in train.columns:
        return False
    if column not in table.columns:
        return True
    values = table.values(column)
    # -1 is a label like another where the training examples have it.
    given = any(map(_is_minus_one, train.values(column)))
    return all(_is_blank(v) or (not given and _is_minus_one(v)) for v in values)


def _is_blank(value: Any) -> bool:
    if isinstance(value, list):  # of tags; an empty list of labels is one
        return bool(value) and all(_is_blank(v) or _is_minus_one(v) for v in value)
    return value is None or value != value or not str(value).strip()


def _is_minus_one(value: Any) -> bool:
    return str(value).strip() in ("-1", "-1.0")


def _refuse_equal(parts: Mapping[str, Table]) -> None:
    for (one, first), (other, second) in combinations(parts.items(), 2):
        if first.columns == second.columns and first.rows == second.rows:
            raise UserError(
                f"the {one} and the {other} examples are the same ({first.origin} and "
                f"{second.origin}), so a score on them would say nothing. Give another "
                "file, or none: a part of the training examples is then held back."
            )


def _refuse(name: str, given: Mapping[str, bool], options: Sequence[str]) -> None:
    unused = [option for option in options if given[option]]
    if unused:
        raise UserError(
            f"{', '.join(unused)} does not apply to --task {name}; leave it out, or "
            "pass a file or folder of your own as --task."
        )
