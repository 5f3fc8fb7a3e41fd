"""BiDoRA: bi-level fine-tuning of DoRA adapters."""

from __future__ import annotations

import hypergrad

if not hasattr(hypergrad, "BilevelProblem"):
    raise ImportError(
        f"the package 'hypergrad' at {hypergrad.__file__} is another project's: its files "
        "shadow those of 'hypergrad-bidora'. Run: pip uninstall hypergrad, then pip "
        "install --force-reinstall --no-deps hypergrad-bidora."
    )

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
