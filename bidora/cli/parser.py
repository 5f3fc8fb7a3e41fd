"""What the command line takes: its commands, their options and their help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import metadata
from typing import Any, NoReturn

from bidora.cli.analyze import add_analyze
from bidora.cli.compare import add_compare
from bidora.cli.export import add_export
from bidora.cli.options import add_settings
from bidora.runs.settings import TrainSettings

__all__ = ["EXIT_USAGE", "Parser", "make_parser"]

EXIT_USAGE = 2

TRAIN = """\
Fine-tune a pretrained model on your examples and save the result.

Without any option this trains a small encoder (all-MiniLM-L6-v2, 22.7 M parameters)
to tell which package of Python's standard library a docstring comes from: 12 classes,
20 training examples each. Nothing is downloaded, and it takes some minutes on a laptop.

This encoder is trained in full, which measured best for it. A larger model gets LoRA, and
so does this one where an option of an adapter is given. --method bidora, or an option of
its own, takes BiDoRA, which scores as LoRA does where it was measured, in more time. It
writes each adapted weight as a magnitude (one number per output) times a direction (a
low-rank change). In the *search*, directions learn on 80 % of the training examples and
magnitudes on the other 20 %. Then the *retraining* keeps the magnitudes and learns the
directions on everything. The result of either is a plain PEFT adapter.
"""

EXAMPLES = """\
examples:
  bidora train                                    the demonstration, offline
  bidora train --method bidora                    the same with BiDoRA, or lora, dora, …
  bidora train --dry-run                          what it would do, and for how long
  bidora train --resume --output-dir runs/mine    go on with a run that was stopped
  bidora train --task reviews.csv --text-column review --label-column stars
  bidora train --task glue/cola --model FacebookAI/roberta-base --max-steps 2000
  bidora train --recipe glue-roberta-base/cola    as the paper did it, or --recipe help
  bidora train --config mine.yaml trainer.dataloader_num_workers=2

exit codes: 0 done; 1 a fault of this program; 2 something to put right in what was
given; 130 stopped by Ctrl-C.
"""

ESTIMATORS = """\
Compare hypergradient estimators on your model and your data: how far each is from a
reference, and what it costs.

Without any option this takes the model and the data of `bidora train`, trains the
directions for 40 steps, and then lets every estimator compute the gradient of the
magnitudes, from one training batch and one held-back batch. It takes about two minutes
on a laptop. Nothing is trained further and no adapter is saved.

What is saved: the table (comparison.csv, comparison.json) and a picture of accuracy
against cost (comparison.png).
"""

ESTIMATORS_EXAMPLES = """\
examples:
  bidora estimators                               all of them, offline
  bidora estimators --estimators darts,sama,neumann:num_terms=10
  bidora estimators --estimators cg:max_iter=50:damping=0.1,cg --reference cg
  bidora estimators --task reviews.csv --model FacebookAI/roberta-base
"""

PREDICT = """\
Score new rows with the model of a finished run.

The input has the columns of the training data, and needs no labels. The output has the
same columns and, beside them, what the model says: labels and probabilities, numbers, or
tags and spans.
"""


class Parser(argparse.ArgumentParser):
    """Say in one line what is wrong, without the long usage."""

    commands: Mapping[str, Parser] = {}
    """The parser of each command, by name."""

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Exit with the words that are no options, and what the first may have meant.

        Args:
            words: What was not understood.
        """
        first = words[0].partition("=")[0]
        near = get_close_matches(
            first, re.findall(r"--[\w-]+", self.format_help()), n=1
        )
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")

    def error(self, message: str) -> NoReturn:
        """Exit with the message.

        Args:
            message: What is wrong.
        """
        self.exit(
            EXIT_USAGE,
            f"bidora: error: {message}. `{self.prog} --help` lists the options.\n",
        )


def _version() -> str:
    try:
        return metadata.version("hypergrad-bidora")
    except metadata.PackageNotFoundError:
        return "(not installed, run from its source)"


def make_parser() -> Parser:
    """Return what reads the words of the command line, all commands among them."""
    parser = Parser(
        prog="bidora",
        description="Fine-tune transformers with BiDoRA.",
        epilog="exit codes: 0 done, 1 a fault of this program, 2 something to put right, "
        "130 stopped by Ctrl-C",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bidora {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    _add_train(commands)
    _add_predict(commands)
    add_export(commands)
    add_analyze(commands)
    add_compare(commands)
    _add_estimators(commands)
    parser.commands = commands.choices
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        usage="bidora train [options] [trainer.FIELD=VALUE ...]",
        help="fine-tune a model and save the result",
        description=TRAIN,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    train.add_argument(
        "fields",
        nargs="*",
        metavar="trainer.FIELD=VALUE",
        help="other fields of transformers.TrainingArguments",
    )
    train.add_argument(
        "--recipe",
        metavar="NAME",
        help="start from the settings of a published run, such as "
        "glue-roberta-base/cola; options and --config go before them; help lists all",
    )
    train.add_argument(
        "--config",
        metavar="FILE",
        help="settings by name, in YAML; options go before it",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with the stopped run in --output-dir, from its last checkpoint",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="tell settings, parameters, time and memory, and train nothing",
    )
    add_settings(train, TrainSettings)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        usage="bidora predict RUN --input FILE --output FILE [options]",
        help="score new rows with a finished run",
        description=PREDICT,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    predict.add_argument("run", metavar="RUN", help="folder of a finished run")
    rows = "rows to score, or a folder of images"
    for name, text in (("input", rows), ("output", "where the scores go")):
        predict.add_argument(
            f"--{name}",
            required=True,
            metavar="FILE",
            help=f"{text}: csv, tsv or jsonl",
        )
    for name, text in (
        ("on-bad-row", "error (default), or skip to leave such rows out"),
        ("quoting", "csv, none or auto"),
        ("encoding", "encoding of the input (default: auto)"),
        ("device", "cpu, cuda, ... (default: a GPU if there is one)"),
    ):
        predict.add_argument(f"--{name}", metavar="WORD", help=text)
    predict.add_argument(
        "--column-names",
        metavar="A,B,...",
        type=lambda text: tuple(text.split(",")),
        help="names of the columns of a file without a header line",
    )
    predict.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output"
    )


def _add_estimators(commands: Any) -> None:
    from bidora.runs.comparison_settings import CompareSettings

    estimators = commands.add_parser(
        "estimators",
        usage="bidora estimators [options]",
        help="compare estimators on a model and data, after some steps of training",
        description=ESTIMATORS,
        epilog=ESTIMATORS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_settings(estimators, CompareSettings)
