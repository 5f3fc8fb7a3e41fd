"""All contact with PEFT's private variant interface.

PEFT keeps one `LoraVariant` object per adapter in `module.lora_variant` and calls its
`forward`; its own documentation calls this private and subject to change. The rest of
the package sees only `DoraAdapter` and the functions of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
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
    "is_replaceable",
    "is_replaced",
    "lora_layers",
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
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.utils.integrations import dequantize_module_weight
except ImportError:  # pragma: no cover - needs another PEFT
    check_peft_version()
    raise

# Kept on the layer, not on the variant: it belongs to the base weight that all adapters
# of the layer share, and layers with PEFT's own variant use it too.
_CACHE = "_bidora_cache"


@dataclass(frozen=True, slots=True)
class DoraAdapter:
    """One DoRA adapter of one Linear (or Conv1D) layer.

    Attributes:
        module: PEFT's layer.
        adapter: Name of the adapter.
    """

    module: Any
    adapter: str

    @property
    def lora_a(self) -> Tensor:
        """The factor `A`, `(r, in)`."""
        return self.module.lora_A[self.adapter].weight

    @property
    def lora_b(self) -> Tensor:
        """The factor `B`, `(out, r)`."""
        return self.module.lora_B[self.adapter].weight

    @property
    def magnitude(self) -> Tensor:
        """The magnitude vector, `(out,)`."""
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
        transposed = getattr(self.module, "fan_in_fan_out", False)
        stored = base.W_q if hasattr(base, "W_q") else base.weight  # W_q: HQQ
        if type(stored) in (nn.Parameter, Tensor) and stored.is_floating_point():
            rows = stored.T if transposed else stored
            return BaseWeight(stored, lambda: rows)

        def dequantise() -> Tensor:
            dense = dequantize_module_weight(base)
            return dense.T if transposed else dense

        return BaseWeight(stored, dequantise, quantised=True)

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


Forward = Callable[[DoraAdapter, Tensor, Tensor], Tensor]


class ReplacedDora(DoraLinearVariant):
    """PEFT's DoRA with another forward; making, merging and unmerging stay PEFT's.

    Args:
        compute: Gives a layer's output from the adapter, the layer's input and the
            output so far (of the base layer and the adapters before this one). It is
            copied and pickled with the model.
    """

    def __init__(self, compute: Forward) -> None:
        self.compute = compute

    # PEFT declares a static method and calls it on the instance, which is what lets a
    # replacement carry its settings.
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


def dora_layers(model: nn.Module) -> list[tuple[str, DoraAdapter]]:
    """Return name and handle of every DoRA adapter of every layer of a model.

    Layers come in the order of `named_modules`. Embedding and convolution layers are
    among them; `is_replaceable` tells.
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


def is_replaceable(layer: DoraAdapter) -> bool:
    """Return whether the forward is PEFT's DoRA for linear layers, or ours.

    Embedding and convolution layers, variants of other packages, and a bias in `B`
    (which PEFT refuses in a DoRA configuration) are not.
    """
    variant = layer.module.lora_variant.get(layer.adapter)
    if type(variant) not in (DoraLinearVariant, ReplacedDora):
        return False
    return layer.module.lora_B[layer.adapter].bias is None


def replace_forward(layer: DoraAdapter, compute: Forward) -> None:
    """Let `compute` give the layer's output with this adapter."""
    layer.module.lora_variant[layer.adapter] = ReplacedDora(compute)


def restore_forward(layer: DoraAdapter) -> None:
    """Give the adapter PEFT's own forward again, and leave nothing behind."""
    layer.module.lora_variant[layer.adapter] = DoraLinearVariant()
    clear_cache(layer)


def clear_cache(layer: DoraAdapter) -> None:
    """Drop what was computed from the layer's base weight."""
    layer.module.__dict__.pop(_CACHE, None)
