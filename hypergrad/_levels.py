"""One level's torch optimizer: made over the level's parameters, stepped, copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hypergrad import _foreach as foreach
from hypergrad import tree
from hypergrad.rules import State
from hypergrad.tree import Params

__all__ = [
    "LevelCopy",
    "OptimizerLike",
    "apply_gradients",
    "make_level",
    "moments",
]

OptimizerLike = torch.optim.Optimizer | Callable[[list[Tensor]], torch.optim.Optimizer]
"""A torch optimizer, or a function from the list of parameters to one."""


def make_level(
    level: str, given: OptimizerLike, params: Params
) -> torch.optim.Optimizer:
    """Return the optimizer of one level, over exactly its parameters.

    Raises:
        TypeError: neither an optimizer nor a function that makes one.
        ValueError: an optimizer over other tensors.
    """
    if isinstance(given, torch.optim.Optimizer):
        optimizer = given
    elif callable(given):
        # torch refuses an empty list; an empty group steps nothing, which is right.
        tensors = list(params.values())
        optimizer = given(tensors) if tensors else given([{"params": []}])  # pyright: ignore[reportArgumentType]
    else:
        msg = (
            f"{level}_optimizer must be a torch optimizer or a function that makes one, "
            f"got {type(given).__name__}. Pass e.g. partial(torch.optim.AdamW, lr=1e-3)."
        )
        raise TypeError(msg)
    if not isinstance(optimizer, torch.optim.Optimizer):
        msg = f"{level}_optimizer made a {type(optimizer).__name__}, not an optimizer."
        raise TypeError(msg)
    names = {id(p): n for n, p in params.items()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for i, n in names.items() if i not in held]
    if missing or held - set(names):
        msg = (
            f"{level}_optimizer holds {len(held & set(names))} of the {len(names)} "
            f"{level} parameters and {len(held - set(names))} other tensors "
            f"(missing: {missing[:4]}). Make it over exactly the problem's "
            f"{level}_params."
        )
        raise ValueError(msg)
    return optimizer


def apply_gradients(
    optimizer: torch.optim.Optimizer, params: Params, grads: Params
) -> None:
    """Step one level on these gradients; `.grad` is left alone."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in params.items()}
    held = [p.grad for p in own]
    try:
        for p in own:
            p.grad = grads[names[id(p)]].to(p.dtype)
        optimizer.step()
        # Fused optimizers move values without raising the version of their tensors, by
        # which records and graphs tell that something moved.
        torch.autograd.graph.increment_version(own)
    finally:
        for p, grad in zip(own, held, strict=True):
            p.grad = grad


def moments(optimizer: torch.optim.Optimizer, params: Params) -> list[Tensor]:
    """Return one level's parameters and, where they have any, their moments."""
    slots = [
        item for p in params.values() for item in optimizer.state.get(p, {}).items()
    ]
    found = [t for n, t in slots if isinstance(t, Tensor) and n != "step"]
    return [*params.values(), *found]


class LevelCopy:
    """Parameters, optimizer state and group settings of one level, copied.

    Args:
        optimizer: the level's optimizer.
        params: its parameters, by name.
        reused: a copy whose memory may be written over; None for memory of its own, which
            then may be kept.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Params,
        reused: LevelCopy | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._tensors = params
        held = {key: dict(optimizer.state[key]) for key in self._keys()}
        tensors = list(params.values())
        for slots in held.values():
            tensors += [v for v in slots.values() if isinstance(v, Tensor)]
        self._memory = _copies(tensors, None if reused is None else reused._memory)
        copies = iter(self._memory)
        self.params: Params = {name: next(copies) for name in params}
        """Copies of the parameters, by name."""
        self._slots = {
            key: {
                name: next(copies) if isinstance(value, Tensor) else _copied(value)
                for name, value in slots.items()
            }
            for key, slots in held.items()
        }
        self._groups = [
            (group, {k: _copied(v) for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
        ]

    @property
    def state(self) -> State:
        """Copies of the optimizer's state, by parameter name."""
        return {
            name: {
                key: value
                for key, value in self._slots.get(tensor, {}).items()
                if isinstance(value, Tensor)
            }
            for name, tensor in self._tensors.items()
        }

    def put_back(self) -> None:
        """Make the level what it was."""
        with torch.inference_mode(mode=False):
            tree.copy(list(self._tensors.values()), list(self.params.values()))
        state = self._optimizer.state
        for key in self._keys():
            if key not in self._slots:
                del state[key]
        # Copies of the copies, whose memory may be written over by the next step.
        state.update({key: _copied(slots) for key, slots in self._slots.items()})
        for group, settings in self._groups:
            params = group["params"]
            group.clear()
            group.update({"params": params, **settings})

    def _keys(self) -> list[Any]:
        # The state may be shared with the other level.
        own = {id(t) for t in self._tensors.values()}
        return [
            key
            for key in self._optimizer.state
            if id(key) in own or not isinstance(key, Tensor)
        ]


def _copies(tensors: list[Tensor], memory: list[Tensor] | None) -> list[Tensor]:
    """Return copies, in one operation for each device."""
    fits = memory is not None and len(memory) == len(tensors)
    if memory is not None and fits and all(map(_alike, memory, tensors)):
        for where in _by_device(tensors):
            tree.copy([memory[i] for i in where], [tensors[i] for i in where])
        return memory
    found = list(tensors)
    with torch.inference_mode(mode=False), torch.no_grad():
        for where in _by_device(tensors):
            new = foreach.clone([tensors[i] for i in where])
            for i, copy in zip(where, new, strict=True):
                found[i] = copy
    return found


def _by_device(tensors: Iterable[Tensor]) -> list[list[int]]:
    found: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault(t.device, []).append(i)
    return list(found.values())


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
