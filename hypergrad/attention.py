"""Attention backends: which one a derivative runs under, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad.errors import SecondOrderError

__all__ = ["AttentionBackend", "attention", "explain_second_order"]

AttentionBackend = Literal["default", "math"]
"""`"default"`: whatever torch picks. `"math"`: the one that can be derived twice."""


@contextmanager
def attention(backend: AttentionBackend) -> Iterator[None]:
    """Run the block under one attention backend.

    Fused attention has no second derivative, and it draws another dropout mask from
    the same random state than the plain one: what is compared or derived twice runs
    under one backend from the forward pass to the last product.
    """
    with sdpa_kernel(SDPBackend.MATH) if backend == "math" else nullcontext():
        yield


_MARKS = (
    "is not implemented",
    "does not support forward",
    "does not have a double backward",
    "not support double backward",
    "not support higher order",
    "once_differentiable",
    "trying to differentiate twice",
    "forward ad",
    "forward-mode ad",
    "setup_context",
)


@contextmanager
def explain_second_order() -> Iterator[None]:
    """Turn torch's refusal of a second derivative into one that says what to do.

    Raises:
        SecondOrderError: in place of torch's RuntimeError or NotImplementedError.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one of them
        if isinstance(error, SecondOrderError):
            raise
        text = str(error)
        if not any(mark in text.lower() for mark in _MARKS):
            raise
        msg = (
            f"the inner loss cannot be differentiated twice: torch says "
            f"{text.splitlines()[0]!r}. A fused kernel (flash or memory-efficient "
            "attention called past torch's dispatcher, a quantised layer, a custom "
            'autograd function) is the usual cause. Load the model with attn_implementation="eager", '
            "or take a first-order estimator: 'first-order', 'darts', or 'sama', 'cg', "
            "'neumann' with product='finite-difference'."
        )
        raise SecondOrderError(msg) from error
