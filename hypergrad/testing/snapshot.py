"""Everything that an estimate must leave as it was, in a form that can be compared."""

from __future__ import annotations

import random
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypergrad import rng
from hypergrad.problem import BilevelProblem

__all__ = ["bits", "differences", "snapshot", "snapshot_of"]

_PLAIN = (type(None), bool, int, str, bytes, complex, Enum, torch.dtype, torch.device)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return dtype, shape and bytes: equal where two tensors are equal bit for bit.

    Example:
        >>> nan = torch.tensor(float("nan"))
        >>> (
        ...     bits(nan) == bits(nan.clone()),
        ...     bits(torch.tensor(0.0)) == bits(-torch.zeros(())),
        ... )
        (True, False)
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (
        str(tensor.dtype),
        tuple(tensor.shape),
        flat.view(torch.uint8).numpy().tobytes(),
    )


def snapshot(problem: BilevelProblem) -> dict[str, Any]:
    """Return the state of a problem and of the process, each part under its name."""
    devices = {
        f"the random state of {name}": snapshot_of(state)
        for name, state in rng.capture(problem.tensors).items()
        if name not in ("python", "numpy", "cpu")
    }
    taken: dict[str, Any] = {
        **devices,
        "torch's random state": bits(torch.get_rng_state()),
        "NumPy's random state": snapshot_of(np.random.get_state(legacy=True)),
        "Python's random state": random.getstate(),
        "the grad mode": torch.is_grad_enabled(),
        "the inference mode": torch.is_inference_mode_enabled(),
        "the default dtype": torch.get_default_dtype(),
    }
    for name, tensor in {**problem.inner_params, **problem.outer_params}.items():
        taken[f"the parameter {name!r}"] = id(tensor), tensor.stride(), bits(tensor)
        taken[f"requires_grad of {name!r}"] = tensor.requires_grad
        grad = tensor.grad
        taken[f"the .grad of {name!r}"] = grad is not None and (id(grad), bits(grad))
    if problem.module is not None:
        for name, buffer in problem.module.named_buffers():
            taken[f"the buffer {name!r}"] = id(buffer), bits(buffer)
        for name, module in problem.module.named_modules():
            taken[f"the mode (train or eval) of {name!r}"] = module.training
    return taken


def snapshot_of(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Return what an object holds, by value: equal after no change to any part of it.

    Example:
        >>> held = {"a": [torch.zeros(2)]}
        >>> before = snapshot_of(held)
        >>> before == snapshot_of(held)
        True
        >>> held["a"][0][1] = 1.0
        >>> before == snapshot_of(held)
        False
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN is not equal to itself
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return bits(value.get_state())
    if id(value) in seen:
        return "seen"
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        return tuple((repr(k), snapshot_of(v, seen)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(snapshot_of(v, seen) for v in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return id(value)
    return type(value).__qualname__, id(value), snapshot_of(vars(value), seen)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of what is not as it was.

    Example:
        >>> differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4})
        ['b', 'c']
    """
    names = [*before, *(n for n in after if n not in before)]
    gone = object()
    return [n for n in names if before.get(n, gone) != after.get(n, gone)]
