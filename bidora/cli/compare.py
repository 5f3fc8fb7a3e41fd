"""The command `bidora compare`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from contextlib import closing
from typing import Any

from bidora.cli.options import add_settings
from bidora.study.settings import StudySettings

__all__ = ["add_compare", "run_compare"]

COMPARE = """\
Compare methods of fine-tuning over tasks, sizes and seeds, as a YAML file asks for.

Each method gets the same budget of trials to choose its settings by, on validation
examples and with seeds of their own. Then it is trained with every seed, at equal steps
and, if the grid says so, at equal time. The report has means with their intervals, and
tests every method against one that you name, seed by seed.

Started again with the same words, it goes on where it was: what was run is not run again.
A run that fails is counted, and the others go on. Tasks, methods, sizes and seeds may be
added to the grid at any time.
"""

EXAMPLES = """\
a grid:
  settings: {max_steps: 60}
  tasks:
    docstrings: {}
  methods:
    probe: {}
    lora: {sweep: {learning_rate: [1.0e-3, 3.0e-3]}}
    dora: {sweep: {learning_rate: [1.0e-3, 3.0e-3]}}
  seeds: [0, 1, 2]
  sweep: {seeds: [100]}
  equal: [steps, time]
  reference: lora
  processes: 2

examples:
  bidora compare grid.yaml --dry-run              the runs, and about how long they take
  bidora compare grid.yaml --output-dir studies/mine
  bidora compare grid.yaml --output-dir studies/mine --time-limit 60
"""


def add_compare(commands: Any) -> None:
    """Add the command.

    Args:
        commands: What takes commands.
    """
    compare = commands.add_parser(
        "compare",
        usage="bidora compare GRID.yaml [options]",
        help="compare methods over tasks, sizes and seeds, with a report",
        description=COMPARE,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    compare.add_argument("grid", metavar="GRID.yaml", help="what to compare")
    compare.add_argument(
        "--dry-run",
        action="store_true",
        help="list the runs and tell how long they will take; nothing is trained",
    )
    add_settings(compare, StudySettings)


def run_compare(options: dict[str, Any]) -> int:
    """Run the command.

    Args:
        options: What was given.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    from bidora.cli.progress import ProgressListener

    dry_run = options.pop("dry_run", False)
    settings = StudySettings(**options)
    listener = ProgressListener(sys.stdout, sys.stderr)
    with closing(listener):
        if dry_run:
            return _tell(settings, listener)
        from bidora.study.runner import compare

        try:
            study = compare(settings, listener)
        except KeyboardInterrupt:
            listener.message(
                f"What was run is in {settings.folder}; the same command goes on."
            )
            raise
    for note in study.notes:
        sys.stdout.write(textwrap.fill(note, 88, subsequent_indent="  ") + "\n")
    return 0


def _tell(settings: StudySettings, listener: Any) -> int:
    from bidora.runs.cost import duration
    from bidora.study.outlook import look_ahead

    found = look_ahead(settings, listener)
    notes = [textwrap.fill(n, 88, subsequent_indent="  ") for n in found.notes]
    at_once = found.plan.grid.processes
    sys.stdout.write(f"""
{found.table()}

{found.plan.remaining} runs to do, {at_once} at a time: about {duration(found.seconds)}
""")
    sys.stdout.write("".join(f"{note}\n" for note in notes))
    sys.stdout.write("Nothing was trained or written.\n")
    return 0
