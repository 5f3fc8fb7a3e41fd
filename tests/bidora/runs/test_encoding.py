"""What becomes of a task's rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from bidora import TrainSettings, train
from bidora.runs.encoding import unknown
from tests.bidora.conftest import Heard


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ({}, (2, 3 / 8)),  # three of eight, in the first and the last example
        ({"unk_token_id": None}, (0, 0.0)),
        ({"eos_token_id": 1}, (0, 0.0)),  # one token for both, as of a GPT-2
        ({"unk_token_id": 9}, (0, 0.0)),
    ],
)
def test_unknown_tokens_are_counted(
    tokens: dict[str, Any], found: tuple[int, float]
) -> None:
    features = Dataset.from_dict({"input_ids": [[2, 1, 1, 3], [2, 4], [1, 3]]})
    usual = {"unk_token_id": 1, "eos_token_id": 3, "bos_token_id": None}
    assert unknown(features, SimpleNamespace(**{**usual, **tokens})) == found


def test_images_and_nothing_have_no_unknown_tokens() -> None:
    tokenizer = SimpleNamespace(unk_token_id=1, eos_token_id=3, bos_token_id=None)
    for columns in ({"pixel_values": [[1.0]]}, {"input_ids": []}):
        assert unknown(Dataset.from_dict(columns), tokenizer) == (0, 0.0)
    assert unknown(Dataset.from_dict({"pixel_values": [[1.0]]}), object()) == (0, 0.0)


def test_texts_in_another_language_are_told(
    tiny_encoder: Path, labelled_rows: list[tuple[str, str]], tmp_path: Path
) -> None:
    data = tmp_path / "texts.csv"
    rows = [f"{text} привет,{label}" for text, label in labelled_rows]
    data.write_text("\n".join(["text,label", *rows]), "utf-8")
    heard = Heard()
    settings = TrainSettings(model=str(tiny_encoder), task=str(data), method="probe")
    train(settings, heard, dry_run=True)
    said = [line for line in heard.lines if "does not know ([UNK], " in line]
    assert len(said) == 1
    # Five words, the new one, and a token at each end: at least one of eight.
    share = float(said[0].split("[UNK], ")[1].split("%")[0])
    assert 100 / 8 - 0.1 < share < 50


def test_proteins_that_are_read_as_words_are_told_their_option(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "proteins.csv"
    letters = "ACDEFGHIKLMNPQRSTVWY"
    rows = [f"{letters[i:]}{letters[:i]},{'ab'[i % 2]}" for i in range(20)]
    data.write_text("\n".join(["text,label", *rows, "MK-V,a"]), "utf-8")
    heard = Heard()
    settings = TrainSettings(model=str(tiny_encoder), task=str(data), method="probe")
    train(settings, heard, dry_run=True)
    (said,) = [line for line in heard.lines if "does not know ([UNK], " in line]
    assert said.endswith(
        "They look like proteins, and are read as words: say --proteins."
    )
