"""What every test shares: offline, one thread, one seed, and no traces left behind."""

from __future__ import annotations

import gc
import os

# Before any test imports a library that reads them. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

SEED = 20240917

# Test problems are small: threads cost more than they bring, and one thread sums in
# one order on every machine.
torch.set_num_threads(1)

# The same examples in every run, so that a red run can be repeated.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def _attention_switches(flags: tuple[bool, bool, bool]) -> None:
    flash, efficient, math = flags
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(math)


# Name of a piece of process-wide state -> (how to read it, how to put it back).
GLOBALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "CPU autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "attention backends": (
        lambda: (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        _attention_switches,
    ),
    "working directory": (os.getcwd, os.chdir),
    "NumPy error handling": (np.geterr, lambda state: np.seterr(**state)),
}


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of every later garbage collection.

    A Trainer collects before it trains, and a comparison before each measurement: a
    third of a second of looking through the modules of torch and transformers.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaves process-wide state other than it found it."""
    before = {name: read() for name, (read, _) in GLOBALS.items()}
    yield
    leaks: list[str] = []
    for name, (read, put_back) in GLOBALS.items():
        after = read()
        if after != before[name]:
            put_back(before[name])
            leaks.append(f"{name}: {before[name]!r} before, {after!r} after")
    if leaks:
        pytest.fail("the test leaked global state: " + "; ".join(leaks), pytrace=False)
