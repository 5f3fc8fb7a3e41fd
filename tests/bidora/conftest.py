"""A tiny pretrained encoder and a small labelled file, for the tests of the job."""

from __future__ import annotations

import csv
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from bidora.runs.results import Listener, RunResult
from bidora.runs.settings import TrainSettings

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


class Heard(Listener):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@dataclass(frozen=True)
class Finished:
    """A run that is over, with what only its process knew."""

    settings: TrainSettings
    result: RunResult
    job: Any  # with the trained model and the tokenised examples
    told: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.result.folder)

    def read(self, name: str) -> Any:
        """Return what a file of the run holds."""
        text = (self.folder / name).read_text("utf-8")
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text) if name.endswith(".json") else text

    def logits(self, model: Any = None) -> torch.Tensor:
        """Return what a model, or that of the run, says of all test examples."""
        model = self.job.model if model is None else model
        examples = self.job.sets["test"]
        batch = self.job.collate([examples[i] for i in range(len(examples))])
        batch.pop("labels")
        with torch.no_grad():
            return model.eval()(**batch).logits


def finish(**given: Any) -> Finished:
    """Train, and keep the model that was trained."""
    from bidora.runs import job

    kept: list[Any] = []
    save = job._Job.save

    def keep(self: Any, *args: Any) -> None:
        kept.append(self)
        save(self, *args)

    heard, settings = Heard(), TrainSettings.from_dict(given)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(job._Job, "save", keep)
        warnings.simplefilter("ignore")
        result = job.train(settings, heard)
    return Finished(settings, result, kept[0], heard.lines)


@pytest.fixture(scope="session")
def small_job(tiny_encoder: Path, labelled_csv: Path) -> dict[str, Any]:
    """Return settings of a run of a second, without its folder."""
    return {
        "model": str(tiny_encoder),
        "task": str(labelled_csv),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 12,
        "eval_steps": 3,
    }


@pytest.fixture(scope="session")
def finished(
    small_job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Finished]:
    """Return a function that gives the finished run of a method, trained once for all."""
    runs: dict[str, Finished] = {}

    def run(method: str) -> Finished:
        if method not in runs:
            place = tmp_path_factory.mktemp("finished") / method
            searches = {"budget": "full", "outer_every": 2, "outer_warmup_steps": 2}
            runs[method] = finish(
                **small_job,
                **(searches if method.startswith("bidora") else {}),
                method=method,
                output_dir=str(place),
            )
        return runs[method]

    return run
