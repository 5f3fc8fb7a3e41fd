"""Tables from JSON lines: an object a line, or one list of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from bidora.data.encodings import NOT_TEXT, foreign_bytes
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["json_table"]

MAX_DEPTH = 100
HALF_PAIR = re.compile("[\ud800-\udfff]")


def json_table(origin: str, text: str) -> Table:
    r"""Read JSON lines, or a list of objects that is one JSON value.

    Half of a surrogate pair, which JSON can write and no tokenizer reads, becomes
    U+FFFD.

    Args:
        origin: The file's name.
        text: Its text.

    Returns:
        A row an object, with None for what it lacks; the other lines are in `bad`.

    Raises:
        UserError: If the file holds one object that is no row, over several lines.

    Example:
        >>> json_table("a.jsonl", '{"text": "one"}\n{"label": 1}').rows
        (('one', None), (None, 1))
    """
    records: list[dict[str, Any]] = []
    lines: list[str] = []
    bad: list[str] = []
    for place, value in _json_values(text):
        if isinstance(value, _Unreadable):
            bad.append(f"{origin}, {place}: {value.why}")
        elif not isinstance(value, dict) or not value:
            bad.append(
                f"{origin}, {place}: {_kind(value)} where an object such as "
                '{"text": "...", "label": "..."} was expected; put one object in a line.'
            )
        else:
            records.append(value)
            lines.append(place)
    if not records:
        _refuse_spread(origin, text)
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    rows = tuple(tuple(record.get(name) for name in columns) for record in records)
    return Table(origin, columns, rows, tuple(lines), bad=tuple(bad))


class _Unreadable(NamedTuple):
    why: str


class _RepeatedNameError(Exception):
    """Report a name that stands twice in a JSON object."""


def _kind(value: Any) -> str:
    return "an empty object" if value == {} else f"a {type(value).__name__}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # JSON leaves open which one counts
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(max(names, key=names.count))
    return found


def _json_values(text: str) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line, or of each item of a file that is a list."""
    if text.lstrip().startswith("["):
        whole = _parse_json(text)
        if isinstance(whole, list):
            for number, value in enumerate(whole, start=1):
                yield f"item {number}", value
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse_json(line)


def _refuse_spread(origin: str, text: str) -> None:
    """Say what a file is whose lines are none by themselves: JSON over several."""
    lines = text.split()
    if len(lines) < 2 or lines[0] not in ("[", "{"):
        return
    whole = _parse_json(text)
    what = whole.why if isinstance(whole, _Unreadable) else "it is one object."
    raise UserError(
        f"{origin} holds JSON over several lines, but no list of objects: {what} Put "
        "one object in a line, or a list of them in the file."
    )


def _parse_json(text: str) -> Any:
    """Return the value, or why there is none."""
    foreign = foreign_bytes(text)
    if foreign:
        return _Unreadable(NOT_TEXT.format(foreign))
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        # An escape such as \ud83d is half an emoji: legal JSON that no tokenizer takes.
        return _whole_characters(value) if "\\ud" in text.lower() else value
    except _RepeatedNameError as error:
        return _Unreadable(f"an object names {error.args[0]!r} twice; rename one.")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        return _Unreadable(
            f"not JSON ({error.msg}: {line}sign {error.colno}). A jsonl file holds one "
            "JSON object a line."
        )
    except RecursionError:
        return _Unreadable(
            f"JSON nested deeper than {MAX_DEPTH} levels; leave that value out."
        )
    except ValueError:
        return _Unreadable(
            "a number of more digits than Python reads (4,300); shorten it or write "
            "it as text."
        )


def _is_deep(value: Any) -> bool:
    """Return whether what is done with a value later may exceed Python's stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, list | dict)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _whole_characters(value: Any) -> Any:
    """Return a JSON value with U+FFFD for each half of a surrogate pair."""
    if isinstance(value, str):
        return HALF_PAIR.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {_whole_characters(k): _whole_characters(v) for k, v in value.items()}
    return value
