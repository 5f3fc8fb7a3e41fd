"""The command line: `bidora train`."""

from __future__ import annotations

import argparse
import ast
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

from bidora.errors import UserError
from bidora.settings import METHODS, TrainSettings

if TYPE_CHECKING:
    from bidora.training import RunResult

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

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
  bidora train --task reviews.csv --text-column review --label-column stars
  bidora train --task glue/cola --model FacebookAI/roberta-base --steps 2000 \\
               --inner-lr 5e-4 --max-length 128
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `bidora`; those of this process by default.

    Returns:
        The exit code: 0, 2 for a wrong input, 130 after Ctrl-C.
    """
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if options.pop("command") is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    try:
        return _train(options)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _say_error("\nbidora: stopped by Ctrl-C.")
        return EXIT_INTERRUPTED


def _train(options: dict[str, Any]) -> int:
    if "estimator_settings" in options:
        options["estimator_settings"] = _pairs(options["estimator_settings"])
    settings = TrainSettings.from_options(**options)
    from bidora.progress import ProgressListener  # tqdm and torch load from here on

    _quieten_libraries()
    import torch

    from bidora.training import train
    from hypergrad.errors import HypergradError

    listener = ProgressListener(sys.stdout, sys.stderr)
    try:
        result = train(settings, listener)
    except KeyboardInterrupt:
        listener.close()
        _say_error(f"bidora: stopped by Ctrl-C{listener.where(settings.output_dir)}.")
        return EXIT_INTERRUPTED
    except HypergradError as error:
        return _complain(str(error))
    except torch.OutOfMemoryError as error:
        return _complain(
            f"out of memory ({str(error).splitlines()[0][:120]}). Try a smaller "
            "--batch-size, --outer-batch-size or --max-length."
        )
    finally:
        listener.close()
    sys.stdout.write(_summary(settings, result))
    return 0


def _summary(settings: TrainSettings, result: RunResult) -> str:
    rows = [f"{'phase':<9}{'steps':>7}{'seconds':>9}{'test acc.':>11}{'macro-F1':>10}"]
    for phase in result.phases:
        rows.append(
            f"{phase.name:<9}{phase.steps:>7}{phase.seconds:>9.1f}"
            f"{phase.test.accuracy:>11.3f}{phase.test.macro_f1:>10.3f}"
        )
    skipped = sum(len(phase.skipped) for phase in result.phases)
    if skipped:
        rows.append(f"{skipped} outer step(s) skipped; reasons in metrics.json")
    table = "\n".join(rows)
    return f"""
{table}

Saved in {result.folder} ({result.seconds:.0f} s in all). Load it in plain PEFT:

  from peft import AutoPeftModelForSequenceClassification
  model = AutoPeftModelForSequenceClassification.from_pretrained(
      {result.folder!r}, num_labels={result.num_labels})
"""


def _quieten_libraries() -> None:
    """Leave the terminal to our own progress bar."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _complain(message: str) -> int:
    _say_error(f"bidora: error: {message}")
    return EXIT_USAGE


def _say_error(message: str) -> None:
    sys.stderr.write(message + "\n")


class _Parser(argparse.ArgumentParser):
    """Say in one line what is wrong, without the long usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            EXIT_USAGE,
            f"bidora: error: {message}. `{self.prog} --help` lists the options.\n",
        )


def _version() -> str:
    try:
        return metadata.version("hypergrad-bidora")
    except metadata.PackageNotFoundError:
        return "(not installed, run from its source)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bidora",
        description="Fine-tune transformers with BiDoRA.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bidora {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    train = commands.add_parser(
        "train",
        help="fine-tune a model and save the adapter",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # only what was given reaches the settings
        allow_abbrev=False,
    )
    _add_main_options(train)
    _add_data_options(train)
    _add_adapter_options(train)
    _add_training_options(train)
    _add_search_options(train)
    _add_output_options(train)
    return parser


def _add_main_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to train, and on what")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="the pretrained model: a folder, or a name on the Hugging Face Hub "
        f"(default: {TrainSettings.model}, which comes with the extra demo)",
    )
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
    group.add_argument(
        "--seed", type=int, help="seed of splits, new weights and order (default: 0)"
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
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
        help=f"tokens kept of a text (default: {TrainSettings.max_length})",
    )


def _add_adapter_options(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"examples a step (default: {TrainSettings.batch_size})",
    )
    group.add_argument(
        "--inner-lr",
        type=float,
        metavar="X",
        help="learning rate of directions and task head "
        f"(default: {TrainSettings.inner_lr:g})",
    )
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
    group.add_argument(
        "--max-grad-norm",
        type=float,
        metavar="X",
        help=f"clip gradients at this norm (default: {TrainSettings.max_grad_norm:g})",
    )


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search and retraining (--method bidora)")
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
    group.add_argument(
        "--outer-batch-size",
        type=int,
        metavar="N",
        help="held-back examples a step of the magnitudes (default: --batch-size)",
    )
    group.add_argument(
        "--validation-fraction",
        type=float,
        metavar="X",
        help="part of the training examples held back for the magnitudes "
        f"(default: {TrainSettings.validation_fraction:g})",
    )
    group.add_argument(
        "--orthogonality",
        type=float,
        metavar="X",
        help="weight of the term that keeps directions apart "
        f"(default: {TrainSettings.orthogonality:g})",
    )
    group.add_argument(
        "--retrain-steps",
        type=int,
        metavar="N",
        help="steps of the retraining (default: as --steps)",
    )
    group.add_argument(
        "--retrain-lr",
        type=float,
        metavar="X",
        help="learning rate of the retraining (default: as --inner-lr)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        metavar="FOLDER",
        help="where adapter, metrics and picture go "
        "(default: runs/METHOD-TASK-seedSEED)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier run in that folder",
    )
    group.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between points of the curves (default: an eighth of --steps)",
    )
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, ... (default: a GPU if there is one)",
    )


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    """Turn `NAME=VALUE` words into a dict; values are Python literals or words."""
    pairs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(
                f"--estimator-setting {word!r} is not of the form NAME=VALUE; write "
                "for example num_terms=5."
            )
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = value
    return pairs


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
