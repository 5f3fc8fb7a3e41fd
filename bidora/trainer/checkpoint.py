"""What a checkpoint holds beyond the Trainer's own files, and which one to go on from."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bidora.trainer.arguments import Phase

__all__ = [
    "Checkpoint",
    "Progress",
    "claim_folder",
    "find_checkpoint",
    "load_values",
    "refuse_other_settings",
    "save_progress",
    "write_json",
]

logger = logging.getLogger(__name__)

PROGRESS_FILE = "bidora_progress.json"
VALUES_FILE = "bidora_values.safetensors"
SPLIT_FILE = "bidora_split.json"
TRAINER_STATE = "trainer_state.json"
FORMAT = 1

SAME_RUN = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "gradient_accumulation_steps",
    "label_smoothing_factor",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "optim",
    "per_device_train_batch_size",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
    "world_size",
)
"""Arguments of transformers that a resumed run must share with the one it goes on from;
those that a version of transformers does not have count for nothing."""


@dataclass
class Progress:
    """How far a job is, beyond what the Trainer's own files tell.

    Attributes:
        phase: in which phase.
        settings: settings that decide the trajectory.
        inner_indices: training examples of the directions.
        outer_indices: those held back for the magnitudes.
        outer_drawn: outer batches that were drawn.
        best_held_back: lowest loss on the held-back part.
        without_gain: evaluations since then.
    """

    phase: Phase
    settings: dict[str, Any]
    inner_indices: list[int] = field(default_factory=list)
    outer_indices: list[int] = field(default_factory=list)
    outer_drawn: int = 0
    best_held_back: float | None = None
    without_gain: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        progress: how far the job was.
        finished: whether its phase took its last step.
    """

    path: Path
    progress: Progress
    finished: bool


def settings_of(args: Any) -> dict[str, Any]:
    """Return the settings that decide a trajectory, as JSON holds them."""
    shared = {name: getattr(args, name) for name in SAME_RUN if hasattr(args, name)}
    retraining = {
        name: getattr(args, name)
        for name in (
            "retrain_learning_rate",
            "retrain_max_steps",
            "retrain_num_train_epochs",
            "recipe",
        )
    }
    settings = {**shared, **retraining, **args.bidora_settings()}
    return json.loads(json.dumps(settings, default=str))


def refuse_other_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of other settings.

    Raises:
        ValueError: listing each difference.
    """
    names = sorted({*saved, *own})
    different = [n for n in names if saved.get(n) != own.get(n)]
    if different:
        listed = "; ".join(
            f"{n} was {saved.get(n)!r} and is {own.get(n)!r}" for n in different
        )
        msg = (
            f"the checkpoint comes from a run with other settings: {listed}. The rest of "
            "the run would belong to neither. Give the settings of the checkpoint, or "
            "start anew in another output_dir."
        )
        raise ValueError(msg)


# -- writing ---------------------------------------------------------------------------


def save_progress(
    folder: str | Path,
    progress: Progress,
    model: nn.Module,
    first_values: Mapping[str, Tensor],
) -> None:
    """Write where a job is and the values of its adapter, bit for bit.

    PEFT's own file is for loading the adapter elsewhere; it may leave out a head that
    is trained without PEFT, and a load may cast.

    Args:
        folder: the checkpoint.
        progress: how far the job is.
        model: the model.
        first_values: what a fresh retraining starts from.
    """
    values = {f"now.{n}": t for n, t in adapter_values(model).items()}
    values.update({f"first.{n}": t for n, t in first_values.items()})
    own = {n: t.detach().cpu().contiguous().clone() for n, t in values.items()}
    save_file(own, str(Path(folder) / VALUES_FILE))
    write_json(Path(folder) / PROGRESS_FILE, {"format": FORMAT, **vars(progress)})


def adapter_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained in either phase, by name."""
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_magnitude_vector" in name
    }


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- reading ---------------------------------------------------------------------------


def load_values(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Put the saved values into a model.

    Args:
        folder: the checkpoint.
        model: the model.

    Returns:
        What a fresh retraining starts from, by name.

    Raises:
        ValueError: the model has other parameters; nothing was changed.
    """
    saved = load_file(str(folder / VALUES_FILE))
    now = {n.removeprefix("now."): t for n, t in saved.items() if n.startswith("now.")}
    own = dict(model.named_parameters())
    unfit = sorted(n for n, t in now.items() if n not in own or own[n].shape != t.shape)
    if unfit:
        msg = (
            f"{folder} holds values for {len(unfit)} parameter(s) that this model does "
            f"not have in that shape ({', '.join(unfit[:3])}): it comes from another "
            "model or adapter. Build the model as the first run did."
        )
        raise ValueError(msg)
    with torch.no_grad():
        for name, value in now.items():
            own[name].copy_(value)
    mark = "first."
    return {n.removeprefix(mark): t for n, t in saved.items() if n.startswith(mark)}


def find_checkpoint(output_dir: str, wanted: str | bool | None) -> Checkpoint | None:
    """Return the checkpoint to go on from.

    Args:
        output_dir: folder of the job.
        wanted: a checkpoint's folder; True for the last complete one of the job; None or
            False for none.

    Returns:
        The checkpoint; None where none is wanted.

    Raises:
        ValueError: there is none, or the one that was named is not complete.
    """
    if not wanted:
        return None
    if wanted is not True:
        found = _read(Path(wanted))
        if found is None:
            msg = (
                f"{wanted} is not a complete checkpoint of a BiDoRA run: it lacks "
                f"{PROGRESS_FILE} or {TRAINER_STATE}. A run that was killed while it "
                "wrote one leaves such a folder; pass an earlier one, or True."
            )
            raise ValueError(msg)
        return found
    for folder in (Path(output_dir), Path(output_dir) / "search"):
        for path in _checkpoints(folder):
            found = _read(path)
            if found is not None:
                return found
            logger.warning("%s is not complete and is passed over", path)
    msg = (
        f"there is no complete checkpoint in {output_dir} or its folder 'search'. Was "
        "save_strategy 'no', or is it another folder?"
    )
    raise ValueError(msg)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the last one first."""
    numbers = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [numbers[n] for n in sorted(numbers, reverse=True)]


def _read(path: Path) -> Checkpoint | None:
    """Read a checkpoint; None where a file of it is missing or half written."""
    try:
        state = json.loads((path / TRAINER_STATE).read_text("utf-8"))
        content = json.loads((path / PROGRESS_FILE).read_text("utf-8"))
        if not (path / VALUES_FILE).is_file() or content.pop("format") != FORMAT:
            return None
        finished = state["global_step"] >= state["max_steps"]
        return Checkpoint(path, Progress(**content), finished)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def claim_folder(output_dir: str, *, overwrite: bool) -> None:
    """Make sure that a job which starts anew destroys no other.

    Args:
        output_dir: folder of the job.
        overwrite: whether checkpoints of an earlier run may be deleted.

    Raises:
        ValueError: there is an earlier run, and it may not.
    """
    folder = Path(output_dir)
    earlier = [*_checkpoints(folder), *_checkpoints(folder / "search")]
    marks = [p for p in (folder / SPLIT_FILE,) if p.is_file()]
    if not earlier and not marks:
        return
    if not overwrite:
        shown = ", ".join(str(p) for p in (earlier or marks)[:3])
        msg = (
            f"{output_dir} holds an earlier run ({shown}). Go on with it by "
            "trainer.train(resume_from_checkpoint=True), name another output_dir, or "
            "pass overwrite_earlier_run=True to delete it."
        )
        raise ValueError(msg)
    for path in earlier:
        shutil.rmtree(path)
    for path in marks:
        path.unlink()
