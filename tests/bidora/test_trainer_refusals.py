"""What a trainer refuses, what it says then, and that it changed nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from bidora.trainer import BiDoRAArguments, BiDoRAMixin, BiDoRATrainer
from tests.bidora.stopped_runs import (
    SETTINGS,
    Sentences,
    collate,
    differences,
    make_model,
    make_trainer,
)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def few(folder: Path, **settings: Any) -> BiDoRATrainer:
    """Return a trainer of two steps of search and one of retraining."""
    return make_trainer(folder, **{"max_steps": 2, "retrain_max_steps": 1, **settings})


def refused(trainer: Any, folder: Path, said: str, **arguments: Any) -> None:
    """Check that `train` refuses with these words, and changes nothing at all."""
    files, random = files_of(folder), torch.get_rng_state()
    values = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    held = trainer.args, trainer.train_dataset, trainer.model_init
    with pytest.raises(ValueError, match=f"(?s){said}"):
        trainer.train(**arguments)
    assert files_of(folder) == files
    assert torch.equal(random, torch.get_rng_state())
    assert differences(values, dict(trainer.model.state_dict())) == []
    assert flags == {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    now = trainer.args, trainer.train_dataset, trainer.model_init
    assert all(a is b for a, b in zip(held, now, strict=True))


# -- arguments -------------------------------------------------------------------------

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True}, r"fp16=True .*GradScaler.*bf16=True"),
    ({"budget": "cheap"}, r"budget='cheap' is unknown.*economical, full"),
    ({"outer_level": "magnitude"}, r"unknown outer level.*Did you mean 'magnitudes'"),
    ({"estimator": "newton"}, r"'newton' is unknown.*choose one of.*neumann"),
    ({"estimator_settings": {"depth": 3}}, r"darts.*'depth'"),
    ({"estimator_settings": "{'a': 1}"}, r"estimator_settings=.*JSON.*\{"),
    ({"estimator_settings": "[1]"}, r"estimator_settings='\[1\]'"),
    (
        {"estimator": "unrolled", "estimator_settings": {"num_steps": 0}},
        "num_steps=0",
    ),
    ({"retrain": "hot"}, r"retrain='hot' is unknown: choose one of fresh, warm, none"),
    (
        {"dora_dropout": "all"},
        r"dora_dropout='all' is unknown: choose one of lora, peft",
    ),
    ({"validation_fraction": 1.0}, r"validation_fraction=1.0 must be .* below 1"),
    ({"validation_fraction": -0.1}, r"validation_fraction=-0.1"),
    ({"validation_fraction": float("nan")}, r"validation_fraction=nan"),
    ({"outer_every": 0}, "outer_every=0 must be a whole number of 1 or more"),
    ({"outer_every": 2.5}, "outer_every=2.5 must be a whole number of 1 or more"),
    ({"outer_warmup_steps": -1}, "outer_warmup_steps=-1 must be a whole number of 0"),
    ({"per_device_outer_batch_size": 0}, "per_device_outer_batch_size=0 must be"),
    ({"search_patience": 0, "eval_strategy": "epoch"}, "search_patience=0 must be"),
    ({"retrain_max_steps": 0}, "retrain_max_steps=0 must be"),
    ({"audit_every": -1}, "audit_every=-1 must be"),
    ({"outer_learning_rate": -1.0}, "outer_learning_rate=-1.0 must be a finite number"),
    ({"outer_weight_decay": -1.0}, "outer_weight_decay=-1.0 must be a finite number"),
    ({"retrain_learning_rate": float("inf")}, "retrain_learning_rate=inf must be"),
    ({"orthogonality": float("nan")}, "orthogonality=nan must be"),
]


@pytest.mark.parametrize(("settings", "said"), ARGUMENTS, ids=str)
def test_arguments_out_of_range(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        few(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# -- the class -------------------------------------------------------------------------


class Above(BiDoRATrainer):
    """Replaces the step of the mixin."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class Own(Trainer):
    """A Trainer with a step of its own."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class Below(BiDoRAMixin, Own):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Lies above a step that the search does not call."""


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Above, r"Above\.training_step replaces that of BiDoRAMixin.*compute_loss"),
        (Below, r"Own\.training_step is not called by that.*compute_loss"),
    ],
)
def test_a_class_with_a_training_step_of_its_own(
    cls: type, said: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=said):
        few(tmp_path / "run", cls=cls)
    assert not (tmp_path / "run").exists()


def test_a_compute_loss_of_its_own_is_allowed(tmp_path: Path) -> None:
    class Fine(BiDoRATrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    assert few(tmp_path, cls=Fine).train().global_step == 1


def test_the_step_of_trl_is_allowed() -> None:
    trl = pytest.importorskip("trl", reason="needs trl, of the extra test")

    class Sft(BiDoRAMixin, trl.SFTTrainer):
        pass

    from bidora.trainer._checks import check_class

    assert "training_step" in vars(trl.SFTTrainer)  # else this shows nothing
    check_class(Sft, BiDoRAMixin)


# -- what the trainer is given ---------------------------------------------------------


def test_arguments_without_settings_of_bidora(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    said = r"args is TrainingArguments, .* no settings of BiDoRA\. Pass BiDoRATraining"
    with pytest.raises(TypeError, match=said):
        BiDoRATrainer(make_model(), args, train_dataset=Sentences(8))


@dataclass
class Mine(BiDoRAArguments, TrainingArguments):
    """Arguments that a user made."""


def test_arguments_of_another_trainer_are_enough(tmp_path: Path) -> None:
    few = {"max_steps": 2, "retrain_max_steps": 1}
    args = Mine(str(tmp_path), **{**SETTINGS, **few})
    own = {"train_dataset": Sentences(30), "data_collator": collate}
    assert BiDoRATrainer(make_model(), args, **own).train().global_step == 1


class Stream(IterableDataset[Any]):
    """A dataset without a length."""

    def __iter__(self) -> Any:
        return iter(Sentences(8).rows)


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1), None


def test_an_optimizer_from_outside(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"optimizers=.*phases need their own.*optim"):
        few(tmp_path, model=model, parts={"optimizers": sgd(model)})
    assert files_of(tmp_path) == {}


TWICE = Sentences(30)

PARTS: list[tuple[dict[str, Any], str]] = [
    ({"train_dataset": Stream()}, "train_dataset has no length.*list"),
    ({"outer_dataset": Stream()}, "outer_dataset has no length.*list"),
    (
        {"outer_dataset": Sentences(9), "split": ([0], [1])},
        "split divides train_dataset, and outer_dataset leaves it whole",
    ),
    (
        {"train_dataset": TWICE, "eval_dataset": TWICE},
        "eval_dataset is train_dataset.*Pass other examples",
    ),
    (
        {"outer_dataset": TWICE, "eval_dataset": TWICE},
        "eval_dataset is outer_dataset.*Pass other examples",
    ),
]


@pytest.mark.parametrize(
    ("parts", "said"), PARTS, ids=["inner", "outer", "both", "a", "b"]
)
def test_data_that_a_trainer_cannot_use(
    parts: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        few(tmp_path, parts=parts)
    assert files_of(tmp_path) == {}


def frozen() -> Any:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("magnitude" not in name and parameter.requires_grad)
    return model


def thawed() -> Any:
    model = make_model()
    model.base_model.model.bert.pooler.requires_grad_(True)
    return model


MODELS = {
    "no adapter": (lambda: make_model(adapter="none"), "no DoRA magnitudes.*use_dora"),
    "no DoRA": (
        lambda: make_model(adapter="lora"),
        "no DoRA magnitudes.*use_dora=True",
    ),
    "frozen": (frozen, "all 2 DoRA magnitudes .* frozen.*is_trainable=True"),
    "base weights": (thawed, "2 base weights are trainable.*requires_grad_"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_without_magnitudes_to_search(kind: str, tmp_path: Path) -> None:
    make, said = MODELS[kind]
    with pytest.raises(ValueError, match=said):
        few(tmp_path, model=make())
    assert files_of(tmp_path) == {}


def test_settings_of_the_trainer_that_a_search_cannot_honour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"search_patience=2 .*'no'.*Set eval_strategy"
    ):
        few(tmp_path, search_patience=2)
    with pytest.raises(ValueError, match=r"auto_find_batch_size=True.*by hand"):
        few(tmp_path, auto_find_batch_size=True)
    from bidora.trainer._checks import check_trainer

    trainer = few(tmp_path)
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, True)
            with pytest.raises(ValueError, match=r"deepspeed and fsdp.*torchrun"):
                check_trainer(trainer)
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*torchrun"):
        check_trainer(trainer)
    assert files_of(tmp_path) == {}


# -- when training begins --------------------------------------------------------------


class Labelled(Sentences):
    """Sentences with given labels."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__(len(labels))
        self.labels = labels


def test_a_training_set_that_cannot_be_split(tmp_path: Path) -> None:
    for data, said in (
        (
            Labelled([0, 0, 0, 0, 1]),
            r"single example: 1\. .*add examples.*outer_dataset",
        ),
        (Labelled([0, 1, 0, 1, 2, 2]), "6 examples of 3 classes.*too few|outer batch"),
        ([Sentences(1)[0]], r"has 1 example.*too few.*outer_dataset"),
    ):
        refused(few(tmp_path, data=data), tmp_path, said)


def test_an_outer_batch_over_the_size_of_the_split(tmp_path: Path) -> None:
    said = "an outer batch of 7 examples .* more than the 6 that .* Lower"
    refused(few(tmp_path, per_device_outer_batch_size=7), tmp_path, said)
    said = "an outer batch of 4 examples .* more than the 3 that "
    parts = {"outer_dataset": Sentences(3)}
    refused(few(tmp_path, parts=parts), tmp_path, said)


def test_a_search_in_which_the_magnitudes_would_never_move(tmp_path: Path) -> None:
    for settings, said in (
        ({"outer_warmup_steps": 3}, "outer_warmup_steps=3 leaves no outer .* 2 steps"),
        ({"outer_every": 3}, "outer_every=3 .* leaves no outer step in the 2 steps"),
        (
            {"estimator": "unrolled", "outer_every": None},
            "looks back at 5 steps.* the 2 steps",
        ),
        # 24 examples in batches of 8 are three steps.
        (
            {"max_steps": -1, "num_train_epochs": 1, "outer_warmup_steps": 4},
            "outer_warmup_steps=4 leaves no outer step in the 3 steps",
        ),
    ):
        refused(few(tmp_path, **settings), tmp_path, said)


def test_a_product_on_less_than_an_example(tmp_path: Path) -> None:
    said = r"product_fraction=0.01 of a batch of 8 .*'product_fraction': 0.125}"
    own = {"product_fraction": 0.01}
    refused(few(tmp_path, estimator_settings=own), tmp_path, said)


def test_nothing_to_do(tmp_path: Path) -> None:
    settings = {"retrain": "none", "validation_fraction": 0.0}
    refused(few(tmp_path, **settings), tmp_path, "retrain='none' leaves nothing to do")


SPLITS: list[tuple[Any, str]] = [
    ((range(20), range(20, 29)), "20 and 9 indices of 30 .*1 examples are in neither"),
    ((range(20), range(19, 30)), "1 indices come twice"),
    ((range(20), range(20, 31)), "1 are of no example"),
    (([], range(30)), "holds all examples back"),
    (range(30), "split is a range; pass two lists of indices"),
]


@pytest.mark.parametrize(("split", "said"), SPLITS, ids=[s for _, s in SPLITS])
def test_a_split_that_is_none(split: Any, said: str, tmp_path: Path) -> None:
    refused(few(tmp_path, parts={"split": split}), tmp_path, said)


def test_another_split_than_that_of_the_checkpoint(tmp_path: Path) -> None:
    split = [*range(0, 30, 2)], [*range(1, 30, 2)]
    few(tmp_path, parts={"split": split}).train()
    written = json.loads((tmp_path / "bidora_split.json").read_text())
    assert [written["inner_indices"], written["outer_indices"]] == [*split]
    trainer = few(tmp_path, parts={"split": split[::-1]})
    said = "split holds 15 examples back, and .*checkpoint-1 .* 15 others"
    refused(trainer, tmp_path, said, resume_from_checkpoint=True)
    for parts in ({"split": split}, {}):
        trainer = few(tmp_path, parts=parts)
        assert trainer.train(resume_from_checkpoint=True).global_step == 1


def test_one_of_several_processes_that_do_not_know_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = few(tmp_path)
    from bidora.trainer._checks import check_trainer

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one of 2 processes.*torchrun"):
        check_trainer(trainer)


def test_no_training_set(tmp_path: Path) -> None:
    trainer = few(tmp_path, parts={"train_dataset": None})
    refused(trainer, tmp_path, "nothing to train on: pass train_dataset")


def test_a_trial_of_a_hyperparameter_search(tmp_path: Path) -> None:
    refused(few(tmp_path), tmp_path, "hyperparameter_search.*Call train once", trial=1)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run, and a file of somebody else's."""
    folder = tmp_path_factory.mktemp("earlier")
    few(folder).train()
    (folder / "notes.txt").write_text("keep me")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "model").write_text("keep me too")
    return folder


def test_an_earlier_run_is_not_overwritten(earlier: Path) -> None:
    said = (
        r"holds an earlier run \(.*checkpoint-1.*resume_from_checkpoint=True.*overwrite"
    )
    refused(few(earlier), earlier, said)


def test_a_run_from_elsewhere_overwrites_none_either(
    earlier: Path, tmp_path: Path
) -> None:
    few(tmp_path).train()
    path = str(tmp_path / "_search" / "checkpoint-1")
    said = "holds an earlier run"
    refused(few(earlier), earlier, said, resume_from_checkpoint=path)


def test_a_checkpoint_from_elsewhere_is_gone_on_from(
    earlier: Path, tmp_path: Path
) -> None:
    trainer = few(tmp_path)
    path = str(earlier / "_search" / "checkpoint-1")
    assert trainer.train(resume_from_checkpoint=path).global_step == 1
    assert (tmp_path / "_search" / "checkpoint-2").is_dir()


def test_overwriting_deletes_the_checkpoints_of_that_run_alone(tmp_path: Path) -> None:
    few(tmp_path, max_steps=3).train()
    (tmp_path / "notes.txt").write_text("keep me")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    few(tmp_path, overwrite_earlier_run=True, seed=4).train()
    assert (tmp_path / "notes.txt").is_file()
    assert (tmp_path / "checkpoint-best").is_dir()
    assert (tmp_path / "checkpoint-9").is_file()
    assert not (tmp_path / "_search" / "checkpoint-3").exists()
    assert json.loads((tmp_path / "bidora_split.json").read_text())["seed"] == 4


def test_a_run_without_a_checkpoint_is_in_the_way_of_another_alone(
    tmp_path: Path,
) -> None:
    few(tmp_path, save_strategy="no").train()
    assert (tmp_path / "bidora_split.json").is_file()
    few(tmp_path, save_strategy="no").train()
    said = "holds an earlier run .*bidora_split.json.*no checkpoint to go on from"
    refused(few(tmp_path, seed=4), tmp_path, said)
    said = "no complete checkpoint in .* without resume_from_checkpoint"
    refused(few(tmp_path), tmp_path, said, resume_from_checkpoint=True)


def test_a_set_up_that_fails_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    refused(few(tmp_path, per_device_outer_batch_size=7), tmp_path, "outer batch")
    assert few(tmp_path).train().global_step == 1


OTHER: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 0.5}, "learning_rate was 0.01 and is 0.5"),
    (
        {"outer_every": 1, "seed": 4},
        "outer_every was 2 and is 1; .*seed was 3 and is 4",
    ),
    ({"estimator": "sama"}, "estimator was 'darts' and is 'sama'"),
    ({"retrain_max_steps": 5}, "retrain_max_steps was 1 and is 5"),
    ({"retrain": "warm"}, "retrain was 'fresh' and is 'warm'"),
    ({"validation_fraction": 0.3}, "validation_fraction was 0.2 and is 0.3"),
    ({"data": Sentences(31)}, "train_examples was 30 and is 31"),
    (
        {"parts": {"outer_dataset": Sentences(9)}},
        "outer_examples was None and is 9",
    ),
]


@pytest.mark.parametrize(("settings", "said"), OTHER, ids=[s for _, s in OTHER])
def test_a_checkpoint_of_other_settings(
    settings: dict[str, Any], said: str, earlier: Path
) -> None:
    said = f"from a run with other settings: .*{said}.* Give the settings"
    trainer = few(earlier, **settings)
    refused(trainer, earlier, said, resume_from_checkpoint=True)


def test_how_often_is_saved_and_logged_may_change(earlier: Path) -> None:
    trainer = few(earlier, save_steps=5, logging_steps=7, save_total_limit=2)
    assert trainer.train(resume_from_checkpoint=True).global_step == 1


@pytest.mark.parametrize("name", ["nowhere", "checkpoint-best", "notes.txt"])
def test_a_folder_that_is_no_checkpoint(name: str, earlier: Path) -> None:
    path = str(earlier / name)
    said = f"{re.escape(path)} is not a complete checkpoint.*trainer_state.*Pass an"
    refused(few(earlier), earlier, said, resume_from_checkpoint=path)


def test_checkpoints_of_the_model_alone(tmp_path: Path) -> None:
    few(tmp_path, save_only_model=True).train()
    path = str(tmp_path / "checkpoint-1")
    said = "not a complete checkpoint.*optimizer.pt.*save_only_model"
    refused(few(tmp_path), tmp_path, said, resume_from_checkpoint=path)


def test_an_exception_in_a_step_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    class Fails(BiDoRATrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                raise ZeroDivisionError
            return super().compute_loss(*args, **kwargs)

    trainer = few(tmp_path, cls=Fails)
    held = trainer.args, trainer.train_dataset
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.args is held[0]
    assert trainer.train_dataset is held[1]
    assert trainer.phase is None
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert names == {n for n, p in make_model().named_parameters() if p.requires_grad}


def test_train_sets_the_seed_of_its_arguments(tmp_path: Path) -> None:
    """What comes before it is of no effect, as in a Trainer with `model_init`."""
    states = []
    for n in (1, 2):
        trainer = few(tmp_path / str(n))
        torch.manual_seed(n)
        trainer.train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
