"""BiDoRA over a `transformers.Trainer`, in two ordinary runs of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput

from bidora.dora import plain_dora_layers, use_exact_dora
from bidora.trainer._checks import check_class, check_trainer, refuse_trial
from bidora.trainer.arguments import SEARCH_FOLDER, Phase, arguments_of_phase
from bidora.trainer.checkpoint import (
    Checkpoint,
    Progress,
    claim_folder,
    find_checkpoint,
    refuse_other_settings,
    save_progress,
    settings_of,
)
from bidora.trainer.data import (
    OuterStream,
    check_outer_batch,
    outer_stream,
    select,
    split_of,
    without_rest,
)
from bidora.trainer.levels import (
    SteppedElsewhere,
    give_outer_schedule,
    make_bilevel_optimizer,
)
from bidora.trainer.lock import held_folder
from bidora.trainer.logs import StepLog, noted_by_the_loss, tells_steps_back
from bidora.trainer.loss import (
    add_orthogonality,
    judge_search,
    loss_of,
    weight_of,
)
from bidora.trainer.plan import Plan, make_plan
from bidora.trainer.seams import (
    AtTheSeams,
    OrderByEpoch,
    end_again,
    lines_without_phase,
    read_state,
    tag_card,
)
from bidora.trainer.upstream import (
    PrivateTrainer,
    check_transformers,
    choose_order,
    name_phases,
    part_tensorboard,
)
from bidora.trainer.values import (
    check_values,
    directions,
    load_values,
    norm_buffers,
)
from hypergrad import Accumulated
from hypergrad.optimizer import StepReport

if TYPE_CHECKING:
    from bidora.outer import OuterLevel

__all__ = ["BiDoRAMixin", "BiDoRATrainer"]

logger = logging.getLogger(__name__)


class BiDoRAMixin(PrivateTrainer):
    """Make a Trainer search DoRA magnitudes, then retrain the directions.

    `class Mine(BiDoRAMixin, Seq2SeqTrainer)` needs no more; its arguments are a class
    made with `BiDoRAArguments`. `train()` then is two ordinary runs of the Trainer:

    1. `search`, in `output_dir/_search`: the directions (A, B and the task head) learn on
       one part of the training set, the magnitudes on the part held back, by
       `BiDoRAOptimizer`.
    2. `retrain`, in `output_dir`: the magnitudes are frozen, and the directions learn on
       all of the training set, from their first values or on from the search.

    Callbacks, evaluation, logging, checkpoints and best-model selection are the
    Trainer's own in both; `trainer.phase` tells which one runs. The loss is
    `compute_loss` on both levels, evaluated several times in a step with an outer step:
    what it counts of its own accord would count those. `eval_dataset` is what neither
    level trains on.

    A run that was stopped goes on by `train(resume_from_checkpoint=True)`, in the phase
    where it was, and ends with the same weights. Numbers in the logs are means since the
    line before, or since the resume. A collator that draws random numbers is drawn from
    again at a resume in mid-epoch, as by any Trainer, and draws others: mask beforehand.

    Args:
        args: as for the Trainer.
        outer_dataset: examples for the magnitudes; then `train_dataset` is not split,
            and the retraining does not see them.
        split: indices of `train_dataset` for the directions, and for the magnitudes, made
            elsewhere; None to hold `validation_fraction` of them back.
        kwargs: as for the Trainer.

    Raises:
        TypeError: arguments without `BiDoRAArguments`, or a class that overrides
            `training_step`.
        ValueError: settings of the Trainer that the search cannot honour.
    """

    args: Any
    model: Any
    optimizer: Any
    train_dataset: Any
    outer_level: OuterLevel

    def __init__(
        self, *args: Any, outer_dataset: Any = None, split: Any = None, **kwargs: Any
    ) -> None:
        check_transformers(type(self))
        check_class(type(self), BiDoRAMixin)
        super().__init__(*args, **kwargs)
        self.outer_dataset, self.split = outer_dataset, split
        check_trainer(self)
        self.phase: Phase | None = None
        self.search_state: TrainerState | None = None
        self._progress: Progress | None = None
        self._first_values: dict[str, Tensor] = {}
        self._bilevel: SteppedElsewhere | None = None
        self._outer: OuterStream | None = None
        self._queue: list[tuple[Any, float]] = []
        self._notes: dict[str, Any] = {}
        self._order = OrderByEpoch()
        self.whole_batches = self._in_whole_batches = False
        self._log = StepLog()
        self._judged_at: int | None = None
        self._goes_on_from: Checkpoint | None = None
        self._split_file: dict[str, Any] = {}
        self._searched = set(self.outer_level.parameters(self.model))
        self._plan: Plan | None = None
        self.add_callback(AtTheSeams(self))
        self.add_callback(self._order)

    # -- the two phases ----------------------------------------------------------------

    @property
    def last_report(self) -> StepReport | None:
        """What the last step of the search did; None outside of it."""
        return None if self._bilevel is None else self._log.last

    def train(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """Search the magnitudes, freeze them, and retrain the directions.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint in
                `output_dir`, or the folder of one.
            trial: must be None; a hyperparameter search cannot run over two phases.
            kwargs: as for the Trainer.

        Returns:
            That of the retraining; `metrics` has those of the search too, as
            `search_train_loss` and so on.

        Raises:
            ValueError: a checkpoint of other settings, an output folder that holds
                another run, or a training set that cannot be split.
        """
        refuse_trial(trial)
        args, data, model_init = self.args, self.train_dataset, self.model_init
        self._home = str(args.output_dir)
        found = find_checkpoint(args.output_dir, resume_from_checkpoint)
        if data is None:
            msg = "there is nothing to train on: pass train_dataset to the trainer."
            raise ValueError(msg)
        held = self.outer_dataset
        settings = settings_of(args, len(data), None if held is None else len(held))
        if found is not None:
            refuse_other_settings(found.progress.settings, settings)
        inner, outer = self._split(found)
        phases: list[Phase] = [] if outer is None else ["search"]
        if settings["retrain"] != "none":
            phases.append("retrain")
        if not phases:
            msg = "retrain='none' leaves nothing to do without a part held back."
            raise ValueError(msg)
        if outer is not None:
            size = settings["per_device_outer_batch_size"]
            check_outer_batch(len(outer), size, args.world_size)
        self._plan = make_plan(self, None if outer is None else inner)
        if model_init is not None:
            set_seed(args.seed)  # once: the phases share the model
            self.model = self.model_wrapped = self.call_model_init().to(args.device)
        if found is not None:
            check_values(found.path, self.model, self._searched)
        home = Path(args.output_dir).resolve()

        def claim() -> None:
            if found is None or home not in found.path.resolve().parents:
                overwrite = args.overwrite_earlier_run
                claim_folder(args.output_dir, self._split_file, overwrite=overwrite)

        self.model_init, self.search_state = None, None
        try:
            with held_folder(args, claim):
                return self._run_phases(phases, settings, inner, outer, found, kwargs)
        finally:
            self.args, self.train_dataset, self.model_init = args, data, model_init
            self.phase = self._bilevel = self._outer = self._goes_on_from = None
            self._queue = []

    def _run_phases(
        self,
        phases: list[Phase],
        settings: dict[str, Any],
        inner: Any,
        outer: Any,
        found: Checkpoint | None,
        kwargs: dict[str, Any],
    ) -> TrainOutput:
        """Run the phases, or what is left of them."""
        args, data, plan = self.args, self.train_dataset, self._plan
        output, metrics = TrainOutput(0, 0.0, {}), dict[str, float]()
        for phase in phases:
            self.args = arguments_of_phase(args, phase)
            if found is not None and phase != found.progress.phase:
                if phase == "search":  # it is over
                    folder = found.path.parent / SEARCH_FOLDER
                    self.search_state = read_state(folder)
                    continue
                found = None
            divided = phase == "search" and plan is not None and plan.drop_last
            self._in_whole_batches = divided or self.whole_batches
            self.train_dataset = inner if phase == "search" else data
            self._progress = Progress(phase, settings, *self._indices)
            output = self._run(phase, outer, found, kwargs)
            if phase == "search":
                metrics = {f"search_{k}": v for k, v in output.metrics.items()}
                self.search_state = self.state
                if self.args.save_strategy != "no":
                    os.makedirs(self.args.output_dir, exist_ok=True)
                    self.save_state()  # for a resume of the retraining
        return output._replace(metrics={**metrics, **output.metrics})

    def _run(
        self, phase: Phase, outer: Any, found: Checkpoint | None, kwargs: dict[str, Any]
    ) -> TrainOutput:
        """Run one phase, or what is left of it."""
        self.phase = phase
        self.optimizer, self.lr_scheduler, self._bilevel = None, None, None
        # A phase's random numbers depend on no other phase.
        set_seed(self.args.seed)
        if plain_dora_layers(self.model):
            use_exact_dora(self.model, dropout=self.args.dora_dropout)
        self._goes_on_from = found
        if found is None and phase == "search":
            fresh = self.args.bidora_settings()["retrain"] == "fresh"
            self._first_values = directions(self.model, self._searched) if fresh else {}
        if phase == "search":
            # The end of an earlier call of `train` froze them.
            for name, parameter in self.model.named_parameters():
                if name in self._searched:
                    parameter.requires_grad_(True)
            self._outer = outer_stream(self, outer)
        self._log = StepLog()
        self._judged_at = None
        part_tensorboard(self)
        name_phases(self)
        if found is not None and found.finished:
            self._restore(found)
            output = end_again(self, found.path)
        else:
            path = None if found is None else str(found.path)
            output = super().train(resume_from_checkpoint=path, **kwargs)
        if phase == "search":
            self._end_search()
        return output

    def _end_search(self) -> None:
        """Freeze the magnitudes; a fresh retraining starts where the search did."""
        if self._bilevel is not None:
            self._bilevel.freeze_magnitudes()
        self.outer_level.settle(self.model)
        if self._first_values:
            own = {**dict(self.model.named_parameters()), **norm_buffers(self.model)}
            with torch.no_grad():
                for name, value in self._first_values.items():
                    own[name].copy_(value)
        self._first_values = {}

    # -- data --------------------------------------------------------------------------

    def _split(self, found: Checkpoint | None) -> tuple[Any, Any]:
        """Return the examples of both levels; None for the outer one without a search."""
        data, args = self.train_dataset, self.args
        if self.outer_dataset is not None:
            self._indices: tuple[list[int], list[int]] = [], []
            self._split_file = {}
            return data, self.outer_dataset
        self._indices = split_of(self, found)
        inner, outer = self._indices
        parts = {"inner_indices": inner, "outer_indices": outer}
        self._split_file = {"seed": args.seed, **parts}
        if not outer:
            logger.warning(
                "no examples are held back (validation_fraction=0, or a split without "
                "any): there is no search, and the first magnitudes stay as they are."
            )
            return data, None
        return select(data, inner), select(data, outer)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the Trainer's own loader; an order at random follows the epoch."""
        with without_rest(self.args, self._in_whole_batches):
            loader = super().get_train_dataloader()
        choose_order(loader, self._order.generator)
        return loader

    # -- stepping ----------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer of both levels in the search, the Trainer's own after it.

        Args:
            args: as for the Trainer.
            kwargs: as for the Trainer.

        Returns:
            The optimizer.
        """
        if self.phase == "retrain":
            # A run that goes on here begins with another model.
            self.outer_level.settle(self.model)
        if self.phase != "search":
            return super().create_optimizer(*args, **kwargs)
        if self.optimizer is None:
            self.optimizer = self._bilevel = make_bilevel_optimizer(self, loss_of(self))
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Any = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of both levels.

        Args:
            num_training_steps: steps of the phase.
            optimizer: as for the Trainer.

        Returns:
            The schedule.

        Raises:
            ValueError: schedules that cannot be put together.
        """
        made = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._bilevel is not None and made:
            give_outer_schedule(scheduler, self._bilevel, self.args, num_training_steps)
        return scheduler

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Take what of a step this micro-batch makes due, and return its loss.

        In the search, micro-batches wait until the last one of a step is there; then
        both levels move. In the retraining this is the Trainer's own step.

        Args:
            model: the model, wrapped perhaps.
            inputs: a micro-batch.
            num_items_in_batch: what the Trainer counted in all of the step's.

        Returns:
            The loss; in the search, that of the whole step on its last micro-batch, and
            0 on the others.
        """
        if self._bilevel is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            return loss + add_orthogonality(self).to(loss.dtype)
        model.train()
        inputs = self.prepared(inputs)
        self._queue.append((inputs, weight_of(self, inputs, num_items_in_batch)))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, weights = zip(*self._queue, strict=True)
        self._queue, self._notes = [], {}
        report = self._bilevel.take_step(
            Accumulated(list(batches), list(weights)),
            self._next_outer,
            tells_steps_back(self),
        )
        vars(self).update(self._notes)
        self._log.add(report, self._bilevel)
        return torch.tensor(report.inner_loss or 0.0, device=self.args.device)

    def _next_outer(self) -> Any:
        outer = self._outer
        if outer is None:
            msg = "there is no outer batch outside of the search."
            raise RuntimeError(msg)
        self._notes = noted_by_the_loss(self)  # those of the inner step
        return self.prepared(outer())

    # -- what is told, saved and read ----------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what the search says of both levels.

        Args:
            logs: what the Trainer logs.
            args: as for the Trainer.
            kwargs: as for the Trainer.
        """
        if self._bilevel is not None and "loss" in logs:
            logs.update(self._log.take(self._bilevel))
        super().log(logs, *args, **kwargs)
        if self.phase is not None:
            line: dict[str, Any] = self.state.log_history[-1]
            line["phase"] = self.phase

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and in a search with patience the held-back part too.

        Args:
            args: as for the Trainer.
            kwargs: as for the Trainer.

        Returns:
            The metrics of the evaluation that was asked for.
        """
        metrics = super().evaluate(*args, **kwargs)
        if self._bilevel is not None:
            judge_search(self)
        return metrics

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Save the adapter; in a checkpoint, all that an exact resume needs too.

        Args:
            output_dir: as for the Trainer.
        """
        super().save_model(output_dir, _internal_call)
        place = os.path.basename(os.path.normpath(output_dir or ""))
        progress = self._progress
        if not place.startswith("checkpoint-") or output_dir is None:
            return
        if self.phase is None or progress is None or not self.args.should_save:
            return
        progress.outer_drawn = 0 if self._outer is None else self._outer.drawn
        save_progress(
            output_dir, progress, self.model, self._searched, self._first_values
        )

    def _restore(self, found: Checkpoint) -> None:
        """Put back, bit for bit, what the Trainer's own files do not hold."""
        first = load_values(found.path, self.model, self._searched)
        self._first_values = {n: t.to(self.args.device) for n, t in first.items()}
        saved, progress = found.progress, self._progress
        if progress is not None:
            progress.best_held_back = saved.best_held_back
            progress.without_gain = saved.without_gain
        if self._outer is not None:
            self._outer.drawn = saved.outer_drawn

    def load_values_of(self, folder: str) -> None:
        """Put the values of a checkpoint into the model.

        Args:
            folder: the checkpoint.
        """
        load_values(Path(folder), self.model, self._searched)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's model card, with the tags `bidora` and `dora`.

        Args:
            args: as for the Trainer.
            kwargs: as for the Trainer.
        """
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), "bidora", "dora"]
        with lines_without_phase(self.state):
            super().create_model_card(*args, tags=list(tags), **kwargs)
        if self.is_world_process_zero():
            tag_card(Path(self.args.output_dir) / "README.md", tags)


class BiDoRATrainer(BiDoRAMixin, Trainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`transformers.Trainer` that fine-tunes a PEFT DoRA model by BiDoRA.

    See `BiDoRAMixin`; its `args` are `BiDoRATrainingArguments`.
    """
