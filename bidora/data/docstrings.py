"""A text classification data set that every Python carries: its own docstrings.

The first paragraph of the docstring of each public class, function and method of the
standard library, labelled with the top-level package that it comes from. The source
files are parsed and never imported, so nothing of them runs.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bidora.data.source import PARTS, Source
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["MASK", "Docstring", "collect_docstrings", "docstrings_source"]

MASK = "[MASK]"
"""What stands in a text where the name of its own package stood."""

SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib-dynload",
        "test",
        "tests",
        "idle_test",
    }
)
"""Folders of the library that hold other packages, binaries or tests."""


class Docstring(NamedTuple):
    """One example: a masked first paragraph and the package it comes from."""

    package: str
    text: str


def docstrings_source(
    seed: int = 0,
    *,
    num_packages: int = 12,
    train_per_class: int = 20,
    max_test_per_class: int = 100,
    max_validation_per_class: int = 50,
    root: Path | None = None,
) -> Source:
    """Ask which package of the standard library a text is from.

    The classes are the packages with the most distinct docstrings. The texts of a class
    are in the order of the SHA-256 of a seed and the text. By seed 0, whatever `seed`
    is, those after the first `train_per_class` test, `max_test_per_class` at most; of
    the others, by `seed`, the first `train_per_class` train and the next
    `max_validation_per_class` validate. So no seed trains on, or chooses by, what
    another tests with.

    Args:
        seed: Seed of what trains and what validates.
        num_packages: Number of classes.
        train_per_class: Training examples of each class.
        max_test_per_class: Test examples of each class, at most.
        max_validation_per_class: Validation examples of each class, at most; a class
            whose texts the other parts use up has none.
        root: Folder of the library's source files; this Python's own by default.

    Returns:
        Columns `text` and `label`.

    Raises:
        UserError: If the source files are not there.
    """
    root = _library_folder() if root is None else root
    by_package: dict[str, list[str]] = defaultdict(list)
    for docstring in collect_docstrings(root):
        by_package[docstring.package].append(docstring.text)
    enough = {
        package: texts
        for package, texts in by_package.items()
        if len(texts) > train_per_class and not package.startswith("_")
    }
    if len(enough) < num_packages:
        raise UserError(
            f"the docstring task found {len(enough)} packages with more than "
            f"{train_per_class} docstrings under {root}, and needs {num_packages}. "
            "This Python seems to come without its library's source files; use "
            "another Python, or your own texts with --task FILE.csv."
        )
    largest = sorted(enough, key=lambda p: (-len(enough[p]), p))[:num_packages]
    rows: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for name in sorted(largest):
        texts = sorted(enough[name], key=lambda text: _place(0, text))
        begin, end = train_per_class, train_per_class + max_test_per_class
        others = sorted(
            texts[:begin] + texts[end:], key=lambda text: _place(seed, text)
        )
        chosen = {
            "train": others[:begin],
            "validation": others[begin : begin + max_validation_per_class],
            "test": texts[begin:end],
        }
        for part, those in chosen.items():
            rows[part] += [(text, name) for text in those]
    return Source(
        name="docstrings",
        parts={part: _table(part, rows[part]) for part in PARTS if rows[part]},
        note=(
            "first paragraphs of the docstrings of this Python's standard library; "
            "the label is the package, its name masked in the text."
        ),
        hints={
            "task_type": "classification",
            "text_column": "text",
            "label_column": "label",
            "max_length": 32,
        },
    )


def collect_docstrings(root: Path | None = None) -> tuple[Docstring, ...]:
    """Collect the library's docstrings, masked and without duplicates.

    A text that occurs twice in one package is kept once; a text that occurs in several
    packages has no right label and is left out. A process parses a folder once: files
    that change later are not seen.

    Args:
        root: Folder of the library's source files; this Python's own by default.

    Returns:
        Docstrings in the order of the files' paths, then of the lines.
    """
    return _collected(_library_folder() if root is None else root)


@lru_cache(maxsize=2)  # parsing takes seconds, and a comparison asks for every run
def _collected(root: Path) -> tuple[Docstring, ...]:
    seen: dict[Docstring, None] = {}
    for path in _source_files(root):
        package = _public_name(path.relative_to(root).parts[0].removesuffix(".py"))
        for paragraph in _first_paragraphs(path):
            text = _mask(paragraph, package)
            if any(character.isalpha() for character in text.replace(MASK, "")):
                seen[Docstring(package, text)] = None
    homes = Counter(docstring.text for docstring in seen)
    return tuple(docstring for docstring in seen if homes[docstring.text] == 1)


def _library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(folder: Path) -> Iterator[Path]:
    """Yield the source files below `folder` in an order that no platform changes."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.is_dir():
            if entry.name not in SKIPPED_FOLDERS and not entry.is_symlink():
                yield from _source_files(entry)
        elif entry.suffix == ".py":
            yield entry


def _public_name(package: str) -> str:
    """Return the name that people import: `_pydecimal` is where decimal is written."""
    return package.removeprefix("_py") if package.startswith("_py") else package


def _first_paragraphs(path: Path) -> Iterator[str]:
    """Yield the first paragraph of each public docstring of a source file."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return  # parsing is what takes the time
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in files that are not ours
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from _walk(tree.body)


def _walk(body: list[ast.stmt]) -> Iterator[str]:
    """Yield first paragraphs of public definitions, and of those inside classes."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            yield re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
        if isinstance(node, ast.ClassDef):
            yield from _walk(node.body)


def _mask(text: str, package: str) -> str:
    """Normalise white space and mask the package's name, whatever its case."""
    text = " ".join(text.split())
    return re.sub(re.escape(package), MASK, text, flags=re.IGNORECASE)


def _place(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode(errors="replace")).digest()


def _table(part: str, rows: list[tuple[str, str]]) -> Table:
    lines = tuple(f"row {number}" for number in range(1, len(rows) + 1))
    return Table(f"docstrings ({part})", ("text", "label"), tuple(rows), lines)
