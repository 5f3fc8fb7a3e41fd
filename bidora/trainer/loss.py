"""The Trainer's loss as that of both levels, and a micro-batch's part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bidora.dora.orthogonality import orthogonality
from bidora.trainer.logs import noted_by_the_loss
from bidora.trainer.upstream import has_the_models_loss, items_in, loss_is_scaled

__all__ = [
    "add_orthogonality",
    "held_back_loss",
    "judge_search",
    "loss_of",
    "weight_of",
]


def loss_of(trainer: Any) -> Callable[[Any, Any], Tensor] | None:
    """Return the mean loss of a batch, as the Trainer computes it.

    Args:
        trainer: the trainer.

    Returns:
        `(model, batch) -> scalar`; None where that is the model's own loss, of which an
        estimator may know more.
    """
    if has_the_models_loss(trainer):
        return None

    def compute(model: nn.Module, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(
                model, dict(batch), num_items_in_batch=items_in(trainer, batch)
            )

    return compute


def weight_of(trainer: Any, batch: Any, num_items: Any) -> float:
    """Return the factor of a micro-batch's mean loss in the loss of a step.

    The Trainer divides a sum over each micro-batch by what it counted in all of them;
    a mean over `n` of these `N` takes a factor of `n / N`.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        num_items: what the Trainer counted in all of the step's; None where it did not.
    """
    scaled = loss_is_scaled(trainer, num_items)
    if scaled:
        return float(items_in(trainer, batch)) / float(num_items)
    return 1.0 if scaled is None else 1.0 / trainer.current_gradient_accumulation_steps


def add_orthogonality(trainer: Any) -> Tensor:
    """Add the term's gradient to `.grad`, once a step of the retraining.

    Args:
        trainer: the trainer.

    Returns:
        The term's value; 0 where none is due.
    """
    weight = trainer._plan.orthogonality if trainer.phase == "retrain" else 0.0
    if not weight or not trainer.accelerator.sync_gradients:
        return torch.zeros((), device=trainer.args.device)
    term = weight * orthogonality(trainer.model)
    own = [p for p in trainer.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(term, own, allow_unused=True)
    for p, grad in zip(own, grads, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad + grad
    return term.detach()


def held_back_loss(trainer: Any, dataset: Any) -> float:
    """Return the mean loss on the part held back, and nothing else of an evaluation.

    Args:
        trainer: the trainer.
        dataset: the part.
    """
    notes = noted_by_the_loss(trainer)
    found = trainer.evaluation_loop(
        trainer.get_test_dataloader(dataset),
        "Held back",
        prediction_loss_only=True,
        metric_key_prefix="held_back",
    )
    vars(trainer).update(notes)
    return found.metrics["held_back_loss"]


def judge_search(trainer: Any) -> None:
    """Ask at an evaluation whether the held-back loss still falls; end the search if not.

    Args:
        trainer: the trainer.
    """
    progress, outer = trainer._progress, trainer._outer
    patience, state = trainer.args.search_patience, trainer.state
    if not patience or progress is None or outer is None:
        return
    if trainer.control.should_training_stop or trainer._judged_at == state.global_step:
        return  # the latter: one of several evaluation sets, and not the first
    trainer._judged_at = state.global_step
    loss = held_back_loss(trainer, outer.dataset)
    trainer.log({"held_back_loss": loss})
    progress.judge(loss)
    trainer.control.should_training_stop = progress.without_gain >= patience
