"""Tasks from local files: csv, tsv or JSON lines, each also compressed with gzip."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidora.errors import UserError
from bidora.tasks.base import Task, holdout_split
from bidora.tasks.columns import Columns, Table, label_names_of, to_examples

__all__ = ["SUFFIXES", "is_table_file", "load_file_task", "read_table"]

SUFFIXES = (".csv", ".tsv", ".jsonl")
QUOTING = ("auto", "csv", "none")
TEST_FRACTION = 0.2
"""Share of the examples held back for testing where no test file is given."""

TEST_STEMS = ("test", "dev", "validation", "valid", "val")
"""Names under which a folder's test file is looked for, in this order."""


def is_table_file(name: str) -> bool:
    """Return whether a name ends like a file that `read_table` reads."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def load_file_task(
    path: Path,
    *,
    seed: int = 0,
    test_path: Path | None = None,
    columns: Columns | None = None,
    column_names: Sequence[str] | None = None,
    quoting: str = "auto",
) -> Task:
    """Build a task from a file, or from a folder with a `train` file in it.

    Without a test file, a stratified fifth of the examples is held back for testing.

    Args:
        path: A csv, tsv or jsonl file, or a folder with `train.csv` (or `.tsv`,
            `.jsonl`) and perhaps `test`, `dev` or `validation` beside it.
        seed: Seed of the test split, where there is no test file.
        test_path: File with the test examples.
        columns: Which columns hold text and label.
        column_names: Names of the columns of a csv or tsv without a header line.
        quoting: `csv` where fields may be quoted, `none` where quotes are plain
            text, `auto` for `csv` in csv files and `none` in tsv files.

    Returns:
        The task.

    Raises:
        UserError: If a file cannot be read as such a table.
    """
    name = str(path)
    if path.is_dir():
        path, found = _files_of_folder(path)
        test_path = test_path or found
    train_table = read_table(path, column_names, quoting)
    chosen = (columns or Columns()).resolve(train_table)
    label_column = str(chosen.label)
    label_names = label_names_of(train_table, label_column)
    examples = to_examples(train_table, chosen, label_names)
    if test_path is not None:
        test_table = read_table(test_path, column_names, quoting)
        test = to_examples(test_table, chosen.resolve(test_table), label_names)
        return Task(
            name=name,
            train=examples,
            test=test,
            label_names=label_names,
            source=f"training examples from {path}, test examples from {test_path}",
            columns=chosen.names,
        )
    if len(label_names) < 2:
        return Task(name, examples, examples, label_names)  # which explains itself
    train_indices, test_indices = holdout_split(
        examples.labels, TEST_FRACTION, seed, label_names
    )
    return Task(
        name=name,
        train=examples.select(train_indices),
        test=examples.select(test_indices),
        label_names=label_names,
        source=(
            f"{path}, a stratified {TEST_FRACTION:.0%} of it (seed {seed}) held back "
            "for testing"
        ),
        columns=chosen.names,
    )


def read_table(
    path: Path, column_names: Sequence[str] | None = None, quoting: str = "auto"
) -> Table:
    """Read a csv, tsv or jsonl file, whole.

    Args:
        path: The file; a name that ends in `.gz` is decompressed.
        column_names: Names of the columns of a csv or tsv without a header line.
        quoting: As in `load_file_task`.

    Returns:
        The table.

    Raises:
        UserError: If the file is missing, not UTF-8, or its rows differ in width.
    """
    if quoting not in QUOTING:
        raise UserError(f"unknown quoting {quoting!r}; choose one of {QUOTING}.")
    if not is_table_file(path.name):
        raise UserError(
            f"{path} is not a file this command reads; give a name that ends in "
            f"{', '.join(SUFFIXES)} (also with .gz)."
        )
    text = _read_text(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".jsonl":
        table = _read_json_lines(path, text)
    else:
        quoted = quoting == "csv" or (quoting == "auto" and suffix == ".csv")
        delimiter = _guess_delimiter(text) if suffix == ".csv" else "\t"
        table = _read_delimited(path, text, delimiter, quoted, column_names)
    if not table.rows:
        raise UserError(f"{path} has no rows; give a file with examples.")
    return table


def _files_of_folder(folder: Path) -> tuple[Path, Path | None]:
    def find(stem: str) -> Path | None:
        names = [stem + suffix + gz for gz in ("", ".gz") for suffix in SUFFIXES]
        return next((folder / n for n in names if (folder / n).is_file()), None)

    train = find("train")
    if train is None:
        raise UserError(
            f"the folder {folder} holds no train.csv, train.tsv or train.jsonl; name "
            "the file itself with --task FILE."
        )
    return train, next(filter(None, map(find, TEST_STEMS)), None)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path} (looked from {Path.cwd()}); check the spelling."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}). It may "
            "have been saved in a Windows or Latin encoding; save it as UTF-8."
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _guess_delimiter(text: str) -> str:
    """Return the sign that divides the first line: many a csv has tabs or `;`."""
    first_line = text.split("\n", maxsplit=1)[0]
    return max(",;\t", key=first_line.count)  # a comma where none leads


def _read_json_lines(path: Path, text: str) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}). A jsonl file holds "
                "one JSON object a line."
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number}: a {type(record).__name__} where an object "
                'such as {"text": "...", "label": "..."} was expected.'
            )
        records.append(record)
        lines.append(f"line {number}")
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    rows = tuple(tuple(record.get(name) for name in columns) for record in records)
    return Table(str(path), columns, rows, tuple(lines))


def _read_delimited(
    path: Path,
    text: str,
    delimiter: str,
    quoted: bool,
    column_names: Sequence[str] | None,
) -> Table:
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    columns = tuple(column_names) if column_names else ()
    rows: list[tuple[str, ...]] = []
    lines: list[str] = []
    try:
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            if not columns:
                columns = tuple(name.strip() for name in row)
                _check_names(path, columns)
                continue
            if len(row) != len(columns):
                raise UserError(_ragged(path, reader.line_num, row, columns, delimiter))
            rows.append(tuple(row))
            lines.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not readable as a table ({error}). If "
            "quotes are plain text in this file, say --quoting none."
        ) from None
    return Table(str(path), columns, tuple(rows), tuple(lines))


def _check_names(path: Path, columns: tuple[str, ...]) -> None:
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise UserError(
            f"{path}: the first line names {', '.join(map(repr, repeated))} more than "
            "once. If it is an example rather than a header, give the names with "
            "--column-names."
        )


def _ragged(
    path: Path, line: int, row: list[str], columns: tuple[str, ...], delimiter: str
) -> str:
    sign = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
    return (
        f"{path}, line {line}: {len(row)} field(s) where {len(columns)} were expected "
        f"({', '.join(columns)[:120]}). The likely cause is a {sign} or a quote inside "
        "a text: quote such fields (--quoting csv), take quotes as plain text "
        "(--quoting none), or save the file as jsonl."
    )
