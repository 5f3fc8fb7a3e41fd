"""NumPy's global generator, read and set by what it holds in memory.

`numpy.random.get_state` and `set_state` copy its 624 words one by one, 60 and 90
microseconds. Around an estimate on a small problem that is what counts, so the words are
copied here as one block, whose address NumPy hands out for that.

A normal number that the generator holds back (they are drawn in pairs) lies elsewhere. To
find it, one is drawn: where the words stay as they are, it was the one held back.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

__all__ = ["NumpyState", "get_state", "set_state"]

NumpyState = tuple[Any, ...]
"""As `numpy.random.get_state()`: name, words, position, and what is held back."""

_NAME, _WORDS = "MT19937", 624
_BYTES = 4 * _WORDS + 4
"""The words and a position."""


def get_state() -> NumpyState:
    """Return the state, and leave it as it is."""
    address = _address()
    if address is None:
        return tuple(np.random.get_state(legacy=True))
    block = ctypes.string_at(address, _BYTES)
    words = np.frombuffer(block, np.uint32, _WORDS)
    position = int(np.frombuffer(block, np.int32, 1, 4 * _WORDS)[0])
    held = _take_held_back(address, block)
    if held is None:
        return _NAME, words, position, 0, 0.0
    state = _NAME, words, position, 1, held
    np.random.set_state(state)
    return state


def set_state(state: NumpyState) -> None:
    """Set the generator to a state.

    Args:
        state: what `get_state` returned; words may be of any integer dtype.
    """
    name, words, position, holds, _ = state
    address = _address()
    words = np.asarray(words).astype(np.uint32)
    if address is None or name != _NAME or holds or len(words) != _WORDS:
        np.random.set_state((name, words, *state[2:]))
        return
    _take_held_back(address, ctypes.string_at(address, _BYTES))
    block = words.tobytes() + np.int32(position).tobytes()
    ctypes.memmove(address, block, _BYTES)


def _address() -> int | None:
    """Return where the generator's state lies; None for one of another kind."""
    random_module: Any = np.random  # whose stubs lack this
    generator = random_module.get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    return generator.ctypes.state_address


def _take_held_back(address: int, block: bytes) -> float | None:
    """Return the normal number that is held back and drop it, or None where there is none.

    Args:
        address: where the state lies.
        block: what lies there, and does so afterwards.
    """
    number = np.random.standard_normal()
    if ctypes.string_at(address, _BYTES) == block:
        return number
    np.random.standard_normal()  # the other one of a new pair
    ctypes.memmove(address, block, _BYTES)
    return None
