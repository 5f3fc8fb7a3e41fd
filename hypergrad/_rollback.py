"""Undo what a step did, where it raises: each part is copied before it may change."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hypergrad import rng
from hypergrad._levels import LevelCopy
from hypergrad._module_state import BufferCopies
from hypergrad.problem import BilevelProblem
from hypergrad.tree import Params

__all__ = ["Rollback", "Workspace"]


class Workspace:
    """Memory for copies that a step needs until it has ended, used by one after another."""

    def __init__(self) -> None:
        self.levels: dict[torch.optim.Optimizer, LevelCopy] = {}
        self.buffers = BufferCopies()


class Rollback:
    """Everything that a step may change outside of the optimizer object itself.

    Args:
        problem: the problem that is stepped.
        workspace: memory to copy into.
    """

    def __init__(self, problem: BilevelProblem, workspace: Workspace) -> None:
        self._problem = problem
        self._workspace = workspace
        self._rng = rng.capture(problem.tensors)
        self._put_back: list[Callable[[], None]] = []

    def module(self) -> tuple[bool, ...] | None:
        """Copy the module's buffers and modes, before a forward pass changes them.

        Returns:
            The train/eval modes; None for a functional problem.
        """
        if self._problem.module is None:
            return None
        training, put_back = self._workspace.buffers.take(self._problem.module)
        self._put_back.append(put_back)
        return training

    def level(
        self, optimizer: torch.optim.Optimizer, params: Params, *, keep: bool
    ) -> LevelCopy:
        """Copy one level, before it may move.

        Args:
            optimizer: the level's optimizer.
            params: its parameters, by name.
            keep: whether the copies are to outlive the step; they must not be changed.

        Returns:
            The copies.
        """
        if keep:
            copy = LevelCopy(optimizer, params)
        else:
            held = self._workspace.levels
            copy = LevelCopy(optimizer, params, held.get(optimizer))
            held[optimizer] = copy
        self._put_back.append(copy.put_back)
        return copy

    def undo(self) -> None:
        """Put everything back that was copied, and the random number generators."""
        for put_back in reversed(self._put_back):
            put_back()
        rng.restore(self._rng)
