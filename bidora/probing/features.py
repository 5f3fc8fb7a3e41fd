"""The features of a probe: what the last linear layer of a model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bidora.errors import UserError
from bidora.probing.fit import Features, Kind

__all__ = ["extract"]

IGNORED = -100
"""The label of a token that has no tag."""

BATCH = 32

MOST_TOKENS = 20_000
"""Tokens that a probe of tags is fitted on, about: those of sentences drawn at random."""


@torch.no_grad()
def extract(
    model: Any, dataset: Any, collator: Callable[[list[Any]], dict[str, Any]]
) -> tuple[Features, nn.Linear]:
    """Return what the last linear layer of a model reads of every example.

    The model runs in eval mode and is put back; no random number is drawn.

    Args:
        model: A model whose output has logits.
        dataset: Examples with labels, by index.
        collator: Makes a batch of a list of them.

    Returns:
        Features in float64, in the order of the examples; and the layer.

    Raises:
        UserError: If there are no labels, no linear layer gives the logits, or the
            examples are a stream.
    """
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"a probe needs examples that can be counted and looked up, and this is "
            f"{type(dataset).__name__}. Pass dataset= with some of them."
        )
    parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    layer, rows = None, 0
    # Tags may be too many, and the first sentences are no fair part of them.
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    with _eval_mode(model):
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]
            batch = dict(collator([dataset[i] for i in indices]))
            labels = batch.pop("labels", None)
            if labels is None:
                raise UserError(
                    "the examples have no labels, so no probe can be fitted; the "
                    "collator should give them as `labels`."
                )
            layer, read = _read(model, batch, layer)
            for index, states, wanted in zip(indices, read, labels, strict=True):
                chosen = states.reshape(-1, states.shape[-1])
                target = wanted.reshape(1, *wanted.shape)
                if states.dim() == 2:  # a row for each token that has a tag
                    target = wanted[wanted != IGNORED]
                    chosen = states[(wanted != IGNORED).to(states.device)]
                parts[index] = chosen.cpu().double().numpy(), target.cpu().numpy()
                rows += len(target)
            if rows > max(MOST_TOKENS, len(dataset)):
                break
    if layer is None:
        raise UserError("there are no examples to fit a probe on.")
    found = sorted(parts)
    targets = np.concatenate([parts[i][1] for i in found])
    features = Features(
        np.concatenate([parts[i][0] for i in found]),
        targets,
        np.repeat(found, [len(parts[i][1]) for i in found]),
        _kind(targets),
        layer.out_features,
        layer.bias is not None,
    )
    return features, layer


def _kind(targets: np.ndarray) -> Kind:
    if np.issubdtype(targets.dtype, np.integer):
        return "classes" if targets.ndim == 1 else "labels"
    several = targets.ndim == 2 and targets.shape[1] > 1
    if several and np.isin(targets, (0.0, 1.0)).all():
        return "labels"
    return "numbers"


def _read(
    model: Any, batch: Mapping[str, Tensor], layer: nn.Linear | None
) -> tuple[nn.Linear, Tensor]:
    """Run a batch; return the last linear layer, and what it read for each logit row.

    Decoders run that layer on all tokens of a text and choose one afterwards; then the
    rows that were chosen are returned.

    Args:
        model: The model, in eval mode.
        batch: Its inputs.
        layer: The layer, where it is known.

    Returns:
        The layer, and `(batch, width)` or, for tags, `(batch, tokens, width)`.

    Raises:
        UserError: If no linear layer gives the logits.
    """
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((module, args[0], output))

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(note) for m in ([layer] if layer else linears)]
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    try:
        logits = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    for module, read, output in reversed(seen):
        if output.shape == logits.shape and torch.equal(output, logits):
            return module, read
        if output.dim() == logits.dim() + 1 and output.shape[-1] == logits.shape[-1]:
            same = (output == logits.unsqueeze(1)).all(-1)
            if bool(same.any(1).all()):
                place = same.to(torch.int8).argmax(1)
                if bool((same.sum(1) > 1).any()):  # logits do not tell the tokens apart
                    place = _chosen(model, inputs, module)
                return module, read[torch.arange(len(read)), place]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    raise UserError(
        f"no probe can be fitted: the outputs of {type(inner).__name__} are not those of "
        "its last linear layer. Start from random values instead: --start random."
    )


def _chosen(model: Any, inputs: Mapping[str, Tensor], layer: nn.Linear) -> Tensor:
    """Return the place of the token whose logits a decoder returns, by row.

    Args:
        model: The model, in eval mode.
        inputs: A batch.
        layer: Its last layer, which gives the places in place of logits.
    """

    def place(module: Any, args: Any, output: Tensor) -> Tensor:
        tokens = torch.arange(output.shape[1], device=output.device)
        return tokens.view(1, -1, 1).expand(output.shape).float()  # exact below 2²⁴

    hook = layer.register_forward_hook(place)
    try:
        return model(**inputs).logits[:, 0].long()
    finally:
        hook.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
