"""A tiny pretrained encoder and a small labelled file, for the tests of the job."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry"],
    "metal": ["iron", "tin", "zinc", "copper"],
    "bird": ["crow", "wren", "swift", "robin"],
}
FILLERS = ["a", "the", "of", "and", "small"]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a BERT with random weights and a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS]
    words += [word for group in WORDS.values() for word in group]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.3,  # random features that tell words apart
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labelled_rows() -> list[tuple[str, str]]:
    """Return 60 texts with their labels, twenty of each of three classes."""
    order = random.Random(0)
    rows = []
    for _ in range(20):
        for label, words in WORDS.items():
            drawn = order.sample(words, 2) + order.sample(FILLERS, 3)
            order.shuffle(drawn)
            rows.append((" ".join(drawn), label))
    return rows


@pytest.fixture(scope="session")
def labelled_csv(
    tmp_path_factory: pytest.TempPathFactory, labelled_rows: list[tuple[str, str]]
) -> Path:
    """Return a csv file of those rows with the columns text and label."""
    path = tmp_path_factory.mktemp("data") / "words.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(labelled_rows)
    return path
