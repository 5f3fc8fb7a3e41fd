"""Random number generators: read them, replay them, leave them as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RngState", "capture", "replayed", "restore"]

RngState = dict[str, Any]
"""State of the generators of Python, NumPy, torch's CPU and each accelerator in use.

Holds tensors and plain Python values alone, so that `torch.load(weights_only=True)`
reads it back.
"""


def capture(tensors: Iterable[Tensor] = ()) -> RngState:
    """Read the state of every generator that a loss on `tensors` may draw from."""
    numpy_state: Any = np.random.get_state(legacy=True)
    state: RngState = {
        "python": random.getstate(),
        "numpy": (
            numpy_state[0],
            torch.from_numpy(numpy_state[1].astype(np.int64)),
            *(float(v) if isinstance(v, float) else int(v) for v in numpy_state[2:]),
        ),
        "cpu": torch.get_rng_state(),
    }
    for device in sorted({str(t.device) for t in tensors if t.device.type != "cpu"}):
        module = torch.get_device_module(torch.device(device))
        state[device] = module.get_rng_state(device)
    return state


def restore(state: RngState) -> None:
    """Set every generator that `state` names."""
    for key, value in state.items():
        if key == "python":
            version, internal, gauss = value
            random.setstate((version, tuple(internal), gauss))
        elif key == "numpy":
            name, keys, *rest = value
            np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        elif key == "cpu":
            torch.set_rng_state(value)
        else:
            torch.get_device_module(torch.device(key)).set_rng_state(value, key)


@contextmanager
def replayed(
    state: RngState | None, tensors: Iterable[Tensor] = ()
) -> Iterator[RngState]:
    """Run the block from `state` (or the present one), then put the generators back.

    Args:
        state: what the block starts from; None starts it from the present state.
        tensors: their devices' generators are saved and put back.

    Yields:
        The state that the block starts from.
    """
    before = capture(tensors)
    if state is not None:
        restore(state)
    try:
        yield before if state is None else state
    finally:
        restore(before)
