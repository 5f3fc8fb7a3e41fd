"""The command line: `bidora train`, `predict`, `export`, `analyze`, `compare` and kin."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bidora._threads import brief_waiting
from bidora.cli.analyze import add_analyze, run_analyze
from bidora.cli.compare import add_compare, run_compare
from bidora.cli.export import add_export, run_export
from bidora.cli.lists import list_methods, list_recipes
from bidora.cli.options import add_settings, literal, pairs
from bidora.errors import UserError
from bidora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from bidora.runs.results import RunResult

__all__ = ["main"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

TRAIN = """\
Fine-tune a pretrained model on your examples and save the result.

Without any option this trains a small encoder (all-MiniLM-L6-v2, 22.7 M parameters)
to tell which package of Python's standard library a docstring comes from: 12 classes,
20 training examples each. Nothing is downloaded, and it takes some minutes on a laptop.

This encoder is trained in full, which measured best for it. A larger model gets BiDoRA,
and so does this one where an option of BiDoRA or of its adapter is given. It writes each
adapted weight as a magnitude (one number per output) times a direction (a low-rank
change). In the *search*, directions learn on 80 % of the training examples and magnitudes
on the other 20 %. Then the *retraining* keeps the magnitudes and learns the directions on
everything. The result is a plain PEFT adapter.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `bidora`; those of this process by default.

    Returns:
        The exit code: 0, 2 for a wrong input, 130 after Ctrl-C. A fault of the program
        itself is an exception, whose exit code is 1.
    """
    parser = _parser()
    found, unknown = parser.parse_known_args(arguments)
    options = vars(found)
    command = options.pop("command")
    if unknown:
        # argparse would point to the help of all commands, which has none of their options.
        asked = _Parser(prog=f"bidora {command}" if command else "bidora")
        asked.error(f"unrecognized arguments: {' '.join(unknown)}")
    if command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    run: dict[str, Callable[[dict[str, Any]], int]] = {
        "train": _train,
        "predict": _predict,
        "export": _export,
        "analyze": _analyze,
        "compare": _compare,
        "estimators": _estimators,
    }
    if "torch" not in sys.modules:
        os.environ.update(brief_waiting())
    try:
        return run[command](options)
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _say_error("\nbidora: stopped by Ctrl-C.")
        return EXIT_INTERRUPTED


def _train(options: dict[str, Any]) -> int:
    for name, lists in (("method", list_methods), ("recipe", list_recipes)):
        if options.get(name) == "help":
            sys.stdout.write(lists())
            return 0
    resume, dry_run = options.pop("resume", False), options.pop("dry_run", False)
    recipe = options.pop("recipe", None)
    options = {**_config(options.pop("config", None)), **options}
    if recipe is not None:
        options = _with_recipe(recipe, options, resume=resume)
    if "estimator_settings" in options:
        given = options["estimator_settings"]
        if not isinstance(given, dict):
            options["estimator_settings"] = pairs(given, "--estimator-setting")
    fields = _fields(options.pop("fields", []))
    if fields:
        options["trainer"] = {**options.get("trainer", {}), **fields}
    if resume:
        from bidora.runs.resume import settings_of_run

        settings = settings_of_run(**options)
    else:
        settings = TrainSettings.from_dict(options)
    from bidora.cli.progress import ProgressListener
    from bidora.runs.job import train

    listener = ProgressListener(sys.stdout, sys.stderr)
    try:
        with _known_failures(), _quiet_libraries(), closing(listener):
            result = train(settings, listener, resume=resume, dry_run=dry_run)
    except KeyboardInterrupt:
        _say_error(f"bidora: stopped by Ctrl-C{listener.where(settings.folder)}.")
        return EXIT_INTERRUPTED
    sys.stdout.write(_dry(settings) if dry_run else _summary(result))
    return 0


def _config(file: str | None) -> dict[str, Any]:
    """Read settings from a YAML file."""
    if file is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(file).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"--config {file} holds a {type(found).__name__}; write settings by name, "
            "such as `max_steps: 400`, one a line."
        )
    return {str(name): value for name, value in found.items()}


def _fields(words: Sequence[str]) -> dict[str, Any]:
    """Read `trainer.FIELD=VALUE` words."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        head, dot, field = name.partition(".")
        if not (equals and dot and head == "trainer" and field.isidentifier()):
            raise UserError(
                f"{word!r} is neither an option nor of the form trainer.FIELD=VALUE, which "
                "sets a field of transformers.TrainingArguments."
            )
        found[field] = literal(value)
    return found


def _with_recipe(name: str, options: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    from bidora.recipes import load_recipe

    if resume:
        raise UserError(
            f"--recipe {name}: a run that is resumed has its settings already; leave "
            "the recipe out."
        )
    return load_recipe(name).with_given(options)


def _predict(options: dict[str, Any]) -> int:
    from bidora.cli.progress import ProgressListener
    from bidora.runs.predict import predict

    listener = ProgressListener(sys.stdout, sys.stderr)
    with _known_failures(), _quiet_libraries(), closing(listener):
        done = predict(
            options.pop("run"),
            options.pop("input"),
            options.pop("output"),
            listener=listener,
            **options,
        )
    for line in done.skipped:
        sys.stdout.write(f"left out: {line}\n")
    sys.stdout.write(f"{done.rows} row(s) scored in {done.output}\n")
    return 0


def _export(options: dict[str, Any]) -> int:
    with _known_failures(), _quiet_libraries():
        return run_export(options)


def _analyze(options: dict[str, Any]) -> int:
    with _quiet_libraries():
        return run_analyze(options)


def _compare(options: dict[str, Any]) -> int:
    with _known_failures(), _quiet_libraries():
        return run_compare(options)


def _estimators(options: dict[str, Any]) -> int:
    from bidora.cli.progress import ProgressListener
    from bidora.runs.comparison import advice, compare
    from bidora.runs.comparison_settings import CompareSettings

    if "estimators" in options:
        options["estimators"] = _choices(options["estimators"])
    settings = CompareSettings.from_dict(options)
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
    try:
        yield
    except Exception as error:
        torch = sys.modules.get("torch")
        errors = sys.modules.get("hypergrad.errors")
        if errors is not None and isinstance(error, errors.HypergradError):
            raise UserError(str(error)) from error
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"out of memory ({str(error).splitlines()[0][:120]}). Try a smaller "
                "--per-device-train-batch-size, --per-device-outer-batch-size or "
                "--max-length, or --gradient-checkpointing."
            ) from error
        raise


def _summary(result: RunResult) -> str:
    last = result.phases[-1]
    names = [n for n in (*last.test, *last.missing) if n != "loss"]
    names.sort(key=lambda n: n != result.metric)
    widths = [max(10, len(n) + 2) for n in names]
    header = "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))
    rows = [f"{'phase':<9}{'steps':>7}{'seconds':>9}{header}   (on the test examples)"]
    first = [result.probe] if result.probe not in (None, *result.phases) else []
    for phase in (*first, *result.phases):
        scores = "".join(
            f"{phase.test[n]:>{w}.3f}" if n in phase.test else f"{'n/a':>{w}}"
            for n, w in zip(names, widths, strict=True)
        )
        rows.append(f"{phase.name:<9}{phase.steps:>7}{phase.seconds:>9.1f}{scores}")
    table = "\n".join(rows)
    code = textwrap.indent(result.loading_code, "  ")
    return f"""
{table}
{_notes(result)}
Saved in {result.folder} ({result.seconds:.0f} s in all). Score new rows:

  bidora predict {result.folder} --input new.csv --output scored.csv

or load it in Python:

{code}"""


def _dry(settings: TrainSettings) -> str:
    usual, fields = TrainSettings(), TrainSettings.__dataclass_fields__
    lines = []
    for name, value in settings.as_dict().items():
        shown = fields[name].metadata.get("shown", "")
        what = f"({shown or 'none'})" if value is None else value
        given = "" if value == getattr(usual, name) else "  (given)"
        lines.append(f"  {name}: {what}{given}")
    return "Settings:\n" + "\n".join(lines) + "\nNothing was trained or written.\n"


def _notes(result: RunResult) -> str:
    """Say in some lines what the estimator warned of, if anything."""
    lines = [
        f"{name}: n/a, for {why}" for name, why in result.phases[-1].missing.items()
    ]
    if len(result.phases) > 1 and any(
        set(p.test) < set(result.phases[-1].test) for p in result.phases
    ):
        lines.append("Texts are written and scored after the last phase alone.")
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
    """Leave the terminal to our own progress bar, and load no library for that."""
    # transformers reads these when it is loaded, which may be later.
    names = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= dict.fromkeys(names, "error")
    loaded = [
        module
        for name in ("transformers.utils.logging", "huggingface_hub.utils.logging")
        if (module := sys.modules.get(name)) is not None
    ]
    levels = [module.get_verbosity() for module in loaded]
    for module in loaded:
        module.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module="transformers"
            )
            yield
    finally:
        for module, level in zip(loaded, levels, strict=True):
            module.set_verbosity(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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


def _choices(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Read `A,B:X=1:Y=2` as names with settings, each under the word it was read from."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = word.split(":")
        if word in chosen:
            raise UserError(f"--estimators lists {word!r} twice; leave one out.")
        chosen[word] = name, pairs(settings, "--estimators")
    if not chosen:
        raise UserError(
            "--estimators names none; write for example darts,neumann:num_terms=10."
        )
    return chosen
