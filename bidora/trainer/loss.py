"""The Trainer's loss as that of both levels, and a micro-batch's part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from bidora.orthogonality import orthogonality
from bidora.trainer.logs import noted_by_the_loss

__all__ = ["add_orthogonality", "held_back_loss", "loss_of", "weight_of"]


def loss_of(trainer: Any) -> Callable[[Any, Any], Tensor] | None:
    """Return the mean loss of a batch, as the Trainer computes it.

    Args:
        trainer: the trainer.

    Returns:
        `(model, batch) -> scalar`; None where that is the model's own loss, of which an
        estimator may know more.
    """
    if (
        type(trainer).compute_loss is Trainer.compute_loss
        and trainer.label_smoother is None
        and trainer.compute_loss_func is None
    ):
        return None

    def compute(model: nn.Module, batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(
                model, dict(batch), num_items_in_batch=_items(trainer, batch)
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
    # A class says by this whether its own `compute_loss` divides by `num_items`.
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if num_items is not None and scaled is not False:
        return float(_items(trainer, batch)) / float(num_items)
    if scaled or (scaled is None and trainer.compute_loss_func is not None):
        return 1.0
    return 1.0 / trainer.current_gradient_accumulation_steps


def _items(trainer: Any, batch: Any) -> Any:
    """Return what the Trainer counts in a batch to divide a summed loss by."""
    return trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1]


def add_orthogonality(trainer: Any) -> Tensor:
    """Add the term's gradient to `.grad`, once a step of the retraining.

    Args:
        trainer: the trainer.

    Returns:
        The term's value; 0 where none is due.
    """
    weight = trainer.args.orthogonality if trainer.phase == "retrain" else 0.0
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
