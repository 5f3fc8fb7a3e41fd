"""`torch.autograd.Function` whose call costs about what an operation's call costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = [
    "Function",
    "is_last",
    "is_plain",
]

# Where torch has no such test, every call takes its own, slower way.
_in_transform: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)


class Function(torch.autograd.Function):
    """A function with `setup_context`, called with all its arguments by position.

    torch's own `apply` reads and binds the signature of `forward` in every call, for
    defaults that these functions do not have. That takes longer than their operations do
    on small tensors.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Call it."""
        if _in_transform():
            return super().apply(*args)
        direct: Any = super(torch.autograd.Function, cls)
        return direct.apply(*args)


def is_last() -> bool:
    """Return whether nothing differentiates, or vmaps, what is computed now."""
    return not torch.is_grad_enabled() and is_plain()


def is_plain() -> bool:
    """Return whether nothing but autograd's backward pass can differentiate it."""
    dual = getattr(forward_ad, "_current_level", 0) >= 0
    return not (dual or _in_transform())
