"""The one place that asks torch for a derivative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from hypergrad._graph import REENTRANT
from hypergrad.attention import explained
from hypergrad.errors import HypergradError

__all__ = ["differentiate", "recording"]


class recording:
    """Record for autograd in the block, whatever mode the caller is in.

    A class and not a generator: it surrounds every evaluation and product.
    """

    def __enter__(self) -> None:
        # Set always: a loss that fails may leave another mode behind.
        self._inference = torch.inference_mode(mode=False)
        self._inference.__enter__()
        self._recorded = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        # Autocast keeps its casts by tensor and does not see that a tensor was moved:
        # under a caller's autocast, the second evaluation would run on the first's.
        torch.clear_autocast_cache()

    def __exit__(self, *error: object) -> None:
        torch.clear_autocast_cache()
        torch.set_grad_enabled(self._recorded)
        self._inference.__exit__(None, None, None)


def differentiate(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    batched: bool = False,
) -> list[Tensor | None]:
    """Return the vector-Jacobian product of a graph.

    Args:
        outputs: where it starts; those that are None or constant are left out.
        inputs: what to differentiate in.
        cotangents: one for each output; None for 1, the gradient of a loss.
        create_graph: whether the result will be differentiated again.
        retain_graph: whether the graph will be used again; None for `create_graph`.
        batched: whether cotangents are several, stacked along a leading axis.

    Returns:
        A part for each input, None where it is not connected.

    Raises:
        HypergradError: the graph runs through reentrant checkpointing, or was freed.
        SecondOrderError: part of it has no second derivative in torch.
        RuntimeError: any other error of torch, as it is.

    Example:
        >>> import torch
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = torch.tensor(1.0, requires_grad=True)
        >>> differentiate([x * x], [x, y])
        [tensor(6.), None]
    """
    if cotangents is None:
        starts, weights = [o for o in outputs if o is not None], None
    else:
        pairs = [
            (o, c if c.dtype == o.dtype else c.to(o.dtype))
            for o, c in zip(outputs, cotangents, strict=True)
            if o is not None and c is not None and o.requires_grad
        ]
        starts, weights = [o for o, _ in pairs], [c for _, c in pairs]
    if not starts or not inputs:
        return [None] * len(inputs)
    try:
        with _out_of_autocast(inputs):
            return list(
                torch.autograd.grad(
                    starts,
                    list(inputs),
                    weights,
                    create_graph=create_graph,
                    retain_graph=retain_graph,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
            )
    except RuntimeError as error:
        second = create_graph or cotangents is not None
        refused = explained(error) if second else None
        if refused is not None:
            raise refused from error
        if "use_reentrant" in str(error):
            raise HypergradError(REENTRANT) from error
        if "second time" in str(error):
            msg = (
                "the graph of the inner gradient was used already and its memory freed. "
                "A kept graph serves one product; build it again for another."
            )
            raise HypergradError(msg) from error
        raise


def _out_of_autocast(tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
    """Return a context that runs a backward pass out of the caller's autocast.

    Autocast belongs around the forward pass alone: a backward pass within it rounds its
    own products to the low precision (2e-3 of a DoRA norm's derivative).
    """
    on = [k for k in {t.device.type for t in tensors} if torch.is_autocast_enabled(k)]
    if not on:
        return nullcontext()
    stack = ExitStack()
    for kind in on:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
