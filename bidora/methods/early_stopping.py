"""Early stopping: transformers' own, over several evaluation sets, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from bidora.errors import UserError

__all__ = ["EarlyStopping"]


class EarlyStopping(EarlyStoppingCallback):
    """Stop where the main metric has not risen for some evaluations, and keep the best.

    transformers counts in `early_stopping_patience_counter`, and the Trainer puts the best
    weights back (`load_best_model_at_end`). What is added: evaluations of other sets are
    passed over, and a resumed run goes on with the count of its checkpoint.
    """

    _began = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Take the count, and the place of the best weights, from a checkpoint.

        Raises:
            UserError: If the best weights so far are gone.
        """
        super().on_train_begin(args, state, control, **kwargs)
        self._began = state.global_step
        if not self._began:
            return
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        for name, value in saved.items():
            setattr(self, name, value)
        # The folder of the run may have moved.
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if not best.is_dir():
            raise UserError(
                f"{best} is gone, which held the best weights so far (--early-stopping-"
                "patience), so the run cannot end with them. Start anew with --overwrite."
            )
        state.best_model_checkpoint = str(best)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any
    ) -> None:
        """Count an evaluation of the set that decides; a resume repeats one."""
        decides = f"eval_{args.metric_for_best_model}" in metrics
        if decides and state.global_step > self._began:
            super().on_evaluate(args, state, control, metrics, **kwargs)
