"""From a file's bytes to its text, whatever program saved it."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from bidora.errors import UserError

__all__ = ["NOT_TEXT", "Text", "decode", "foreign_bytes", "read_text"]

BYTE_ORDER_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),  # before UTF-16's, with which it begins
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)

FOREIGN_FILES = (
    (b"PK\x03\x04", "a zip archive or a spreadsheet (.xlsx)"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet (.xls)"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"%PDF-", "a PDF"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"BZh91AY&SY", "compressed with bzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz"),
)

ESCAPED = re.compile("[\udc80-\udcff]")
"""What stands in a text for a byte that could not be decoded."""


NOT_TEXT = (
    "{} does not belong to the file's encoding. Name the encoding with --encoding, or "
    "repair the row."
)
"""What to say of a row in which `foreign_bytes` finds some."""


class Text(NamedTuple):
    """A file's text, and a sentence where its encoding had to be guessed."""

    text: str
    note: str


def read_text(path: Path, encoding: str = "auto") -> Text:
    """Read a file, also one that gzip compressed.

    A byte that does not fit the encoding stands in the text as `surrogateescape` has
    it, so that whoever reads rows can tell which of them is damaged: see
    `foreign_bytes`.

    Args:
        path: The file.
        encoding: Python's name of the encoding; `auto` takes a byte-order mark's word,
            then UTF-8, then Windows-1252, and says so in the note.

    Returns:
        The text without a byte-order mark, and the note.

    Raises:
        UserError: If the file is missing, empty, damaged, or in another encoding.
    """
    data = _read_bytes(path)
    if not data:
        raise UserError(f"{path} is empty; give a file with examples.")
    for start, kind in FOREIGN_FILES:
        if data.startswith(start):
            raise UserError(
                f"{path} is {kind} and not a text file; save its rows as csv, tsv or "
                "jsonl."
            )
    return decode(data, str(path), encoding)


def decode(data: bytes, origin: str, encoding: str = "auto") -> Text:
    r"""Return the text of a file's bytes.

    Args:
        data: The bytes.
        origin: The file's name, for messages.
        encoding: As for `read_text`.

    Returns:
        The text without a byte-order mark, and the note.

    Raises:
        UserError: If the bytes are no text of that encoding, or of none that is tried.

    Example:
        >>> decode(b"caf\xe9", "menu.csv").text
        'café'
        >>> decode("café".encode("utf-16"), "menu.csv").text
        'café'
    """
    if encoding != "auto":
        return Text(_decode_as(data, origin, encoding), "")
    for mark, marked in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            note = "" if marked == "utf-8" else f"{origin} was read as {marked.upper()}"
            return Text(_decode_as(data, origin, marked), note)
    unmarked = _unmarked_utf16(data)
    if unmarked:
        return Text(
            _decode_as(data, origin, unmarked),
            f"{origin} was read as {unmarked.upper()}, which its zero bytes suggest",
        )
    text = data.decode("utf-8", "surrogateescape")
    wrong = len(ESCAPED.findall(text))
    right = sum(character > "\x7f" for character in text) - wrong if wrong else 0
    if not wrong or right > wrong:
        return Text(text, "")  # UTF-8, with a damaged row at most
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin} is neither UTF-8 nor Windows-1252 text (line "
            f"{_line(data, error.start)}, byte 0x{data[error.start]:02x}). Name its "
            "encoding with --encoding, such as cp1251, shift_jis or gb18030, or save "
            "it as UTF-8."
        ) from None
    first = re.search("[^\x00-\x7f]", text)
    sign = "" if first is None else f" (its first sign beyond ASCII is {first[0]!r})"
    return Text(
        text,
        f"{origin} is not UTF-8 and was read as Windows-1252{sign}; if texts look "
        "wrong, name its encoding with --encoding",
    )


def foreign_bytes(text: str) -> str:
    r"""Return which bytes of a row could not be decoded, for a message; or nothing.

    Args:
        text: A part of what `read_text` returned.

    Returns:
        Words such as `the byte 0xe9`; empty where all is well.

    Example:
        >>> foreign_bytes(b"caf\xe9".decode("utf-8", "surrogateescape"))
        'the byte 0xe9'
    """
    found = ESCAPED.search(text)
    return "" if found is None else f"the byte 0x{ord(found[0]) - 0xDC00:02x}"


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        # By its content too: browsers and tools unpack, pack and rename.
        if path.name.lower().endswith(".gz") or data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return data
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path} (looked from {Path.cwd()}); check the spelling."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder where a file was expected.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} cannot be read: its gzip archive is damaged or cut off ({error}). "
            "Fetch or pack it again."
        ) from None
    except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
        raise UserError(f"{path} cannot be read: {error}.") from None


def _decode_as(data: bytes, origin: str, encoding: str) -> str:
    try:
        try:
            text = data.decode(encoding, "surrogateescape")
        except UnicodeDecodeError:
            raise
        except UnicodeError:  # utf-16 without a mark, and codecs that know no escapes
            text = data.decode(encoding)
    except UnicodeError as error:
        raise UserError(
            f"{origin} is not {encoding} text ({error}). Name another encoding with "
            "--encoding, or save it as UTF-8."
        ) from None
    except (LookupError, ValueError):
        raise UserError(
            f"unknown encoding {encoding!r} (--encoding); Python's names are such as "
            "utf-8, utf-16, cp1252, latin-1, cp1251, shift_jis or gb18030."
        ) from None
    return text.removeprefix("\ufeff")


def _unmarked_utf16(data: bytes) -> str:
    """Return which UTF-16 it is if every other byte is zero, as Latin text has it."""
    head = data[:4096]
    if len(head) < 8 or len(data) % 2:
        return ""
    first, second = head[0::2].count(0), head[1::2].count(0)
    many, few = 0.4 * len(head) / 2, 0.05 * len(head) / 2
    if second > many and first <= few:
        return "utf-16-le"
    return "utf-16-be" if first > many and second <= few else ""


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
