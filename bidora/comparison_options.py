"""The options of `bidora estimators`."""

from __future__ import annotations

import argparse
from typing import Any

from bidora.options import (
    add_adapter_options,
    add_data_options,
    add_shared_option,
)
from bidora.settings import TrainSettings

__all__ = ["add_estimators_parser"]

DESCRIPTION = """\
Compare hypergradient estimators on your model and your data: how far each is from a
reference, and what it costs.

Without any option this takes the model and the task of `bidora train`, trains the
directions for 40 steps, and then lets every estimator compute the gradient of the
magnitudes, from one training batch and one held-back batch. It takes about two minutes
on a laptop. Nothing is trained further and no adapter is saved.

What is saved: the table (comparison.csv, comparison.json) and a picture of accuracy
against cost (comparison.png).
"""

EXAMPLES = """\
examples:
  bidora estimators                               all of them, offline
  bidora estimators --estimators darts,sama,neumann:num_terms=10
  bidora estimators --estimators cg:max_iter=50:damping=0.1,cg --reference cg
  bidora estimators --task reviews.csv --model FacebookAI/roberta-base
"""

STEPS, LOOKBACK, REPEATS = 40, 10, 2
REFERENCES = ("auto", "dense", "cg", "unrolled")


def add_estimators_parser(commands: Any) -> None:
    """Add the command `estimators` with all its options.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "estimators",
        usage="bidora estimators [options]",
        help="compare hypergradient estimators on a model and a task",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was given reaches the settings
        allow_abbrev=False,
    )
    _add_comparison_options(parser)
    _add_model_options(parser)
    add_data_options(parser)
    add_adapter_options(parser)
    _add_training_options(parser)
    _add_output_options(parser)


def _add_comparison_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to compare")
    group.add_argument(
        "--estimators",
        metavar="A,B:X=1,...",
        help="names, each with settings after colons, such as neumann:num_terms=10 "
        "(default: all, some with either product)",
    )
    group.add_argument(
        "--reference",
        metavar="{" + ",".join(REFERENCES) + "}",
        help="what they are measured against; auto (default) unrolls the last "
        "--lookback steps. dense and cg differentiate the minimum of the inner loss, "
        "which is another question",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps of the directions before the comparison (default: {STEPS})",
    )
    group.add_argument(
        "--lookback",
        type=int,
        metavar="N",
        help="how many of them are looked back at, at most "
        f"(default: {LOOKBACK}); unrolled:num_steps=K needs K",
    )
    group.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"timed runs of each (default: {REPEATS})",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on what")
    add_shared_option(group, "--model")
    group.add_argument(
        "--task",
        metavar="NAME",
        help="the examples, as for `bidora train` (default: docstrings)",
    )
    add_shared_option(group, "--seed")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training before the comparison")
    add_shared_option(group, "--batch-size")
    add_shared_option(group, "--outer-batch-size")
    add_shared_option(group, "--inner-lr")
    group.add_argument(
        "--inner-weight-decay",
        type=float,
        metavar="X",
        help="AdamW's decay of the directions and head "
        f"(default: {TrainSettings.inner_weight_decay:g})",
    )
    add_shared_option(group, "--max-grad-norm")
    add_shared_option(group, "--orthogonality")
    add_shared_option(group, "--validation-fraction")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="where table and picture go (default: runs/estimators-TASK-seedSEED)",
    )
    add_shared_option(group, "--overwrite")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, ... (default: a GPU if there is one)",
    )
