r"""The average of the last weights of a phase, in place of the last of them [IPG18].

After $T$ steps with weights $w_1, \dots, w_T$, the model ends with
$\bar w = \frac{1}{n} \sum_{t = T - n + 1}^{T} w_t$ of the parameters that are trained.
Of a low-rank change it is the mean of $A$ and that of $B$, and not that of $BA$. Buffers,
such as the statistics of a BatchNorm, stay those of the last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from bidora.errors import UserError

__all__ = ["AverageLast", "averaged_steps"]

FILE = "average.safetensors"


def averaged_steps(share: float, steps: int) -> int:
    """Return how many of the last weights are averaged.

    Args:
        share: Share of the steps.
        steps: Steps of the phase.

    Example:
        >>> averaged_steps(0.5, 9), averaged_steps(0.01, 9)
        (4, 1)
    """
    return max(1, round(share * steps))


class AverageLast(TrainerCallback):
    """Keep a running mean of the trained weights, and end a phase with it.

    The mean is in float32, and in each checkpoint of a step that it has seen, so that a
    resumed run ends with the same bits. Add it before what scores the end of the phase.

    Args:
        trainer: The Trainer; in a `BiDoRATrainer`, its `phase` names the phase.
        share: Share of the steps of the phase.
        phase: Which phase; `train` for a Trainer of one.
    """

    def __init__(self, trainer: Any, share: float, phase: str = "train") -> None:
        self.trainer = trainer
        self.share = share
        self.phase = phase
        self._trained: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Begin at zero, or with the mean that a checkpoint holds."""
        self._trained, self._mean = {}, {}
        if (getattr(self.trainer, "phase", None) or "train") != self.phase:
            return
        self._trained = {
            name: p.detach()
            for name, p in self.trainer.model.named_parameters()
            if p.requires_grad
        }
        if self._seen(state) > 0:
            self._mean = self._read(_place(args, state))
        else:
            self._mean = {
                name: torch.zeros_like(p, dtype=torch.float32)
                for name, p in self._trained.items()
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the weights of a step."""
        seen = self._seen(state)
        if seen > 0:
            for name, mean in self._mean.items():
                mean.lerp_(self._trained[name].float(), 1 / seen)
        self._keep(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the mean where checkpoints are of epochs."""
        self._keep(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the mean into the model."""
        if self._seen(state) > 0:
            for name, mean in self._mean.items():
                self._trained[name].copy_(mean)

    def _seen(self, state: Any) -> int:
        """Return how many weights the mean is of after this step; 0 or less for none."""
        last = averaged_steps(self.share, state.max_steps)
        return state.global_step - (state.max_steps - last)

    def _keep(self, args: Any, state: Any, control: Any) -> None:
        """Write the mean, before the Trainer writes what makes a checkpoint complete."""
        due = control.should_save and args.should_save
        if due and self._mean and self._seen(state) > 0:
            place = _place(args, state)
            place.mkdir(parents=True, exist_ok=True)
            own = {name: mean.cpu().contiguous() for name, mean in self._mean.items()}
            save_file(own, str(place / FILE))

    def _read(self, place: Path) -> dict[str, Tensor]:
        try:
            found = load_file(str(place / FILE))
        except OSError as error:
            raise UserError(
                f"{place} holds no {FILE}, the mean of the last weights so far, so a "
                "resumed run cannot end as the first would have. Delete that folder to "
                "go on from the checkpoint before it, or start anew with --overwrite."
            ) from error
        return {
            name: found[name].to(p.device, copy=True)
            for name, p in self._trained.items()
        }


def _place(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
