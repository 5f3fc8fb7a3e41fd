"""BiDoRA: search the magnitudes on held-back data, then retrain; and its ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.errors import UserError
from bidora.methods.base import OF_LORA_PLUS, TrainerParts
from bidora.methods.lora import PeftDora

if TYPE_CHECKING:
    from transformers import Trainer

    from bidora.runs.settings import TrainSettings

__all__ = ["BiDoRA", "FirstOrder", "NoOrthogonality", "NoRetraining", "OneSplit"]

PASSED_ON = (
    "budget",
    "estimator",
    "validation_fraction",
    "outer_learning_rate",
    "outer_weight_decay",
    "outer_every",
    "per_device_outer_batch_size",
    "orthogonality",
    "audit_every",
    "retrain",
    "retrain_max_steps",
    "retrain_learning_rate",
)
"""Settings that are arguments of the trainer by the same name."""


class BiDoRA(PeftDora):
    """The two phases of BiDoRA [QZX24]; the exact forward is the trainer's to put in."""

    name: ClassVar[str] = "bidora"
    exact: ClassVar[bool] = True  # by its trainer
    summary: ClassVar[str] = (
        "BiDoRA: search magnitudes on held-back examples, then retrain directions on all"
    )
    phases: ClassVar[tuple[str, ...]] = ("search", "retrain")
    searches: ClassVar[bool] = True
    holds_back: ClassVar[bool] = True
    ignores: ClassVar[tuple[str, ...]] = OF_LORA_PLUS

    def check(self, settings: TrainSettings) -> None:
        """Refuse what the search could not do, before anything is loaded.

        Args:
            settings: Of the run.

        Raises:
            UserError: If the estimator or one of its settings is refused, or the search
                is to stop early.
        """
        super().check(settings)
        if settings.early_stopping_patience is not None:
            raise UserError(
                "--early-stopping-patience is for methods of one phase. In --method "
                f"{self.name} the examples that are held back teach the magnitudes, so "
                "they cannot judge as well. Leave it out, and say how long with "
                "--max-steps; or choose --method dora."
            )
        name = self.preset.get("estimator", settings.estimator)
        if name is None and not settings.estimator_settings:
            return
        from bidora.defaults import ESTIMATOR
        from hypergrad import make_estimator

        name = name or ESTIMATOR  # that of every budget
        try:
            make_estimator(name, **settings.estimator_settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"--estimator {name}: {error}") from error

    def trainer(self, parts: TrainerParts) -> Trainer:
        """Return a `BiDoRATrainer` over both levels.

        Args:
            parts: What it is made of.

        Raises:
            UserError: If an outer batch takes more examples than there are for it.
        """
        from bidora.methods.training import use_one_device
        from bidora.trainer import BiDoRATrainer, BiDoRATrainingArguments

        settings = parts.settings
        own = {name: getattr(settings, name) for name in PASSED_ON}
        if settings.outer_warmup_steps is not None:
            own["outer_warmup_steps"] = settings.outer_warmup_steps
        args = BiDoRATrainingArguments(
            **parts.arguments,
            **{**own, **self.preset},
            estimator_settings=settings.estimator_settings or None,
        )
        use_one_device(args)
        held = len(parts.split[1]) or len(parts.given["train_dataset"])
        size = settings.per_device_outer_batch_size
        if size is None:  # no more than there is
            usual = args.bidora_settings()["per_device_outer_batch_size"]
            args.per_device_outer_batch_size = min(usual, held)
        elif size > held:  # the trainer would refuse it, once the folder is claimed
            raise UserError(_too_large(size, parts))
        trainer = BiDoRATrainer(args=args, **parts.given, **self.levels(parts))
        trainer.whole_batches = parts.whole_batches
        return trainer

    def levels(self, parts: TrainerParts) -> dict[str, Any]:
        """Return which examples each level learns on, as the trainer takes it.

        Args:
            parts: What it is made of.
        """
        return {"split": parts.split}


def _too_large(size: int, parts: TrainerParts) -> str:
    """Return why an outer batch can't be that large, and what to do."""
    inner, outer = map(len, parts.split)
    there, remedy = f"{inner} training examples", ""
    if outer:
        there = f"{outer} of {inner + outer} training examples held back for it"
    if outer and size < inner + outer:
        remedy = ", or hold more back with --validation-fraction"
    return (
        f"--per-device-outer-batch-size {size} is more than the {there}, so that some "
        "would come twice in a batch. A recipe sets it for data larger than this. Pass "
        f"--per-device-outer-batch-size {outer or inner} or less{remedy}."
    )


class FirstOrder(BiDoRA):
    """ξ = 0: the magnitudes follow the direct gradient alone."""

    name: ClassVar[str] = "bidora-first-order"
    summary: ClassVar[str] = "BiDoRA without the indirect term (the paper's ξ = 0)"
    preset: ClassVar[Mapping[str, Any]] = {"estimator": "first-order"}


class NoOrthogonality(BiDoRA):
    """γ = 0: no term keeps directions apart."""

    name: ClassVar[str] = "bidora-no-orthogonality"
    summary: ClassVar[str] = "BiDoRA without the orthogonality term (the paper's γ = 0)"
    preset: ClassVar[Mapping[str, Any]] = {"orthogonality": 0.0}


class NoRetraining(BiDoRA):
    """The search alone: what it ends with is the result."""

    name: ClassVar[str] = "bidora-no-retraining"
    summary: ClassVar[str] = "BiDoRA's search alone, without the retraining"
    phases: ClassVar[tuple[str, ...]] = ("search",)
    preset: ClassVar[Mapping[str, Any]] = {"retrain": "none"}
    ignores: ClassVar[tuple[str, ...]] = (
        *OF_LORA_PLUS,
        "retrain_max_steps",
        "retrain_learning_rate",
    )


class OneSplit(BiDoRA):
    """Both levels learn on all training examples: nothing is held back."""

    name: ClassVar[str] = "bidora-one-split"
    summary: ClassVar[str] = "BiDoRA with both levels on all training examples"
    holds_back: ClassVar[bool] = False
    ignores: ClassVar[tuple[str, ...]] = (*OF_LORA_PLUS, "validation_fraction")

    def levels(self, parts: TrainerParts) -> dict[str, Any]:
        """Return all training examples for both levels.

        Args:
            parts: What the trainer is made of.
        """
        import copy

        # Another object: a Trainer refuses to evaluate on what it trains on.
        return {"outer_dataset": copy.copy(parts.given["train_dataset"])}
