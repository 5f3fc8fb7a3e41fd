"""FASTA: sequences of proteins, each under a line that begins with `>` and names it.

A file says nothing of classes, so they come from one of two places: a file for each
class, whose name is the class; or words such as `label=thermophilic` in the name line,
where UniProt has its `OX=9606`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bidora.data.encodings import read_text
from bidora.data.files import SEQUENCE_FILES
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["classes_of_files", "fasta_source", "fasta_table"]

REMEDY = (
    "since a FASTA file has no labels of its own, write one into each name line, as in "
    "'>P12345 label=1', or pass a folder with a file for each class"
)
_WORD = re.compile(r"(?<!\S)([A-Za-z_]\w*)=(\S+)")


def fasta_table(origin: str, text: str) -> Table:
    r"""Return the table of a FASTA file: one row a sequence.

    Args:
        origin: The file, for messages.
        text: What it holds.

    Returns:
        Columns `sequence` and `name` (the first word of the name line), and one for each
        `key=value` that most name lines have, with None for the others. A row's place is
        its name line.

    Raises:
        UserError: If the text begins with anything but a name line.

    Example:
        >>> table = fasta_table("t.fasta", ">P1 label=yes\nMK\nV\n>P2 label=no\nAC\n")
        >>> table.columns, table.rows[0]
        (('sequence', 'name', 'label'), ('MKV', 'P1', 'yes'))
    """
    found: list[tuple[int, str, str]] = []
    bad: list[str] = []
    for line, head, sequence in _records(origin, text):
        if sequence:
            found.append((line, head, sequence))
        else:
            name = _name(head) or "without a name"
            bad.append(f"{origin}, line {line}: the sequence {name} has no residues.")
    words = [dict(_WORD.findall(head)) for _, head, _ in found]
    counts = Counter(key for own in words for key in own)
    keys = [k for k, count in counts.items() if 2 * count > len(words)]
    keys = [k for k in keys if k not in ("sequence", "name")]
    return Table(
        origin,
        ("sequence", "name", *keys),
        tuple(
            (sequence, _name(head), *(own.get(key) for key in keys))
            for (_, head, sequence), own in zip(found, words, strict=True)
        ),
        tuple(f"line {line}" for line, _, _ in found),
        bad=tuple(bad),
        remedy=REMEDY,
    )


def classes_of_files(folder: Path) -> dict[str, Path]:
    """Return the FASTA files of a folder by what their names say, if that is classes.

    Args:
        folder: Where to look.

    Returns:
        Files by name without suffix; none where there are fewer than two, or where one
        of them is `train`, so that the files are parts.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        plain = path.name.removesuffix(".gz")
        if path.is_file() and Path(plain.lower()).suffix in SEQUENCE_FILES:
            found[Path(plain).stem] = path
    parts = {"train", "training"} & {stem.lower() for stem in found}
    return {} if parts or len(found) < 2 else found


def fasta_source(
    files: Mapping[str, Path], *, encoding: str = "auto", **hints: Any
) -> Source:
    """Read a class from each file; the job holds back a part for testing.

    Args:
        files: The file of each class, by the class' name.
        encoding: Of the text; `auto` to see from the bytes.
        hints: What else is known of the data.

    Returns:
        A source with the part `train`.

    Raises:
        UserError: If a file can't be read.
    """
    rows: list[tuple[Any, ...]] = []
    lines: list[str] = []
    bad: list[str] = []
    notes: list[str] = []
    for name, path in files.items():
        text, note = read_text(path, encoding)
        # Named as places of the whole table are: its folder, the file, the line.
        table = fasta_table(f"{path.parent}, {path.name}", text)
        rows += [(row[0], row[1], name) for row in table.rows]
        lines += [f"{path.name}, {line}" for line in table.lines]
        bad += table.bad
        notes += [note] if note else []
    folder = str(next(iter(files.values())).parent)
    train = Table(
        folder, ("sequence", "name", "label"), tuple(rows), tuple(lines), bad=tuple(bad)
    )
    told = [f"{folder}: a class of sequences a file ({', '.join(files)})", *notes]
    known = {
        "task_type": "classification",
        "text_column": "sequence",
        "label_column": "label",
        "proteins": True,
    }
    return Source(folder, {"train": train}, "; ".join(told), {**known, **hints})


def _records(origin: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, name line and sequence of each record."""
    head, start = "", 0
    residues: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(">"):
            if start:
                yield start, head, "".join(residues)
            head, start, residues = line[1:], number, []
        elif line.strip() and not line.startswith(";"):
            if not start:
                raise UserError(
                    f"{origin}, line {number}: a FASTA file begins with a line such as "
                    f"'>P12345', and this one with {line[:40]!r}. Save a table of "
                    "sequences as csv or jsonl."
                )
            residues.append("".join(line.split()))
    if start:
        yield start, head, "".join(residues)


def _name(head: str) -> str:
    return head.split(maxsplit=1)[0] if head.split() else ""
