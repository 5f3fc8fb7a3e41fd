"""Tables from folders of images: a folder for each class, or images to score."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bidora.data.folder import STEMS
from bidora.data.images import is_image_file
from bidora.data.table import Table
from bidora.errors import UserError

__all__ = ["has_class_folders", "read_class_folders", "read_images"]

LITTER = ("thumbs.db", "desktop.ini")
"""What file managers leave behind; so are names that begin with a dot."""


def has_class_folders(folder: Path) -> bool:
    """Return whether a folder holds folders of images, perhaps one for each part.

    Args:
        folder: Where to look.
    """
    if not folder.is_dir():
        return False
    roots = [*_parts(folder).values()] or [folder]
    return any(
        is_image_file(file.name)
        for root in roots
        for child in _children(root)
        if child.is_dir()
        for file in _children(child)
    )


def read_class_folders(folder: Path) -> tuple[dict[str, Table], str]:
    """Read images that lie in a folder for each class.

    Args:
        folder: With `train/CLASS/*.png`, and perhaps `validation` and `test` (by the
            names that table files may have); or with `CLASS/*.png` alone.

    Returns:
        Tables by part (`train`, `dev`, `test`) with the columns `image`, a path from
        `folder`, and `label`, the class; and a sentence on the layout.

    Raises:
        UserError: If there is no train part, a class has no image, or images lie beside
            the classes.
    """
    parts = _parts(folder)
    if parts and "train" not in parts:
        raise UserError(
            f"the folder {folder} holds {' and '.join(p.name for p in parts.values())} "
            "and no folder train; call the folder of the training images train."
        )
    roots = parts or {"train": folder}
    tables = {part: _class_table(folder, root) for part, root in roots.items()}
    return tables, f"a folder for each class in {folder}"


def read_images(folder: Path, column: str) -> Table:
    """Read the images of a folder and of all folders in it, without labels.

    Args:
        folder: Where they lie.
        column: What the column of their paths is called.

    Returns:
        One row an image, in the order of the paths.

    Raises:
        UserError: If there are none.
    """
    rows: list[str] = []
    bad: list[str] = []
    for file in _files(folder):
        name = file.relative_to(folder).as_posix()
        if is_image_file(name):
            rows.append(name)
        else:
            bad.append(f"{folder}, {name}: {_NO_IMAGE}")
    if not rows:
        raise UserError(f"the folder {folder} holds no image; {_listing(folder)}.")
    return Table(
        str(folder),
        (column,),
        tuple((name,) for name in rows),
        tuple(rows),
        bad=tuple(bad),
        folder=str(folder),
    )


_NO_IMAGE = "no image, by its ending; move it out of the folder."


def _class_table(folder: Path, root: Path) -> Table:
    rows: list[tuple[str, str]] = []
    lines: list[str] = []
    bad: list[str] = []
    for child in _children(root):
        if not child.is_dir():
            if is_image_file(child.name):  # others are notes on the data
                bad.append(
                    f"{root}, {child.name}: lies beside the folders of the classes, so "
                    "its class is not known; move it into one of them, or away."
                )
            continue
        before = len(rows)
        for file in _children(child):
            name = f"{child.name}/{file.name}"
            if file.is_dir():
                bad.append(
                    f"{root}, {name}: a folder in the folder of a class; move its images "
                    "up, or make it a class of its own."
                )
            elif not is_image_file(name):
                bad.append(f"{root}, {name}: {_NO_IMAGE}")
            else:
                rows.append((file.relative_to(folder).as_posix(), child.name))
                lines.append(name)
        if len(rows) == before:
            raise UserError(
                f"the folder {child} of the class {child.name!r} holds no image. Put "
                "images of it there, or remove the folder."
            )
    if not rows:
        raise UserError(
            f"the folder {root} holds no folders of classes with images in them; "
            f"{_listing(root)}."
        )
    return Table(
        str(root),
        ("image", "label"),
        tuple(rows),
        tuple(lines),
        bad=tuple(bad),
        folder=str(folder),
    )


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folders of the parts, if there are any."""
    found: dict[str, Path] = {}
    for part, stems in STEMS.items():
        there = [folder / stem for stem in stems if (folder / stem).is_dir()]
        if len(there) > 1:
            names = " and ".join(path.name for path in there)
            raise UserError(
                f"the folder {folder} holds {names}, and one of them is wanted; move the "
                "other away."
            )
        if there:
            found[part] = there[0]
    return found


def _children(folder: Path) -> list[Path]:
    """Return what a folder holds, in an order that no platform changes."""
    names = [p for p in folder.iterdir() if not _is_litter(p.name)]
    return sorted(names, key=lambda path: path.name)


def _files(folder: Path) -> Iterator[Path]:
    for child in _children(folder):
        if (
            child.is_dir() and not child.is_symlink()
        ):  # a link may lead round in circles
            yield from _files(child)
        elif not child.is_dir():
            yield child


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _listing(folder: Path) -> str:
    names = [path.name for path in _children(folder)]
    return f"it holds {', '.join(names[:8])}" if names else "it is empty"
