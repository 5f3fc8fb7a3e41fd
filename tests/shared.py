"""Where real data sets lie: beside the repository, and never inside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_data(*names: str) -> Path:
    """Return a file or folder of the shared data; skip the test where there is none.

    It is looked for in `shared/data` beside the repository, or in the folder `data` of
    what the variable HYPERGRAD_SHARED names.
    """
    shared = os.environ.get("HYPERGRAD_SHARED") or ROOT.parent / "shared"
    path = Path(shared, "data", *names)
    if not path.exists():
        pytest.skip(
            f"needs the real data in {path} (HYPERGRAD_SHARED names its folder)"
        )
    return path
