"""Checks of what a user passes: settings, and the tensors of a problem."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad import tree

__all__ = [
    "check_count",
    "check_disjoint",
    "check_flag",
    "check_module",
    "check_names",
    "check_new_name",
    "check_number",
    "check_positive",
    "check_scalar",
    "check_tensor",
    "some",
]


def some(names: Mapping[str, Any], most: int = 6) -> str:
    """Return the first few names.

    Args:
        names: a dictionary by name.
        most: number of names to show.

    Returns:
        The names, separated by commas.

    Example:
        >>> some({"a": 1, "b": 2, "c": 3}, most=2)
        'a, b, ...'
    """
    shown = ", ".join(list(names)[:most])
    return shown + (", ..." if len(names) > most else "")


def check_number(name: str, value: object) -> None:
    """Refuse a setting that is not a real number; a bool is none.

    Raises:
        TypeError: with the value.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        msg = (
            f"{name}={value!r} must be a number, got {type(value).__name__}. Pass a "
            "plain float."
        )
        raise TypeError(msg)


def check_positive(name: str, value: float, about: str) -> None:
    """Refuse a setting that is not a positive finite number.

    Args:
        name: of the setting.
        value: what was passed.
        about: what the setting is, and what to pass.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative, infinite or NaN.
    """
    check_number(name, value)
    if not 0 < value < float("inf"):
        msg = f"{name}={value} must be positive and finite: {about}"
        raise ValueError(msg)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a count that is not a whole number of at least `least`.

    Raises:
        TypeError: not a whole number.
        ValueError: too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{name}={value!r} must be a whole number, got {type(value).__name__}."
        raise TypeError(msg)
    if value < least:
        msg = f"{name}={value} must be at least {least}."
        raise ValueError(msg)


def check_flag(name: str, value: bool) -> None:
    """Refuse a switch that is neither True nor False.

    Raises:
        TypeError: with the value.
    """
    if not isinstance(value, bool):
        msg = f"{name}={value!r} must be True or False, got {type(value).__name__}."
        raise TypeError(msg)


def check_module(model: object) -> None:
    """Refuse what is not a module, and one that is wrapped for several ranks.

    Raises:
        TypeError: naming what to pass.
    """
    if not isinstance(model, nn.Module):
        msg = f"model must be a torch.nn.Module, got {type(model).__name__}"
        raise TypeError(msg)
    kinds = {
        c.__name__ for c in type(model).__mro__ if c.__module__.startswith("torch.")
    }
    if kinds & {"DistributedDataParallel", "DataParallel"}:
        msg = (
            f"model is a {type(model).__name__}, whose hooks torch.autograd.grad does "
            "not run. Pass model.module: averaging over ranks is done here, with one "
            "message for each gradient."
        )
        raise TypeError(msg)
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        msg = (
            f"model is sharded ({type(model).__name__}): its parameters are parts of "
            "tensors, and torch.autograd.grad does not gather them. Pass the module "
            "unsharded on every rank; adapters are small, and averages over ranks are "
            "taken here."
        )
        raise TypeError(msg)


def check_new_name(kind: str, name: str, taken: Mapping[str, Any]) -> None:
    """Refuse a name that cannot be registered.

    Raises:
        ValueError: the name is taken, or has other characters than it may.
    """
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        msg = f"name={name!r} must be made of lower-case letters, digits and hyphens."
        raise ValueError(msg)
    if name in taken:
        msg = f"{kind} named {name!r} is registered already. Choose another name."
        raise ValueError(msg)


def check_names(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> None:
    """Refuse a name that stands for an inner and an outer tensor.

    Raises:
        TypeError: a set that is not a dictionary.
        ValueError: naming the first such name.
    """
    for kind, params in (("inner_params", inner), ("outer_params", outer)):
        if not isinstance(params, Mapping):
            msg = (
                f"{kind} must be a dictionary of named tensors, got "
                f"{type(params).__name__}. Pass e.g. dict(model.named_parameters())."
            )
            raise TypeError(msg)
    for name in inner:
        if name in outer:
            msg = (
                f"the name {name!r} is in inner_params and in outer_params: results and "
                "messages go by name. Rename one of the two."
            )
            raise ValueError(msg)


def check_tensor(kind: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be a parameter of a problem.

    Raises:
        TypeError: a shard of a distributed tensor.
        ValueError: not of real floating point dtype, on the meta device, not a leaf,
            frozen, made in inference mode, or with entries that share memory.
    """
    where = f"{kind}[{name!r}]"
    if type(tensor).__name__ == "DTensor" or hasattr(tensor, "device_mesh"):
        msg = (
            f"{where} is a DTensor, a shard of a tensor that is spread over ranks. Pass "
            "an ordinary tensor that is whole on every rank: tensor.full_tensor(), or a "
            "module that is not sharded; averages over ranks are taken here."
        )
        raise TypeError(msg)
    if not tensor.is_floating_point():
        msg = (
            f"{where} has dtype {tensor.dtype}: only real floating point tensors are "
            "differentiated here. Convert it, or leave it out of the problem."
        )
    elif tensor.is_meta:
        msg = (
            f"{where} is on the meta device: it holds no values (an offloaded weight, "
            "perhaps). Load the weight onto a device first."
        )
    elif tensor.is_inference():
        msg = (
            f"{where} was made in torch.inference_mode, which autograd cannot "
            "differentiate. Pass a .clone() made outside of it."
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
    elif _overlaps_itself(tensor):
        msg = (
            f"{where} is expanded: its entries share memory (strides "
            f"{tensor.stride()}), so none can be moved alone. Pass a .clone()."
        )
    else:
        return
    raise ValueError(msg)


def check_scalar(name: str, value: Any, like: Tensor | None = None) -> Tensor:
    """Return a loss, unless it is none.

    Args:
        name: of what returned it.
        value: what it returned.
        like: a tensor that says where a plain number is put, in float64; None where a
            number will not do, for it has no derivative.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not a scalar.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and like is not None:
        return torch.tensor(
            float(value), dtype=tree.wide_dtype(like.device), device=like.device
        )
    if not isinstance(value, Tensor):
        metric = " For a metric without a derivative, take estimator='zeroth-order'."
        msg = (
            f"{name} returned {type(value).__name__}, not a tensor. Return the scalar "
            "loss tensor itself (not .item(), not a model output)."
            f"{metric if number and name == 'outer_loss' else ''}"
        )
        raise TypeError(msg)
    if value.dim() != 0:
        msg = (
            f"{name} returned a tensor of shape {tuple(value.shape)}, not a scalar: a "
            "loss per example, perhaps. Reduce it, e.g. loss.mean()."
        )
        raise ValueError(msg)
    return value


def check_disjoint(inner: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> None:
    """Refuse a tensor in both sets, and two tensors that share memory.

    Raises:
        ValueError: naming both.
    """
    entries = [("inner", n, t) for n, t in inner.items()]
    entries += [("outer", n, t) for n, t in outer.items()]
    inner_names = {id(t): n for n, t in inner.items()}
    for name, tensor in outer.items():
        if id(tensor) in inner_names:
            msg = (
                f"the same tensor is inner ({inner_names[id(tensor)]!r}) and outer "
                f"({name!r}): each tensor belongs to one level. Leave it out of one set."
            )
            raise ValueError(msg)
    by_storage: dict[int, list[tuple[str, str, Tensor]]] = {}
    for level, name, tensor in entries:
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() and key:  # wrapper subclasses have no storage of their own
            by_storage.setdefault(key, []).append((level, name, tensor))
    for group in by_storage.values():
        for i, (level_a, name_a, a) in enumerate(group):
            for level_b, name_b, b in group[:i]:
                if _overlap(a, b):
                    msg = (
                        f"{level_a} {name_a!r} and {level_b} {name_b!r} are different "
                        "tensors that share memory, so moving one moves the other. "
                        "Pass the same tensor object under both names, or a .clone()."
                    )
                    raise ValueError(msg)


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        start = int(t.storage_offset()) * t.element_size()
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return start, start + (last + 1) * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    if a1 <= b0 or b1 <= a0:
        return False
    # Interleaved views (every other column) lie in one another's span and share nothing.
    return bool(torch.isin(_addresses(a), _addresses(b)).any())


def _overlaps_itself(tensor: Tensor) -> bool:
    if not tensor.numel():
        return False
    # Sorted by stride, each dimension steps over all that the smaller ones span.
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride == 0:
            return True
        if size > 1 and stride <= span:
            # Rare: overlapping, or interleaved in a way that only counting tells.
            return _addresses(tensor).unique().numel() < tensor.numel()
        span += stride * (size - 1)
    return False


def _addresses(tensor: Tensor) -> Tensor:
    index = torch.full((1,), int(tensor.storage_offset()))
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        index = (index[:, None] + torch.arange(size) * stride).reshape(-1)
    return index * tensor.element_size()
