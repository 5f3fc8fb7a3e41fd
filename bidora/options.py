"""The options of `bidora train`, in groups, with a help that a newcomer can follow."""

from __future__ import annotations

import argparse
from typing import Any

from bidora.recipe import RECIPES, RETRAININGS
from bidora.settings import (
    METHODS,
    OTHER_MODEL_LR,
    OTHER_TASK_LENGTH,
    TASK_LENGTHS,
    TrainSettings,
)

__all__ = [
    "add_adapter_options",
    "add_data_options",
    "add_shared_option",
    "add_train_parser",
]

DESCRIPTION = """\
Fine-tune a pretrained model on a text classification task and save the adapter.

Without any option this trains a small encoder (all-MiniLM-L6-v2, 22.7 M parameters)
to tell which package of Python's standard library a docstring comes from: 12 classes,
20 training examples each. Nothing is downloaded, and it takes some minutes on a laptop.

The method is BiDoRA. It writes each adapted weight as a magnitude (one number per
output) times a direction (a low-rank change). In the *search*, directions learn on
80 % of the training examples and magnitudes on the other 20 %, which makes overfitting
harder. Then the *retraining* keeps the magnitudes and learns the directions again on
everything. The result is a plain PEFT adapter.
"""

EXAMPLES = """\
examples:
  bidora train                                    the demonstration, offline
  bidora train --method lora                      the same with LoRA, to compare
  bidora train --resume --output-dir runs/mine    go on with a run that was stopped
  bidora train --task reviews.csv --text-column review --label-column stars
  bidora train --task glue/cola --model FacebookAI/roberta-base --steps 2000 \\
               --inner-lr 5e-4 --max-length 128
"""


_SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "NAME",
        "help": "the pretrained model: a folder, or a name on the Hugging Face Hub "
        f"(default: {TrainSettings.model}, which comes with the extra demo)",
    },
    "--seed": {
        "type": int,
        "metavar": "N",
        "help": "seed of splits, new weights and order (default: 0)",
    },
    "--batch-size": {
        "type": int,
        "metavar": "N",
        "help": f"examples a step (default: {TrainSettings.batch_size})",
    },
    "--inner-lr": {
        "type": float,
        "metavar": "X",
        "help": "learning rate of directions and task head (default: "
        f"{TrainSettings.inner_lr:g} for the bundled model, else {OTHER_MODEL_LR:g})",
    },
    "--max-grad-norm": {
        "type": float,
        "metavar": "X",
        "help": f"clip gradients at this norm (default: {TrainSettings.max_grad_norm:g})",
    },
    "--outer-batch-size": {
        "type": int,
        "metavar": "N",
        "help": "held-back examples a step of the magnitudes (default: --batch-size)",
    },
    "--validation-fraction": {
        "type": float,
        "metavar": "X",
        "help": "part of the training examples held back for the magnitudes "
        f"(default: {TrainSettings.validation_fraction:g})",
    },
    "--orthogonality": {
        "type": float,
        "metavar": "X",
        "help": "weight of the term that keeps directions apart "
        f"(default: {TrainSettings.orthogonality:g})",
    },
    "--overwrite": {
        "action": "store_true",
        "help": "replace an earlier run in that folder",
    },
}
"""Options that more than one command has."""


def add_shared_option(group: Any, name: str) -> None:
    """Add an option that more than one command has.

    Args:
        group: The parser's group.
        name: The option, with its dashes.
    """
    group.add_argument(name, **_SHARED[name])


def add_train_parser(commands: Any) -> None:
    """Add the command `train` with all its options.

    Options that were not given leave no trace in what is parsed, so that
    `TrainSettings.from_options` can tell them from those that were.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    train = commands.add_parser(
        "train",
        usage="bidora train [options]",
        help="fine-tune a model and save the adapter",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was given reaches the settings
        allow_abbrev=False,
    )
    _add_main_options(train)
    add_data_options(train)
    add_adapter_options(train)
    _add_training_options(train)
    _add_search_options(train)
    _add_output_options(train)


def _add_main_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to train, and on what")
    add_shared_option(group, "--model")
    group.add_argument(
        "--task",
        metavar="NAME",
        help="the examples: docstrings (default), a csv, tsv or jsonl file, a folder "
        "with a train file, or a data set of the Hub such as glue/cola or OWNER/NAME",
    )
    group.add_argument(
        "--method",
        metavar="{" + ",".join(METHODS) + "}",
        help="bidora (default): search, then retrain; dora: magnitudes and "
        "directions together; lora: directions alone",
    )
    add_shared_option(group, "--seed")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what tells how to read the examples.

    Args:
        parser: The command's parser.
    """
    group = parser.add_argument_group("your own data (files and Hub tasks)")
    group.add_argument(
        "--text-column", metavar="NAME", help="column of the text (default: by name)"
    )
    group.add_argument(
        "--text-pair-column",
        metavar="NAME",
        help="column of a second text, for pairs of sentences",
    )
    group.add_argument(
        "--label-column", metavar="NAME", help="column of the label (default: by name)"
    )
    group.add_argument(
        "--test-file",
        metavar="FILE",
        help="test examples (default: a stratified fifth of the training file)",
    )
    group.add_argument(
        "--column-names",
        metavar="A,B,...",
        type=_names,
        help="names of the columns of a csv or tsv that has no header line",
    )
    group.add_argument(
        "--quoting",
        choices=("auto", "csv", "none"),
        help='whether "..." quotes a field; auto (default): in csv yes, in tsv no',
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens kept of a text (default: {TASK_LENGTHS['docstrings']} for the "
        f"docstrings, else {OTHER_TASK_LENGTH} or what the model takes)",
    )


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add what sets the size and place of the adapter.

    Args:
        parser: The command's parser.
    """
    group = parser.add_argument_group("the adapter")
    group.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help=f"rank of the change of direction (default: {TrainSettings.rank})",
    )
    group.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help=f"the change is scaled by alpha / rank (default: {TrainSettings.alpha:g})",
    )
    group.add_argument(
        "--target-modules",
        metavar="A,B,...",
        type=_names,
        help="layers to adapt, by the end of their names, or all-linear "
        "(default: PEFT's choice, in a BERT query,value)",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of the search, or of the one phase of dora and lora "
        f"(default: {TrainSettings.steps})",
    )
    add_shared_option(group, "--batch-size")
    add_shared_option(group, "--inner-lr")
    group.add_argument(
        "--outer-lr",
        type=float,
        metavar="X",
        help="learning rate of the magnitudes (default: as --inner-lr)",
    )
    for level, what in (("inner", "directions and head"), ("outer", "magnitudes")):
        default = getattr(TrainSettings, f"{level}_weight_decay")
        group.add_argument(
            f"--{level}-weight-decay",
            type=float,
            metavar="X",
            help=f"AdamW's decay of the {what} (default: {default:g})",
        )
    group.add_argument(
        "--warmup-ratio",
        type=float,
        metavar="X",
        help="part of each phase in which the rates rise; then they fall to 0 "
        f"(default: {TrainSettings.warmup_ratio:g})",
    )
    add_shared_option(group, "--max-grad-norm")


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search and retraining (--method bidora)")
    group.add_argument(
        "--recipe",
        metavar="{" + ",".join(RECIPES) + "}",
        help="defaults of this group: full, as the paper has it, with a step of the "
        "magnitudes after every step; economical, with every fourth, on a smaller batch, "
        "half of --steps for the search and two thirds for a warm retraining",
    )
    group.add_argument(
        "--estimator",
        metavar="NAME",
        help="how the magnitudes' gradient looks through the training of the "
        f"directions (default: {TrainSettings.estimator}); a wrong name lists all",
    )
    group.add_argument(
        "--estimator-setting",
        dest="estimator_settings",
        metavar="NAME=VALUE",
        action="append",
        help="a setting of the estimator, such as num_terms=5; may be repeated",
    )
    group.add_argument(
        "--outer-every",
        type=int,
        metavar="N",
        help="inner steps for each step of the magnitudes "
        f"(default: {TrainSettings.outer_every})",
    )
    group.add_argument(
        "--outer-warmup",
        type=int,
        metavar="N",
        help="inner steps before the first step of the magnitudes "
        f"(default: {TrainSettings.outer_warmup})",
    )
    add_shared_option(group, "--outer-batch-size")
    add_shared_option(group, "--validation-fraction")
    add_shared_option(group, "--orthogonality")
    group.add_argument(
        "--retrain-steps",
        type=int,
        metavar="N",
        help="steps of the retraining (default: as --steps)",
    )
    group.add_argument(
        "--retrain",
        metavar="{" + ",".join(RETRAININGS) + "}",
        help="fresh (default): from the first directions and head again; warm: on from "
        "those of the search",
    )
    group.add_argument(
        "--retrain-lr",
        type=float,
        metavar="X",
        help="learning rate of the retraining (default: as --inner-lr)",
    )
    group.add_argument(
        "--audit-every",
        type=int,
        metavar="N",
        help="compare each N-th step of the magnitudes with one unrolled through all "
        "steps since the last, in history.jsonl; what is trained stays the same "
        "(default: never)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="where adapter, metrics and picture go "
        "(default: runs/METHOD-TASK-seedSEED)",
    )
    add_shared_option(group, "--overwrite")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the stopped run in that folder, from its last checkpoint and "
        "with its settings",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between points of the curves, and between checkpoints "
        "(default: a sixth of --steps)",
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, ... (default: a GPU if there is one)",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
