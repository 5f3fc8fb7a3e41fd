r"""The one multiply-add of a DoRA layer, $g \odot (z - b) + b$.

Autograd's own derivative of it makes two more copies of the layer's output than it
needs, which is most of what a DoRA step takes beyond a LoRA step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

# Where no graph is built, the gradient of the gain is summed over this many elements
# at a time: 512 KiB in float32, so that products stay in a CPU's cache.
BLOCK_ELEMENTS = 1 << 17


def apply_gain(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return gain ⊙ (z − bias) + bias, differentiable any number of times.

    Args:
        z: Output of the linear layer, bias included, `(..., out)`.
        gain: g, `(out,)`; its dtype may be wider.
        bias: b, `(out,)`, or None.

    Returns:
        The scaled output, `(..., out)`, in the wider of the dtypes.
    """
    if torch.compiler.is_compiling():  # which fuses the derivative, too
        return _multiply_add(z, gain, bias)
    return cast(Tensor, _Gain.apply(z, gain, bias))


def _multiply_add(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `apply_gain`."""
    if bias is None:
        return gain * z
    return torch.addcmul(torch.addcmul(bias, gain, bias, value=-1), z, gain)


class _Gain(torch.autograd.Function):
    """`apply_gain` with a derivative that reads its inputs once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply_add(z, gain, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, gain, bias = ctx.saved_tensors
        needs_z, needs_gain, needs_bias = ctx.needs_input_grad
        (grad,) = grads
        # Both as (rows, out), rows being all the batch.
        grads_2d, z_2d = (t.reshape(-1, t.shape[-1]) for t in (grad, z))
        return (
            (grad * gain).to(z.dtype) if needs_z else None,
            _gain_gradient(grads_2d, z_2d, bias) if needs_gain else None,
            (1 - gain) * grads_2d.sum(0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, gain, bias = ctx.saved_tensors
        z_t, gain_t, bias_t = tangents
        if bias is None:
            return gain * z_t + gain_t * z
        shifted = z.to(gain.dtype) - bias
        return gain * z_t + gain_t * shifted + (1 - gain) * bias_t


def _gain_gradient(grad: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum over rows of grad ⊙ (z − bias), `(out,)`."""
    count = z.shape[0]
    if not torch.is_grad_enabled():  # else every block would be a node of the graph
        count = max(1, min(count, BLOCK_ELEMENTS // max(1, z.shape[1])))
    if count >= z.shape[0]:
        return _summed(grad, z, bias)
    total: Tensor | None = None
    for g, block in zip(grad.split(count), z.split(count), strict=True):
        part = _summed(g, block, bias)
        total = part if total is None else total + part
    return cast(Tensor, total)


def _summed(grad: Tensor, z: Tensor, bias: Tensor | None) -> Tensor:
    z = z.to(grad.dtype)  # before the difference, which may cancel
    return (grad * (z if bias is None else z - bias)).sum(0)
