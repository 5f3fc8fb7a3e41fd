"""A tiny pretrained encoder and a small labelled file, for the tests of the job."""

from __future__ import annotations

import csv
import json
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertModel, BertTokenizer

from bidora.methods import METHODS
from bidora.runs.plots import draw_curves
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
    trainer: Any
    values: dict[str, dict[str, torch.Tensor]]  # as a phase begins and ends
    groups: dict[
        str, dict[str, tuple[float, float]]
    ]  # rate and decay by name, by phase

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

    def condition_of_the_head(self) -> float:
        """Return how much the head enlarges the rounding of what it reads.

        A relative error of each entry of h is one of ‖|W||h| + |b|‖ over ‖Wh + b‖ in the
        logits: much more than 1 where large weights cancel, as those of a probe do.
        """
        named = self.job.model.named_modules()
        head: Any = next(m for n, m in named if n.endswith(("classifier", "head")))
        read: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(
            lambda module, given: read.append(given[0])
        )
        logits = self.logits().double()
        hook.remove()
        weight, bias = head.weight.double().abs(), head.bias.double().abs()
        sizes = read[0].double().abs() @ weight.T + bias
        return (sizes.norm() / logits.norm()).item()


def trained_values(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of what a method may train, by name."""
    marks = ("lora_", "modules_to_save", ".down.", ".up.", "classifier")
    return {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if any(mark in n for mark in marks) and "original_module" not in n
    }


def spare(patch: pytest.MonkeyPatch) -> None:
    """Leave out of jobs what costs more than their training, and has its own tests.

    The probe is fitted for three of its eleven strengths, no picture is drawn, and PEFT
    writes no card beside a checkpoint, which it renders from a template each time.
    """
    patch.setattr("bidora.probing.fit.STRENGTHS", (1e-3, 1e-2, 1e-1))
    patch.setattr(
        "bidora.runs.plots.draw_curves",
        lambda history, path, title, metric: path.touch(),
    )
    patch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


@pytest.fixture
def spared() -> Iterator[None]:
    """Run the jobs of a test without what has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        spare(patch)
        yield


def finish(*, draws: bool = False, **given: Any) -> Finished:
    """Train as a spared job does, but for a picture where it is asked for; keep it all."""
    from bidora.runs import job
    from bidora.runs.recorder import Recorder

    kept: dict[str, Any] = {}
    values: dict[str, dict[str, torch.Tensor]] = {}
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    save, begin, end = job._Job.save, Recorder.on_train_begin, Recorder.on_train_end

    def keep(self: Any, *args: Any) -> None:
        kept["job"] = self
        save(self, *args)

    def on_train_begin(self: Any, *args: Any, **rest: Any) -> None:
        begin(self, *args, **rest)
        kept["trainer"] = self.trainer
        model = self.trainer.model
        values[f"{self.phase} begins"] = trained_values(model)
        names = {id(p): n for n, p in model.named_parameters()}
        groups[self.phase] = {
            names[id(p)]: (group["initial_lr"], group["weight_decay"])
            for group in rest["optimizer"].param_groups
            for p in group["params"]
        }

    def on_train_end(self: Any, *args: Any, **rest: Any) -> None:
        values[f"{self.phase} ends"] = trained_values(self.trainer.model)
        end(self, *args, **rest)

    heard, settings = Heard(), TrainSettings.from_dict(given)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(job._Job, "save", keep)
        patch.setattr(Recorder, "on_train_begin", on_train_begin)
        patch.setattr(Recorder, "on_train_end", on_train_end)
        spare(patch)
        if draws:
            patch.setattr("bidora.runs.plots.draw_curves", draw_curves)
        warnings.simplefilter("ignore")
        result = job.train(settings, heard)
    return Finished(
        settings,
        result,
        kept["job"],
        heard.lines,
        kept.get("trainer"),  # none of the probe's, which takes no step
        values,
        groups,
    )


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
            own: dict[str, Any] = {"method": method, "output_dir": str(place)}
            if method.startswith("bidora"):
                own |= {"budget": "full", "outer_every": 2, "outer_warmup_steps": 2}
            if method.startswith("bidora-"):
                own |= {"max_steps": 4, "eval_steps": 4}
            refused = METHODS.get(method).ignores
            given = {n: v for n, v in small_job.items() if n not in refused}
            runs[method] = finish(**{**given, **own}, draws=method == "bidora")
        return runs[method]

    return run
