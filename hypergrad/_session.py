"""What surrounds the evaluations of one estimate: set up once, and put back at its end."""

from __future__ import annotations

from torch import Tensor, nn

from hypergrad import rng
from hypergrad._module_state import ModuleState
from hypergrad.rng import RngState

__all__ = ["Session"]


class Session:
    """Random state, buffers and train/eval modes while a problem is looked at.

    Args:
        module: the problem's module; None for a functional problem.
        tensors: the problem's tensors; their devices' generators are looked after.
        state: random state that the first evaluation starts from; None for the present.
        training: train/eval modes that it runs in; likewise.
    """

    def __init__(
        self,
        module: nn.Module | None,
        tensors: list[Tensor],
        state: RngState | None,
        training: tuple[bool, ...] | None = None,
    ) -> None:
        self._before = rng.capture(tensors)
        if state is not None:
            self._before |= rng.missing(state, self._before)
        self._moved = state is not None
        self.start: RngState = self._before if state is None else state
        """The random state that evaluations start from which have none of their own."""
        self._module = None if module is None else ModuleState(module)
        self.training = training
        """The train/eval modes of evaluations that have none of their own."""
        if training is None and self._module is not None:
            self.training = self._module.training

    def rewind(
        self,
        state: RngState | None,
        training: tuple[bool, ...] | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """Make everything what an evaluation has to start from.

        Args:
            state: its random state; None for that of the session.
            training: the train/eval modes that it runs in; likewise.
            keep: whether the evaluation's graph is kept, so that nothing which it saved
                may be changed by a later one.
        """
        state = self.start if state is None else state
        if self._moved or state is not self._before:
            rng.restore(state)
        self._moved = True
        self.set_modes(training)
        if self._module is not None:
            self._module.rewind(keep=keep)

    def set_modes(self, training: tuple[bool, ...] | None) -> None:
        """Set the module's train/eval modes; None for those of the session."""
        training = self.training if training is None else training
        if self._module is not None and training is not None:
            self._module.set_modes(training)

    def close(self) -> None:
        """Put everything back.

        Raises:
            HypergradError: an evaluation changed a buffer too large to be copied.
        """
        try:
            if self._module is not None:
                self._module.close()
        finally:
            rng.restore(self._before)
