"""The command `bidora export`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from contextlib import closing
from typing import Any

from bidora.errors import UserError

__all__ = ["add_export", "run_export"]

EXPORT = """\
Write the model of a finished run in another form.

With --merge, the adapter goes into the weights: the folder holds a whole model that plain
transformers loads without PEFT, for servers and converters that do not know DoRA. Its
outputs are compared with those of the run's own model.
"""

EXAMPLES = """\
examples:
  bidora export runs/mine --merge --output merged
  bidora export runs/mine --merge --output merged --dtype bfloat16
"""


def add_export(commands: Any) -> None:
    """Add the command.

    Args:
        commands: What takes commands.
    """
    export = commands.add_parser(
        "export",
        usage="bidora export RUN --merge --output FOLDER [options]",
        help="write a run's model whole, without an adapter",
        description=EXPORT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    export.add_argument("run", metavar="RUN", help="folder of a finished run")
    export.add_argument(
        "--merge", action="store_true", help="put the adapter into the weights"
    )
    export.add_argument(
        "--output", required=True, metavar="FOLDER", help="where the model goes"
    )
    export.add_argument(
        "--dtype",
        metavar="WORD",
        help="float32, bfloat16 or float16 for the written weights (default: float32)",
    )
    export.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export"
    )


def run_export(options: dict[str, Any]) -> int:
    """Run the command.

    Args:
        options: What was given.

    Returns:
        The exit code.

    Raises:
        UserError: If no form is asked for.
    """
    if not options.pop("merge", False):
        raise UserError(
            "say what to write: --merge for the whole model with the adapter in its "
            "weights. The adapter itself is in the run's folder."
        )
    from bidora.cli.progress import ProgressListener
    from bidora.runs.export import export

    listener = ProgressListener(sys.stdout, sys.stderr)
    with closing(listener):
        done = export(
            options.pop("run"), options.pop("output"), listener=listener, **options
        )
    code = textwrap.indent(done.loading_code, "  ")
    sys.stdout.write(f"\nSaved in {done.folder} ({done.dtype}). In Python:\n\n{code}")
    return 0
