"""Attention backends: which one a derivative runs under, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad.errors import SecondOrderError

__all__ = [
    "REMEDY",
    "AttentionBackend",
    "attention",
    "explain_second_order",
    "explained",
]

AttentionBackend = Literal["default", "math"]
"""`"default"`: whatever torch picks. `"math"`: the one that can be derived twice."""


def attention(backend: AttentionBackend) -> AbstractContextManager[object]:
    """Return a context that runs its block under one attention backend.

    Fused attention has no second derivative, and it draws another dropout mask from
    the same random state than the plain one: what is compared or derived twice runs
    under one backend from the forward pass to the last product.
    """
    if backend != "math" or _math_alone():
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def _math_alone() -> bool:
    """Return whether no other backend may be picked: to ask is cheaper than to set."""
    return cuda.math_sdp_enabled() and not (
        cuda.flash_sdp_enabled()
        or cuda.mem_efficient_sdp_enabled()
        or cuda.cudnn_sdp_enabled()
    )


REMEDY = (
    "A fused kernel (flash or memory-efficient attention called past torch's dispatcher, "
    "a compiled or quantised layer, a custom autograd function) is the usual cause. Load "
    'the model with attn_implementation="eager" and without torch.compile, or take a '
    "first-order estimator: "
    "'first-order', 'darts', or 'sama', 'cg', 'neumann' with "
    "product='finite-difference'."
)

# What torch 2.13 says, and who says it.
_MARKS = (
    "is not implemented",  # a native operator: flash attention, ctc_loss, cdist
    "not currently support double backward",  # a compiled module
    "don't support automatic differentiation",  # a custom function that works in place
    "non-empty donated buffers",  # the same, once it has had a plain backward
    "trying to differentiate twice",  # a function marked once_differentiable
    "trying to use forward ad",  # a native operator, forward mode: flash attention, LSTM
    "forward mode ad",  # a custom function without jvp
    "setup_context",  # a custom function in torch.func
)


@contextmanager
def explain_second_order(instead: str = "") -> Iterator[None]:
    """Turn torch's refusal of a second derivative into one that says what to do.

    Args:
        instead: a remedy of the caller's own, put first.

    Raises:
        SecondOrderError: in place of torch's RuntimeError or NotImplementedError.
        RuntimeError: any other error of the block, as it is.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one of them
        said = explained(error, instead)
        if said is None:
            raise
        raise said from error


def explained(error: RuntimeError, instead: str = "") -> SecondOrderError | None:
    """Return what to raise in place of torch's refusal of a second derivative.

    Args:
        error: what was raised.
        instead: a remedy of the caller's own, put first.

    Returns:
        The error; None where this is no such refusal, or says what to do already.
    """
    text = str(error)
    if isinstance(error, SecondOrderError) or not any(
        mark in text.lower() for mark in _MARKS
    ):
        return None
    return SecondOrderError(
        "the inner loss cannot be differentiated twice this way: torch says "
        f"{text.splitlines()[0]!r}. {instead}{REMEDY}"
    )
