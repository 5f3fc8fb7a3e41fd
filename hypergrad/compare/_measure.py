"""Seconds and bytes of a call; and whether it left the problem as it was."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hypergrad.errors import HypergradError
from hypergrad.problem import BilevelProblem

__all__ = ["collected", "left_alone", "peak_bytes", "seconds_of"]


def seconds_of(run: Callable[[], Any], devices: Iterable[torch.device]) -> float:
    """Return the wall-clock seconds of a call, its work on the devices included."""
    waiting = [device for device in devices if device.type != "cpu"]
    for device in waiting:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    for device in waiting:
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], devices: Iterable[torch.device]) -> int | None:
    """Return how many bytes of tensors a call held at once beyond those before it.

    On CUDA from the allocator's own peak, which is reset; where there are several
    devices, the sum of their peaks. On a CPU from the allocations that torch's profiler
    records, so that equal calls give equal numbers. None where neither can be had.

    Example:
        Two tensors of 4 MB at a time:

        >>> peak_bytes(lambda: torch.ones(10**6) + 1, [torch.device("cpu")]) // 10**6
        8
    """
    kinds = {device.type for device in devices}
    if kinds == {"cuda"}:
        return _cuda_peak(run, set(devices))
    if kinds == {"cpu"}:
        return _cpu_peak(run)
    return None


def _cuda_peak(run: Callable[[], Any], devices: set[torch.device]) -> int:
    before = {}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    run()
    return sum(torch.cuda.max_memory_allocated(d) - n for d, n in before.items())


def _cpu_peak(run: Callable[[], Any]) -> int | None:
    from torch.profiler import ProfilerActivity, profile

    if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
        return None  # a caller's own profile: there can be one at a time
    with _quiet_start():
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with profiler:
            run()
    # The public `events()` leaves out what is allocated and freed within an operator.
    results = getattr(profiler.profiler, "kineto_results", None)
    if not hasattr(results, "events"):
        return None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Keep torch's profiler from writing to the terminal that it starts and stops.

    It reads this variable once, at the first profile of a process.
    """
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]


@contextmanager
def collected() -> Iterator[None]:
    """Run the garbage collector before the block, and not in it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def left_alone(problem: BilevelProblem) -> Iterator[None]:
    """Put back what the block changed of parameters and `.grad`, and say so.

    Random state, buffers and train/eval mode are put back too, without a word.

    Raises:
        HypergradError: the block changed a parameter or a `.grad`.
    """
    values = [(t, t.detach().clone()) for t in problem.tensors]
    grads = [(t, t.grad, _copy(t.grad)) for t in problem.tensors]
    changed = False
    try:
        with problem.untouched():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                if not _same(tensor, value):
                    tensor.copy_(value)
                    changed = True
            for tensor, grad, value in grads:
                if tensor.grad is not grad:
                    tensor.grad = grad
                    changed = True
                if grad is not None and value is not None and not _same(grad, value):
                    grad.copy_(value)
                    changed = True
    if changed:
        msg = (
            "it changed the problem's parameters or their .grad, which no estimator may; "
            "they were put back. Work in `with problem.at(...)`, and take gradients by "
            "torch.autograd.grad; hypergrad.testing.check_estimator checks this."
        )
        raise HypergradError(msg)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _same(a: Tensor, b: Tensor) -> bool:
    # Bits, so that a NaN is itself and -0.0 is not 0.0.
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.contiguous().reshape(-1).view(torch.uint8)
