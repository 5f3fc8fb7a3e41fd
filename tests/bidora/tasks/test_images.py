"""Images as a task: what is read, told and refused, before any model is loaded."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from bidora.data import load_source
from bidora.data.images import png_bytes
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.runs.examples import read_examples
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.tasks.guess import guess_task_type
from bidora.tasks.images import ImageClassification
from tests.bidora.conftest import Heard
from tests.bidora.image_models import write_pets

TASK = ImageClassification()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return write_pets(tmp_path / "first", each=3)


def read(task: Path | str, listener: Listener | None = None, **given: Any) -> Any:
    settings = TrainSettings.from_dict({"task": str(task), "model": "a-vit", **given})
    return read_examples(settings, listener or Listener(), searches=False)


def table_in(folder: Path, rows: list[list[str]], header: str = "image,label") -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def test_a_folder_of_mixed_sizes_is_read_and_told(pets: Path) -> None:
    heard = Heard()
    found = read(pets, heard)
    assert found.task.name == "images"
    assert found.schema.label_names == ("ant", "bee", "cat")
    assert found.rows["train"].columns["labels"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    told = "\n".join(heard.lines)
    assert "images of 4 sizes, from 10 × 8 to 10 × 11 pixels" in told
    assert "ant (train 3, test 4)" in told


def test_a_table_of_paths_is_guessed_and_read(pets: Path) -> None:
    rows = [[f"train/{c}/{i}.png", c] for c in ("ant", "bee") for i in range(3)]
    heard = Heard()
    found = read(table_in(pets, rows, "img,kind"), heard, label_column="kind",
                 test_file=str(table_in(pets / "test", [["ant/1.png", "ant"]],
                                        "img,kind")))  # fmt: skip
    assert any(
        "Type   images: column 'img' holds images" in line for line in heard.lines
    )
    held = found.rows["train"].columns["image"]
    assert held[0] == str((pets / "train/ant/0.png").resolve())
    assert len(found.rows["test"]) == 1


def test_every_bad_row_is_told_with_its_place(pets: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pets, data)
    whole = (data / "train/ant/0.png").read_bytes()
    (data / "cut.png").write_bytes(whole[:-60])
    (tmp_path / "outside.png").write_bytes(whole)
    rows = [
        ["train/ant/0.png", "ant"],
        ["train/bee/0.png", "bee"],
        ["cut.png", "ant"],
        ["../outside.png", "ant"],
        [str(tmp_path / "outside.png"), "ant"],
        ["train/ant/99.png", "ant"],
        ["notes.txt", "ant"],
        ["", "ant"],
        ["train/bee/1.png", ""],
    ]
    path = table_in(data, rows)
    with pytest.raises(UserError) as told:
        read(path)
    lines = str(told.value).splitlines()[1:8]
    for line, number, words in zip(
        lines,
        range(4, 11),
        [
            "broken or cut short",
            "leads out of",
            "leads out of",
            "has no such file",
            "no path of an image",
            "holds no image",
            "holds no label",
        ],
        strict=True,
    ):
        assert line.startswith(f"  {path}, line {number}: ")
        assert words in line
    table = load_source(str(path)).train
    source = Source("rows", {"train": table})
    assert len(TASK.rows(table, TASK.schema(source))) == 2


def test_a_column_of_texts_is_refused_at_once() -> None:
    rows = tuple((f"a nice film {i}", "ab"[i % 2]) for i in range(6))
    table = Table("films.csv", ("text", "label"), rows, ("line",) * 6)
    source = Source("films", {"train": table})
    with pytest.raises(UserError, match=r"holds no images, but 'a nice film 0'"):
        ImageClassification(image_column="text").schema(source)
    with pytest.raises(UserError, match=r"no column with a usual name \(image, img"):
        TASK.schema(source)
    assert guess_task_type(source, {})[0] == "classification"
    assert guess_task_type(source, {"image_column": "text"})[0] == "images"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text_column": "image"}, "--text-column has no meaning for images"),
        ({"proteins": True}, "--proteins has no meaning for images"),
        ({"max_length": 64}, "--max-length is about the tokens of texts"),
        ({"pooling": "mean"}, "--pooling is about the tokens of texts"),
        ({"model": "all-MiniLM-L6-v2"}, "google/vit-base-patch16-224-in21k"),
        ({"model": "antiberty"}, "preprocessor_config.json"),
    ],
)
def test_what_is_about_texts_is_refused(
    given: dict[str, Any], words: str, pets: Path
) -> None:
    with pytest.raises(UserError, match=words):
        read(pets, **given)


def test_an_image_column_means_nothing_to_texts(labelled_csv: Path) -> None:
    with pytest.raises(
        UserError, match="--image-column has no meaning for classification"
    ):
        read(labelled_csv, task_type="classification", image_column="text")


def test_a_class_with_one_image_can_not_be_split(pets: Path) -> None:
    rows = [[f"train/ant/{i}.png", "ant"] for i in range(3)]
    rows += [[f"train/cat/{i}.png", "cat"] for i in range(3)]
    path = table_in(pets, [*rows, ["train/bee/0.png", "bee"]])
    with pytest.raises(
        UserError, match=r"single example: bee.*--min-examples-per-class"
    ):
        read(path)
    kept = read(path, min_examples_per_class=2)
    assert kept.schema.label_names == ("ant", "cat")


def test_a_class_that_train_lacks_is_a_bad_row(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "pets")
    shutil.copytree(pets / "train/ant", tmp_path / "pets/test/dog")
    with pytest.raises(UserError, match=r"test, dog/0.png: column 'label' holds 'dog'"):
        read(tmp_path / "pets")


def test_images_that_two_parts_share_are_told(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "pets")
    again = Image.open(pets / "train/ant/0.png")
    again.save(tmp_path / "pets/test/ant/9.bmp")  # another file, the same pixels
    again.save(tmp_path / "pets/train/bee/9.bmp")
    heard = Heard()
    read(tmp_path / "pets", heard)
    told = "\n".join(heard.lines)
    assert "1 of 13 examples of test have an image that train has too, such as" in told
    assert "test, ant/9.bmp; what the model has seen" in told
    assert "1 image(s) of train have several labels in several rows" in told


def test_kinds_of_images_that_are_changed_are_told() -> None:
    clear = png_bytes(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    deep = png_bytes(Image.fromarray(np.full((2, 2), 1000, dtype=np.uint16)))
    rows = tuple((image, label) for image in (clear, deep, deep) for label in "ab")
    table = Table("made", ("image", "label"), rows, ("row",) * 6)
    source = Source("made", {"train": table})
    schema = TASK.schema(source)
    lines = TASK.describe({"train": TASK.rows(table, schema)}, schema)
    assert "2 transparent image(s) laid on white" in lines
    assert "4 grey image(s) of 16 bits, brought to 8" in lines


def test_features_are_what_the_processor_makes_of_rgb() -> None:
    processor: Any = ViTImageProcessor(size={"height": 2, "width": 2})
    grey = png_bytes(Image.new("L", (2, 2), 255))
    black = png_bytes(Image.new("RGB", (5, 3)))
    schema: Any = None
    made = TASK.features(
        {"image": [grey, black], "labels": [1, 0]}, processor, schema, 0
    )
    # ViT's own normalisation: (x / 255 - 0.5) / 0.5
    assert [v.shape for v in made["pixel_values"]] == [(3, 2, 2)] * 2
    assert (made["pixel_values"][0] == 1.0).all()
    assert (made["pixel_values"][1] == -1.0).all()
    batch = TASK.collator(processor)(
        [{n: v[i] for n, v in made.items()} for i in range(2)]
    )
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["labels"].tolist() == [1, 0]
