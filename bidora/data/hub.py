"""Tables from the Hugging Face Hub, by name: `glue/cola` or `owner/dataset`."""

from __future__ import annotations

from typing import Any

from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["read_hub"]

CONVERTED = "refs/convert/parquet"
"""Branch on which the Hub keeps a copy without code of data sets that are scripts."""

PARTS = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "dev"),
    "test": "test",
}
"""Our name of a part, by the Hub's."""


def read_hub(
    name: str,
    repository: str,
    configuration: str | None = None,
    *,
    renamed: dict[str, str] | None = None,
) -> tuple[dict[str, Table], list[str]]:
    """Fetch a data set, or find it in the local cache.

    Args:
        name: What the user called it, for messages.
        repository: The data set's repository.
        configuration: Its configuration, where it has several.
        renamed: Our name of a column, by the Hub's.

    Returns:
        Tables by part: `train`, `dev`, `test`, and the same with `_mismatched`. Values
        are as the Hub has them; which classes they count is in `Table.class_names`.
        And what a user should know.

    Raises:
        UserError: If the data set cannot be fetched or has nothing to train on.
    """
    tables: dict[str, Table] = {}
    others: list[str] = []
    parts = _fetch(name, repository, configuration)
    for part, rows in parts.items():
        ours = _our_part(part)
        if ours is None or ours in tables:
            others.append(part)
        else:
            tables[ours] = _table(rows, f"{name} ({part})", renamed or {})
    if "train" not in tables:
        raise UserError(
            f"the data set {name!r} has no part named train (it has "
            f"{', '.join(sorted(parts))}); save the rows you want as csv and pass "
            "--task FILE.csv."
        )
    note = f"its part(s) {', '.join(others)} are not used"
    return tables, [note] if others else []


def _our_part(part: str) -> str | None:
    """Return our name of a part: those of MNLI come in two kinds."""
    stem, _, kind = part.lower().partition("_")
    if stem not in PARTS or kind not in ("", "matched", "mismatched"):
        return None
    return PARTS[stem] + ("_mismatched" if kind == "mismatched" else "")


def _fetch(name: str, repository: str, configuration: str | None) -> dict[str, Any]:
    """Return the data set's parts by name."""
    import datasets

    try:
        try:
            parts: Any = datasets.load_dataset(repository, configuration)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            parts = datasets.load_dataset(repository, configuration, revision=CONVERTED)
        return {str(part): rows for part, rows in parts.items()}
    except Exception as error:  # many kinds: network, name, script, configuration
        lines = str(error).strip().split("\n")
        raise UserError(
            f"the data set {name!r} cannot be fetched from the Hub "
            f"({type(error).__name__}: {lines[0][:200]}). Check its name and the network "
            "connection, or work offline: --task docstrings needs no network, "
            "--data-dir FOLDER reads the files of a data set that is known by name, "
            "--task FILE.csv (or .tsv, .jsonl, or a folder with a train file) your own "
            "examples."
        ) from error


def _table(part: Any, origin: str, renamed: dict[str, str]) -> Table:
    names = [str(name) for name in part.column_names]
    ours = [renamed.get(name, name) for name in names]
    class_names: list[tuple[str, tuple[str, ...]]] = []
    values: list[list[Any]] = []
    for name, our in zip(names, ours, strict=True):
        feature = part.features[name]
        if type(feature).__name__ == "Image":
            values.append(_encoded(part, name))
            continue
        column = list(part[name])
        item: Any = getattr(feature, "feature", None)  # of a list
        if hasattr(feature, "int2str"):
            class_names.append((our, tuple(feature.names)))
        elif hasattr(item, "int2str"):
            column = [_words(indices, item.names) for indices in column]
        values.append(column)
    rows = tuple(zip(*values, strict=True))
    lines = tuple(f"row {number}" for number in range(len(rows)))
    return Table(origin, tuple(ours), rows, lines, tuple(class_names))


def _words(indices: list[int] | None, names: list[str]) -> list[str | None] | None:
    """Return the names of a list of classes, such as a sentence's tags."""
    if indices is None:
        return None
    return [names[i] if i is not None and i >= 0 else None for i in indices]


def _encoded(part: Any, name: str) -> list[bytes | None]:
    """Return images as the bytes of their files, which need no decoding to be held."""
    from datasets import Image

    found = part.cast_column(name, Image(decode=False))[name]
    return [None if image is None else _file_bytes(image) for image in found]


def _file_bytes(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:  # in the cache of datasets
        return file.read()
