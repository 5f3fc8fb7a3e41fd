"""How long a job will take, and how much memory: timed, not modelled."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["duration", "memory_in_use", "outer_step_cost", "time_a_step"]


def time_a_step(model: torch.nn.Module, batch: Callable[[], dict[str, Any]]) -> float:
    """Return the seconds of one forward and backward, the mean of three after one.

    Parameters, `.grad` (none) and the random numbers are as before afterwards.

    Args:
        model: A model whose output has a loss.
        batch: Makes a batch on the model's device.
    """
    import torch

    clock = _clock(next(model.parameters()).device)
    started = 0.0
    with torch.random.fork_rng():
        for repeat in range(4):
            if repeat == 1:
                started = clock()
            model(**batch()).loss.backward()
    seconds = (clock() - started) / 3
    model.zero_grad(set_to_none=True)
    return seconds


def outer_step_cost(estimator: Any) -> float:
    """Return about how many inner steps an outer step costs.

    An inner step is a gradient, 2F with F one forward. The direct gradient takes one
    more, a mixed product two, each Hessian-vector product one.

    Args:
        estimator: An estimator; its settings are read where it has them.

    Returns:
        The cost in inner steps, for an estimate of time and for nothing else.
    """
    products = getattr(estimator, "num_terms", None) or getattr(
        estimator, "max_iter", 0
    )
    revisited = getattr(estimator, "num_steps", 0)
    name = getattr(estimator, "name", "")
    if name in ("first-order", "pbgd-free"):
        return 1.0
    if name == "f2sa":  # g and f at each point
        return 2.0 * estimator.num_points + 2.0
    if name == "penalty":  # each of its steps is on g twice, and on f once
        return 3.0 * revisited + 2.0
    if name == "forward":  # a graph for each step, and a product for each direction
        directions = estimator.num_directions
        count = 8 if directions == "all" else directions
        return 1.0 + revisited * (1.0 + 1.25 * count)
    if name == "zeroth-order":  # the steps on either side, and four values
        directions = estimator.num_directions
        count = 8 if directions == "all" else directions
        return count * (2.0 * revisited + 2.0)
    return 3.0 + products + 2.25 * revisited


def inner_step_cost(estimator: Any) -> float:
    """Return about how many inner steps one costs, with an estimator's own part in it.

    Args:
        estimator: An estimator; its settings are read where it has them.

    Example:
        >>> from hypergrad import make_estimator
        >>> inner_step_cost(make_estimator("f2sa", num_points=2))
        5.0
    """
    name = getattr(estimator, "name", "")
    if name == "pbgd-free":  # a gradient of f
        return 2.0
    return 1.0 + 2.0 * estimator.num_points if name == "f2sa" else 1.0


def memory_in_use(device: torch.device) -> int:
    """Return the most bytes that were in use so far: of the device, or the process.

    Args:
        device: Where the model is.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def duration(seconds: float) -> str:
    """Return a length of time in words.

    Example:
        >>> duration(150.0)
        '2.5 minutes'
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _clock(device: torch.device) -> Callable[[], float]:
    def read() -> float:
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
