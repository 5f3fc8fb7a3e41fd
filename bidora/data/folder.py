"""Tables from a folder: the user's own train, dev and test files, or official ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidora.data.catalog import CATALOG, Entry, Layout
from bidora.data.encodings import NOT_TEXT, foreign_bytes, read_text
from bidora.data.files import (
    SEQUENCE_FILES,
    SUFFIXES,
    FileTable,
    plain_records,
    read_file,
    refuse_empty,
)
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["find_class_files", "own_file", "read_folder", "read_official", "recognise"]

STEMS = {
    "train": ("train", "training"),
    "dev": ("validation", "valid", "val", "dev", "devel"),
    "test": ("test", "testing"),
}
"""Names under which a folder's own files are looked for, by part."""


def read_folder(
    folder: Path,
    *,
    column_names: Sequence[str] | None = None,
    quoting: str = "auto",
    encoding: str = "auto",
    label_column: str | None = None,
    entry: Entry | None = None,
) -> tuple[dict[str, Table], list[str]]:
    """Read the train, dev and test files of a folder.

    Args:
        folder: With a file `train.csv`, `.tsv` or `.jsonl`, and perhaps `validation`
            (also `valid`, `val`, `dev`) and `test` beside it.
        column_names: As for `read_file`.
        quoting: As for `read_file`.
        encoding: As for `read_file`.
        label_column: The one of `column_names` that a test file may lack.
        entry: The data set whose files they are, if it is a known one.

    Returns:
        Tables by part (`train`, `dev`, `test`), and what had to be guessed.

    Raises:
        UserError: If there is no train file, or two files for one part.
    """
    tables: dict[str, Table] = {}
    notes: list[str] = []
    for part in STEMS:
        path = own_file(folder, part)
        if path is not None:
            names = list(column_names or ())
            optional = label_column if part != "train" else None
            tables[part], note = _read_part(path, names, optional, quoting, encoding)
            notes += [note] if note else []
    if "train" not in tables and entry is not None:
        raise UserError(_lacking(folder, ["train.csv"], entry))
    if "train" not in tables:
        raise UserError(
            f"the folder {folder} holds no train.csv, train.tsv or train.jsonl, nor "
            f"folders of images ({_listing(folder)}). Name the file itself with --task "
            "FILE, or, for a data set that is known by name, say --task NAME --data-dir "
            "FOLDER."
        )
    return tables, notes


def recognise(folder: Path) -> Entry | None:
    """Return the known data set whose official files lie in a folder.

    Args:
        folder: Where to look.

    Returns:
        The entry; None unless the folder's name or the files' own names tell it, and
        the files read as such.
    """
    plain = folder.resolve().name.lower().replace("-", "").replace("_", "")
    for entry in CATALOG.values():
        files = entry.class_files.values()
        if files and all(_official_file(folder, name) for name in files):
            return entry
        for layout in entry.layouts:
            telling = layout.files["train"] not in ("train.tsv", "train.txt")
            if not (telling or plain in entry.folders):
                continue
            train = _official_file(folder, layout.files["train"])
            if train is not None and _fits(train, layout):
                return entry
    return None


def find_class_files(folder: Path, entry: Entry | None) -> dict[str, Path]:
    """Return the FASTA file of each class, for data that comes so.

    Args:
        folder: Where they lie.
        entry: The data set, if it is a known one.

    Returns:
        Files by class; none for data that comes otherwise.

    Raises:
        UserError: If the folder of a known data set lacks one of them.
    """
    if entry is None:
        from bidora.data.formats.fasta import classes_of_files

        return classes_of_files(folder) if folder.is_dir() else {}
    found = {c: _official_file(folder, name) for c, name in entry.class_files.items()}
    missing = [entry.class_files[c] for c, path in found.items() if path is None]
    if missing:
        raise UserError(_lacking(folder, missing, entry))
    return {c: path for c, path in found.items() if path is not None}


def read_official(
    entry: Entry, folder: Path, *, encoding: str = "auto"
) -> tuple[dict[str, Table], list[str]]:
    """Read the official files of a known data set.

    Args:
        entry: The data set.
        folder: Where its files lie, or the folder above.
        encoding: As for `read_file`.

    Returns:
        Tables by part, their columns named as on the Hub, and what a user should know.

    Raises:
        UserError: If a file is missing, or is not laid out as it should be.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder} (--data-dir, looked from {Path.cwd()}), which "
            f"is to hold {entry.name}. {entry.fetching}"
        )
    folder, layout = _find_layout(entry, folder)
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for part, name in layout.files.items():
        path = _official_file(folder, name)
        if path is not None:
            paths[part] = path
        elif part not in layout.optional:
            missing.append(name)
    if missing:
        raise UserError(_lacking(folder, missing, entry))
    tables: dict[str, Table] = {}
    notes: list[str] = []
    for part, path in paths.items():
        if layout.read_as_is:
            tables[part], note = read_file(path, encoding=encoding)
            lacking = set(layout.renamed) - set(tables[part].columns)
            if lacking:
                raise UserError(
                    f"{path} has no column {', '.join(sorted(lacking))}, which the "
                    f"official file of {entry.name} has. The files come from "
                    f"{entry.homepage}; for a file of your own say --task FILE."
                )
        else:
            tables[part], note = _official_table(
                path, entry, layout, encoding, labelled=part not in layout.optional
            )
        notes += [note] if note else []
    for part, name in layout.fallback.items():
        other = _official_file(folder, name)
        labelled = part in tables and "label" in tables[part].columns
        if other is not None and not labelled:
            tables[part], note = _official_table(
                other, entry, layout, encoding, labelled=True
            )
            notes += [note] if note else []
    return tables, notes


def _find_layout(entry: Entry, folder: Path) -> tuple[Path, Layout]:
    """Return the folder and the layout of which most files are there."""
    below = [
        child
        for child in sorted(folder.iterdir())
        if child.is_dir() and child.name.lower().replace("-", "") in entry.folders
    ]
    best = (-1, folder, entry.layouts[0])
    for place in (folder, *below):
        for layout in entry.layouts:
            found = sum(
                _official_file(place, name) is not None
                for name in layout.files.values()
            )
            if found > best[0]:
                best = (found, place, layout)
    return best[1], best[2]


def _official_file(folder: Path, name: str) -> Path | None:
    if not name:
        return None
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def own_file(folder: Path, part: str) -> Path | None:
    """Return the table or FASTA file of a part, None where the folder has none.

    Args:
        folder: Where to look.
        part: A key of `STEMS`.

    Raises:
        UserError: If there are two.
    """
    found: dict[str, Path] = {}
    for stem in STEMS[part]:
        for suffix in (*SUFFIXES, *SEQUENCE_FILES):
            path = _official_file(folder, stem + suffix)
            if path is not None:
                found[stem + suffix] = path
    if len(found) > 1:
        option = {"dev": "--validation-file", "test": "--test-file"}.get(part, "--task")
        raise UserError(
            f"the folder {folder} holds {' and '.join(found)}, and one of them is "
            f"wanted; move the other away, or name files with {option}."
        )
    return next(iter(found.values()), None)


def _read_part(
    path: Path, names: list[str], optional: str | None, quoting: str, encoding: str
) -> FileTable:
    """Read a file by the names given, or by those without one that it may lack."""
    try:
        return read_file(path, column_names=names, quoting=quoting, encoding=encoding)
    except UserError as error:
        if optional not in names:
            raise
        names = [name for name in names if name != optional]
        try:
            return read_file(
                path, column_names=names, quoting=quoting, encoding=encoding
            )
        except UserError:
            raise error from None


def _lacking(folder: Path, missing: Sequence[str], entry: Entry) -> str:
    return (
        f"the folder {folder} lacks {' and '.join(missing)} of {entry.name} "
        f"({_listing(folder)}). {entry.fetching}"
    )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}"


def _fits(path: Path, layout: Layout) -> bool:
    """Return whether a file's first line is that of the layout."""
    if layout.read_as_is and not layout.renamed:
        return True
    try:
        if layout.read_as_is:
            return set(layout.renamed) <= set(read_file(path).table.columns)
        text = read_text(path).text
    except UserError:
        return False
    _, first = next(plain_records(text), (0, []))
    named = set(layout.renamed) <= set(first)
    return named or len(first) >= len(layout.headerless) > 0


def _official_table(
    path: Path, entry: Entry, layout: Layout, encoding: str, *, labelled: bool
) -> tuple[Table, str]:
    """Read one official tsv: the texts and the label, by our names."""
    text, note = read_text(path, encoding)
    clean = not foreign_bytes(text)
    records = plain_records(text)
    line, first = next(records, (0, []))
    label = next(own for own, ours in layout.renamed.items() if ours == "label")
    needed = set(layout.renamed) - (set() if labelled else {label})
    if needed <= set(first):
        header = tuple(first)
    elif layout.headerless and len(first) >= len(layout.headerless):
        header = layout.headerless
        records = plain_records(text)
    else:
        wanted = ", ".join(map(repr, layout.renamed))
        raise UserError(
            f"{path}, line {line}: not laid out as the official file of {entry.name}, "
            f"whose columns include {wanted}. The files come from {entry.homepage}; for "
            "a file of your own say --task FILE."
        )
    wanted = [own for own in layout.renamed if own in header]
    positions = [header.index(own) for own in wanted]
    columns = tuple(layout.renamed[own] for own in wanted)
    rows: list[tuple[Any, ...]] = []
    lines: list[str] = []
    bad: list[str] = []
    torn = 0
    for line, fields in records:
        foreign = "" if clean else foreign_bytes("".join(fields))
        if foreign:
            bad.append(f"{path}, line {line}: {NOT_TEXT.format(foreign)}")
        elif not (
            len(fields) == len(header)
            or (layout.open_ended and len(fields) > len(header))
        ):
            torn += 1
            if not layout.torn:
                bad.append(
                    f"{path}, line {line}: {len(fields)} field(s) where {len(header)} "
                    f"were expected; fetch the file again from {entry.homepage}."
                )
        else:
            values = [fields[position] for position in positions]
            rows.append(
                tuple(
                    _class(value, entry) if name == "label" else value
                    for name, value in zip(columns, values, strict=True)
                )
            )
            lines.append(f"line {line}")
    if torn and layout.torn:
        left_out = (
            f"{torn:,} row(s) of {path} are torn in the official file and left out"
        )
        note = f"{note}; {left_out}" if note else left_out
    names = (("label", entry.class_names),) if entry.class_names else ()
    table = Table(str(path), columns, tuple(rows), tuple(lines), names, tuple(bad))
    return refuse_empty(table), note


def _class(value: str, entry: Entry) -> Any:
    """Return the index of a class that is given by name or by index."""
    if value in entry.class_names:
        return entry.class_names.index(value)
    if entry.class_names and value.removeprefix("-").isdecimal() and len(value) < 10:
        return int(value)
    return value
