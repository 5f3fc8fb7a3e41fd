"""What the examples of a comparison are recognised by."""

from __future__ import annotations

from pathlib import Path

import pytest

from bidora.data.digits import digits_source
from bidora.data.load import load_source
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.study.data import digest


def written(folder: Path, rows: str = "a crow,bird\nthe iron,metal\n") -> Path:
    """Write a train file, and return the folder."""
    folder.mkdir()
    (folder / "train.csv").write_text(f"text,label\n{rows}")
    return folder


def of(place: Path) -> str:
    return digest(load_source(str(place)))


def test_the_same_examples_in_another_folder_are_the_same(tmp_path: Path) -> None:
    found = of(written(tmp_path / "a"))
    assert found.startswith("2 train, sha256 ")
    assert of(written(tmp_path / "b")) == found


@pytest.mark.parametrize(
    "rows",
    [
        "a crow,metal\nthe iron,metal\n",
        "a wren,bird\nthe iron,metal\n",
        "the iron,metal\na crow,bird\n",
        "a crow,bird\nthe iron,metal\nthe iron,metal\n",
    ],
)
def test_another_label_text_order_or_row_is_another_data_set(
    tmp_path: Path, rows: str
) -> None:
    assert of(written(tmp_path / "a")) != of(written(tmp_path / "b", rows))


def test_another_part_is_another_data_set(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    before = of(folder)
    (folder / "test.csv").write_text("text,label\nthe plum,fruit\n")
    assert of(folder).startswith("2 train, 1 test, ")
    (folder / "test.csv").unlink()
    assert of(folder) == before


def test_images_are_known_by_what_they_show_and_not_by_their_names(
    tmp_path: Path,
) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra images")

    def images(name: str, shade: int) -> str:
        for label in ("dark", "light"):
            (tmp_path / name / label).mkdir(parents=True)
            picture = Image.new("L", (4, 4), shade)
            picture.save(tmp_path / name / label / "1.png")
        return of(tmp_path / name)

    assert images("a", 3) == images("b", 3) != images("c", 4)


def test_an_image_of_bytes_is_known_however_it_is_packed(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    source = digits_source()
    table = source.train
    data, label = table.rows[0]
    (tmp_path / "one.png").write_bytes(data)
    with Image.open(tmp_path / "one.png") as image:
        image.save(tmp_path / "packed.png", compress_level=0)
    packed = (tmp_path / "packed.png").read_bytes()
    assert packed != data

    def of_one(value: bytes) -> str:
        rows = ((value, label),)
        return digest(Source("d", {"train": Table("d", table.columns, rows, ("1",))}))

    assert of_one(packed) == of_one(data)
    assert of_one(table.rows[1][0]) != of_one(data)
