r"""LoRA+: LoRA whose $B$ learns at a higher rate than its $A$ [HGY24].

$A$ learns at `learning_rate` and $B$ at `loraplus_lr_ratio` times that. What belongs to
neither goes where PEFT's `create_loraplus_optimizer` puts it: weights of the head with
$A$, its biases with $B$, and LoRA's parts of an embedding at $10^{-6}$.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from bidora.methods.base import OF_MAGNITUDES, SEARCH_ONLY
from bidora.methods.lora import Lora

if TYPE_CHECKING:
    from torch import nn

    from bidora.runs.settings import TrainSettings

__all__ = ["LoraPlus"]


class LoraPlus(Lora):
    """LoRA with two rates."""

    name: ClassVar[str] = "lora-plus"
    summary: ClassVar[str] = (
        "LoRA+: LoRA whose B learns at loraplus_lr_ratio times the rate of A"
    )
    ignores: ClassVar[tuple[str, ...]] = (*SEARCH_ONLY, *OF_MAGNITUDES)

    def rates(self, model: nn.Module, settings: TrainSettings) -> Mapping[str, float]:
        """Return the rates that PEFT gives, by the names of the parameters.

        Differs from PEFT's optimizer in what decays alone, which is as in every method
        here: a trained RMSNorm does not.

        Args:
            model: The PEFT model.
            settings: Of the run.
        """
        from peft.optimizers import create_loraplus_optimizer
        from torch.optim import AdamW

        made = create_loraplus_optimizer(
            model,  # type: ignore[arg-type]  # a PeftModel
            AdamW,
            lr=settings.rate,
            loraplus_lr_ratio=settings.loraplus_lr_ratio,
        )
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: g["lr"] for g in made.param_groups for p in g["params"]}
