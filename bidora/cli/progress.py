"""What the terminal shows while a run goes on."""

from __future__ import annotations

from typing import Any, TextIO

from tqdm import tqdm

from bidora.runs.results import Listener

__all__ = ["ProgressListener"]

UNITS = {"compare": "run"}
"""What is counted in a phase, where it is not steps."""


class ProgressListener(Listener):
    """Write messages to one stream and a progress bar to another.

    Args:
        out: Takes the messages.
        bar: Takes the progress bar.
    """

    def __init__(self, out: TextIO, bar: TextIO) -> None:
        """Keep the streams; nothing is written yet."""
        self._out = out
        self._bar_stream = bar
        self._bar: Any = None
        self._losses: dict[str, float] = {}
        self._phase = ""
        self._step = 0

    def message(self, text: str) -> None:
        """Write a line.

        Args:
            text: The line.
        """
        self._out.write(text + "\n")
        self._out.flush()

    def phase(self, name: str, steps: int) -> None:
        """Begin a progress bar.

        Args:
            name: What stands before it.
            steps: Where it ends.
        """
        self.close()
        self._phase, self._step, self._losses = name, 0, {}
        self._bar = tqdm(
            total=steps,
            desc=f"{name:<8}",
            unit=UNITS.get(name, "step"),
            file=self._bar_stream,
            dynamic_ncols=True,
        )

    def step(self, step: int, losses: dict[str, float]) -> None:
        """Move the bar on, and show the losses as running means over some ten steps.

        Args:
            step: How far the phase is.
            losses: The newest losses.
        """
        for name, loss in losses.items():
            mean = self._losses.get(name, loss)
            self._losses[name] = mean + 0.1 * (loss - mean)
        self._step = step
        shown = ", ".join(f"{name} {loss:.3f}" for name, loss in self._losses.items())
        self._bar.set_postfix_str(f"loss: {shown}", refresh=False)
        self._bar.update(step - self._bar.n)

    def working_on(self, step: int, what: str) -> None:
        """Move the bar on, and show what is being done.

        Args:
            step: How many steps of the phase are done.
            what: What comes now.
        """
        self._step = step
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """End the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def where(self, folder: str) -> str:
        """Say how far the run came and what is left of it, as the end of a sentence.

        Args:
            folder: The run's folder.

        Returns:
            Words to follow "stopped by Ctrl-C".
        """
        if not self._phase:
            return " before the training began"
        return (
            f" at step {self._step} of the {self._phase} phase; the history up to "
            f"there is in {folder}/history.jsonl, no adapter was saved. To go on from "
            f"the last checkpoint: bidora train --resume --output-dir {folder}"
        )
