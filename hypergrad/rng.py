"""Random number generators: read them, replay them, leave them as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad import _numpy_rng

__all__ = ["RngState", "capture", "missing", "relocated", "replayed", "restore"]

RngState = dict[str, Any]
"""State of the generators of Python, NumPy, torch's CPU and each accelerator in use.

Holds tensors and plain Python values alone, so that `torch.load(weights_only=True)`
reads it back.
"""


def capture(tensors: Iterable[Tensor] = ()) -> RngState:
    """Read the state of every generator that a loss on `tensors` may draw from.

    Args:
        tensors: their devices' generators are read beside those of the host.

    Returns:
        States by name of generator or device; `restore` sets them.

    Example:
        >>> sorted(capture())
        ['cpu', 'numpy', 'python']
    """
    name, words, *rest = _numpy_rng.get_state()
    state: RngState = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(words.astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    return state | _capture_devices({str(d) for d in {t.device for t in tensors}})


def missing(state: RngState, known: RngState) -> RngState:
    """Return the present state of the generators that `state` names and `known` lacks."""
    return _capture_devices(set(state) - _HOST - set(known))


def relocated(state: RngState | None, device: torch.device) -> RngState | None:
    """Return a state for a process whose tensors are on another device.

    Args:
        state: what was captured, or read from a checkpoint.
        device: where the tensors are now.

    Returns:
        The state, that of a single accelerator under the name that it has now. Generators
        of a kind that `device` is not are left out: they cannot be set here.
    """
    if state is None:
        return None
    kept = {key: _on_host(value) for key, value in state.items() if key in _HOST}
    others = [key for key in state if key not in _HOST]
    alike = [key for key in others if torch.device(key).type == device.type]
    if str(device) in alike:
        alike = [str(device)]
    if alike:
        kept[str(device)] = _on_host(state[alike[0]])
    return kept


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, (tuple, list)):
        return tuple(_on_host(part) for part in value)
    return value


_HOST = {"python", "numpy", "cpu"}


def _capture_devices(devices: Iterable[str]) -> RngState:
    state: RngState = {}
    for name in sorted(set(devices) - {*_HOST, "meta"}):
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
            name, words, *rest = value
            _numpy_rng.set_state((name, words.numpy(), *rest))
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
        before |= missing(state, before)
    try:
        if state is not None:
            restore(state)
        yield before if state is None else state
    finally:
        restore(before)
