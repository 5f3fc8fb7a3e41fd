"""The docstrings of the standard library as a data set that every Python carries."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

import bidora.data.docstrings
from bidora.data.docstrings import (
    MASK,
    Docstring,
    collect_docstrings,
    docstrings_source,
)
from bidora.data.source import Source
from bidora.errors import UserError


@pytest.fixture(scope="module")
def docstrings() -> list[Docstring]:
    return list(collect_docstrings())


@pytest.fixture(scope="module")
def source(docstrings: list[Docstring]) -> Source:
    return source_of(docstrings, seed=0)


def source_of(docstrings: list[Docstring], seed: int) -> Source:
    """Build the source without parsing the library again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bidora.data.docstrings, "collect_docstrings", lambda root: docstrings
        )
        return docstrings_source(seed)


def test_docstrings_are_read_without_import(docstrings: list[Docstring]) -> None:
    assert docstrings
    assert not {"antigravity", "this", "idlelib.pyshell"} & set(sys.modules)


def test_docstrings_are_many_distinct_and_one_line(
    docstrings: list[Docstring],
) -> None:
    assert len(docstrings) > 4000
    texts = [docstring.text for docstring in docstrings]
    assert len(set(texts)) == len(texts)
    assert all(text == " ".join(text.split()) for text in texts)


def test_docstrings_never_name_their_package(docstrings: list[Docstring]) -> None:
    for docstring in docstrings:
        unmasked = docstring.text.replace(MASK, "").lower()
        assert docstring.package.lower() not in unmasked


def test_docstrings_of_tests_and_other_packages_are_left_out(
    docstrings: list[Docstring],
) -> None:
    packages = {docstring.package for docstring in docstrings}
    assert "asyncio" in packages
    assert not packages & {"test", "site-packages", "torch", "peft"}


def test_parts_have_the_promised_sizes(source: Source) -> None:
    counts = {
        part: Counter(table.values("label")) for part, table in source.parts.items()
    }
    assert list(counts) == ["train", "validation", "test"]
    assert len(counts["train"]) == 12
    assert set(counts["train"].values()) == {20}
    assert set(counts["test"]) == set(counts["train"])
    assert max(counts["test"].values()) <= 100
    assert max(counts["validation"].values()) <= 50
    assert not any(name.startswith("_") for name in counts["train"])
    texts = [text for table in source.parts.values() for text in table.values("text")]
    assert len(set(texts)) == len(texts)
    assert source.train.values("label") == sorted(source.train.values("label"))


def test_hints_make_it_a_classification_of_short_texts(source: Source) -> None:
    assert source.hints["task_type"] == "classification"
    assert source.hints["max_length"] == 32


@pytest.mark.parametrize("seed", [0, 3])
def test_the_order_of_hashes_decides_who_trains_and_who_tests(
    docstrings: list[Docstring], seed: int
) -> None:
    source = source_of(docstrings, seed)
    by_package: dict[str, list[str]] = {}
    for package, text in docstrings:
        by_package.setdefault(package, []).append(text)

    def ordered(texts: list[str], seed: int) -> list[str]:
        return sorted(texts, key=lambda t: sha256(f"{seed}\n{t}".encode()).digest())

    for name in set(source.train.values("label")):
        test = ordered(by_package[name], 0)[20:120]
        train = ordered([t for t in by_package[name] if t not in test], seed)[:20]
        for part, chosen in (("train", train), ("test", test)):
            rows = source.parts[part].rows
            assert [text for text, label in rows if label == name] == chosen


def test_no_seed_learns_from_what_another_tests_with(
    docstrings: list[Docstring],
) -> None:
    """A sweep by one seed chooses what others are scored with."""
    first, other = (source_of(docstrings, seed) for seed in (0, 100))
    tested = set(first.parts["test"].values("text"))
    assert set(other.parts["test"].values("text")) == tested
    for part in ("train", "validation"):
        assert not tested & set(other.parts[part].values("text"))


def test_split_depends_on_the_seed_and_not_on_the_order(
    source: Source, docstrings: list[Docstring]
) -> None:
    assert source_of(docstrings[::-1], seed=0) == source
    other = source_of(docstrings, seed=1)
    assert set(other.train.values("label")) == set(source.train.values("label"))
    assert other.train != source.train


def library(tmp_path: Path) -> Path:
    """Write a small library in which each rule is broken or kept once."""
    (tmp_path / "alpha" / "tests").mkdir(parents=True)
    (tmp_path / "alpha" / "core.py").write_text(
        '''
raise RuntimeError("this file is only ever parsed")

def public():
    """Open the ALPHA
    file.

    Second paragraph.
    """

def _private():
    """Not read."""

def bare(): pass

class Thing:
    """Hold a thing."""

    def method(self):
        """Return alphabetical order."""

    def __len__(self):
        """Not read either."""

async def shared():
    """Do what beta does too."""

def again():
    """Hold a thing."""
''',
        encoding="utf-8",
    )
    (tmp_path / "alpha" / "broken.py").write_text('def f(:\n    """No."""\n')
    (tmp_path / "alpha" / "tests" / "test_it.py").write_text(
        'def f():\n    """No."""\n'
    )
    (tmp_path / "_pybeta.py").write_text(
        'def f():\n    """Do what beta does too."""\n\ndef g():\n    """Beta."""\n'
        "\n\ndef h():\n    '''Return the beta of it.'''\n",
        encoding="utf-8",
    )
    return tmp_path


def test_docstring_rules(tmp_path: Path) -> None:
    assert collect_docstrings(library(tmp_path)) == (
        # Of "Do what beta does too" each package masks another part: both are kept.
        Docstring("beta", f"Do what {MASK} does too."),
        Docstring("beta", f"Return the {MASK} of it."),
        Docstring("alpha", f"Open the {MASK} file."),
        Docstring("alpha", "Hold a thing."),
        Docstring("alpha", f"Return {MASK}betical order."),
        Docstring("alpha", "Do what beta does too."),
    )


def test_a_library_is_parsed_once_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda text: parsed.append(text) or parse(text))
    first = collect_docstrings(library(tmp_path))
    assert len(parsed) == 3  # those of tests are not opened
    assert collect_docstrings(tmp_path) is first
    assert len(parsed) == 3


def test_text_of_two_packages_is_left_out(tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text('def f():\n    """Return a copy."""\n')
    assert collect_docstrings(tmp_path) == ()


def test_library_without_sources_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 packages.*--task FILE.csv"):
        docstrings_source(root=tmp_path / "nowhere")
