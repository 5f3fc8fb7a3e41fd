"""Checks of what a user passes as the tensors of a problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_disjoint", "check_tensor", "some"]


def some(names: Mapping[str, Any], most: int = 6) -> str:
    """List the first few names."""
    shown = ", ".join(list(names)[:most])
    return shown + (", ..." if len(names) > most else "")


def check_tensor(kind: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be a parameter of a problem.

    Raises:
        ValueError: not floating point, on the meta device, not a leaf, frozen, expanded.
    """
    where = f"{kind}[{name!r}]"
    if not tensor.is_floating_point():
        msg = (
            f"{where} has dtype {tensor.dtype}: only floating point tensors have "
            "gradients. Convert it, or leave it out of the problem."
        )
    elif tensor.is_meta:
        msg = (
            f"{where} is on the meta device: it holds no values (an offloaded weight, "
            "perhaps). Load the weight onto a device first."
        )
    elif not tensor.is_leaf:
        msg = (
            f"{where} is not a leaf: it was computed by {tensor.grad_fn}. Pass the "
            "tensor it was computed from, or .detach().requires_grad_()."
        )
    elif not tensor.requires_grad:
        msg = (
            f"{where} is frozen (requires_grad is False). Call .requires_grad_() on "
            "it, or leave it out of the problem."
        )
    elif any(
        s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        msg = (
            f"{where} is expanded: its entries share memory (strides "
            f"{tensor.stride()}), so none can be moved alone. Pass a .clone()."
        )
    else:
        return
    raise ValueError(msg)


def check_disjoint(inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> None:
    """Refuse two tensors that share memory.

    Raises:
        ValueError: naming both.
    """
    entries = [("inner", n, t) for n, t in inner.items()]
    entries += [("outer", n, t) for n, t in outer.items()]
    by_storage: dict[int, list[tuple[str, str, Tensor]]] = {}
    for level, name, tensor in entries:
        if tensor.numel():
            key = tensor.untyped_storage().data_ptr()
            by_storage.setdefault(key, []).append((level, name, tensor))
    for group in by_storage.values():
        for i, (level_a, name_a, a) in enumerate(group):
            for level_b, name_b, b in group[:i]:
                if a is b:
                    msg = (
                        f"the same tensor is inner ({name_b!r}) and outer ({name_a!r}):"
                        " each tensor belongs to one level. Leave it out of one set."
                    )
                    raise ValueError(msg)
                if _overlap(a, b):
                    msg = (
                        f"{level_a} {name_a!r} and {level_b} {name_b!r} are different "
                        "tensors that share memory, so moving one moves the other. "
                        "Pass the same tensor object under both names, or a .clone()."
                    )
                    raise ValueError(msg)


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        start = t.storage_offset() * t.element_size()
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return start, start + (last + 1) * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    if a1 <= b0 or b1 <= a0:
        return False

    def addresses(t: Tensor) -> Tensor:
        index = torch.full((1,), t.storage_offset())
        for n, s in zip(t.shape, t.stride(), strict=True):
            index = (index[:, None] + torch.arange(n) * s).reshape(-1)
        return index * t.element_size()

    # Interleaved views (every other column) lie in one another's span and share nothing.
    return bool(torch.isin(addresses(a), addresses(b)).any())
