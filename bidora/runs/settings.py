"""Everything that a job can be told, with its defaults: the one source of it.

The fields of the classes here are the options of the command line, the keys of a YAML
file and the arguments of Python alike; `bidora.cli.options` reads them. None stands for
what is derived from model, data, method or budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bidora import defaults
from bidora.budget import BUDGETS, RETRAININGS
from bidora.defaults import BUNDLED_MODEL
from bidora.errors import UserError
from bidora.methods.registry import METHODS
from bidora.runs.declared import Declared, described, option

__all__ = ["JobSettings", "TrainSettings", "default_folder"]

OF_BEST_WEIGHTS = (
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "save_strategy",
    "eval_strategy",
)
"""Fields of `TrainingArguments` that decide which weights a Trainer ends with."""

OTHER_LENGTH = 128
"""Tokens kept of an example where its data does not suggest another number."""


WHAT = "what to train, and on what"
DATA = "your own data"
ADAPTER = "head and adapter"
TRAINING = "training"
SEARCH = "search and retraining (method bidora)"
OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class JobSettings(Declared):
    """What every job on a model and data is told.

    Raises:
        UserError: If a setting is out of range.
    """

    model: str = option(
        BUNDLED_MODEL,
        "the pretrained model: a folder, or a name on the Hugging Face Hub",
        WHAT,
        shown=f"{BUNDLED_MODEL}, which comes with the extra demo",
        metavar="NAME",
    )
    task: str = option(
        "docstrings",
        "the examples: docstrings, a csv, tsv, jsonl or column file, a folder with a "
        "train file, glue/cola and its kin, reuters/modapte, conll2003, or a data set "
        "of the Hub such as OWNER/NAME",
        WHAT,
        metavar="NAME",
    )
    task_type: str | None = option(
        None,
        "classification, regression, multilabel or tagging",
        WHAT,
        shown="from the data",
        metavar="NAME",
    )
    seed: int = option(0, "seed of splits, new weights and order", WHAT)

    data_dir: str | None = option(
        None,
        "folder with the official files of a data set named by --task; nothing is "
        "fetched then",
        DATA,
        metavar="FOLDER",
    )
    text_column: str | None = option(
        None, "column of the text", DATA, shown="by name", metavar="NAME"
    )
    text_pair_column: str | None = option(
        None,
        "column of a second text, for pairs",
        DATA,
        shown="by name",
        metavar="NAME",
    )
    label_column: str | None = option(
        None, "column of the label", DATA, shown="by name", metavar="NAME"
    )
    label_separator: str | None = option(
        None, "what stands between the labels of one example", DATA, shown="guessed"
    )
    label_columns: tuple[str, ...] | None = option(
        None, "columns of 0 and 1, one for each label, in place of a label column", DATA
    )
    allow_empty: bool | None = option(
        None, "whether an example may have no label (multilabel)", DATA, shown="by data"
    )
    scheme: str | None = option(
        None, "IOB1 or IOB2, how tags mark entities (tagging)", DATA, shown="by data"
    )
    validation_file: str | None = option(
        None, "examples that choices may be made by", DATA, metavar="FILE"
    )
    test_file: str | None = option(
        None,
        "test examples, scored once at the end",
        DATA,
        shown="a fifth of the training file",
        metavar="FILE",
    )
    column_names: tuple[str, ...] | None = option(
        None, "names of the columns of a csv or tsv without a header line", DATA
    )
    quoting: str = option(
        "auto", 'csv where "..." quotes a field, none where it is text, or auto', DATA
    )
    encoding: str = option(
        "auto", "encoding of the files, such as utf-8, utf-16 or cp1252", DATA
    )
    on_bad_row: str = option(
        "error", "what a row that can't be used is for: error, or skip", DATA
    )
    min_examples_per_class: int | None = option(
        None, "leave out classes with fewer training examples", DATA
    )
    metric: str | None = option(
        None,
        "the main metric: first in tables, drawn in the curves",
        DATA,
        shown="that of the data set or task type",
    )
    max_length: int | None = option(
        None,
        "tokens kept of an example",
        DATA,
        shown=f"32 for docstrings, else {OTHER_LENGTH} or what the model takes",
    )

    max_train_samples: int | None = option(
        None,
        "train on at most that many examples, drawn by --seed with the classes in "
        "proportion",
        DATA,
    )
    max_validation_samples: int | None = option(
        None,
        "at most that many validation examples; where the data has none, taken from the "
        "training examples that --max-train-samples leaves out",
        DATA,
    )
    max_test_samples: int | None = option(
        None, "score at most that many test examples, the same for every seed", DATA
    )

    pooling: str = option(
        "auto",
        "what the head reads of a text: mean, first, last or max of the tokens, through "
        "one linear layer; or head, the stock class of transformers",
        ADAPTER,
        shown="as the model was trained, where it says so, else head",
        metavar="{" + ",".join(defaults.POOLINGS) + "}",
    )
    lora_r: int = option(8, "rank of the change of a weight", ADAPTER)
    lora_alpha: float = option(
        16.0, "the change is scaled by lora_alpha / lora_r", ADAPTER
    )
    lora_dropout: float = option(0.0, "dropout in front of the change", ADAPTER)
    target_modules: tuple[str, ...] | None = option(
        None,
        "layers to adapt, by the end of their names, or all-linear",
        ADAPTER,
        shown="all-linear",
    )

    per_device_train_batch_size: int = option(16, "examples of a step", TRAINING)
    learning_rate: float | None = option(
        None,
        "rate of directions and head, or of all that is trained",
        TRAINING,
        shown=f"{defaults.LEARNING_RATE:g} for the bundled model, else "
        f"{defaults.OTHER_LEARNING_RATE:g}",
    )
    weight_decay: float = option(defaults.WEIGHT_DECAY, "AdamW's decay", TRAINING)
    max_grad_norm: float = option(1.0, "clip gradients at this norm", TRAINING)

    per_device_outer_batch_size: int | None = option(
        None,
        "held-back examples of a step of the magnitudes",
        SEARCH,
        shown="by budget",
    )
    validation_fraction: float = option(
        defaults.VALIDATION_FRACTION,
        "part of the training examples held back for the magnitudes, or for early stopping",
        SEARCH,
    )
    orthogonality: float = option(
        defaults.ORTHOGONALITY, "weight of the term that keeps directions apart", SEARCH
    )

    output_dir: str | None = option(
        None, "where it all goes", OUTPUT, shown="runs/METHOD-TASK-seedSEED"
    )
    overwrite: bool = option(False, "replace an earlier run in that folder", OUTPUT)
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one", OUTPUT)

    def __post_init__(self) -> None:
        """Check every setting, naming its option."""
        self.check_kinds()
        self.check_counts(
            (1, "per_device_train_batch_size", "per_device_outer_batch_size", "lora_r"),
            (1, "min_examples_per_class"),
            (1, "max_train_samples", "max_validation_samples", "max_test_samples"),
            (4, "max_length"),
        )
        for name in ("learning_rate", "lora_alpha", "max_grad_norm"):
            self.check_number(name, lambda x: x > 0, "a finite number above 0")
        for name in ("weight_decay", "orthogonality"):
            self.check_number(name, lambda x: x >= 0, "a finite number of 0 or more")
        self.check_number(
            "lora_dropout", lambda x: 0 <= x < 1, "a number from 0 to below 1"
        )
        self.check_number(
            "seed",
            lambda x: isinstance(x, int) and 0 <= x < 2**32,
            "a whole number from 0 to 2**32",
        )
        self.check_number(
            "validation_fraction", lambda x: 0 < x < 1, "a number between 0 and 1"
        )
        self.check_choice("quoting", ("auto", "csv", "none"))
        self.check_choice("on_bad_row", ("error", "skip"))
        self.check_choice("pooling", defaults.POOLINGS)

    @property
    def what(self) -> str:
        """What the run's folder is named after."""
        return "job"

    @property
    def folder(self) -> str:
        """The folder of the run: `output_dir`, or one made of method, task and seed."""
        return self.output_dir or default_folder(self.what, self.task, self.seed)

    @property
    def rate(self) -> float:
        """The learning rate; models that ours was not tried on get a lower one."""
        if self.learning_rate is not None:
            return self.learning_rate
        bundled = self.model == BUNDLED_MODEL
        return defaults.LEARNING_RATE if bundled else defaults.OTHER_LEARNING_RATE

    def tokens_kept(self, longest: int | None, usual: int | None = None) -> int:
        """Return how many tokens of an example are kept.

        Args:
            longest: What the model takes; None where it sets no bound.
            usual: What suits the data; None where nothing is known.

        Returns:
            `max_length`, or where it is None, what suits the data and the model.

        Raises:
            UserError: If `max_length` is more than the model takes.

        Example:
            >>> TrainSettings(task="reviews.csv").tokens_kept(64)
            64
        """
        if self.max_length is None:
            wanted = usual or OTHER_LENGTH
            return wanted if longest is None else min(wanted, longest)
        if longest is not None and self.max_length > longest:
            raise UserError(
                f"--max-length {self.max_length} is more than the {longest} tokens "
                f"that {self.model!r} takes; choose {longest} or fewer."
            )
        return self.max_length


@dataclass(frozen=True, kw_only=True)
class TrainSettings(JobSettings):
    """Settings of `bidora train`, named as the command line's options.

    Raises:
        UserError: If a setting is out of range.

    Example:
        >>> TrainSettings(task="reviews.csv", method="lora").folder
        'runs/lora-reviews.csv-seed0'
    """

    method: str = option(
        "bidora", "how to train; --method help lists all", WHAT, metavar="NAME"
    )

    max_steps: int = option(
        120,
        "steps to spend: those of the one phase, or what the budget shares out between "
        "search and retraining",
        TRAINING,
    )
    loraplus_lr_ratio: float = option(
        16.0, "rate of B over that of A (method lora-plus)", ADAPTER
    )
    gradient_accumulation_steps: int = option(1, "batches that make one step", TRAINING)
    outer_learning_rate: float | None = option(
        None, "rate of the magnitudes", TRAINING, shown="as --learning-rate"
    )
    outer_weight_decay: float | None = option(
        None, "AdamW's decay of the magnitudes", TRAINING, shown="as --weight-decay"
    )
    warmup_ratio: float = option(
        defaults.WARMUP_RATIO, "part of each phase in which the rates rise", TRAINING
    )
    lr_scheduler_type: str = option(
        "linear", "how the rates fall after that, as transformers calls it", TRAINING
    )
    average_last: float = option(
        0.0,
        "end the last phase with the average of the weights after its last steps: their "
        "share of its steps, such as 0.5 (0: with the last weights)",
        TRAINING,
    )
    early_stopping_patience: int | None = option(
        None,
        "stop after so many evaluations (--eval-steps) without a better main metric, and "
        "keep the best weights; judged on the validation part, or on "
        "--validation-fraction of the training examples, which are not trained on then "
        "(methods of one phase)",
        TRAINING,
        shown="all steps, and the last weights",
    )
    bf16: bool = option(False, "compute in bfloat16 (autocast)", TRAINING)
    gradient_checkpointing: bool = option(
        False, "save memory: compute activations again for the gradient", TRAINING
    )

    start: str = option(
        defaults.STARTS[0],
        "what the head starts from: probe, a linear head fitted on the frozen model; or "
        "random values",
        TRAINING,
        metavar="{" + ",".join(defaults.STARTS) + "}",
    )

    budget: str = option(
        defaults.BUDGET,
        "economical: a small outer step after every fourth inner one, half of --max-steps "
        "for the search and two thirds for a warm retraining; full: the paper's, an outer "
        "step after every inner one and a fresh retraining of as many steps",
        SEARCH,
        metavar="{" + ",".join(BUDGETS) + "}",
    )
    estimator: str | None = option(
        None,
        "how the magnitudes' gradient looks through the training of the directions; a "
        "wrong name lists all",
        SEARCH,
        shown="by budget",
    )
    estimator_settings: dict[str, Any] = field(
        default_factory=dict,
        metadata=described(
            "settings of the estimator, such as num_terms=5",
            SEARCH,
            metavar="NAME=VALUE",
        ),
    )
    outer_every: int | None = option(
        None, "inner steps for each step of the magnitudes", SEARCH, shown="by budget"
    )
    outer_warmup_steps: int | None = option(
        None,
        "inner steps before the first step of the magnitudes",
        SEARCH,
        shown=f"{defaults.OUTER_WARMUP}, at most a quarter of the search",
    )
    retrain: str | None = option(
        None,
        "fresh: from the first directions and head again; warm: on from the search; none: "
        "keep those of the search",
        SEARCH,
        shown="by budget",
    )
    retrain_max_steps: int | None = option(
        None, "steps of the retraining", SEARCH, shown="by budget"
    )
    retrain_learning_rate: float | None = option(
        None, "rate of the retraining", SEARCH, shown="as --learning-rate"
    )
    audit_every: int = option(
        0,
        "compare each N-th step of the magnitudes with one unrolled through all steps "
        "since the last, in history.jsonl; what is trained stays the same (0: never)",
        SEARCH,
    )

    eval_steps: int | None = option(
        None,
        "steps between points of the curves, and between checkpoints",
        OUTPUT,
        shown="a sixth of --max-steps",
    )
    report_to: tuple[str, ...] = option(
        (), "where else to log, as transformers calls it, such as tensorboard", OUTPUT
    )
    push_to_hub: bool = option(False, "upload the result to the Hub", OUTPUT)
    hub_model_id: str | None = option(None, "where on the Hub, as OWNER/NAME", OUTPUT)
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata=described("other fields of transformers.TrainingArguments", OUTPUT),
    )

    def __post_init__(self) -> None:
        """Check every setting, naming its option."""
        super().__post_init__()
        if self.method not in METHODS:
            METHODS.get(self.method)  # whose error names the nearest
        self.check_choice("budget", BUDGETS)
        self.check_choice("start", defaults.STARTS)
        self.check_choice("retrain", (None, *RETRAININGS))
        self.check_counts(
            (
                1,
                "max_steps",
                "gradient_accumulation_steps",
                "outer_every",
                "eval_steps",
            ),
            (1, "retrain_max_steps", "early_stopping_patience"),
            (0, "outer_warmup_steps", "audit_every"),
        )
        for name in ("outer_learning_rate", "retrain_learning_rate"):
            self.check_number(name, lambda x: x > 0, "a finite number above 0")
        self.check_number(
            "outer_weight_decay", lambda x: x >= 0, "a finite number of 0 or more"
        )
        self.check_number(
            "loraplus_lr_ratio", lambda x: x >= 1, "a number of 1 or more"
        )
        for name in ("warmup_ratio", "average_last"):
            self.check_number(name, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self._check_which_weights()
        if self.hub_model_id and not self.push_to_hub:
            raise UserError(
                "--hub-model-id says where to upload, and --push-to-hub, which uploads, "
                "is not given; add it."
            )

    def _check_which_weights(self) -> None:
        """Refuse two answers to which weights a run ends with."""
        average, patience = self.average_last, self.early_stopping_patience
        if average and patience:
            raise UserError(
                f"--average-last {average:g} ends with the average of the last weights, "
                f"and --early-stopping-patience {patience} with the best ones; choose one."
            )
        given = [n for n in OF_BEST_WEIGHTS if n in self.trainer]
        if given and (average or patience):
            option = "--average-last" if average else "--early-stopping-patience"
            raise UserError(
                f"trainer.{given[0]} and {option} both decide which weights a run ends "
                "with; leave one out."
            )

    @property
    def what(self) -> str:
        """The method, which names the folder."""
        return self.method

    @property
    def rate(self) -> float:
        """The learning rate; methods and models that ours does not suit get a lower one."""
        usual = METHODS.get(self.method).usual_rate
        if self.learning_rate is None and usual is not None:
            return usual
        return super().rate

    def differs(self) -> set[str]:
        """Return the names of the settings that are not at their defaults."""
        usual = type(self)()
        return {
            f.name
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(usual, f.name)
        }


def default_folder(what: str, task: str, seed: int) -> str:
    """Return the folder that a run goes to where none is named.

    Args:
        what: The method or command.
        task: The task, as the user named it.
        seed: The seed.

    Returns:
        A path under `runs`.

    Example:
        >>> default_folder("lora", "data/reviews.csv", 1)
        'runs/lora-data-reviews.csv-seed1'
    """
    name = "".join(c if c.isalnum() or c in "_." else "-" for c in task).strip("-.")
    return f"runs/{what}-{name[-40:]}-seed{seed}"
