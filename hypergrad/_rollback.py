"""Undo what a step did, where it raises: each part is copied before it may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad import rng, tree
from hypergrad._module_state import remember
from hypergrad.problem import BilevelProblem
from hypergrad.rules import State
from hypergrad.tree import Params

__all__ = ["LevelCopy", "Rollback"]


class LevelCopy:
    """Parameters, optimizer state and group settings of one level, copied.

    Args:
        optimizer: the level's optimizer.
        params: its parameters, by name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Params) -> None:
        self._optimizer = optimizer
        self._tensors = params
        self.params: Params = tree.clone(params)
        """Copies of the parameters, by name."""
        self._slots = {key: _copied(optimizer.state[key]) for key in self._keys()}
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
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self.params[name])
        state = self._optimizer.state
        for key in self._keys():
            if key not in self._slots:
                del state[key]
        state.update(self._slots)
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


class Rollback:
    """Everything that a step may change outside of the optimizer object itself.

    Args:
        problem: the problem that is stepped.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self._problem = problem
        self._rng = rng.capture(problem.tensors)
        self._put_back: list[Callable[[], None]] = []

    def module(self) -> None:
        """Copy the module's buffers and modes, before a forward pass changes them."""
        if self._problem.module is not None:
            self._put_back.append(remember(self._problem.module))

    def level(self, optimizer: torch.optim.Optimizer, params: Params) -> LevelCopy:
        """Copy one level, before its optimizer steps; the copies must not be changed."""
        copy = LevelCopy(optimizer, params)
        self._put_back.append(copy.put_back)
        return copy

    def undo(self) -> None:
        """Put everything back that was copied, and the random number generators."""
        for put_back in reversed(self._put_back):
            put_back()
        rng.restore(self._rng)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
