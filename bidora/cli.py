"""The command line: `bidora train` and `bidora estimators`."""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

from bidora.comparison_options import add_estimators_parser
from bidora.errors import UserError
from bidora.options import add_train_parser
from bidora.resume import settings_of_run
from bidora.settings import TrainSettings

if TYPE_CHECKING:
    from bidora.report import RunResult

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `bidora`; those of this process by default.

    Returns:
        The exit code: 0, 2 for a wrong input, 130 after Ctrl-C.
    """
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    try:
        return {"train": _train, "estimators": _estimators}[command](options)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _say_error("\nbidora: stopped by Ctrl-C.")
        return EXIT_INTERRUPTED


def _train(options: dict[str, Any]) -> int:
    if "estimator_settings" in options:
        options["estimator_settings"] = _pairs(
            options["estimator_settings"], "--estimator-setting"
        )
    resume = options.pop("resume", False)
    make = settings_of_run if resume else TrainSettings.from_options
    settings = make(**options)
    from bidora.progress import ProgressListener
    from bidora.training import train

    listener = ProgressListener(sys.stdout, sys.stderr)
    try:
        with _known_failures(), _quiet_libraries(), closing(listener):
            result = train(settings, listener, resume=resume)
    except KeyboardInterrupt:
        _say_error(f"bidora: stopped by Ctrl-C{listener.where(settings.output_dir)}.")
        return EXIT_INTERRUPTED
    sys.stdout.write(_summary(settings, result))
    return 0


def _estimators(options: dict[str, Any]) -> int:
    from bidora.comparison import advice, compare
    from bidora.comparison_settings import CompareSettings
    from bidora.progress import ProgressListener

    if "estimators" in options:
        options["estimators"] = _choices(options["estimators"])
    settings = CompareSettings.from_options(**options)
    listener = ProgressListener(sys.stdout, sys.stderr)
    with _known_failures(), _quiet_libraries(), closing(listener):
        result = compare(settings, listener)
    paragraphs = "\n\n".join(
        textwrap.fill(text, width=100) for text in advice(result.comparison)
    )
    sys.stdout.write(f"""
{result.comparison}

{paragraphs}

Saved in {result.folder} ({result.seconds:.0f} s in all): comparison.json, .csv and .png
""")
    return 0


@contextmanager
def _known_failures() -> Iterator[None]:
    """Turn what a model or its size can cause into a sentence."""
    import torch

    from hypergrad.errors import HypergradError

    try:
        yield
    except HypergradError as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory ({str(error).splitlines()[0][:120]}). Try a smaller "
            "--batch-size, --outer-batch-size or --max-length."
        ) from error


def _summary(settings: TrainSettings, result: RunResult) -> str:
    rows = [f"{'phase':<9}{'steps':>7}{'seconds':>9}{'test acc.':>11}{'macro-F1':>10}"]
    for phase in result.phases:
        rows.append(
            f"{phase.name:<9}{phase.steps:>7}{phase.seconds:>9.1f}"
            f"{phase.test.accuracy:>11.3f}{phase.test.macro_f1:>10.3f}"
        )
    table = "\n".join(rows)
    return f"""
{table}
{_notes(result)}
Saved in {result.folder} ({result.seconds:.0f} s in all). Load it in plain PEFT:

  from peft import AutoPeftModelForSequenceClassification
  model = AutoPeftModelForSequenceClassification.from_pretrained(
      {result.folder!r}, num_labels={result.num_labels})
"""


def _notes(result: RunResult) -> str:
    """Say in some lines what the estimator warned of, if anything."""
    lines = []
    skipped = sum(len(phase.skipped) for phase in result.phases)
    if skipped:
        lines.append(
            f"{skipped} outer step(s) skipped; the reasons are in metrics.json."
        )
    for note in filter(None, (phase.note for phase in result.phases)):
        lines += textwrap.wrap(f"The estimator's last note: {note}", width=80)
    return "\n" + "\n".join(lines) + "\n" if lines else ""


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave the terminal to our own progress bar."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it reports every attempt to connect
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module="transformers"
            )
            yield
    finally:
        hub_logging.set_verbosity(hub_verbosity)
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


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
    add_train_parser(commands)
    add_estimators_parser(commands)
    return parser


def _choices(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Read `A,B:X=1:Y=2` as names with settings, each under the word it was read from."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = word.split(":")
        if word in chosen:
            raise UserError(f"--estimators lists {word!r} twice; leave one out.")
        chosen[word] = name, _pairs(settings, "--estimators")
    if not chosen:
        raise UserError(
            "--estimators names none; write for example darts,neumann:num_terms=10."
        )
    return chosen


def _pairs(words: Sequence[str], option: str) -> dict[str, Any]:
    """Turn `NAME=VALUE` words into a dict; values are Python literals or words."""
    pairs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(
                f"{option}: {word!r} is not of the form NAME=VALUE; write for example "
                "num_terms=5."
            )
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = value
    return pairs
