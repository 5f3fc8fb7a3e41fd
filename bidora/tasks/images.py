"""One class for each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.data.images import (
    BadImageError,
    image_path,
    is_image_file,
    open_picture,
    pillow,
)
from bidora.data.source import Source
from bidora.data.table import Table, name_column, same_column
from bidora.errors import UserError
from bidora.packaged import PACKAGED
from bidora.tasks.base import Rows, Schema
from bidora.tasks.classes import OneClass
from bidora.tasks.labels import BadValueError, shown

if TYPE_CHECKING:
    from bidora.runs.job_settings import JobSettings

__all__ = ["IMAGE_COLUMNS", "ImageClassification", "holds_images"]

IMAGE_COLUMNS = ("image", "img", "file_name")
"""Names that a column of images is looked for by; the last is that of `metadata.csv`."""

TRAITS = {
    "transparent": "transparent image(s) laid on white",
    "animated": "animation(s), of which the first image is taken",
    "16-bit": "grey image(s) of 16 bits, brought to 8",
}
"""What is told of images that are not read as they are."""


@dataclass(frozen=True, kw_only=True)
class ImageClassification(OneClass):
    """Classes of images that exclude each other.

    An image is a path, from the folder of its table and never out of it, or the bytes of
    a file. Each is opened once when rows are read, so that broken ones are told, and
    again when a batch needs it.

    Args:
        image_column: Column of the images; None for one with a usual name.
        label_column: Column of the class; None for one with a usual name.
        metric: `accuracy`, `f1_macro`, `matthews_correlation`, or `f1` of class 1 of
            two; None for the data set's own, or else accuracy.
        min_examples_per_class: Classes with fewer examples in train are left out.

    Example:
        >>> from bidora.data.digits import digits_source
        >>> ImageClassification().schema(digits_source()).label_names[-1]
        '9'
    """

    name: ClassVar[str] = "images"
    noun: ClassVar[str] = "image"
    peft_type: ClassVar[str | None] = None
    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    auto_processor: ClassVar[str] = "AutoImageProcessor"
    lazy: ClassVar[bool] = True

    image_column: str | None = None

    def check(self, settings: JobSettings) -> None:
        """Refuse what is about texts, and models that read nothing else."""
        about_texts = [
            option
            for option, is_given in (
                ("--max-length", settings.max_length is not None),
                ("--pooling", settings.pooling != "auto"),
            )
            if is_given
        ]
        if about_texts:
            raise UserError(
                f"{' and '.join(about_texts)} is about the tokens of texts, and "
                "--task-type images has none: the model's image processor says what size "
                "images are brought to. Leave it out."
            )
        if settings.model in PACKAGED:
            raise UserError(
                f"--model {settings.model} reads texts, and the examples are images. Pass "
                "a model for images, such as --model google/vit-base-patch16-224-in21k, "
                "or a folder that holds one with its preprocessor_config.json."
            )

    def input_columns(self, source: Source) -> dict[str, str]:
        """Return the column of the images."""
        given = self.image_column or source.hints.get("image_column")
        column = name_column(source.train, given, "--image-column", IMAGE_COLUMNS)
        if not holds_images(source.train, column):
            first = source.train.values(column)[0]
            raise UserError(
                f"{source.train.origin}: column {column!r} holds no images, but "
                f"{shown(repr(first), 60)} and such. An image is the path of a file (png, "
                "jpg, ...), or an image column of the Hub; name the column with "
                "--image-column, or, if the examples are texts, choose --task-type "
                "classification."
            )
        return {"image_column": column}

    def read_inputs(self, table: Table, schema: Schema) -> dict[str, Sequence[Any]]:
        """Return where each image is, and what it is like; each is opened once."""
        column = same_column(table, schema.settings["image_column"])
        pillow()
        folder = Path(table.folder or Path(table.origin).parent)
        read: dict[str, list[Any]] = {
            "image": [],
            "digest": [],
            "size": [],
            "traits": [],
        }
        for value in table.values(column):
            try:
                image = _image(value, folder)
                picture = open_picture(image)
                row = (image, picture.digest, picture.image.size, picture.traits)
            except BadImageError as error:
                row = (BadValueError(f"column {column!r} {error}"), "", (0, 0), ())
            for values, found in zip(read.values(), row, strict=True):
                values.append(found)
        return dict(read)

    def contents(self, part: Rows) -> list[str]:
        """Return what is equal for images that are so, pixel by pixel."""
        return part.columns["digest"]

    def spelled(self, part: Rows, index: int) -> str:
        """Return where an image stands."""
        return part.places[index]

    def describe(self, rows: Mapping[str, Rows], schema: Schema) -> list[str]:
        """Tell the column, sizes, classes, and what of the images is changed."""
        lines = super().describe(rows, schema)
        sizes = {size for part in rows.values() for size in part.columns["size"]}
        small, large = (f"{w} × {h}" for w, h in (min(sizes), max(sizes)))
        told = f"images of {small} pixels" if len(sizes) == 1 else (
            f"images of {len(sizes):,} sizes, from {small} to {large} pixels"
        )  # fmt: skip
        lines.insert(1, f"{told}; the model's image processor brings them to its own")
        traits = Counter(
            trait
            for part in rows.values()
            for several in part.columns["traits"]
            for trait in several
        )
        return [*lines, *(f"{n:,} {TRAITS[trait]}" for trait, n in traits.items())]

    def try_model(self, model: Any, processor: Any, rows: Mapping[str, Rows]) -> None:
        """Show the model a blank image, and the processor some of the examples' sizes."""
        import torch
        from PIL import Image

        inputs = processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt")
        try:
            with torch.no_grad():
                model(**inputs.to(next(model.parameters()).device))
        except (ValueError, RuntimeError) as error:
            size = " × ".join(map(str, inputs["pixel_values"].shape[-2:]))
            raise UserError(
                f"The model's image processor brings images to {size} pixels, which the "
                f"model refuses: {str(error).splitlines()[0][:200]} Set `size` in its "
                "preprocessor_config.json to what the model was trained with."
            ) from error
        sizes = {size for part in rows.values() for size in part.columns["size"]}
        _refuse_mixed(processor, sizes)

    def features(
        self,
        batch: Mapping[str, list[Any]],
        processor: Any,
        schema: Schema,
        length: int,
    ) -> dict[str, list[Any]]:
        """Return the pixels as the model's image processor makes them of RGB images."""
        del schema, length
        images = [open_picture(value).image for value in batch["image"]]
        made = processor(images=images, return_tensors="np")
        found = {name: list(values) for name, values in made.items()}
        if "labels" in batch:
            found["labels"] = list(batch["labels"])
        return found

    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that stacks images, which are of one size by now."""
        del processor
        from transformers import default_data_collator

        return default_data_collator


def _refuse_mixed(processor: Any, sizes: set[tuple[int, int]]) -> None:
    """Refuse a processor that leaves images of several sizes, which no batch can hold.

    The smallest and the largest show whether it brings images to a size of its own, the
    narrowest and the widest whether it keeps their shapes.

    Args:
        processor: The model's image processor.
        sizes: Width and height of the examples.

    Raises:
        UserError: If it makes inputs of different shapes of them.
    """
    from PIL import Image

    def made(size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        inputs = processor(images=[Image.new("RGB", size)], return_tensors="np")
        return {name: values.shape for name, values in inputs.items()}

    def shape(size: tuple[int, int]) -> float:
        return size[0] / size[1]

    small, large = min(sizes), max(sizes)
    for first, second in (
        (small, large),
        (min(sizes, key=shape), max(sizes, key=shape)),
    ):
        if made(first) == made(second):
            continue
        found = (
            " × ".join(map(str, made(size)["pixel_values"][-2:]))
            for size in (first, second)
        )
        raise UserError(
            f"the model's image processor leaves images of several sizes: it makes "
            f"{' and '.join(found)} pixels (height × width) of images of "
            f"{first[1]} × {first[0]} and {second[1]} × {second[0]}, and a batch takes one "
            f"size. The examples have {len(sizes):,} sizes. In the model's "
            "preprocessor_config.json, set do_resize to true and size to a height and a "
            "width; or keep its shortest_edge, set do_center_crop to true and give "
            "crop_size."
        )


def holds_images(table: Table, column: str) -> bool:
    """Return whether a column holds images: bytes, or paths that end like those of images.

    Args:
        table: The rows.
        column: One of its columns.

    Returns:
        True where at least half of the values that are there do.

    Example:
        >>> rows = (("cat/1.png",), ("cat/2.jpg",), ("notes",))
        >>> holds_images(Table("t.csv", ("image",), rows, ("", "", "")), "image")
        True
    """
    there = [v for v in table.values(column) if v is not None and v != ""]
    fitting = sum(
        isinstance(v, bytes) or (isinstance(v, str) and is_image_file(v)) for v in there
    )
    return bool(there) and 2 * fitting >= len(there)


def _image(value: Any, folder: Path) -> str | bytes:
    """Return an image as it is held: the path of a file, or its bytes.

    Args:
        value: As the table has it.
        folder: Where paths start from.

    Raises:
        BadImageError: If it is no image.
    """
    if value is None or value == "":
        raise BadImageError("holds no image")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadImageError(f"holds a {type(value).__name__}, and no image")
    if not is_image_file(value.strip()):
        raise BadImageError(
            f"holds {shown(repr(value), 60)}, which is no path of an image"
        )
    return str(image_path(folder, value.strip()))
