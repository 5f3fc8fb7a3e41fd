"""What the graph of a loss tells about derivatives that would be wrong in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from hypergrad.errors import HypergradError

__all__ = [
    "REENTRANT",
    "leaf_ids",
    "nodes",
    "once_only",
    "refuse_reentrant",
    "underived_backwards",
]

REENTRANT = (
    "the loss runs through reentrant activation checkpointing, which "
    "torch.autograd.grad cannot see through: gradients would be zeros without a word. "
    "Pass gradient_checkpointing_kwargs={'use_reentrant': False} to transformers, or "
    "use_reentrant=False to torch.utils.checkpoint."
)

# All functions that the decorator makes share one code object.
_ONCE = once_differentiable(lambda ctx: None).__code__


def nodes(loss: Tensor) -> Iterator[Any]:
    """Yield every node of the graph that a tensor was computed by."""
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def refuse_reentrant(loss: Tensor) -> None:
    """Refuse a loss that runs through reentrant activation checkpointing.

    Raises:
        HypergradError: with the setting that helps.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes(loss)):
        raise HypergradError(REENTRANT)


def leaf_ids(loss: Tensor) -> set[int]:
    """Return the `id` of each leaf tensor that the loss was computed from."""
    return {id(node.variable) for node in nodes(loss) if hasattr(node, "variable")}


def once_only(loss: Tensor) -> list[str]:
    """Return the custom functions in the graph that are marked `once_differentiable`.

    Args:
        loss: where the graph ends.

    Returns:
        Their names.

    `torch.autograd.grad(..., allow_unused=True)` takes their second derivative for 0.
    """
    found = []
    for node in nodes(loss):
        forward_class = getattr(node, "_forward_cls", None)
        backward = getattr(forward_class, "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            found.append(node.name())
    return found


@contextmanager
def underived_backwards(loss: Tensor) -> Iterator[list[str]]:
    """Watch a backward pass with `create_graph` for custom functions that end the graph.

    A fused kernel's backward gives numbers that torch cannot trace back: their
    derivative would count as 0.

    Args:
        loss: what the backward pass of the block starts from.

    Yields:
        A list, filled in the block, with the names of such functions.
    """
    found: list[str] = []

    def note(name: str, inputs: Any, outputs: Any) -> None:
        # Zeros are constant: nothing to trace.
        ends = not any(g is not None and g.requires_grad for g in inputs)
        starts = any(g is not None and g.requires_grad for g in outputs)
        if ends and starts and any(g is not None and bool(g.any()) for g in inputs):
            found.append(name)

    custom: list[Any] = [n for n in nodes(loss) if isinstance(n, BackwardCFunction)]
    handles = [node.register_hook(partial(note, node.name())) for node in custom]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
