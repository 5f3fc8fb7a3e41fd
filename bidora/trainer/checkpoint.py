"""What a checkpoint holds beyond the Trainer's own files, and which one to go on from."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bidora._files import write_whole
from bidora.trainer.arguments import SEARCH_FOLDER, Phase
from bidora.trainer.upstream import TRAINER_FILES, TRAINER_STATE, was_stopped
from bidora.trainer.values import VALUES_FILE, save_values

__all__ = [
    "Checkpoint",
    "Progress",
    "checkpoints_in",
    "claim_folder",
    "find_checkpoint",
    "last_complete",
    "refuse_other_settings",
    "save_progress",
    "write_json",
]

logger = logging.getLogger(__name__)

PROGRESS_FILE = "bidora_progress.json"
SPLIT_FILE = "bidora_split.json"
FORMAT = 1

SAME_RUN = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "gradient_accumulation_steps",
    "greater_is_better",
    "group_by_length",
    "label_smoothing_factor",
    "learning_rate",
    "load_best_model_at_end",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim",
    "optim_args",
    "per_device_train_batch_size",
    "seed",
    "train_sampling_strategy",
    "warmup_ratio",
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

    def judge(self, loss: float) -> None:
        """Take the loss on the held-back part at an evaluation."""
        if self.best_held_back is None or loss < self.best_held_back:
            self.best_held_back, self.without_gain = loss, 0
        else:
            self.without_gain += 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        progress: how far the job was.
        step: steps of its phase that are taken.
        finished: whether that is all of them, or the phase was ended early there.
    """

    path: Path
    progress: Progress
    step: int
    finished: bool


def settings_of(
    args: Any, train_examples: int, outer_examples: int | None
) -> dict[str, Any]:
    """Return what decides a trajectory and can be told in words, as JSON holds it.

    Args:
        args: the arguments of the whole job.
        train_examples: length of the training set.
        outer_examples: length of `outer_dataset`, where there is one.
    """
    shared = {name: getattr(args, name) for name in SAME_RUN if hasattr(args, name)}
    retraining = {
        name: getattr(args, name)
        for name in (
            "retrain_learning_rate",
            "retrain_max_steps",
            "retrain_num_train_epochs",
        )
    }
    examples = {"train_examples": train_examples, "outer_examples": outer_examples}
    settings = {**shared, **retraining, **args.bidora_settings(), **examples}
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
    outer: Collection[str],
    first_values: Mapping[str, Tensor],
) -> None:
    """Write where a job is and the values of its adapter, bit for bit.

    Args:
        folder: the checkpoint.
        progress: how far the job is.
        model: the model.
        outer: names of the outer parameters.
        first_values: what a fresh retraining starts from.
    """
    save_values(Path(folder), model, outer, first_values)
    write_json(Path(folder) / PROGRESS_FILE, {"format": FORMAT, **vars(progress)})


def write_json(path: Path, content: Any) -> None:
    """Write JSON as a whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


# -- reading ---------------------------------------------------------------------------


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
        if isinstance(found, str):
            msg = (
                f"{wanted} is not a complete checkpoint of a BiDoRA run: {found}. A run "
                "that was killed while it wrote one leaves such a folder, and so does "
                "save_only_model=True. Pass an earlier one, or True."
            )
            raise ValueError(msg)
        return found
    found = last_complete(Path(output_dir))
    if found is not None:
        return found
    msg = (
        f"there is no complete checkpoint in {output_dir} or its folder "
        f"{SEARCH_FOLDER!r}: the run was stopped before its first one, saved none "
        "(save_strategy='no') or is in another folder. Call train() without "
        "resume_from_checkpoint to start anew."
    )
    raise ValueError(msg)


def last_complete(output_dir: Path) -> Checkpoint | None:
    """Return the last complete checkpoint of a job; None where there is none."""
    for folder in (output_dir, output_dir / SEARCH_FOLDER):
        for path in checkpoints_in(folder):
            found = _read(path)
            if not isinstance(found, str):
                return found
            logger.warning("%s is not complete and is passed over: %s", path, found)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, complete or not, the last one first."""
    numbers = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [numbers[n] for n in sorted(numbers, reverse=True)]


def _read(path: Path) -> Checkpoint | str:
    """Read a checkpoint; where it is not complete, return what is wrong with it."""
    reading = TRAINER_STATE
    try:
        state = json.loads((path / TRAINER_STATE).read_text("utf-8"))
        step, steps = state["global_step"], state["max_steps"]
        finished = step >= steps or was_stopped(state)
        reading = PROGRESS_FILE
        progress = _progress(json.loads((path / PROGRESS_FILE).read_text("utf-8")))
        reading = VALUES_FILE
        with safe_open(path / VALUES_FILE, "pt"):
            pass  # its header tells how long the file must be
    except FileNotFoundError:
        return f"there is no {reading}"
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ):
        return f"{reading} is half written or holds something else"
    for pattern in TRAINER_FILES:
        files = list(path.glob(pattern))
        if not files:
            return f"there is no {pattern}"
        if not all(map(zipfile.is_zipfile, files)):
            return f"{pattern} is half written"
    return Checkpoint(path, progress, step, finished)


def _progress(content: Any) -> Progress:
    """Return what a progress file says.

    Raises:
        ValueError: it says what no run writes.
        TypeError: it has other keys.
    """
    known = isinstance(content, dict) and content.pop("format", None) == FORMAT
    if not known:
        msg = f"the format is not {FORMAT}"
        raise ValueError(msg)
    progress = Progress(**content)
    inner, outer = progress.inner_indices, progress.outer_indices
    counts = [progress.outer_drawn, progress.without_gain]
    best = progress.best_held_back
    if not (
        progress.phase in ("search", "retrain")
        and isinstance(progress.settings, dict)
        and isinstance(inner, list)
        and isinstance(outer, list)
        and all(type(i) is int for i in [*inner, *outer, *counts])
        and sorted([*inner, *outer]) == list(range(len(inner) + len(outer)))
        # None where the outer examples were given apart.
        and len(inner) + len(outer) in (0, progress.settings.get("train_examples"))
        and min(counts) >= 0
        and (best is None or type(best) in (int, float))
    ):
        msg = "a value is of another kind, or the indices are no split"
        raise ValueError(msg)
    return progress


def claim_folder(output_dir: str, split: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make sure that a job which starts anew destroys no other.

    The split alone, as a run leaves it that is stopped before its first checkpoint, is
    in nobody's way where this one would write the same.

    Args:
        output_dir: folder of the job.
        split: what the job writes down of its split.
        overwrite: whether checkpoints of an earlier run may be deleted.

    Raises:
        ValueError: there is an earlier run, and it may not.
    """
    folder = Path(output_dir)
    earlier = [*checkpoints_in(folder), *checkpoints_in(folder / SEARCH_FOLDER)]
    mark = folder / SPLIT_FILE
    if not earlier and (not mark.is_file() or _read_json(mark) == split):
        return
    if not overwrite:
        shown = ", ".join(str(p) for p in (earlier or [mark])[:3])
        go_on = (
            "Go on with it by trainer.train(resume_from_checkpoint=True), name"
            if earlier
            else "It has no checkpoint to go on from: name"
        )
        msg = (
            f"{output_dir} holds an earlier run ({shown}). {go_on} another output_dir, "
            "or pass overwrite_earlier_run=True to delete it."
        )
        raise ValueError(msg)
    for path in earlier:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    mark.unlink(missing_ok=True)
    (folder / SEARCH_FOLDER / TRAINER_STATE).unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    """Return what a file holds; None where that is no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
