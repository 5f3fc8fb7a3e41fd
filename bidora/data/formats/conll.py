"""Column files: one word a line with its tags beside it, a blank line after a sentence.

CoNLL-2003 and its kin divide columns by blanks, JNLPBA and most biomedical files by
tabs; which of them a file uses is seen from its lines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bidora.data.encodings import foreign_bytes, read_text
from bidora.data.files import refuse_empty
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["SUFFIXES", "conll_source", "is_conll", "read_conll"]

SUFFIXES = (".txt", ".conll", ".bio", ".iob", ".iob2", ".tsv")
"""How the names of column files end, if they end in anything (each also with .gz)."""

STEMS = {
    "train": ("eng.train", "train", "genia4ertask1"),
    "validation": ("eng.testa", "validation", "valid", "dev", "devel"),
    "test": ("eng.testb", "test", "genia4ereval1"),
}
"""Names under which a folder's parts are looked for, without suffix, in this order."""

_DOCUMENT_LINES = ("-DOCSTART-", "###MEDLINE:")
# CoNLL-U and MultiCoNER tell what a sentence is: `# sent_id = 7`, `# id 7 domain=en`.
_COMMENT = re.compile(r"# (?:\w+ =(?: |$)|id \S+ domain=)")
_TAG = re.compile(r"O|[BI](?:-\S+)?")

_Words = list[tuple[int, list[str]]]
"""A sentence's lines: number and fields."""


def read_conll(
    path: Path, *, token_column: int = 0, tag_column: int = -1, encoding: str = "auto"
) -> Table:
    r"""Read a column file: one row a sentence, with its words and its tags.

    A sentence with a line of another width than the file's is told in `bad`, and is no
    row. A file of a single column has words only.

    Args:
        path: The file; one that is compressed with gzip is decompressed.
        token_column: Where the word stands in a line, from 0; from the end if negative.
        tag_column: Where its tag stands.
        encoding: Of the text; `auto` to see from the bytes.

    Returns:
        A table with the columns `tokens` and `tags`, whose values are lists of words. A
        row's place is the line of its first word.

    Raises:
        UserError: If the file cannot be read, holds no sentence, or has no such column.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.txt"
        >>> _ = path.write_text("EU B-ORG\nrejects O\n\nPeter B-PER\n")
        >>> read_conll(path).rows[0]
        (['EU', 'rejects'], ['B-ORG', 'O'])
    """
    return _read(path, token_column, tag_column, encoding)[0]


def is_conll(path: Path) -> bool:
    """Return whether a file, or a folder's training file, has columns that end in tags.

    Args:
        path: File or folder.

    Raises:
        UserError: If the file cannot be read.
    """
    if path.is_dir():
        found = _find(path, "train")
        return found is not None and is_conll(found)
    if not path.is_file():
        return False
    head = "\n".join(read_text(path).text.split("\n", 500)[:500])
    lines = [fields for words in _split_sentences(head) for _, fields in words]
    tagged = sum(len(f) > 1 and _TAG.fullmatch(f[-1]) is not None for f in lines)
    return bool(lines) and tagged >= 0.9 * len(lines)


def conll_source(
    path: Path, *, token_column: int = 0, tag_column: int = -1, encoding: str = "auto"
) -> Source:
    """Read a folder in the layout of CoNLL-2003, JNLPBA or `train.txt`, or one file.

    Looked for are `eng.train`, `eng.testa` and `eng.testb`; `train`, `dev` (`valid`,
    `validation`, `devel`) and `test`; or `Genia4ERtask1` and `Genia4EReval1`. Each may
    end in one of `SUFFIXES`, and in `.gz`.

    Args:
        path: Folder, or the file to train on.
        token_column: As in `read_conll`.
        tag_column: As in `read_conll`.
        encoding: As in `read_conll`.

    Returns:
        The parts that are there. A test file without tags is left out.

    Raises:
        UserError: If there is no file to train on, or one of them cannot be read.
    """
    files = {"train": path}
    if path.is_dir():
        found = {part: _find(path, part) for part in STEMS}
        files = {part: file for part, file in found.items() if file is not None}
        if "train" not in files:
            raise UserError(_no_training_file(path))
    parts: dict[str, Table] = {}
    notes: list[str] = []
    for part, file in files.items():
        parts[part], guess = _read(file, token_column, tag_column, encoding)
        hidden = "" if "tags" in parts[part].columns else ", left out: it has no tags"
        notes.append(f"{part} examples from {file}{hidden}")
        notes += [guess] if guess else []
    if "tags" not in parts["train"].columns:
        raise UserError(
            f"{files['train']} has one column, which leaves no tags to learn from; a "
            "column file holds a word and its tag in each line, divided by a blank or "
            "a tab."
        )
    refuse_empty(parts["train"])
    tagged = {part: table for part, table in parts.items() if "tags" in table.columns}
    return Source(str(path), tagged, "; ".join(notes), {"task_type": "tagging"})


def _read(
    path: Path, token_column: int, tag_column: int, encoding: str
) -> tuple[Table, str]:
    """Return a file's table, and a sentence where its encoding had to be guessed."""
    text, note = read_text(path, encoding)
    sentences = _split_sentences(text)
    if not sentences:
        raise UserError(
            f"{path} has no sentences; a column file holds one word a line, its tag "
            "beside it, and a blank line between sentences."
        )
    widths = Counter(len(fields) for sentence in sentences for _, fields in sentence)
    width = widths.most_common(1)[0][0]
    chosen = _columns(path, width, token_column, tag_column)
    rows: list[tuple[list[str], ...]] = []
    places: list[str] = []
    bad: list[str] = []
    for words in sentences:
        fault = _fault(words, width, chosen)
        if fault:
            bad.append(f"{path}, {fault}")
            continue
        rows.append(tuple([fields[c] for _, fields in words] for c in chosen))
        places.append(f"line {words[0][0]}")
    names = ("tokens", "tags")[: len(chosen)]
    table = Table(str(path), names, tuple(rows), tuple(places), bad=tuple(bad))
    return table, note


def _sentences(text: str) -> Iterator[list[tuple[int, str]]]:
    """Yield the numbered lines of each sentence, without the lines of documents."""
    # Not str.splitlines, which ends lines at signs that stand in words.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    sentence: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith(_DOCUMENT_LINES):
            sentence.append((number, line))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _split_sentences(text: str) -> list[_Words]:
    """Return the lines of each sentence as fields, without comments before it."""
    sentences = list(_sentences(text))
    tabs = ["\t" in line.rstrip() for sentence in sentences for _, line in sentence]
    divided = 2 * sum(tabs) >= len(tabs)
    split = ([(n, _fields(line, divided)) for n, line in s] for s in sentences)
    return list(filter(None, map(_without_comments, split)))


def _fields(line: str, tabs: bool) -> list[str]:
    # Not split() without a sign: a no-break space may be part of a word.
    if tabs:
        return [field.strip(" ") for field in line.rstrip(" \t").split("\t")]
    fields = line.strip(" \t").replace("\t", " ").split(" ")
    return list(filter(None, fields)) if "" in fields else fields


def _columns(path: Path, width: int, token: int, tag: int) -> tuple[int, ...]:
    for option, column in (("token_column", token), ("tag_column", tag)):
        if not -width <= column < width:
            raise UserError(
                f"{path} has {width} column(s), so there is none at "
                f"{option}={column}; count from 0, or from -1 at the end."
            )
    columns = (token % width, tag % width)
    if columns[0] != columns[1]:
        return columns
    if width > 1:
        raise UserError(
            f"{path}: token_column={token} and tag_column={tag} are the same of its "
            f"{width} columns; words and tags need one each."
        )
    return columns[:1]


def _without_comments(sentence: _Words) -> _Words:
    for index, (_, fields) in enumerate(sentence):
        if not _COMMENT.match(" ".join(fields)):
            return sentence[index:]
    return []


def _fault(words: _Words, width: int, chosen: tuple[int, ...]) -> str:
    """Return what is wrong with a sentence's lines; nothing if all is well."""
    wrong = [
        (number, fields)
        for number, fields in words
        if len(fields) != width
        or not all(fields[c] for c in chosen)
        or foreign_bytes("".join(fields))
    ]
    if not wrong:
        return ""
    number, fields = wrong[0]
    more = f", and {len(wrong) - 1} more of this sentence" if len(wrong) > 1 else ""
    foreign = foreign_bytes("".join(fields))
    if foreign:
        return (
            f"line {number}: {foreign} does not belong to the file's encoding{more}. "
            "Name the encoding with --encoding, or repair the line."
        )
    what = (
        "an empty field"
        if len(fields) == width
        else f"{len(fields)} field(s) where the file has {width}"
    )
    return f"line {number}: {what} ({' | '.join(fields)[:80]}){more}"


def _find(folder: Path, part: str) -> Path | None:
    """Return the file of a part; a compressed one where it has no plain twin."""
    by_name: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir(), key=lambda f: (len(f.name), f.name)):
        name = file.name.lower().removesuffix(".gz")
        stem = next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)
        if file.is_file():
            by_name.setdefault(stem, []).append(file)
    for stem in STEMS[part]:
        files = by_name.get(stem, [])
        kinds = {f.name.lower().removesuffix(".gz") for f in files}
        if len(kinds) > 1:
            raise UserError(
                f"{folder} holds several files that may be its {part} part: "
                f"{', '.join(f.name for f in files)}; keep one of them."
            )
        if files:
            return files[0]
    return None


def _no_training_file(folder: Path) -> str:
    return (
        f"the folder {folder} holds no column file to train on (eng.train, train.txt, "
        "train.conll, train.tsv, train.iob2 or Genia4ERtask1.iob2, each also with "
        ".gz). CoNLL-2003 comes from https://www.clips.uantwerpen.be/conll2003/ner/ "
        "and needs the Reuters corpus RCV1; JNLPBA's Genia4ERtraining.tar.gz and "
        "Genia4ERtest.tar.gz come from "
        "http://www.nactem.ac.uk/GENIA/current/Shared-tasks/JNLPBA/. Put the unpacked "
        "files in this folder, or name the file itself."
    )
