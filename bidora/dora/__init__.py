"""DoRA that is exact: its forward pass, row norms, gains, and the border to PEFT."""

from __future__ import annotations

from bidora.dora.exact import (
    check_norms,
    direction_norms,
    exact_dora_layers,
    magnitudes,
    plain_dora_layers,
    use_exact_dora,
    use_peft_dora,
)

__all__ = [
    "check_norms",
    "direction_norms",
    "exact_dora_layers",
    "magnitudes",
    "plain_dora_layers",
    "use_exact_dora",
    "use_peft_dora",
]
