"""The comparison behind docs/quality.md: `bidora compare`, with SetFit in the same grid.

    pip install -e ".[bench]"
    python -m benchmarks.quality --output-dir benchmarks/results/quality

Takes the options of `bidora compare`. SetFit is no method of the command, because it
trains in a way of its own; here it has the same tasks, seeds, steps and report.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import setfit_rival
from bidora.cli.options import add_settings
from bidora.cli.progress import ProgressListener
from bidora.runs.results import RunResult
from bidora.runs.settings import TrainSettings
from bidora.study.runner import compare
from bidora.study.settings import StudySettings

GRID = Path(__file__).parent / "studies" / "quality.yaml"


def train(settings: TrainSettings, **options: Any) -> RunResult:
    """Train by SetFit's own Trainer where that is the method, else as `bidora.train`.

    Args:
        settings: Of the run.
        options: As for `bidora.train`.
    """
    if settings.method == setfit_rival.SetFit.name:
        return setfit_rival.train(settings, **options)
    from bidora.runs.job import train as job

    return job(settings, **options)


def main(words: list[str] | None = None) -> None:
    """Run the comparison as far as it goes.

    Args:
        words: Options; those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add_settings(parser, StudySettings)
    settings = StudySettings(grid=GRID, **vars(parser.parse_args(words)))
    listener = ProgressListener(sys.stdout, sys.stderr)
    with closing(listener):
        compare(settings, listener, train=train)


if __name__ == "__main__":
    main()
