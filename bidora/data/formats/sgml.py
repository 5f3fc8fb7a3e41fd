"""Reuters-21578: news of 1987 with their topics, in its three published splits.

It is distributed as 22 SGML files, `reut2-000.sgm` to `reut2-021.sgm`. A copy as JSON
lines is read too, with an object a document: `newid`, `lewissplit`, `cgisplit`,
`topics_attr` (the attribute TOPICS), `topics`, `title` and `body`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidora.data.encodings import foreign_bytes, read_text
from bidora.data.files import read_file, refuse_empty
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["EMPTY_TEXT", "SPLITS", "is_reuters", "reuters_source"]


@dataclass(frozen=True)
class _Split:
    """Which documents a split takes: values of one attribute, and of TOPICS."""

    attribute: str
    train: str
    test: str
    topics: frozenset[str]
    sizes: tuple[int, int]


SPLITS = {
    "modapte": _Split("lewissplit", "TRAIN", "TEST", frozenset({"YES"}), (9603, 3299)),
    "modhayes": _Split(
        "cgisplit",
        "TRAINING-SET",
        "PUBLISHED-TESTSET",
        frozenset({"YES", "NO", "BYPASS"}),
        (20856, 722),
    ),
    "modlewis": _Split(
        "lewissplit", "TRAIN", "TEST", frozenset({"YES", "NO"}), (13625, 6188)
    ),
}
"""The splits that the collection's README defines, with the documents in each part."""

EMPTY_TEXT = "(no text)"
"""Stands for the text of a document without any, so that the published counts hold."""

FILES = 22

_SGML_NAME = re.compile(r"reut2-(\d{3})\.sgm(?:\.gz)?", re.IGNORECASE)
_START = re.compile(r"<REUTERS\b([^>]*)>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r'([A-Z]+)\s*=\s*"([^"]*)"', re.IGNORECASE)
_TEXT = re.compile(
    r'<TEXT\b[^>]*?(?:TYPE\s*=\s*"(\w+)"[^>]*)?>(.*)</TEXT>', re.IGNORECASE | re.DOTALL
)
_ENTITY = re.compile(r"&(?:#(\d{1,7})|(lt|gt|amp|quot|apos));", re.IGNORECASE)
_NAMED = {"lt": "<", "gt": ">", "amp": "&", "quot": '"', "apos": "'"}
_TEXTS = ("lewissplit", "cgisplit", "topics_attr", "title", "body")

_Found = tuple[str, dict[str, Any] | str]
"""A document's place, and the document or what is wrong with it."""


def reuters_source(path: Path, split: str = "modapte") -> Source:
    """Read Reuters-21578, in one of its published splits.

    The text is title and body with a line break between. Documents with a title alone
    (`BRIEF`), with a body alone (`UNPROC`) and without a topic stay in their split.

    Args:
        path: Folder with `reut2-*.sgm` or `reuters21578.jsonl`, each also with `.gz`;
            or one such file.
        split: `modapte`, `modhayes` or `modlewis`.

    Returns:
        Parts `train` and `test` with the columns `text` and `labels`, a list of topics.

    Raises:
        UserError: If there is no such split, or the files are missing or incomplete.
    """
    name = split.lower()
    if name not in SPLITS:
        raise UserError(
            f"unknown split {split!r} of Reuters-21578; choose one of "
            f"{', '.join(SPLITS)}."
        )
    chosen = SPLITS[name]
    rows: dict[str, list[tuple[str, list[str]]]] = {"train": [], "test": []}
    places: dict[str, list[str]] = {"train": [], "test": []}
    bad: list[str] = []
    empty: list[str] = []
    for place, document in _documents(path):
        if isinstance(document, str):
            bad.append(
                f"{path}, {place}: {document}" if place else f"{path}, {document}"
            )
            continue
        part = _part(document, chosen)
        if part is None:
            continue
        text = "\n".join(filter(None, (document[k].strip() for k in ("title", "body"))))
        if not text:
            empty.append(f"{place} ({part})")
        rows[part].append((text or EMPTY_TEXT, list(dict.fromkeys(document["topics"]))))
        places[part].append(place)
    tables = {
        part: Table(
            str(path),
            ("text", "labels"),
            tuple(rows[part]),
            tuple(places[part]),
            bad=tuple(bad) if part == "train" else (),
        )
        for part in rows
        if rows[part] or part == "train"
    }
    refuse_empty(tables["train"])
    hints = {
        "task_type": "multilabel",
        "text_column": "text",
        "label_column": "labels",
        "metric": "f1_micro",
    }
    return Source(str(path), tables, _note(path, name, rows, empty), hints)


def is_reuters(path: Path) -> bool:
    """Return whether a file or folder is named like Reuters-21578.

    Args:
        path: File or folder.
    """
    return bool(_sgml_files(path)) or _json_file(path) is not None


def _note(path: Path, split: str, rows: dict[str, list[Any]], empty: list[str]) -> str:
    sizes = (len(rows["train"]), len(rows["test"]))
    note = f"Reuters-21578 from {path}, split {split}: {sizes[0]:,} and {sizes[1]:,}"
    expected = SPLITS[split].sizes
    if sizes != expected:
        note += f", where the whole collection has {expected[0]:,} and {expected[1]:,}"
    if empty:
        note += f"; without any text, so read as {EMPTY_TEXT!r}: {', '.join(empty)}"
    return note


def _part(document: dict[str, Any], split: _Split) -> str | None:
    if document["topics_attr"] not in split.topics:
        return None
    return {split.train: "train", split.test: "test"}.get(document[split.attribute])


def _documents(path: Path) -> Iterator[_Found]:
    files = _sgml_files(path)
    if files:
        _check_complete(path, files)
        for file in files:
            for place, document in _read_sgml(file):
                yield (f"{file.name}, {place}" if path.is_dir() else place), document
        return
    file = _json_file(path)
    if file is None:
        raise UserError(
            f"{path} holds neither reut2-000.sgm to reut2-{FILES - 1:03}.sgm nor "
            "reuters21578.jsonl (each also with .gz). Reuters-21578 is "
            "reuters21578.tar.gz at http://kdd.ics.uci.edu/databases/reuters21578/ or "
            "https://archive.ics.uci.edu/dataset/137; unpack it there."
        )
    yield from _read_json(file)


def _sgml_files(path: Path) -> list[Path]:
    candidates = path.iterdir() if path.is_dir() else [path]
    found: dict[str, Path] = {}
    for file in sorted(candidates):  # a plain file stands before its .gz
        name = _SGML_NAME.fullmatch(file.name)
        if name and file.is_file():
            found.setdefault(name.group(1), file)
    return [found[number] for number in sorted(found)]


def _check_complete(path: Path, files: list[Path]) -> None:
    if path.is_file():
        return
    numbers = {int(file.name[6:9]) for file in files}
    missing = sorted(set(range(max(numbers))) - numbers)
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(f'reut2-{n:03}.sgm' for n in missing)} of "
            "Reuters-21578; they come with the others in reuters21578.tar.gz "
            "(https://archive.ics.uci.edu/dataset/137)."
        )


def _json_file(path: Path) -> Path | None:
    if path.is_dir():
        names = (path / "reuters21578.jsonl", path / "reuters21578.jsonl.gz")
        return next(filter(Path.is_file, names), None)
    is_json = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    return (
        path if is_json and path.is_file() and "reuters" in path.name.lower() else None
    )


def _read_sgml(path: Path) -> Iterator[_Found]:
    text = read_text(path, "utf-8").text
    if foreign_bytes(text):
        text = read_text(path, "latin-1").text  # as distributed
    starts = list(_START.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    if not starts:
        raise UserError(
            f"{path} holds no <REUTERS> element, so it is no file of Reuters-21578, or "
            "it was damaged."
        )
    line, read_to = 1, 0
    for start, end in zip(starts, ends, strict=True):
        line += text.count("\n", read_to, start.start())
        read_to = start.start()
        inside = text[start.end() : end]
        yield f"line {line}", _parse(start.group(1), inside)


def _parse(opening: str, inside: str) -> dict[str, Any] | str:
    attributes = {k.lower(): v for k, v in _ATTRIBUTE.findall(opening)}
    missing = {"topics", "lewissplit", "cgisplit", "newid"} - set(attributes)
    if missing:
        return f"a <REUTERS> element without {', '.join(sorted(missing)).upper()}"
    content, closing, _ = _partition(inside, "</REUTERS>")
    text = _TEXT.search(content)
    if not closing or text is None:
        return f"document {attributes['newid']} has no end or no text; it was cut"
    body = _element(text.group(2), "BODY")
    if (text.group(1) or "").upper() == "UNPROC":
        body = text.group(2)
    return {
        "lewissplit": attributes["lewissplit"],
        "cgisplit": attributes["cgisplit"],
        "topics_attr": attributes["topics"],
        "topics": [_clean(t) for t in _elements(_element(content, "TOPICS"), "D")],
        "title": _clean(_element(text.group(2), "TITLE")),
        "body": _clean(body),
    }


def _partition(text: str, tag: str) -> tuple[str, str, str]:
    at = text.upper().find(tag)
    if at < 0:
        return text, "", ""
    return text[:at], tag, text[at + len(tag) :]


def _elements(text: str, name: str) -> list[str]:
    return re.findall(rf"<{name}>(.*?)</{name}>", text, re.IGNORECASE | re.DOTALL)


def _element(text: str, name: str) -> str:
    return next(iter(_elements(text, name)), "")


def _clean(text: str) -> str:
    """Resolve entities, once, and drop control characters but tabs and line ends."""
    text = _ENTITY.sub(_resolve, text).replace("\r\n", "\n")
    kept = (c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return "".join(kept).strip("\n")


def _resolve(entity: re.Match[str]) -> str:
    number, name = entity.groups()
    if name:
        return _NAMED[name.lower()]
    return chr(int(number)) if int(number) < 0xD800 else "\N{REPLACEMENT CHARACTER}"


def _read_json(path: Path) -> Iterator[_Found]:
    table = read_file(path).table
    for fault in table.bad:
        yield "", fault.removeprefix(f"{path}, ")
    for row, line in zip(table.rows, table.lines, strict=True):
        yield line, _checked(dict(zip(table.columns, row, strict=True)))


def _checked(document: dict[str, Any]) -> dict[str, Any] | str:
    """Return the document, or which of its fields are missing or of another kind."""
    wrong = [key for key in _TEXTS if not isinstance(document.get(key), str)]
    topics = document.get("topics")
    if not isinstance(topics, list) or not all(isinstance(t, str) for t in topics):
        wrong.append("topics")
    if wrong:
        return (
            f"a document without {', '.join(wrong)}; the texts are "
            f"{', '.join(_TEXTS)}, and topics is a list of them."
        )
    return document
