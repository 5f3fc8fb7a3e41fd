r"""The forward pass of an exact DoRA layer of each kind, and its gain.

With rows $v_i = w_i + s\,b_i A$ of the adapted weight and gains
$g_i = m_i / \|v_i\|$, every kind of layer computes $g \odot (z - b) + b$, where z is
the output of the base layer plus s times that of the low-rank pair. What the rows are
depends on the kind:

| layer | rows of W | A | B |
|---|---|---|---|
| Linear, Conv1D (GPT-2) | output features | `(r, in)` | `(out, r)` |
| Embedding | columns of the table | `(r, entries)` | `(width, r)` |
| convolution | output channels, their kernels flattened | `(r, in · k)` | `(out, r)` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bidora.dora import norms as _norms
from bidora.dora.function import is_last
from bidora.dora.gain import add_pair, apply_gain, multiply_add
from bidora.dora.peft import DoraAdapter
from bidora.dora.row_gain import row_gains

__all__ = [
    "ExactDora",
    "base_norms",
    "expanded_norms",
    "forget",
    "rows_name",
    "squared_norms",
]

_DROPOUT = ("lora", "peft")
_NORM_GRAD = ("attached", "detached")


@dataclass(frozen=True)
class ExactDora:
    """The forward pass of an exact DoRA layer.

    Attributes:
        dropout: See `use_exact_dora`.
        norm_grad: See `use_exact_dora`.
    """

    dropout: Literal["lora", "peft"] = "lora"
    norm_grad: Literal["attached", "detached"] = "attached"

    def __post_init__(self) -> None:
        _check_choice("dropout", self.dropout, _DROPOUT)
        _check_choice("norm_grad", self.norm_grad, _NORM_GRAD)

    def __call__(self, layer: DoraAdapter, x: Tensor, result: Tensor) -> Tensor:
        """Return the output with the adapter, given the output without it.

        The gain is applied to z, not folded into `B`, so that it stays in float32 where
        products run in bfloat16.

        Args:
            layer: The adapter.
            x: Input of the layer, in the adapter's dtype; indices of an embedding.
            result: Output of the base layer and of the active adapters before this one.

        Returns:
            Output, in the wider of the dtypes met; PEFT's layer casts it.
        """
        gain = self._gain(layer)
        if layer.kind == "embedding":
            return self._embedding(layer, x, result, gain)
        if layer.kind == "convolution":
            return self._convolution(layer, x, result, gain)
        return self._linear(layer, x, result, gain)

    def _linear(
        self, layer: DoraAdapter, x: Tensor, result: Tensor, gain: Tensor
    ) -> Tensor:
        """Do a Linear layer: one low-rank pair, one multiply-add."""
        dropped = layer.drop(x)
        low = layer.down(dropped)
        if self.dropout == "peft" and dropped is not x:
            # PEFT sends the dropped input through the base weight a second time.
            base = F.linear(dropped, layer.weight.fetch().to(x.dtype))
            up = F.linear(layer.scaling * low, layer.lora_b)
            return result + (gain - 1) * base + gain * up
        return apply_gain(_with_pair(layer, low, result), gain, layer.bias)

    def _embedding(
        self, layer: DoraAdapter, x: Tensor, result: Tensor, gain: Tensor
    ) -> Tensor:
        """Do an Embedding: PEFT has no dropout there, and rows of A are looked up."""
        # PEFT looks up as the base layer does, whose padding entry gets no gradient. The
        # norm's gradient reaches it all the same, so ours is the loss's.
        table = layer.lora_a.T
        low = (
            F.embedding(x, table)
            if self.norm_grad == "attached"
            else layer.module._embed(x, table)
        )
        scale = layer.module._get_embed_scale()  # Gemma's, of the output
        if scale is not None:
            low = low * scale.to(low.dtype)
        return apply_gain(_with_pair(layer, low, result), gain, None)

    def _convolution(
        self, layer: DoraAdapter, x: Tensor, result: Tensor, gain: Tensor
    ) -> Tensor:
        """Do a convolution: channels stand before the axes that it slides along."""
        shape = (-1, *(1,) * (layer.weight.stored.dim() - 2))
        gain = gain.view(shape)
        dropped = layer.drop(x)
        up = layer.module.lora_B[layer.adapter](layer.down(dropped))
        if self.dropout == "peft" and dropped is not x:
            base = layer.convolve(dropped)
            return result + (gain - 1) * base + gain * (layer.scaling * up)
        bias = None if layer.bias is None else layer.bias.view(shape)
        return multiply_add(torch.add(result, up, alpha=layer.scaling), gain, bias)

    def _gain(self, layer: DoraAdapter) -> Tensor:
        """Return m / ‖v‖, `(out,)`; without gradients in eval, one computed before."""
        if torch.compiler.is_compiling():
            return self._new_gain(layer)
        cache, key, name = layer.cache, layer.weight.key(), _gain_name(layer)
        state = None if layer.module.training or not is_last() else _state(layer)
        if state is None:
            # Training may write where torch does not count, so that nothing outlives it.
            if cache.get(key, name) is not None:
                cache.put(key, name, None)
            return self._new_gain(layer)
        found = cache.get(key, name)
        if found is None or found[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                found = state, self._new_gain(layer)
            cache.put(key, name, found)
        return found[1]

    def _new_gain(self, layer: DoraAdapter) -> Tensor:
        """Compute m / ‖v‖, `(out,)`, in float32 or float64."""
        base = base_norms(layer)
        magnitude = layer.magnitude.reshape(-1)
        magnitude = magnitude.to(base.squared.device, base.squared.dtype)
        if self.norm_grad == "attached" and layer.groups == 1:
            weight = layer.weight
            rows = layer.cache.get(weight.key(), rows_name(layer))
            factors = layer.lora_a, layer.lora_b, magnitude, layer.scaling
            return row_gains(weight, *factors, base, rows)
        attached = self.norm_grad == "attached" and torch.is_grad_enabled()
        with torch.set_grad_enabled(attached):
            squared = squared_norms(layer)
        return _norms.gains(magnitude, squared, base)


def base_norms(layer: DoraAdapter) -> _norms.BaseNorms:
    """Return what the norms need of the layer's base weight."""
    weight = layer.weight
    dtype = _norms.compute_dtype(layer.lora_a, layer.lora_b, weight.stored)
    return _norms.cached_base_norms(weight, dtype, layer.cache)


def squared_norms(layer: DoraAdapter, wait: bool = False) -> Tensor:
    """Return the squared norms of the layer's adapted rows, `(out,)`."""
    weight, base = layer.weight, base_norms(layer)
    if layer.groups > 1:
        return _grouped_norms(layer, base)
    rows = layer.cache.get(weight.key(), rows_name(layer))
    factors = layer.lora_a, layer.lora_b, layer.scaling
    return _norms.squared_norms(weight, *factors, base, rows, wait)


def expanded_norms(layer: DoraAdapter) -> Tensor:
    """Return the expansion of the squared norms alone, as `squared_norms` starts from."""
    if layer.groups > 1:
        return squared_norms(layer)
    factors = layer.lora_a, layer.lora_b, layer.scaling
    return _norms.expanded_norms(layer.weight, *factors, base_norms(layer))


def _grouped_norms(layer: DoraAdapter, base: _norms.BaseNorms) -> Tensor:
    """Return the squared norms of a convolution in groups, from the kernels' entries.

    PEFT's A sees every channel and its kernels those of a group, so that the product has
    another shape than the weight. PEFT reads its entries in order into the weight's
    shape. So do we: magnitudes mean in both what they were trained to.
    """
    dtype = base.squared.dtype
    with _norms.autocast_off(layer.lora_a.device):
        a, b = layer.lora_a.to(dtype), layer.lora_b.to(dtype)
        rows = layer.weight.fetch().to(dtype)
        product = (b.reshape(-1, a.shape[0]) @ a).view_as(rows)
        squared = (rows + layer.scaling * product).square().sum(1)
        return squared.clamp(min=torch.finfo(dtype).tiny)


def _with_pair(layer: DoraAdapter, low: Tensor, result: Tensor) -> Tensor:
    """Return result + s·low·Bᵀ."""
    scaling, b = layer.scaling, layer.lora_b
    if result.dtype == low.dtype:
        return add_pair(result, low, b.to(low.dtype), scaling)
    return result + F.linear(scaling * low, b)


def _state(layer: DoraAdapter) -> tuple[Any, ...] | None:
    """Return what the gain depends on beside the base weight, None if it cannot be told."""
    parts = [_norms.identity(t) for t in (layer.lora_a, layer.lora_b, layer.magnitude)]
    return None if None in parts else (*parts, layer.scaling)


def rows_name(layer: DoraAdapter) -> str:
    """Return the name in the cache of the rows to compute from their entries."""
    return f"rows-{layer.adapter}"


def _gain_name(layer: DoraAdapter) -> str:
    """Return the name in the cache of the gain."""
    return f"gain-{layer.adapter}"


def forget(layer: DoraAdapter) -> None:
    """Drop what is kept of the adapter, but not what belongs to the base weight."""
    key = layer.weight.key()
    layer.cache.put(key, rows_name(layer), None)
    layer.cache.put(key, _gain_name(layer), None)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of the choices."""
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise ValueError(
            f"{name}={value!r} is not a setting of use_exact_dora; use {known}."
        )
