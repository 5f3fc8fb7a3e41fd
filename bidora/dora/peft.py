"""All contact with PEFT's private variant interface.

PEFT keeps one `LoraVariant` object per adapter in `module.lora_variant` and calls its
`forward`; its own documentation calls this private and subject to change. The rest of
the package sees only `DoraAdapter` and the functions of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidora.dora.norms import BaseWeight, WeightCache

__all__ = [
    "TESTED",
    "DoraAdapter",
    "Forward",
    "ReplacedDora",
    "check_peft_version",
    "clear_cache",
    "dora_layers",
    "is_replaced",
    "lora_layers",
    "obstacle",
    "replace_forward",
    "restore_forward",
]

TESTED = ">=0.21,<0.22"
"""The PEFT versions this was tested with."""


def check_peft_version(version: str | None = None) -> None:
    """Refuse a PEFT whose private interface may differ from the one used here.

    Args:
        version: The version to judge; by default the installed one.

    Raises:
        ImportError: The version is outside the tested range.
    """
    found = peft.__version__ if version is None else version
    if found.split(".")[:2] != ["0", "21"]:
        raise ImportError(
            f"Exact DoRA was tested with peft{TESTED}, but peft {found} is installed. "
            "It replaces the forward of PEFT's DoRA through an interface that PEFT "
            f"changes without notice. Install a tested one: pip install 'peft{TESTED}'."
        )


try:
    from peft.tuners.lora.layer import Embedding, LoraLayer, LoraVariant, _ConvNd
    from peft.tuners.lora.variants import (
        DoraConv1dVariant,
        DoraConv2dVariant,
        DoraConv3dVariant,
        DoraEmbeddingVariant,
        DoraLinearVariant,
    )
    from peft.utils.integrations import dequantize_module_weight
except ImportError:  # pragma: no cover - needs another PEFT
    check_peft_version()
    raise

_DORA = (
    DoraLinearVariant,
    DoraEmbeddingVariant,
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
)

# Kept on the layer, not on the variant: it belongs to the base weight that all adapters
# of the layer share, and layers with PEFT's own variant use it too.
_CACHE = "_bidora_cache"


@dataclass(frozen=True, slots=True)
class DoraAdapter:
    """One DoRA adapter of one layer, its tensors seen as matrices.

    Attributes:
        module: PEFT's layer.
        adapter: Name of the adapter.
    """

    module: Any
    adapter: str

    @property
    def kind(self) -> Literal["linear", "embedding", "convolution"]:
        """What the layer is; Conv1D (GPT-2) is linear."""
        if isinstance(self.module, Embedding):
            return "embedding"
        return "convolution" if isinstance(self.module, _ConvNd) else "linear"

    @property
    def groups(self) -> int:
        """In how many groups a convolution works; 1 for other layers."""
        if not isinstance(self.module, _ConvNd):
            return 1
        base: Any = self.module.get_base_layer()
        return base.groups

    @property
    def lora_a(self) -> Tensor:
        """The factor `A`, `(r, in)`."""
        if isinstance(self.module, Embedding):
            return self.module.lora_embedding_A[self.adapter]
        weight = self.module.lora_A[self.adapter].weight
        return weight if weight.dim() == 2 else weight.flatten(1)

    @property
    def lora_b(self) -> Tensor:
        """The factor `B`, `(out, r)`; `(out, r / groups)` of a convolution in groups."""
        if isinstance(self.module, Embedding):
            return self.module.lora_embedding_B[self.adapter]
        weight = self.module.lora_B[self.adapter].weight
        return weight if weight.dim() == 2 else weight.flatten(1)

    @property
    def magnitude(self) -> Tensor:
        """The magnitude vector, of `out` entries; a convolution's has further axes."""
        return self.module.lora_magnitude_vector[self.adapter].weight

    @property
    def has_magnitude(self) -> bool:
        """Whether it is DoRA, and not plain LoRA."""
        return self.adapter in (self.module.lora_magnitude_vector or ())

    @property
    def scaling(self) -> float:
        """The scaling s, which PEFT may change at any time."""
        return self.module.scaling[self.adapter]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer, `(out,)`."""
        return getattr(self.module.get_base_layer(), "bias", None)

    @property
    def weight(self) -> BaseWeight:
        """The weight of the base layer as rows of output features, `(out, in)`."""
        base = self.module.get_base_layer()
        stored = base.W_q if hasattr(base, "W_q") else base.weight  # W_q: HQQ
        if type(stored) in (nn.Parameter, Tensor) and stored.is_floating_point():
            rows = self._as_rows(stored)
            return BaseWeight(stored, lambda: rows)

        def dequantise() -> Tensor:
            return self._as_rows(dequantize_module_weight(base))

        return BaseWeight(stored, dequantise, quantised=True)

    def _as_rows(self, dense: Tensor) -> Tensor:
        """Return a weight as a matrix whose rows are output features."""
        if _rows_last(self.module):
            return dense.T
        return dense if dense.dim() == 2 else dense.flatten(1)

    @property
    def is_active(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return self.adapter in self.module.active_adapters

    @property
    def is_merged(self) -> bool:
        """Whether the layer's base weight holds a merged adapter."""
        return bool(self.module.merged_adapters)

    @property
    def cache(self) -> WeightCache:
        """What was computed from the base weight; empty while a compiler traces."""
        if torch.compiler.is_compiling():
            return WeightCache()  # a graph must not depend on what was kept elsewhere
        cache = self.module.__dict__.get(_CACHE)
        if not isinstance(cache, WeightCache):
            cache = self.module.__dict__[_CACHE] = WeightCache()
        return cache

    def down(self, x: Tensor) -> Tensor:
        """Return x Aᵀ, `(..., r)`, through PEFT's module, so that its hooks run."""
        return self.module.lora_A[self.adapter](x)

    def drop(self, x: Tensor) -> Tensor:
        """Return `x` after the adapter's dropout: `x` itself where none is in force."""
        dropout = self.module.lora_dropout[self.adapter]
        idle = isinstance(dropout, nn.Identity) or not self.module.training
        return x if idle else dropout(x)

    def convolve(self, x: Tensor) -> Tensor:
        """Return the base convolution of `x` without its bias, as PEFT's DoRA takes it."""
        base = self.module.get_base_layer()
        convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[base.weight.dim()]
        return convolution(
            x,
            base.weight.to(x.dtype),
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=base.groups,
        )


def _rows_last(module: Any) -> bool:
    """Return whether the base weight's last axis is that of output features."""
    return isinstance(module, Embedding) or bool(
        getattr(module, "fan_in_fan_out", False)
    )


Forward = Callable[[DoraAdapter, Tensor, Tensor], Tensor]


class ReplacedDora(LoraVariant):
    """PEFT's DoRA with another forward; making, merging and unmerging stay PEFT's.

    Rows that are zero, in the weight and in the adapter, PEFT merges to 0/0. They are
    left as they are, which is what a gain of 1 makes of them.

    Args:
        compute: Gives a layer's output from the adapter, the layer's input and the
            output so far (of the base layer and the adapters before this one). It is
            copied and pickled with the model.
        original: PEFT's variant for this kind of layer.
    """

    def __init__(self, compute: Forward, original: Any) -> None:
        self.compute = compute
        self.original = original

    def supports_lora_conversion(self) -> bool:
        """Return what PEFT's own variant does."""
        return self.original.supports_lora_conversion()

    # PEFT declares static methods and calls them on the instance, which is what lets a
    # replacement carry its settings.
    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make the magnitude."""
        self.original.init(module, adapter_name=adapter_name, **kwargs)

    def merge_safe(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Return the weight with this adapter merged in."""
        merged = self.original.merge_safe(module, active_adapter, orig_weight)
        gone = _zero_norms(module, active_adapter)
        return _with_rows_of(orig_weight, merged, gone, module)

    def merge_unsafe(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> None:
        """Merge this adapter into the weight."""
        before = orig_weight.data  # which PEFT replaces
        self.original.merge_unsafe(module, active_adapter, orig_weight)
        gone = _zero_norms(module, active_adapter)
        orig_weight.data = _with_rows_of(before, orig_weight.data, gone, module)

    def unmerge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, module: Any, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        """Return the weight without this adapter."""
        gone = _zero_norms(module, active_adapter)  # PEFT forgets them
        unmerged = self.original.unmerge(module, active_adapter, orig_weight)
        return _with_rows_of(orig_weight.data, unmerged, gone, module)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        module: nn.Module,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: object,
    ) -> Tensor:
        """Return the output of the layer with this adapter."""
        return self.compute(DoraAdapter(module, active_adapter), x, result)


def _zero_norms(module: Any, adapter: str) -> Tensor:
    """Return which norms were 0 when the adapter was merged, `(out,)`."""
    return module._caches[f"{adapter}-weight_norm"].flatten() == 0


def _with_rows_of(old: Tensor, new: Tensor, rows: Tensor, module: Any) -> Tensor:
    """Return `new`, with the given rows as they are in `old`."""
    if not bool(rows.any()):
        return new
    shape = (1, -1) if _rows_last(module) else (-1, *(1,) * (new.dim() - 1))
    return torch.where(rows.to(new.device).view(shape), old.to(new.dtype), new)


def dora_layers(model: nn.Module) -> list[tuple[str, DoraAdapter]]:
    """Return name and handle of every DoRA adapter of every layer of a model.

    Layers come in the order of `named_modules`, whether another forward can replace
    theirs (see `obstacle`) or not.
    """
    check_peft_version()
    return [
        (name, DoraAdapter(module, adapter))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for adapter in module.lora_magnitude_vector or ()
    ]


def lora_layers(model: nn.Module) -> list[tuple[str, DoraAdapter]]:
    """Return name and handle of every adapter of a linear layer, with magnitudes or not.

    Args:
        model: Any model.
    """
    check_peft_version()
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    return [
        (name, DoraAdapter(module, adapter))
        for name, module in layers
        for adapter in module.lora_A  # empty for an embedding
        if module.lora_A[adapter].weight.dim() == 2
    ]


def is_replaced(layer: DoraAdapter) -> bool:
    """Return whether another forward than PEFT's is in force."""
    return isinstance(layer.module.lora_variant.get(layer.adapter), ReplacedDora)


def obstacle(layer: DoraAdapter) -> str | None:
    """Return why the layer cannot have another forward, None where it can."""
    variant = layer.module.lora_variant.get(layer.adapter)
    base = layer.module.get_base_layer()
    if type(variant) not in (*_DORA, ReplacedDora):
        kind = type(variant).__name__
        return f"its variant {kind} is not PEFT's DoRA for a layer of this kind"
    if layer.kind == "embedding":
        if base.max_norm is not None:
            return "its max_norm changes the frozen weight in every forward pass"
        return None
    if layer.module.lora_B[layer.adapter].bias is not None:
        return "its B has a bias (lora_bias), for which DoRA has no place"
    if layer.kind == "convolution":
        own = layer.module.lora_A[layer.adapter]
        if base.dilation != own.dilation and max(base.kernel_size) > 1:
            return f"PEFT makes A without its dilation of {base.dilation}"
        if base.padding_mode != own.padding_mode:
            return f"PEFT's A pads with {own.padding_mode}, not {base.padding_mode}"
    return None


def replace_forward(layer: DoraAdapter, compute: Forward) -> None:
    """Let `compute` give the layer's output with this adapter."""
    present = layer.module.lora_variant[layer.adapter]
    original = present.original if isinstance(present, ReplacedDora) else present
    layer.module.lora_variant[layer.adapter] = ReplacedDora(compute, original)


def restore_forward(layer: DoraAdapter) -> None:
    """Give the adapter PEFT's own forward again, and leave nothing behind."""
    variant = layer.module.lora_variant[layer.adapter]
    layer.module.lora_variant[layer.adapter] = variant.original
    clear_cache(layer)


def clear_cache(layer: DoraAdapter) -> None:
    """Drop what was computed from the layer's base weight."""
    layer.module.__dict__.pop(_CACHE, None)
