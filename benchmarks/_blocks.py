"""A trial for `product_memory`: double backward of blocks that keep their inputs alone.

Every pass through a block runs it again: the gradient once, the product twice more, which
is nine gradients' worth of halves in place of four. A trial, and no part of the library:
it takes blocks with one input that needs a gradient, and neither dropout nor buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Block(torch.autograd.Function):
    """A block's output; saves what the block was given."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, *Pull.apply(ctx.run, cotangent, *ctx.saved_tensors)


class Pull(torch.autograd.Function):
    """The vector-Jacobian product of a block, which can be differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], cotangent: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.run = run
        ctx.save_for_backward(cotangent, *inputs)
        leaves, output = again(run, inputs)
        return torch.autograd.grad(output, leaves, cotangent)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> Any:
        cotangent, *inputs = ctx.saved_tensors
        leaves, output = again(ctx.run, inputs)
        with torch.enable_grad():
            start = cotangent.detach().requires_grad_()
            pulled = torch.autograd.grad(output, leaves, start, create_graph=True)
        return None, *torch.autograd.grad(pulled, [start, *leaves], directions)


def again(
    run: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        return leaves, run(*leaves)


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have these blocks run again instead of keeping what they save."""
    try:
        for block in blocks:
            block.forward = _wrapped(block, block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward


def _wrapped(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    slots = [
        (module, name)
        for module in block.modules()
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad
    ]

    def run_with(hidden: Tensor, *rest: Any, **named: Any) -> Any:
        def run(x: Tensor, *weights: Any) -> Any:
            own = [module._parameters[name] for module, name in slots]
            try:
                for (module, name), weight in zip(slots, weights, strict=True):
                    module._parameters[name] = weight
                return forward(x, *rest, **named)
            finally:
                for (module, name), weight in zip(slots, own, strict=True):
                    module._parameters[name] = weight

        return Block.apply(run, hidden, *(m._parameters[name] for m, name in slots))

    return run_with
