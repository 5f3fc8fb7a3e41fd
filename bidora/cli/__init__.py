"""The command line: `bidora train`, `predict`, `export`, `analyze`, `compare` and kin."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidora._threads import brief_waiting
from bidora.cli.analyze import run_analyze
from bidora.cli.compare import run_compare
from bidora.cli.export import run_export
from bidora.cli.lists import list_methods, list_recipes
from bidora.cli.options import literal, pairs
from bidora.cli.parser import EXIT_USAGE, make_parser
from bidora.errors import UserError
from bidora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from bidora.runs.results import RunResult

__all__ = ["main"]

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after `bidora`; those of this process by default.

    Returns:
        The exit code: 0, 2 for a wrong input, 130 after Ctrl-C. A fault of the program
        itself is an exception, whose exit code is 1.
    """
    parser = make_parser()
    found, unknown = parser.parse_known_args(arguments)
    options = vars(found)
    command = options.pop("command")
    if unknown:
        # argparse would point to the help of all commands, which has none of their options.
        parser.commands.get(command, parser).refuse(unknown)
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
