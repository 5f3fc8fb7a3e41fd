"""The optimizer and the schedule of both levels, as the Trainer's arguments say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import SchedulerType, get_scheduler

from bidora.optimizer import BiDoRAOptimizer
from hypergrad.optimizer import StepReport

__all__ = ["SteppedElsewhere", "give_outer_schedule", "make_bilevel_optimizer"]


class SteppedElsewhere(BiDoRAOptimizer):
    """An optimizer whose steps `training_step` takes, with the batches at hand.

    The Trainer's own call of `step()` comes after that and has nothing left to do.
    """

    def take_step(
        self,
        inner_batch: Any,
        outer_batch: Any,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> StepReport:
        """Take an inner step and, where one is due, an outer step.

        Args:
            inner_batch: as for `BiDoRAOptimizer.step`.
            outer_batch: likewise.
            on_progress: likewise.

        Returns:
            What was done.
        """
        return super().step(inner_batch, outer_batch, on_progress=on_progress)

    def step(self, closure: Any = None, outer_batch: Any = None) -> StepReport:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Do nothing.

        Args:
            closure: unused.
            outer_batch: unused.

        Returns:
            A report of nothing.
        """
        return StepReport()


def make_bilevel_optimizer(
    trainer: Any, loss_fn: Callable[[Any, Any], Tensor] | None
) -> SteppedElsewhere:
    """Return the optimizer of a search: the class and rates that the arguments name.

    Both levels have the Trainer's two groups, with and without weight decay.

    Args:
        trainer: the trainer; its arguments, model and choice of optimizer are read.
        loss_fn: as for `BiDoRAOptimizer`.

    Raises:
        ValueError: an optimizer that is made from the whole model.
    """
    args, settings, plan = trainer.args, trainer.args.bidora_settings(), trainer._plan
    cls, options = trainer.optimizer_cls_and_kwargs or (
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    )
    whole = {"params", "model", "optimizer_dict"} & set(options)
    if whole or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        msg = (
            f"optim={args.optim} makes its optimizer from the whole model, and the "
            "search needs one for each level. Choose adamw_torch, adamw_torch_fused or "
            "sgd."
        )
        raise ValueError(msg)
    decaying = set(trainer.get_decay_parameter_names(trainer.model))
    names = {id(p): name for name, p in trainer.model.named_parameters()}

    def level(weight_decay: float, **own: Any) -> Callable[..., torch.optim.Optimizer]:
        def make(params: list[Tensor]) -> torch.optim.Optimizer:
            groups = [
                {
                    "params": [
                        p for p in params if (names[id(p)] in decaying) == decay
                    ],
                    "weight_decay": weight_decay if decay else 0.0,
                }
                for decay in (True, False)
            ]
            make_one: Any = cls
            return make_one([g for g in groups if g["params"]], **{**options, **own})

        return make

    return SteppedElsewhere(
        trainer.model,
        plan.estimator,
        loss_fn=loss_fn,
        inner_optimizer=level(args.weight_decay),
        outer_optimizer=level(
            settings["outer_weight_decay"], lr=settings["outer_learning_rate"]
        ),
        outer_every=plan.outer_every,
        outer_warmup=plan.outer_warmup,
        max_grad_norm=args.max_grad_norm or None,
        orthogonality=plan.orthogonality,
        outer_level=trainer.outer_level,
        dropout=settings["dora_dropout"],
        audit_every=args.audit_every or None,
    )


def give_outer_schedule(
    scheduler: Any, optimizer: torch.optim.Optimizer, args: Any, steps: int
) -> None:
    """Give the outer groups a schedule of their own, where the arguments name one.

    Args:
        scheduler: the Trainer's, over the groups of both levels; changed in place.
        optimizer: the optimizer of both levels.
        args: the arguments of the phase.
        steps: its steps.

    Raises:
        ValueError: schedules that cannot be put together.
    """
    kind = args.bidora_settings()["outer_lr_scheduler_type"]
    if kind == args.lr_scheduler_type:
        return
    other: Any = get_scheduler(
        kind,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
    )
    if not hasattr(scheduler, "lr_lambdas") or not hasattr(other, "lr_lambdas"):
        msg = (
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value} and "
            f"outer_lr_scheduler_type={kind} cannot go together: one of them waits for a "
            "metric or holds its own state. Choose the same for both."
        )
        raise ValueError(msg)
    for i, group in enumerate(optimizer.param_groups):
        if group["level"] == "outer":
            scheduler.lr_lambdas[i] = other.lr_lambdas[0]
            group["lr"] = scheduler.base_lrs[i] * scheduler.lr_lambdas[i](0)
