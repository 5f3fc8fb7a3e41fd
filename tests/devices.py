"""The accelerator that tests marked `gpu` run on.

`HYPERGRAD_TEST_DEVICE=cpu pytest -m gpu` runs their logic without one: what is compared is
then the CPU with itself, and what only a GPU can say is skipped.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

__all__ = ["DEVICE", "chosen_device", "needs_cuda", "waits_of"]

DEVICE = os.environ.get("HYPERGRAD_TEST_DEVICE", "cuda")


def chosen_device() -> torch.device:
    """Return the device to test, or skip the test where there is none."""
    if DEVICE.startswith("cuda"):
        needs_cuda()
    return torch.device(DEVICE)


def needs_cuda() -> None:
    """Skip a test of what only CUDA has."""
    if not (DEVICE.startswith("cuda") and torch.cuda.is_available()):
        pytest.skip(
            f"torch finds no CUDA device (torch {torch.__version__}, device {DEVICE!r})"
        )


def waits_of(step: Callable[[], Any]) -> Counter[str]:
    """Return where the host waited for the device, by `file:line`."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{w.filename}:{w.lineno}" for w in heard if "synchroniz" in str(w.message)
    )
