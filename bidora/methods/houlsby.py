r"""Adapters of Houlsby et al.: small bottlenecks inside each layer of an encoder.

After the output projection of attention and of the feed-forward part of each layer, and
before the residual connection, $h + W_{up}\,\mathrm{gelu}(W_{down} h + b) + c$ takes the
place of $h$ [HGJ19, Fig. 2]. $W_{up}$ and $c$ start at zero, so the model starts as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from bidora.errors import UserError
from bidora.methods._tensors import load_trained, save_trained
from bidora.methods.base import (
    OF_LORA_PLUS,
    OF_MAGNITUDES,
    OF_WEIGHTS,
    SEARCH_ONLY,
    Method,
)

if TYPE_CHECKING:
    from torch import nn

    from bidora.models import Base
    from bidora.runs.job_settings import JobSettings

__all__ = ["Houlsby", "insert"]

PLACES = (
    "attention.output.dense",  # BERT, RoBERTa, DeBERTa, ESM
    "output.dense",
    "attention.out_lin",  # DistilBERT
    "ffn.lin2",
    "self_attn.o_proj",  # Llama, Qwen, Gemma
    "mlp.down_proj",
    "attn.c_proj",  # GPT-2
    "mlp.c_proj",
    "attn.Wo",  # ModernBERT
    "mlp.Wo",
)
"""Ends of the names of the projections that an adapter comes after."""

FILE = "houlsby.safetensors"


def insert(model: nn.Module, size: int) -> list[str]:
    """Put an adapter after each such projection, in place.

    Args:
        model: A transformer.
        size: Width of the bottlenecks.

    Returns:
        Names of the projections; none where the model has none of `PLACES`.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=9,
        ...     hidden_size=8,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ...     intermediate_size=8,
        ... )
        >>> insert(BertModel(config), size=2)
        ['encoder.layer.0.attention.output.dense', 'encoder.layer.0.output.dense']
    """
    found = [n for n, _ in model.named_modules() if n.endswith(PLACES)]
    for name in found:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, _bottleneck_class()(getattr(owner, child), size))
    return found


class Houlsby(Method):
    """Bottleneck adapters in a frozen model; the head is trained with them."""

    name: ClassVar[str] = "houlsby"
    summary: ClassVar[str] = (
        "Houlsby's adapters: two bottlenecks of width lora_r a layer"
    )
    ignores: ClassVar[tuple[str, ...]] = (
        *SEARCH_ONLY,
        *OF_MAGNITUDES,
        *OF_LORA_PLUS,
        *OF_WEIGHTS,
        "lora_alpha",
        "lora_dropout",
        "target_modules",
    )

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the model with adapters, everything but them and the head frozen.

        Args:
            base: The loaded model.
            settings: `lora_r` is the width of the bottlenecks.

        Raises:
            UserError: If the model's layers are not known.
        """
        model = base.model.requires_grad_(False)
        if not insert(model, settings.lora_r):
            raise UserError(
                f"--method houlsby does not know the layers of {settings.model!r}: none "
                f"ends in {', '.join(PLACES)}. Choose another method, such as lora."
            )
        for name in base.head:
            model.get_submodule(name).requires_grad_(True)
        for module in model.modules():
            if isinstance(module, _bottleneck_class()):
                cast("Any", module).down.requires_grad_(True)
                cast("Any", module).up.requires_grad_(True)
        return model

    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained, as one safetensors file.

        Args:
            model: The model.
            folder: Where to.
        """
        inserted: list[Any] = [
            m for m in model.modules() if isinstance(m, _bottleneck_class())
        ]
        size = str(inserted[0].down.out_features)
        save_trained(model, folder / FILE, size=size)

    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the base with the saved adapters and head.

        Args:
            base: The loaded model.
            folder: Where they are.
        """
        from safetensors import safe_open

        with safe_open(str(folder / FILE), framework="pt") as file:
            size = int(file.metadata()["size"])
        insert(base.model, size)
        load_trained(base.model, folder / FILE)
        return base.model

    def loading_code(self, names: Mapping[str, str]) -> str:
        """Return lines that load the adapters; no other library knows them.

        Args:
            names: `folder`.
        """
        return f"""\
from bidora import load_run

model, tokenizer = load_run({names["folder"]!r})
"""


def _bottleneck_class() -> type[nn.Module]:
    """Return the adapter's class; torch is loaded when the first is asked for."""
    from bidora.methods._bottleneck import Bottleneck

    return Bottleneck
