"""The command `bidora analyze`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any

__all__ = ["add_analyze", "run_analyze"]

ANALYZE = """\
Show how runs changed their weights: norms of rows (ΔM) against directions (ΔD).

The runs were trained with --record-weights, from one base model. A point is a layer after
a step. The slope of the line through the points of a kind of layer is what the DoRA and
BiDoRA papers compare methods by.

What is saved: the slopes and points (analysis.json), the points (analysis.csv), and a
picture of them with the curves of loss and score (analysis.png).
"""

EXAMPLES = """\
examples:
  bidora train --method bidora --record-weights --output-dir runs/bidora
  bidora train --method lora --record-weights --output-dir runs/lora
  bidora analyze runs/bidora runs/lora --output figures
"""


def add_analyze(commands: Any) -> None:
    """Add the command.

    Args:
        commands: What takes commands.
    """
    analyze = commands.add_parser(
        "analyze",
        usage="bidora analyze RUN [RUN ...] --output FOLDER [options]",
        help="show how runs changed norms and directions of their weights",
        description=ANALYZE,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    analyze.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a finished run"
    )
    analyze.add_argument(
        "--output", required=True, metavar="FOLDER", help="where the analysis goes"
    )
    analyze.add_argument(
        "--overwrite", action="store_true", help="replace an earlier analysis"
    )


def run_analyze(options: dict[str, Any]) -> int:
    """Run the command.

    Args:
        options: What was given.

    Returns:
        The exit code.
    """
    from bidora.runs.analyze import analyze, table

    output = options.pop("output")
    runs = analyze(options.pop("runs"), output, **options)
    sys.stdout.write(table(runs))
    for run in runs:
        for note in run.notes:
            text = f"{run.folder}: {note}"
            sys.stdout.write(textwrap.fill(text, 88, subsequent_indent="  ") + "\n")
    sys.stdout.write(f"Saved in {output}: analysis.json, .csv and .png\n")
    return 0
