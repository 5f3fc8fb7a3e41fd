"""BiDoRA: bi-level fine-tuning of DoRA adapters."""

from __future__ import annotations

from bidora.dora import (
    check_norms,
    exact_dora_layers,
    magnitudes,
    plain_dora_layers,
    use_exact_dora,
    use_peft_dora,
)
from bidora.optimizer import BiDoRAOptimizer
from bidora.orthogonality import orthogonality

__all__ = [
    "BiDoRAOptimizer",
    "check_norms",
    "exact_dora_layers",
    "magnitudes",
    "orthogonality",
    "plain_dora_layers",
    "use_exact_dora",
    "use_peft_dora",
]
