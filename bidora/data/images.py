"""Images as a source holds them: paths or encoded bytes, opened one at a time.

What is held is never a decoded image, which is many times as large as its file.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bidora.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "IMAGE_FILES",
    "BadImageError",
    "Picture",
    "image_path",
    "is_image_file",
    "open_picture",
    "pillow",
    "png_bytes",
]

IMAGE_FILES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
}
"""Endings of the files that are read, and Pillow's name of their format.

No other format is tried, whatever the bytes look like: some start programs.
"""

WIDE = 2**16
"""One more than the largest value of a grey image of 16 bits."""


class BadImageError(ValueError):
    """Report an image that can't be read; the row goes, and the others stay."""


class Picture(NamedTuple):
    """An image as a model may read it, and what it was before.

    Args:
        image: In RGB, 8 bits a channel, upright.
        digest: Equal for images that are equal, pixel by pixel.
        traits: What of the file the image does not show: `transparent`, `animated`,
            `16-bit`.
    """

    image: Image
    digest: str
    traits: tuple[str, ...]


def pillow() -> Any:
    """Return Pillow's module of images.

    Raises:
        UserError: If it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            "images are read by Pillow, which is not installed: "
            'pip install "hypergrad-bidora[images]".'
        ) from error
    return Image


def is_image_file(name: str) -> bool:
    """Return whether a name ends like an image that is read.

    Args:
        name: A file's name or path.

    Example:
        >>> is_image_file("cat/1.PNG"), is_image_file("notes.txt")
        (True, False)
    """
    return os.path.splitext(name)[1].lower() in IMAGE_FILES


def image_path(folder: Path, name: str) -> Path:
    """Return the file that a name in a table means, never one outside of the folder.

    A table may come from anywhere, and must not make us open what it likes: neither by
    `..`, nor from the root, nor by a link.

    Args:
        folder: Where names start from.
        name: A path as the table has it.

    Returns:
        The file's own path, links followed.

    Raises:
        BadImageError: If it is outside, or there is no such file.
    """
    if "\0" in name:
        raise BadImageError("holds a zero byte, which no path has")
    try:
        inside = folder.resolve()
        found = (inside / name).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links, too long a name
        raise BadImageError(f"holds {_shown(name)}, which is no path") from error
    if not found.is_relative_to(inside):
        raise BadImageError(
            f"holds {_shown(name)}, which leads out of {folder}; images are read from "
            "that folder and the folders in it alone, so move or copy it there"
        )
    try:
        is_file = found.is_file()
    except OSError:  # too long a name
        is_file = False
    if not is_file:
        raise BadImageError(f"holds {_shown(name)}, and {folder} has no such file")
    return found


def open_picture(value: str | bytes) -> Picture:
    """Open an image, whole.

    Grey becomes RGB. Grey of 16 bits is divided by 257, so that 0 stays black and 65535
    white. What is transparent lies on white. Of an animation, the first image is taken;
    an image that says how it was held is turned upright.

    Args:
        value: The path of a file, or what a file holds.

    Returns:
        The image, and what it was.

    Raises:
        BadImageError: If it is broken, cut short, or of a kind whose values have no
            known range.
        UserError: If Pillow is not installed.

    Example:
        >>> grey = pillow().new("L", (2, 3), 128)
        >>> opened = open_picture(png_bytes(grey)).image
        >>> opened.mode, opened.size, opened.getpixel((0, 0))
        ('RGB', (2, 3), (128, 128, 128))
    """
    Image = pillow()
    try:
        data = Path(value).read_bytes() if isinstance(value, str) else value
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise BadImageError("is empty")
    formats = sorted(set(IMAGE_FILES.values()))
    try:
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            opened.load()
            return _as_rgb(opened)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError(
            f"is no image of a kind that is read ({', '.join(formats)}), or broken in "
            "its first bytes"
        ) from error
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise BadImageError(f"is broken or cut short ({reason})") from error


def png_bytes(image: Image) -> bytes:
    """Return what a png file of an image holds.

    Args:
        image: Of Pillow.
    """
    held = io.BytesIO()
    image.save(held, format="PNG")
    return held.getvalue()


def _as_rgb(opened: Any) -> Picture:
    """Return an opened image as RGB, its first one if there are several."""
    from PIL import ImageOps

    traits: list[str] = []
    if getattr(opened, "n_frames", 1) > 1:
        traits.append("animated")
        opened.seek(0)
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _from_16_bits(image)
        traits.append("16-bit")
    elif image.mode == "F":
        raise BadImageError(
            "holds fractions, and which of them is white is not known; save it with 8 "
            "bits a channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").histogram()[255] < image.width * image.height:
            ground = pillow().new("RGBA", image.size, "white")
            ground.alpha_composite(image)
            image = ground
            traits.append("transparent")
    image = image.convert("RGB")
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    return Picture(image, digest.hexdigest(), tuple(traits))


def _from_16_bits(image: Any) -> Any:
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() >= WIDE:
        raise BadImageError(
            f"holds values from {values.min()} to {values.max()}, and 16 bits hold 0 to "
            f"{WIDE - 1}; save it with 8 bits a channel"
        )
    return pillow().fromarray(((values + 128) // 257).astype(np.uint8))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:59]}…")
