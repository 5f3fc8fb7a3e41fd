"""Losses of a module as functions of two dictionaries of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad.errors import HypergradError

__all__ = ["ModuleLoss", "refuse_recompute", "swapped"]

_Slot = tuple[nn.Module, str]


def _slots(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[_Slot]]:
    """Find every place of `model` that holds each tensor; tied weights have several."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found: dict[str, list[_Slot]] = {name: [] for name in tensors}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                found[names[id(parameter)]].append((module, attribute))
    return found


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put `tensors` in the places of the model's parameters of the same names.

    The module then runs as it is, hooks, wrappers and activation checkpointing
    included, on tensors that an optimizer does not move. A graph built inside one such
    block is right after the optimizer has moved the parameters, provided that the
    products taken from it run inside another block with the same tensors.

    Args:
        model: the module; its own parameters come back when the block ends, also
            after an exception.
        tensors: replacements by parameter name, same shapes.

    Raises:
        ValueError: a name that the model does not have, or another shape.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> two = torch.tensor([[2.0]], requires_grad=True)
        >>> with swapped(model, {"weight": two}):
        ...     y = model(torch.ones(1, 1))
        >>> y.item(), model.weight is two
        (2.0, False)
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in own:
            msg = (
                f"the model has no parameter {name!r}; names come from "
                "model.named_parameters(). Pass one of those."
            )
            raise ValueError(msg)
        if own[name].shape != tensor.shape:
            msg = (
                f"the replacement of {name!r} has shape {tuple(tensor.shape)} but the "
                f"parameter has {tuple(own[name].shape)}. Pass a tensor of its shape."
            )
            raise ValueError(msg)
    slots = _slots(model, {name: own[name] for name in tensors})
    with _placed(slots, tensors):
        yield


@contextmanager
def _placed(
    slots: Mapping[str, list[_Slot]], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for name, tensor in tensors.items():
            for module, attribute in slots[name]:
                saved.append((module, attribute, module._parameters[attribute]))
                module._parameters[attribute] = tensor  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for module, attribute, parameter in reversed(saved):
            module._parameters[attribute] = parameter


@contextmanager
def refuse_recompute(model: nn.Module | None) -> Iterator[None]:
    """Raise where the backward pass of the block runs a forward of `model` again.

    Activation checkpointing runs the forward again inside the backward pass. After
    `torch.func.functional_call` has put the module's own weights back, that second
    forward uses other weights than the first and the derivative is silently wrong.

    Raises:
        HypergradError: from within the recomputed forward.
    """
    if model is None:
        yield
        return

    def refuse(module: nn.Module, args: Any) -> None:
        if not getattr(model, "_hypergrad_functional", False):
            raise HypergradError(_CHECKPOINTING)

    handles = [m.register_forward_pre_hook(refuse) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_CHECKPOINTING = (
    "activation checkpointing is on while the model is evaluated functionally "
    "(torch.func.functional_call): the recomputed forward would use other weights "
    "and the derivative would be silently wrong (pytorch #122729). Call "
    "model.gradient_checkpointing_disable(), or use product='exact' (double "
    "backward), which runs the module as it is."
)


class _Functional(nn.Module):
    """`loss_fn(model, batch)` as a module, so that `functional_call` can run it."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Any:
        return self.loss_fn(self.model, batch)


class ModuleLoss:
    """`loss_fn(model, batch)` as a function `(inner_params, outer_params, batch)`.

    Where every tensor passed is the one that the module holds, the module runs as it
    is. Any other dictionary goes through `torch.func.functional_call`; it is never
    ignored.

    Args:
        model: the module.
        loss_fn: `(model, batch) -> scalar`.
        tensors: the parameters that may be replaced, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self._slots = _slots(model, tensors)

    def __call__(
        self,
        inner_params: Mapping[str, Tensor],
        outer_params: Mapping[str, Tensor],
        batch: Any,
    ) -> Any:
        given = {**inner_params, **outer_params}
        if all(self._holds(name, tensor) for name, tensor in given.items()):
            return self.loss_fn(self.model, batch)
        return self._functional(given, batch)

    def placed(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return a context in which the module holds `tensors`; see `swapped`."""
        return _placed(self._slots, tensors)

    def _holds(self, name: str, tensor: Tensor) -> bool:
        slots = self._slots.get(name)
        if not slots:
            msg = (
                f"the problem has no parameter {name!r}; it has {sorted(self._slots)}. "
                "Pass dictionaries with the problem's own names."
            )
            raise ValueError(msg)
        return all(module._parameters[attr] is tensor for module, attr in slots)

    def _functional(self, given: Mapping[str, Tensor], batch: Any) -> Any:
        checkpointed: Iterable[nn.Module] = (
            m
            for m in self.model.modules()
            if m.training and getattr(m, "gradient_checkpointing", False) is True
        )
        if next(iter(checkpointed), None) is not None:
            raise HypergradError(_CHECKPOINTING)
        replaced = {f"model.{name}": tensor for name, tensor in given.items()}
        wrapper = _Functional(self.model, self.loss_fn)
        wrapper.training = self.model.training
        # object.__setattr__: a plain flag, kept out of nn.Module's registries.
        object.__setattr__(self.model, "_hypergrad_functional", True)
        try:
            return torch.func.functional_call(wrapper, replaced, (batch,))
        finally:
            object.__setattr__(self.model, "_hypergrad_functional", False)
