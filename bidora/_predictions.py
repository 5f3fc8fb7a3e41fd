"""What a transformers model predicts and how it is scored, for Gauss-Newton curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["criterion_of", "predictions"]


def predictions(model: nn.Module, batch: Any) -> Tensor:
    """Return the logits of the model on a batch.

    Raises:
        ValueError: the model's output has none.
    """
    logits = getattr(model(**batch), "logits", None)
    if not isinstance(logits, Tensor):
        msg = (
            "curvature='gauss-newton' needs the logits that the loss scores, and the "
            f"output of {type(model).__name__} has none. Pass curvature='hessian', or "
            "take a BilevelOptimizer on a problem with inner_outputs and "
            "inner_criterion."
        )
        raise ValueError(msg)
    return logits


def criterion_of(model: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    """Return the loss that the model's task head computes from logits and labels.

    Squared error for real-valued labels of one output, binary cross-entropy for those of
    several; softmax cross-entropy for classes, of an example, or of each token but those
    labelled -100. The labels of a causal language model are shifted as its own loss does.
    """
    # transformers names the loss of each of its models, and takes that of a causal
    # language model where it knows none.
    heads = (m for m in model.modules() if hasattr(m, "loss_type"))
    kind = getattr(next(heads, None), "loss_type", "none")
    shifts = kind in (None, "ForCausalLM")

    def criterion(logits: Tensor, batch: Any) -> Tensor:
        labels = batch["labels"]
        if labels.is_floating_point():
            if logits.shape[-1] > 1 and logits.shape == labels.shape:
                return functional.binary_cross_entropy_with_logits(logits, labels)
            return functional.mse_loss(logits.reshape(labels.shape), labels)
        if shifts and logits.dim() == 3:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.reshape(-1, logits.shape[-1])
        return functional.cross_entropy(flat, labels.reshape(-1))

    return criterion
