"""What a trainer and its class must be, before anything is trained."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import IterableDataset

from bidora.optimizer import check_base_weights
from bidora.trainer.arguments import BiDoRAArguments

__all__ = ["check_class", "check_trainer", "refuse_trial"]

KNOWN_HOMES = ("transformers.", "trl.")
"""Packages whose `training_step` is known to do nothing that a search would miss."""


def check_class(cls: type, mixin: type) -> None:
    """Refuse a class whose own `training_step` the search would not run.

    Raises:
        TypeError: naming the class that overrides it.
    """
    owners = [c for c in cls.__mro__ if "training_step" in vars(c)]
    before = owners[: owners.index(mixin)]
    after = [
        c for c in owners[len(before) + 1 :] if not c.__module__.startswith(KNOWN_HOMES)
    ]
    if before or after:
        owner = (before or after)[0]
        place = "replaces" if before else "is not called by"
        msg = (
            f"{owner.__qualname__}.training_step {place} that of BiDoRAMixin, which "
            "steps both levels: its own work would be lost in the search, or the search "
            "itself. Put what it does into compute_loss or a callback, and leave "
            "training_step out."
        )
        raise TypeError(msg)


def check_trainer(trainer: Any) -> None:
    """Refuse what the search could not honour.

    Raises:
        TypeError: arguments without the settings of BiDoRA.
        ValueError: naming the setting.
    """
    args: Any = trainer.args
    if not isinstance(trainer.args, BiDoRAArguments):
        msg = (
            f"args is {type(args).__name__}, which has no settings of BiDoRA. Pass "
            "BiDoRATrainingArguments, or a dataclass that derives from BiDoRAArguments "
            "and from the arguments of your Trainer."
        )
        raise TypeError(msg)
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        msg = (
            "optimizers=(...) gives one optimizer, and the phases need their own. Choose "
            "one by optim and its rates by learning_rate and outer_learning_rate."
        )
        raise ValueError(msg)
    # Before anything is written, and not when the search begins.
    trainer.outer_level = args.make_outer_level()
    trainer.outer_level.parameters(trainer.model)
    check_base_weights(trainer.model, allowed=False)
    for name in ("train_dataset", "outer_dataset"):
        data = getattr(trainer, name)
        streams = isinstance(data, IterableDataset) or not hasattr(data, "__len__")
        if streams and data is not None:
            msg = (
                f"{name} has no length, so that it cannot be split or resumed exactly. "
                "Pass a dataset with a length, such as list(dataset)."
            )
            raise ValueError(msg)
    if trainer.split is not None and trainer.outer_dataset is not None:
        msg = (
            "split divides train_dataset, and outer_dataset leaves it whole: pass one of "
            "them."
        )
        raise ValueError(msg)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        msg = (
            f"this is one of {launched} processes, and transformers was not told: each "
            f"would train by itself, into the same {args.output_dir}. Start one process, "
            "or several by torchrun."
        )
        raise ValueError(msg)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        msg = (
            "deepspeed and fsdp shard the parameters that the search moves. Train on one "
            "device, or on several by plain torchrun."
        )
        raise ValueError(msg)
    if args.n_gpu > 1:
        msg = (
            f"{args.n_gpu} GPUs in one process would be used by DataParallel, which "
            "second derivatives do not go through. Start by torchrun, or set "
            "CUDA_VISIBLE_DEVICES to one of them."
        )
        raise ValueError(msg)
    if args.auto_find_batch_size:
        msg = (
            "auto_find_batch_size=True starts a phase anew with smaller batches in the "
            "middle of its steps, and the search cannot take its own back. Choose "
            "per_device_train_batch_size by hand, with gradient_accumulation_steps."
        )
        raise ValueError(msg)
    if args.search_patience and args.eval_strategy == "no":
        msg = (
            f"search_patience={args.search_patience} counts evaluations, and "
            "eval_strategy is 'no'. Set eval_strategy and eval_steps, and pass "
            "eval_dataset."
        )
        raise ValueError(msg)
    for name in ("train_dataset", "outer_dataset"):
        data = getattr(trainer, name)
        if data is not None and trainer.eval_dataset is data:
            msg = (
                f"eval_dataset is {name}, which is trained on: its scores would choose "
                "the model that overfits most. Pass other examples."
            )
            raise ValueError(msg)


def refuse_trial(trial: Any) -> None:
    """Refuse a hyperparameter search.

    Raises:
        ValueError: there is a trial.
    """
    if trial is not None:
        msg = (
            "hyperparameter_search calls train with a trial, and the two phases of "
            "BiDoRA share no single objective. Call train once for each setting."
        )
        raise ValueError(msg)
