"""All contact with transformers beyond its documented interface, in one place.

What is overridden or read here may change without notice. `check_transformers` refuses
another major version, and a version in which one of the names is gone.
"""

from __future__ import annotations

import functools
import os
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = [
    "NOTES",
    "TRAINER_FILES",
    "TRAINER_STATE",
    "PrivateTrainer",
    "check_transformers",
    "choose_order",
    "collator_of",
    "frozen_new_head",
    "group_by_length",
    "has_the_models_loss",
    "items_in",
    "load_checkpoint_values",
    "loss_is_scaled",
    "name_phases",
    "part_tensorboard",
    "steps_of",
    "trainable_base_weights",
    "use_one_device",
    "was_stopped",
]

TESTED = ">=5.0,<6"
"""The versions of transformers whose Trainer this was made for."""

PRIVATE = (
    "_load_best_model",
    "_load_from_checkpoint",
    "_prepare_inputs",
    "get_batch_samples",
    "call_model_init",
    "evaluation_loop",
    "_get_collator_with_removed_columns",
)
"""Methods of the Trainer that are called or overridden and are not documented."""

TRAINER_STATE = "trainer_state.json"
TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""What the Trainer writes between our files and its state, which comes last."""

NOTES = ("_metrics", "_total_train_tokens")
"""Where trainers of TRL note what `compute_loss` saw, until they log it."""

_ADAPTER_MARKS = ("lora_", "modules_to_save", "trainable_tokens")


def check_transformers(cls: type | None = None, version: str | None = None) -> None:
    """Refuse a transformers whose Trainer may differ from the one used here.

    Args:
        cls: The Trainer to judge; by default that of transformers.
        version: The version to judge; by default the installed one.

    Raises:
        ImportError: The version is outside the tested range, or a method is gone.
    """
    import transformers

    found = transformers.__version__ if version is None else version
    trainer = transformers.Trainer if cls is None else cls
    gone = [name for name in PRIVATE if not hasattr(trainer, name)]
    if found.split(".")[0] != "5" or gone:
        what = f" and its Trainer has no {', '.join(gone)}" if gone else ""
        raise ImportError(
            f"BiDoRATrainer was made for transformers{TESTED}, but transformers {found} is "
            f"installed{what}. It overrides methods that transformers changes without "
            f"notice. Install a tested one: pip install 'transformers{TESTED}'."
        )


class PrivateTrainer(_Base, metaclass=ABCMeta):
    """A Trainer whose undocumented methods have names that are ours."""

    @abstractmethod
    def load_values_of(self, folder: str) -> None:
        """Put the values of a checkpoint into the model.

        Args:
            folder: The checkpoint.
        """

    def prepared(self, inputs: Any) -> Any:
        """Return a batch on the device, as the Trainer's own step gets it.

        Args:
            inputs: The batch.
        """
        return self._prepare_inputs(inputs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        """Load what we saved: PEFT's own file has no head that is trained beside it."""
        self.load_values_of(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Likewise; a load by PEFT may freeze the adapter too."""
        self.load_values_of(str(self.state.best_model_checkpoint))


# -- models ----------------------------------------------------------------------------


def _backbone(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return the transformers model inside and its backbone, None where there is none."""
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", None)
        # A PeftModel has the attribute too, and leads to the transformers model.
        if isinstance(prefix, str) and hasattr(module, "config_class"):
            backbone = getattr(module, prefix, None) if prefix else None
            return module, backbone if isinstance(backbone, nn.Module) else module
    return None


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in _ADAPTER_MARKS)


def trainable_base_weights(model: nn.Module) -> list[str]:
    """Return the trainable parameters that belong to neither an adapter nor a head.

    Without a transformers model inside, every parameter that PEFT did not add counts as
    the base's.
    """
    found = _backbone(model)
    base = None if found is None else {id(p) for p in found[1].parameters()}
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not _is_adapter(name) and (base is None or id(p) in base)
    ]


def frozen_new_head(model: nn.Module) -> list[str]:
    """Return parameters of a task head that are newly initialised and frozen.

    `from_pretrained` marks what it read from the checkpoint by `_is_hf_initialized`.
    """
    found = _backbone(model)
    if found is None or found[0] is found[1]:
        return []
    base = {id(p) for p in found[1].parameters()}
    return [
        name
        for name, p in model.named_parameters()
        if not p.requires_grad
        and id(p) not in base
        and not _is_adapter(name)
        and ".original_module." not in name
        and not getattr(p, "_is_hf_initialized", False)
    ]


# -- arguments and steps ---------------------------------------------------------------


def use_one_device(args: Any) -> None:
    """Let a Trainer use the first GPU where there are several, without DataParallel."""
    if args.n_gpu > 1:
        args._n_gpu = 1


def steps_of(args: Any, batches: int) -> int:
    """Return how many steps a Trainer takes.

    Args:
        args: Its arguments.
        batches: Micro-batches of an epoch, on each process.
    """
    if args.max_steps > 0:
        return args.max_steps
    each = max(1, -(-batches // args.gradient_accumulation_steps))
    return max(1, -int(-args.num_train_epochs * each // 1))


def choose_order(loader: Any, generator: torch.Generator) -> None:
    """Give samplers without a generator of their own one that is ours.

    They draw from the global random state otherwise, which a resumed run does not have
    at the beginning of its epoch.

    Args:
        loader: A loader as accelerate prepared it.
        generator: What a random order is drawn from.
    """
    batches: Any = loader.batch_sampler
    while batches is not None:
        sampler: Any = getattr(batches, "sampler", None)
        if getattr(sampler, "generator", generator) is None:
            sampler.generator = generator
        batches = getattr(batches, "batch_sampler", None)


def load_checkpoint_values(trainer: Any, folder: str) -> None:
    """Put the values of a checkpoint into the model, as the Trainer itself does.

    Args:
        trainer: The trainer.
        folder: The checkpoint.
    """
    trainer._load_from_checkpoint(folder)


def was_stopped(state: Mapping[str, Any]) -> bool:
    """Return whether a callback ended the training that wrote this `trainer_state.json`.

    Args:
        state: What the file holds.
    """
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    return control.get("args", {}).get("should_training_stop", False) is True


# -- the loss --------------------------------------------------------------------------


def has_the_models_loss(trainer: Any) -> bool:
    """Return whether the loss is the model's own, of which an estimator may know more.

    Args:
        trainer: The trainer.
    """
    from transformers import Trainer

    return (
        type(trainer).compute_loss is Trainer.compute_loss
        and trainer.label_smoother is None
        and trainer.compute_loss_func is None
    )


def group_by_length() -> dict[str, Any]:
    """Return the argument of a Trainer that puts examples of like length in one batch.

    Early versions of transformers 5 have another name for it.
    """
    from transformers import TrainingArguments

    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def collator_of(trainer: Any) -> Callable[[list[Any]], Any]:
    """Return the Trainer's collator, without columns that its model does not take.

    Args:
        trainer: The trainer; `remove_unused_columns` of its arguments decides.
    """
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def loss_is_scaled(trainer: Any, num_items: Any) -> bool | None:
    """Return what `compute_loss` makes of the count of a whole step.

    Args:
        trainer: The trainer.
        num_items: What the Trainer counted; None where it did not.

    Returns:
        True where the losses of micro-batches are to be weighted by their counts; None
        where they only add up; False where they are averaged.
    """
    # A class says by this whether its own `compute_loss` divides by `num_items`.
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if num_items is not None and scaled is not False:
        return True
    if scaled or (scaled is None and trainer.compute_loss_func is not None):
        return None
    return False


def items_in(trainer: Any, batch: Any) -> Any:
    """Return what the Trainer counts in a batch to divide a summed loss by.

    Args:
        trainer: The trainer.
        batch: The batch.
    """
    return trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1]


# -- what is logged --------------------------------------------------------------------


class _WholeName(str):
    """A metric's name to which integrations do not add their `train/`."""

    __slots__ = ()

    def __radd__(self, prefix: str) -> str:
        return str(self)


def name_phases(trainer: Any) -> None:
    """Let callbacks that report tell the phases of a job apart, by the metrics' names.

    TensorBoard and the other integrations get `search/loss` for `loss`; what is printed
    begins with the phase.

    Args:
        trainer: The trainer; its `phase` is read at each line.
    """
    from transformers import PrinterCallback, ProgressCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    integrations = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in trainer.callback_handler.callbacks:
        if "on_log" in vars(callback):
            continue  # at an earlier phase
        if isinstance(callback, integrations):
            named = functools.partial(_report, trainer, callback.on_log, whole=True)
        elif isinstance(callback, PrinterCallback | ProgressCallback):
            named = functools.partial(_report, trainer, callback.on_log, whole=False)
        else:
            continue
        callback.on_log = named


def _report(
    trainer: Any, on_log: Any, *args: Any, whole: bool, logs: Any = None, **kwargs: Any
) -> Any:
    if trainer.phase is not None and logs is not None:
        if whole:
            logs = {_WholeName(f"{trainer.phase}/{k}"): v for k, v in logs.items()}
        else:
            logs = {"phase": trainer.phase, **logs}
    return on_log(*args, logs=logs, **kwargs)


def part_tensorboard(trainer: Any) -> None:
    """Make TensorBoard's callback choose a folder again: it keeps its first one.

    Args:
        trainer: The trainer, at the beginning of a phase.
    """
    from transformers.integrations.integration_utils import TensorBoardCallback

    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    own = os.path.join(chosen, trainer.phase) if chosen else None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = own
