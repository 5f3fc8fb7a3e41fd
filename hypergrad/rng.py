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
    return state | _capture_devices({str(t.device) for t in tensors})


def _capture_devices(devices: Iterable[str]) -> RngState:
    state: RngState = {}
    for name in sorted(set(devices) - {"cpu", "meta"}):
        device = torch.device(name)
        module = torch.get_device_module(device)
        # MPS has one generator and asks for no index.
        one = device.type == "mps"
        state[name] = module.get_rng_state() if one else module.get_rng_state(device)
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
            device = torch.device(key)
            module = torch.get_device_module(device)
            if device.type == "mps":
                module.set_rng_state(value)
            else:
                module.set_rng_state(value, device)


@contextmanager
def replayed(
    state: RngState | None, tensors: Iterable[Tensor] = ()
) -> Iterator[RngState]:
    """Run the block from `state` (or the present one), then put the generators back.

    They are put back where the block raises too, and where `state` cannot be set.

    Args:
        state: what the block starts from; None starts it from the present state.
        tensors: their devices' generators are saved and put back; so are those that
            `state` names.

    Yields:
        The state that the block starts from.

    Example:
        >>> import torch
        >>> now = capture()
        >>> with replayed(now):
        ...     first = torch.rand(())
        >>> with replayed(now):
        ...     again = torch.rand(())
        >>> bool(first == again), bool(first == torch.rand(()))
        (True, True)
    """
    before = capture(tensors)
    if state is not None:
        named = set(state) - {"python", "numpy", "cpu"} - set(before)
        before |= _capture_devices(named)
    try:
        if state is not None:
            restore(state)
        yield before if state is None else state
    finally:
        restore(before)
