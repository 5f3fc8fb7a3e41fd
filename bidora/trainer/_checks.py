"""What a trainer and its class must be, before anything is trained."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from bidora.trainer.arguments import BiDoRAArguments

__all__ = ["check_class", "check_trainer"]

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
    data = trainer.train_dataset
    streams = isinstance(data, IterableDataset) or not hasattr(data, "__len__")
    if streams and data is not None:
        msg = (
            "train_dataset has no length, so that it cannot be split or resumed "
            "exactly. Pass a dataset with a length, such as list(dataset)."
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
    if args.search_patience and args.eval_strategy == "no":
        msg = (
            f"search_patience={args.search_patience} counts evaluations, and "
            "eval_strategy is 'no'. Set eval_strategy and eval_steps, and pass "
            "eval_dataset."
        )
        raise ValueError(msg)
    if (
        trainer.eval_dataset is not None
        and trainer.eval_dataset is trainer.train_dataset
    ):
        msg = (
            "eval_dataset is train_dataset, on which both levels train: its scores would "
            "choose the model that overfits most. Pass other examples."
        )
        raise ValueError(msg)
