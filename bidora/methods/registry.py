"""Methods by name."""

from __future__ import annotations

from typing import Any

from bidora._registry import Registry

__all__ = ["METHODS", "make_method"]

METHODS = Registry(
    "method",
    "bidora.methods",
    {
        "bidora": "bidora.methods.bidora:BiDoRA",
        "dora": "bidora.methods.lora:ExactDora",
        "dora-peft": "bidora.methods.lora:PeftDora",
        "lora": "bidora.methods.lora:Lora",
        "rslora": "bidora.methods.lora:RankStabilisedLora",
        "lora-plus": "bidora.methods.lora_plus:LoraPlus",
        "houlsby": "bidora.methods.houlsby:Houlsby",
        "bitfit": "bidora.methods.bitfit:BitFit",
        "full": "bidora.methods.full:Full",
        "probe": "bidora.methods.partial:Probe",
        "bidora-first-order": "bidora.methods.bidora:FirstOrder",
        "bidora-no-orthogonality": "bidora.methods.bidora:NoOrthogonality",
        "bidora-no-retraining": "bidora.methods.bidora:NoRetraining",
        "bidora-one-split": "bidora.methods.bidora:OneSplit",
    },
    base="bidora.methods.base:Method",
    chosen_by="auto",
)


def make_method(name: str) -> Any:
    """Return the method of that name.

    Args:
        name: One of `METHODS.names()`.

    Raises:
        UserError: If there is none.

    Example:
        >>> make_method("lora").phases
        ('train',)
    """
    return METHODS.get(name)()
