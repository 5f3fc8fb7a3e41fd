"""Images that scikit-learn carries: 1,797 handwritten digits of 8 × 8 pixels."""

from __future__ import annotations

import hashlib
from typing import Any

from bidora.data.images import pillow, png_bytes
from bidora.data.source import PARTS, Source
from bidora.data.table import Table

__all__ = ["digits_source"]

LARGEST = 16
"""A pixel counts the dark points among sixteen."""


def digits_source(
    seed: int = 0, *, test_per_class: int = 40, validation_per_class: int = 20
) -> Source:
    """Ask which digit was written.

    The images of a class are in the order of the SHA-256 of a seed and the pixels. By
    seed 0, whatever `seed` is, the first `test_per_class` test; of the others, by `seed`,
    the first `validation_per_class` validate and the rest train. Writers are not known,
    so a test image may be by the hand of a training image.

    Args:
        seed: Seed of what trains and what validates.
        test_per_class: Test images of each class.
        validation_per_class: Validation images of each class.

    Returns:
        Columns `image`, as the bytes of a png file, and `label`.

    Raises:
        UserError: If Pillow is not installed.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = np.rint(found.images * (255 / LARGEST)).astype(np.uint8)
    Image = pillow()
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(found.target):
        by_class.setdefault(int(label), []).append(row)

    def place(row: int, seed: int) -> bytes:
        return hashlib.sha256(f"{seed}\n".encode() + pixels[row].tobytes()).digest()

    rows: dict[str, list[tuple[bytes, int]]] = {part: [] for part in PARTS}
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    for label, members in sorted(by_class.items()):
        ranked = sorted(members, key=lambda row: (place(row, 0), row))
        others = sorted(
            ranked[test_per_class:], key=lambda row: (place(row, seed), row)
        )
        chosen = {
            "test": ranked[:test_per_class],
            "validation": others[:validation_per_class],
            "train": others[validation_per_class:],
        }
        for part, places in chosen.items():
            for row in places:
                rows[part].append((png_bytes(Image.fromarray(pixels[row])), label))
                lines[part].append(f"image {row}")
    names = (("label", tuple(map(str, sorted(by_class)))),)
    return Source(
        name="digits",
        parts={
            part: Table(
                f"digits ({part})",
                ("image", "label"),
                tuple(rows[part]),
                tuple(lines[part]),
                names,
            )
            for part in PARTS
            if rows[part]
        },
        note=(
            "handwritten digits of scikit-learn, 8 × 8 pixels in 17 greys; whose hand "
            "an image is by is not known, so parts may share writers."
        ),
        hints={
            "task_type": "images",
            "image_column": "image",
            "label_column": "label",
        },
    )
