"""The tolerances of all tests of numerics, each with its reason.

Errors are relative to the size of the truth (largest entry or norm), never entry by entry:
an entry that cancels to nothing carries the rounding of its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["error", "tol"]

Kind = Literal["algebra", "difference", "solve"]


def tol(
    dtype: torch.dtype,
    cond: float = 1.0,
    kind: Kind = "algebra",
    rtol: float | None = None,
) -> float:
    """Return the relative error that is allowed.

    Args:
        dtype: of the computation under test; its truth is in float64.
        cond: condition number of what is computed.
        kind: how it is computed.
        rtol: stopping rule of an iterative solve.
    """
    eps = torch.finfo(dtype).eps
    if kind == "algebra":
        # Each operation rounds by eps/2; ten roundings that do not cancel.
        return 10 * eps * cond
    if kind == "difference":
        # A central difference over h loses h² to curvature and eps/h to rounding: least,
        # eps^(2/3), at h = eps^(1/3).
        if eps > 1e-4:
            msg = f"finite differences in {dtype} test nothing: compute them in float32"
            raise ValueError(msg)
        return 10 * eps ** (2 / 3) * cond
    # A residual of rtol is an error of at most rtol·cond; a bfloat16 solve never gets
    # below its own rounding, so that any rtol would be fiction.
    if rtol is None or eps > 1e-4:
        msg = f"an iterative solve needs its rtol and float32 or finer, got {rtol}, {dtype}"
        raise ValueError(msg)
    return 10 * rtol * cond


def error(
    got: Tensor | Mapping[str, Tensor], truth: Tensor | Mapping[str, Tensor]
) -> float:
    """Return the norm of the difference over the norm of the truth, in float64.

    Dictionaries are taken as one vector; where the truth is 0, the error is absolute.
    """
    if isinstance(got, Tensor) or isinstance(truth, Tensor):
        assert isinstance(got, Tensor)
        assert isinstance(truth, Tensor)
        got, truth = {"": got}, {"": truth}
    assert set(got) == set(truth), (set(got), set(truth))
    assert all(got[n].shape == t.shape for n, t in truth.items())
    a = torch.cat([got[n].detach().double().reshape(-1) for n in truth])
    b = torch.cat([truth[n].detach().double().reshape(-1) for n in truth])
    size = float(b.norm())
    return float((a - b).norm()) / (size or 1.0)
