"""Tables from local files: csv, tsv or JSON lines, each also compressed with gzip.

A row that can't be read stops nothing: it is told in `Table.bad`, with its line, so
that all of them are known at once.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from bidora.data.encodings import NOT_TEXT, foreign_bytes, read_text
from bidora.data.json_lines import json_table
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = [
    "COLUMN_FILES",
    "SEQUENCE_FILES",
    "SUFFIXES",
    "FileTable",
    "is_table_file",
    "plain_records",
    "read_file",
    "refuse_empty",
]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
"""Endings of the files that hold a row a line."""

COLUMN_FILES = (".conll", ".bio", ".iob", ".iob2")
"""Endings of the files that hold a word a line, sentences apart by empty lines."""

SEQUENCE_FILES = (".fasta", ".fa", ".faa", ".fas")
"""Endings of the FASTA files, which hold proteins."""

QUOTING = ("auto", "csv", "none")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
FIELD_LIMIT = 2**31 - 1  # what a C long holds everywhere
_EXCEL_DELIMITER = re.compile("sep=(.)")  # a first line that Excel writes and reads
LONE_RETURN = re.compile("\r(?!\n)")


class FileTable(NamedTuple):
    """A file's rows, and a sentence if something about the file had to be guessed."""

    table: Table
    note: str


def is_table_file(name: str) -> bool:
    """Return whether a name ends like a file that `read_file` reads.

    Args:
        name: A file's name or path.

    Example:
        >>> is_table_file("mails.csv.gz"), is_table_file("glue/cola")
        (True, False)
    """
    known = (*SUFFIXES, *COLUMN_FILES, *SEQUENCE_FILES)
    return _suffix(name) in known or _is_conll2003(name)


def read_file(
    path: Path,
    *,
    column_names: Sequence[str] | None = None,
    quoting: str = "auto",
    encoding: str = "auto",
) -> FileTable:
    """Read a table from a file, whole.

    Args:
        path: The file; its name tells its kind. Column files (`.conll`, `.bio`, a
            `.tsv` or `.txt` with a word and its tag a line) give lists of words.
        column_names: Names of the columns of a csv or tsv without a header line.
        quoting: `csv` where fields may be quoted, `none` where quotes are plain
            text, `auto` for `csv` in csv files and `none` in tsv files.
        encoding: Python's name of the encoding, or `auto`.

    Returns:
        The rows that could be read; the others are in the table's `bad`.

    Raises:
        UserError: If nothing of the file can be read.
    """
    if quoting not in QUOTING:
        raise UserError(
            f"unknown quoting {quoting!r} (--quoting); choose one of {', '.join(QUOTING)}."
        )
    suffix = _suffix(path.name)
    if _is_column_file(path, suffix):
        return _read_column_file(path, encoding)
    readable = (*SUFFIXES, *COLUMN_FILES, *SEQUENCE_FILES)
    if suffix not in (*readable, ".txt") and path.exists():
        raise UserError(
            f"{path} is not a file this command reads; give a name that ends in "
            f"{', '.join(readable)} (also with .gz)."
        )
    text, note = read_text(path, encoding)
    origin = str(path)
    if suffix in SEQUENCE_FILES:
        from bidora.data.formats.fasta import fasta_table

        return FileTable(refuse_empty(fasta_table(origin, text)), note)
    if suffix in (".jsonl", ".json"):
        return FileTable(refuse_empty(json_table(origin, text)), note)
    names = tuple(column_names or ())
    if len(set(names)) < len(names):
        raise UserError(
            f"--column-names gives a name twice ({', '.join(names)}); columns need "
            "different names."
        )
    first = text.split("\n", maxsplit=1)[0].rstrip("\r")
    in_quotes = all(re.fullmatch('".*"', name) for name in first.split("\t"))
    quoted = quoting == "csv" or (quoting == "auto" and (suffix == ".csv" or in_quotes))
    delimiter = "\t"
    if suffix == ".csv":
        delimiter = _guess_delimiter(text, quoted, len(names))
    records = (_quoted_records if quoted else plain_records)(text, delimiter)
    if _EXCEL_DELIMITER.fullmatch(first):
        next(records)
    clean = not foreign_bytes(text) and "\0" not in text
    table = _delimited_table(origin, records, delimiter, names, clean=clean)
    return FileTable(refuse_empty(table), note)


def plain_records(text: str, delimiter: str = "\t") -> Iterator[tuple[int, list[str]]]:
    r"""Yield the lines of a table in which quotes are plain text, as fields.

    Args:
        text: The file's text.
        delimiter: What divides fields.

    Yields:
        Number of the line, from 1, and its fields.

    Example:
        >>> list(plain_records('say "no\tfalse\n'))
        [(1, ['say "no', 'false'])]
    """
    # Not str.splitlines, which also divides at signs that texts hold.
    for number, line in enumerate(text.split(_line_end(text)), start=1):
        line = line.removesuffix("\r")
        if line:
            yield number, line.split(delimiter)


def _line_end(text: str) -> str:
    """Return the last sign of a line: the carriage return in files from old Macs."""
    returns = text.count("\r") - text.count("\r\n")
    return "\r" if returns > text.count("\n") else "\n"


def _suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _is_conll2003(name: str) -> bool:
    """Return whether it is named like CoNLL's own: `eng.train`, `deu.testa`."""
    last = Path(name).name.lower().removesuffix(".gz")
    return re.fullmatch(r"(eng|deu|ned|esp)\.(train|testa|testb)", last) is not None


def _is_column_file(path: Path, suffix: str) -> bool:
    if suffix in COLUMN_FILES or _is_conll2003(path.name):
        return True
    if suffix in (".csv", ".jsonl", ".json"):
        return False
    from bidora.data.formats.conll import is_conll

    try:
        # A table's classes may look like tags too; empty lines between rows do not.
        return is_conll(path) and (
            suffix != ".tsv" or re.search("\n\r?\n", read_text(path).text) is not None
        )
    except UserError:
        return False  # told when it is read, perhaps in an encoding that was named


def _read_column_file(path: Path, encoding: str) -> FileTable:
    from bidora.data.formats.conll import read_conll

    table = refuse_empty(read_conll(path, encoding=encoding))
    return FileTable(table, read_text(path, encoding).note)


def refuse_empty(table: Table) -> Table:
    """Return a table that has rows.

    Args:
        table: As it was read.

    Returns:
        The same.

    Raises:
        UserError: If there are no rows; it tells the first bad ones.
    """
    if table.rows:
        return table
    if not table.bad:
        raise UserError(f"{table.origin} has no rows; give a file with examples.")
    shown = "\n  ".join(table.bad[:3])
    more = f"\n  and {len(table.bad) - 3:,} more" if len(table.bad) > 3 else ""
    raise UserError(
        f"{table.origin}: none of its {len(table.bad):,} row(s) can be read.\n  "
        f"{shown}{more}"
    )


# -- csv and tsv ----------------------------------------------------------------------


def _delimited_table(
    origin: str,
    records: Iterable[tuple[int, list[str] | str]],
    delimiter: str,
    columns: tuple[str, ...],
    *,
    clean: bool,
) -> Table:
    """Build the table of records, each a list of fields or why there are none.

    Args:
        origin: The file.
        records: Line and fields, or what is wrong with them.
        delimiter: What divides fields, for messages.
        columns: Names of the columns; none to take them from the first record.
        clean: Whether all bytes of the file could be decoded and none is zero.

    Returns:
        The table.

    Raises:
        UserError: If there is no header, or all rows have another width than it.
    """
    rows: list[tuple[str, ...]] = []
    lines: list[str] = []
    bad: list[str] = []
    widths: Counter[int] = Counter()
    for line, fields in records:
        if isinstance(fields, str):
            if not columns:  # the rows below have no names then
                raise UserError(f"{origin}, line {line}: {fields}")
            bad.append(f"{origin}, line {line}: {fields}")
            continue
        if not fields:
            continue
        if (not columns or len(fields) < len(columns)) and not "".join(fields).strip():
            continue
        if not columns:
            columns = _header(origin, line, fields)
            continue
        damage = "" if clean else _damage("".join(fields))
        if damage:
            bad.append(f"{origin}, line {line}: {damage}")
        elif len(fields) != len(columns):
            widths[len(fields)] += 1
            bad.append(_ragged(origin, line, fields, columns, delimiter))
        else:
            rows.append(tuple(fields))
            lines.append(f"line {line}")
    while rows and not "".join(rows[-1]).strip():  # as spreadsheets leave them
        del rows[-1], lines[-1]
    if not rows and len(widths) == 1 and widths.total() == len(bad) > 1:
        width = next(iter(widths))
        raise UserError(
            f"{origin}: each of its {len(bad):,} rows has {width} field(s), and "
            f"{len(columns)} columns are named ({', '.join(columns)[:120]}). Name "
            f"{width} columns in the first line, or, if it holds no names, with "
            "--column-names."
        )
    return Table(origin, columns, tuple(rows), tuple(lines), bad=tuple(bad))


def _quoted_records(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the first line of each record of a csv with its fields, or what's wrong."""
    stand_in = ""
    if "\r" in text and _line_end(text) == "\n" and LONE_RETURN.search(text):
        # Part of a text where lines end otherwise; the csv module ends a row there.
        stand_in = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
        text = LONE_RETURN.sub(stand_in, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        limit = csv.field_size_limit(FIELD_LIMIT)  # of the process: put back each time
        try:
            fields: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lost = reader.line_num - start
            fields = (
                f"not readable as csv ({error})"
                + (f", and {lost:,} line(s) after it are lost with it" if lost else "")
                + ". If quotes are plain text in this file, say --quoting none."
            )
        finally:
            csv.field_size_limit(limit)
        if stand_in and isinstance(fields, list):
            fields = [field.replace(stand_in, "\r") for field in fields]
        yield start, fields


def _guess_delimiter(text: str, quoted: bool, width: int) -> str:
    """Return the sign that divides the first lines alike: many a csv has tabs or `;`.

    Args:
        text: The file's text.
        quoted: Whether fields may be quoted.
        width: Number of columns, if it is known; otherwise 0.
    """
    head = text[:100_000]
    chosen = _EXCEL_DELIMITER.match(head)
    if chosen and chosen[1] in DELIMITERS:
        return chosen[1]
    best, best_score = ",", (0, 0)
    for delimiter in DELIMITERS:
        records = (_quoted_records if quoted else plain_records)(head, delimiter)
        first = [fields for _, fields in islice(records, 20)]
        widths = [
            len(fields) for fields in first if fields and isinstance(fields, list)
        ]
        expected = width or (widths[0] if widths else 0)
        if expected > 1:
            score = (sum(w == expected for w in widths), expected)
            if score > best_score:
                best, best_score = delimiter, score
    return best


def _damage(row: str) -> str:
    foreign = foreign_bytes(row)
    if foreign:
        return NOT_TEXT.format(foreign)
    if "\0" in row:
        return (
            "holds a zero byte, so the file is damaged or in UTF-16; repair the row, or "
            "name the encoding with --encoding."
        )
    return ""


def _header(origin: str, line: int, fields: list[str]) -> tuple[str, ...]:
    """Return the names of the columns; one without a name is called by its number."""
    names = tuple(
        name.strip() or f"column_{number}"
        for number, name in enumerate(fields, start=1)
    )
    foreign = foreign_bytes("".join(names))
    if foreign:
        raise UserError(f"{origin}, line {line}: " + NOT_TEXT.format(foreign))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"{origin}: the first line names {', '.join(map(repr, repeated))} more than "
            "once. If it is an example rather than a header, give the names with "
            "--column-names; otherwise rename one of them."
        )
    return names


def _ragged(
    origin: str, line: int, fields: list[str], columns: tuple[str, ...], delimiter: str
) -> str:
    return (
        f"{origin}, line {line}: {len(fields)} field(s) where {len(columns)} were "
        f"expected ({', '.join(columns)[:120]}). The likely cause is a "
        f"{DELIMITERS[delimiter]} or a quote inside a text: quote such fields "
        "(--quoting csv), take quotes as plain text (--quoting none), or save the file "
        "as jsonl."
    )
