r"""A DoRA layer on its rows: the low-rank pair and the multiply-add $g \odot (z - b) + b$.

Autograd's own derivative of the multiply-add makes two more copies of the layer's output
than it needs, which is most of what a DoRA step takes beyond a LoRA step. Second
derivatives of both are closed forms too, and take a quarter of autograd's operations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bidora.dora.function import Function, is_last
from bidora.dora.norms import autocast_off

__all__ = [
    "BLOCK_ELEMENTS",
    "add_pair",
    "apply_gain",
    "multiply_add",
]

# Where no graph is built, the gradient of the gain is summed over this many elements
# at a time: 512 KiB in float32, so that products stay in a CPU's cache.
BLOCK_ELEMENTS = 1 << 17


def add_pair(result: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
    r"""Return result + s·low·Bᵀ, differentiable any number of times.

    Args:
        result: Output of the base layer, `(..., out)`.
        low: x Aᵀ, `(..., r)`, in the dtype of `result`.
        up: B, `(out, r)`, in that dtype too.
        scaling: s.

    Returns:
        The sum, `(..., out)`.
    """
    rows, low = _rows(result), _rows(low)
    if torch.compiler.is_compiling():
        return torch.addmm(rows, low, up.T, alpha=scaling).view(result.shape)
    return cast(Tensor, _Pair.apply(rows, low, up, scaling)).view(result.shape)


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
        return multiply_add(z, gain, bias)
    return cast(Tensor, _Gain.apply(_rows(z), gain, bias)).view(z.shape)


def _rows(x: Tensor) -> Tensor:
    """Return `x` as (rows, features), rows being all the batch."""
    return x.reshape(-1, x.shape[-1])


def _scaled_mm(like: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return scaling · left @ right, of the shape of `like`, in one operation."""
    return torch.addmm(like, left, right, beta=0, alpha=scaling)


class _Pair(Function):
    """`add_pair` of matrices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
        with autocast_off(rows.device):
            return torch.addmm(rows, low, up.t(), alpha=scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, low, up, ctx.scaling = inputs
        ctx.save_for_backward(low, up)
        ctx.save_for_forward(low, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not any(ctx.needs_input_grad[1:3]):
            return grads[0], None, None, None
        derivative: Any = _PairBackward.forward if is_last() else _PairBackward.apply
        return grads[0], *derivative(grads[0], *ctx.saved_tensors, ctx.scaling), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        low, up = ctx.saved_tensors
        rows_dot, low_dot, up_dot, _ = tangents
        moved = torch.addmm(rows_dot, low_dot, up.t(), alpha=ctx.scaling)
        return torch.addmm(moved, low, up_dot.t(), alpha=ctx.scaling)


class _PairBackward(Function):
    """The derivative of `_Pair` in the two factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, low: Tensor, up: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        with autocast_off(grad.device):
            return (
                _scaled_mm(low, grad, up, scaling),
                _scaled_mm(up, grad.t(), low, scaling),
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad, low, up), s = ctx.saved_tensors, ctx.scaling
        of_low, of_up = grads
        with autocast_off(grad.device):
            moved = _scaled_mm(grad, of_low, up.t(), s)
            moved = torch.addmm(moved, low, of_up.t(), alpha=s)
            in_low = _scaled_mm(low, grad, of_up, s)
            return moved, in_low, _scaled_mm(up, grad.t(), of_low, s), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        (grad, low, up), s = ctx.saved_tensors, ctx.scaling
        grad_dot, low_dot, up_dot, _ = tangents
        in_low = _scaled_mm(low, grad_dot, up, s)
        in_up = _scaled_mm(up, grad_dot.t(), low, s)
        return (
            torch.addmm(in_low, grad, up_dot, alpha=s),
            torch.addmm(in_up, grad.t(), low_dot, alpha=s),
        )


def multiply_add(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `apply_gain`; with autograd's derivative, of any shapes that broadcast."""
    if bias is None:
        return gain * z
    return torch.addcmul(torch.addcmul(bias, gain, bias, value=-1), z, gain)


class _Gain(Function):
    """`apply_gain` of a matrix, with a derivative that reads its inputs once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return multiply_add(z, gain, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, gain, bias = ctx.saved_tensors
        (grad,) = grads
        needs_z, needs_gain, needs_bias = ctx.needs_input_grad
        in_bias = (1 - gain) * grad.sum(0) if needs_bias else None
        if torch.is_grad_enabled() and needs_z and needs_gain:
            in_z, in_gain = _GainBackward.apply(grad, z, gain, bias)
            return in_z, in_gain, in_bias
        return (
            (grad * gain).to(z.dtype) if needs_z else None,
            _gain_gradient(grad, z, bias) if needs_gain else None,
            in_bias,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        z, gain, bias = ctx.saved_tensors
        z_t, gain_t, bias_t = tangents
        if bias is None:
            return gain * z_t + gain_t * z
        shifted = z.to(gain.dtype) - bias
        return gain * z_t + gain_t * shifted + (1 - gain) * bias_t


class _GainBackward(Function):
    """The derivative of `_Gain` in z and gain."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, z: Tensor, gain: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return (grad * gain).to(z.dtype), _gain_gradient(grad, z, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, z, gain, bias = ctx.saved_tensors
        of_z, of_gain = grads
        moved = in_z = in_gain = in_bias = None
        if of_z is not None:
            of_z = of_z.to(grad.dtype)
            moved, in_gain = of_z * gain, _gain_gradient(grad, of_z, None)
        if of_gain is not None:
            shifted = _shifted(z, grad.dtype, bias)
            moved = (
                shifted * of_gain
                if moved is None
                else torch.addcmul(moved, shifted, of_gain)
            )
            in_z = (grad * of_gain).to(z.dtype)
            if ctx.needs_input_grad[3]:
                in_bias = -of_gain * grad.sum(0)
        return moved, in_z, in_gain, in_bias

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        grad, z, gain, bias = ctx.saved_tensors
        grad_t, z_t, gain_t, bias_t = cast(Any, tuple)(
            torch.zeros_like(t) if tangent is None and t is not None else tangent
            for t, tangent in zip(ctx.saved_tensors, tangents, strict=True)
        )
        in_gain = _gain_gradient(grad_t, z, bias) + _gain_gradient(grad, z_t, bias_t)
        return (grad_t * gain + grad * gain_t).to(z.dtype), in_gain


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
    return (grad * _shifted(z, grad.dtype, bias)).sum(0)


def _shifted(z: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    z = z.to(dtype)  # before the difference, which may cancel
    return z if bias is None else z - bias
