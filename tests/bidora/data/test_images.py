"""Images as sources hold them: opened as RGB, found by class folders, never elsewhere."""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as HubImage
from PIL import Image
from sklearn.datasets import load_digits

from bidora.data import load_source
from bidora.data.digits import digits_source
from bidora.data.image_folder import read_images
from bidora.data.images import BadImageError, image_path, open_picture, png_bytes
from bidora.errors import UserError

COLOURS = {"red": (200, 10, 10), "blue": (10, 10, 200)}


def png(
    colour: Any = "red", size: tuple[int, int] = (4, 4), mode: str = "RGB"
) -> bytes:
    return png_bytes(Image.new(mode, size, colour))


def folder_of(root: Path, *names: str) -> Path:
    """Write an image for each name; each has a colour of its own."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, i, i)))
    return root


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **settings)
    return held.getvalue()


def first_pixel(value: bytes) -> Any:
    return open_picture(value).image.getpixel((0, 0))


# -- one image ------------------------------------------------------------------------


def test_grey_and_palettes_become_rgb() -> None:
    assert first_pixel(png(77, mode="L")) == (77, 77, 77)
    assert first_pixel(png(1, mode="1")) == (255, 255, 255)
    palette = saved(Image.new("RGB", (2, 2), (1, 2, 3)).quantize(), "GIF")
    assert first_pixel(palette) == (1, 2, 3)
    assert open_picture(palette).traits == ()


@pytest.mark.parametrize(
    ("deep", "byte"), [(0, 0), (257, 1), (32896, 128), (65535, 255)]
)
def test_16_bits_are_scaled_and_not_clipped(deep: int, byte: int) -> None:
    values = np.full((2, 3), deep, dtype=np.uint16)
    opened = open_picture(saved(Image.fromarray(values), "PNG"))
    assert opened.image.getpixel((0, 0)) == (byte, byte, byte)
    assert opened.image.size == (3, 2)
    assert opened.traits == ("16-bit",)


def test_what_is_transparent_lies_on_white() -> None:
    opened = open_picture(png((10, 20, 30, 0), mode="RGBA"))
    assert opened.image.getpixel((0, 0)) == (255, 255, 255)
    assert opened.traits == ("transparent",)
    half = open_picture(png((0, 0, 0, 51), mode="RGBA"))  # a fifth of black
    assert half.image.getpixel((0, 0)) == (204, 204, 204)
    opaque = open_picture(png((10, 20, 30, 255), mode="RGBA"))
    assert opaque.image.getpixel((0, 0)) == (10, 20, 30)
    assert opaque.traits == ()


def test_an_animation_is_its_first_image() -> None:
    frames = [Image.new("RGB", (2, 2), c) for c in COLOURS.values()]
    opened = open_picture(
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    )
    assert opened.image.getpixel((0, 0)) == COLOURS["red"]
    assert opened.traits == ("animated",)


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    photo = saved(Image.new("RGB", (6, 4)), "JPEG", exif=exif)
    assert open_picture(photo).image.size == (4, 6)


def test_equal_images_have_one_digest_whatever_their_files() -> None:
    image = Image.new("RGB", (3, 3), (9, 9, 9))
    digests = {
        open_picture(saved(image, kind)).digest for kind in ("PNG", "BMP", "TIFF")
    }
    assert len(digests) == 1
    turned = Image.new("RGB", (1, 9), (9, 9, 9))  # the same bytes in another shape
    assert open_picture(saved(turned, "PNG")).digest not in digests


def test_fractions_have_no_known_white() -> None:
    image = Image.fromarray(np.ones((2, 2), dtype=np.float32))
    with pytest.raises(BadImageError, match="which of them is white is not known"):
        open_picture(saved(image, "TIFF"))


def test_more_than_16_bits_are_refused() -> None:
    image = Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32))
    with pytest.raises(BadImageError, match="70000, and 16 bits hold 0 to 65535"):
        open_picture(saved(image, "TIFF"))


def damaged() -> dict[str, tuple[bytes, str]]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), "PNG")
    photo = saved(Image.fromarray(noise), "JPEG")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + whole[24:29]
    huge = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    return {
        "cut png": (whole[: len(whole) // 2], "broken or cut short"),
        "cut jpeg": (photo[: len(photo) // 2], "broken or cut short"),
        "a wrong checksum": (whole[:60] + b"\0\0" + whole[62:], "broken or cut short"),
        "a bomb": (huge, "decompression bomb"),
        "text": (b"no image at all", "no image of a kind that is read"),
        "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image of a kind that is read"),
        "nothing": (b"", "is empty"),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_damage_is_told(kind: str) -> None:
    data, message = damaged()[kind]
    with pytest.raises(BadImageError, match=message):
        open_picture(data)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"hypergrad-bidora\[images\]"):
        digits_source()


# -- paths ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "OUTSIDE", "link"]
)
def test_no_path_leaves_its_folder(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    inside = folder_of(tmp_path / "data", "a/1.png")
    (inside / "link").symlink_to(secret)
    with pytest.raises(BadImageError, match="leads out of"):
        image_path(inside, str(secret) if name == "OUTSIDE" else name)


def test_paths_within_the_folder_are_found(tmp_path: Path) -> None:
    inside = folder_of(tmp_path / "data", "a/1.png")
    expected = (inside / "a" / "1.png").resolve()
    for name in ("a/1.png", "./a/1.png", "a/../a/1.png", str(expected)):
        assert image_path(inside, name) == expected


@pytest.mark.parametrize("name", ["a/2.png", "a", "x" * 5000 + ".png", "a\0.png"])
def test_what_is_no_file_is_told(name: str, tmp_path: Path) -> None:
    inside = folder_of(tmp_path, "a/1.png")
    with pytest.raises(BadImageError):
        image_path(inside, name)


# -- folders of classes ---------------------------------------------------------------


def test_a_folder_for_each_class_and_part(tmp_path: Path) -> None:
    names = [
        f"{p}/{c}/{i}.png" for p in ("train", "val", "test") for c in "ab" for i in "12"
    ]
    source = load_source(str(folder_of(tmp_path / "pets", *names)))
    assert list(source.parts) == ["train", "validation", "test"]
    assert source.train.columns == ("image", "label")
    assert source.train.rows[0] == ("train/a/1.png", "a")
    assert [label for _, label in source.train.rows] == ["a", "a", "b", "b"]
    assert source.place("test", 3) == f"{tmp_path}/pets/test, b/2.png"
    assert source.hints["task_type"] == "images"


def test_classes_alone_are_the_training_part(tmp_path: Path) -> None:
    source = load_source(str(folder_of(tmp_path, "cat/1.png", "dog/1.JPG")))
    assert list(source.parts) == ["train"]
    assert source.train.rows == (("cat/1.png", "cat"), ("dog/1.JPG", "dog"))


def test_a_train_file_goes_before_folders_of_images(tmp_path: Path) -> None:
    folder_of(tmp_path, "images/1.png", "images/2.png")
    (tmp_path / "train.csv").write_text("image,label\nimages/1.png,a\nimages/2.png,b\n")
    source = load_source(str(tmp_path))
    assert source.train.rows == (("images/1.png", "a"), ("images/2.png", "b"))


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/cat/1.png")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / ".hidden").touch()
    with pytest.raises(UserError, match=r"train/dog of the class 'dog' holds no image"):
        load_source(str(tmp_path))


def test_folders_without_a_training_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="call the folder of the training images train"):
        load_source(str(folder_of(tmp_path, "test/cat/1.png")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nor folders of images"):
        load_source(str(tmp_path / "empty"))


def test_two_folders_for_one_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="train and training, and one of them is wanted"
    ):
        load_source(str(folder_of(tmp_path, "train/a/1.png", "training/a/1.png")))


def test_what_is_no_image_is_a_bad_row(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/a/1.png", "train/a/b/2.png", "train/3.png")
    (tmp_path / "train" / "a" / "notes.txt").touch()
    (tmp_path / "train" / "a" / "Thumbs.db").touch()
    bad = load_source(str(tmp_path)).train.bad
    assert [line.split(":")[0] for line in bad] == [
        f"{tmp_path}/train, 3.png",
        f"{tmp_path}/train, a/b",
        f"{tmp_path}/train, a/notes.txt",
    ]


def test_options_of_tables_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/1.png", "b/1.png")
    with pytest.raises(UserError, match="--column-names does not apply"):
        load_source(str(tmp_path), column_names=["image", "label"])
    with pytest.raises(UserError, match="--data-dir does not apply to --task digits"):
        load_source("digits", data_dir=str(tmp_path))


def test_images_to_score_are_found_at_every_depth(tmp_path: Path) -> None:
    table = read_images(folder_of(tmp_path, "b.png", "a/2.png", "a/c/1.png"), "picture")
    assert table.columns == ("picture",)
    assert table.values("picture") == ["a/2.png", "a/c/1.png", "b.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no image; it is empty"):
        read_images(tmp_path / "none", "picture")


# -- digits and the Hub ---------------------------------------------------------------


def test_digits_are_those_of_scikit_learn() -> None:
    source = load_source("digits")
    known: Any = load_digits()
    sizes = {part: len(table) for part, table in source.parts.items()}
    assert sizes == {"train": 1197, "validation": 200, "test": 400}
    seen: list[int] = []
    for table in source.parts.values():
        for row, (image, label) in enumerate(table.rows):
            number = int(table.lines[row].removeprefix("image "))
            seen.append(number)
            assert label == known.target[number]
            if row % 50 == 0:
                grey = np.asarray(open_picture(image).image)[..., 0].astype(float)
                # 16 dark points are white; a step of 255/16, to half of one of 255
                assert abs(grey * 16 / 255 - known.images[number]).max() <= 8 / 255
    assert sorted(seen) == list(range(1797))


def test_the_test_part_follows_from_the_pixels_alone() -> None:
    known: Any = load_digits()
    pixels = np.rint(known.images * 255 / 16).astype(np.uint8)
    places = sorted(
        (hashlib.sha256(b"0\n" + pixels[i].tobytes()).digest(), i)
        for i in np.flatnonzero(known.target == 0)
    )
    expected = [f"image {i}" for _, i in places[:40]]
    found = digits_source(3)
    assert list(found.parts["test"].lines[:40]) == expected
    assert digits_source(4).parts["test"] == found.parts["test"]
    assert digits_source(4).parts["train"] != found.parts["train"]


def test_images_of_the_hub_stay_encoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "1.png"
    file.write_bytes(png((1, 2, 3)))
    features = Features(
        {"image": HubImage(), "label": ClassLabel(names=["cat", "dog"])}
    )
    images = [
        Image.new("RGB", (2, 2), (7, 7, 7)),
        {"bytes": None, "path": str(file)},
        None,
    ]
    rows = Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *given, **more: DatasetDict([("train", rows)])
    )
    table = load_source("owner/pets").train
    first, second, third = table.values("image")
    assert first_pixel(first) == (7, 7, 7)
    assert second == file.read_bytes()
    assert third is None
    assert table.class_names == (("label", ("cat", "dog")),)
