"""Losses of a module as functions of two dictionaries of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad._checks import some
from hypergrad._graph import refuse_reentrant
from hypergrad._module_state import copy_of_buffer
from hypergrad.errors import HypergradError

__all__ = ["ModuleLoss", "refuse_recompute", "select_parameters", "swapped"]

_Slot = tuple[nn.Module, str]


def _slots(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[_Slot]]:
    """Find every place of `model` that holds each tensor; tied weights have several."""
    places: dict[int, list[_Slot]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, attribute))
    return {name: places.get(id(tensor), []) for name, tensor in tensors.items()}


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
        ValueError: a name that the model does not have, another shape, or two tensors
            for one tied weight.

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
    placed: dict[int, Tensor] = {}
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
        if placed.setdefault(id(own[name]), tensor) is not tensor:
            msg = (
                f"{name!r} is tied to another name that was given another tensor: one "
                "weight can hold only one. Pass the same tensor, or one name."
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
def refuse_recompute() -> Iterator[None]:
    """Raise where a forward pass of the block asks to be run again in the backward pass.

    Activation checkpointing runs the forward again inside the backward pass. After
    `torch.func.functional_call` has put the module's own weights back, that second
    forward uses other weights than the first and the derivative is silently wrong.

    Raises:
        HypergradError: from within the forward pass.
        RuntimeError: any other error of the block, as it is.
    """
    try:
        # Checkpointing saves its inputs through these hooks; so does offloading
        # (save_on_cpu), which torch.func refuses as well.
        with torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTING):
            yield
    except HypergradError:
        raise
    except RuntimeError as error:
        if _CHECKPOINTING in str(error) or "saved tensor hooks" in str(error):
            raise HypergradError(_CHECKPOINTING) from error
        raise


_CHECKPOINTING = (
    "activation checkpointing (or another user of saved-tensor hooks) is on while the "
    "model is evaluated functionally (torch.func): the recomputed forward would use "
    "other weights and the derivative would be silently wrong (pytorch #122729). Call "
    "model.gradient_checkpointing_disable(), or use product='exact' (double backward), "
    "which runs the module as it is."
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
    is. Any other dictionary goes through `torch.func.functional_call`, which leaves the
    module's buffers alone; it is never ignored.

    Args:
        model: the module.
        loss_fn: `(model, batch) -> scalar`.
        tensors: the parameters that may be replaced, by name.

    Example:
        y = 2x where the module holds 5x.

        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 5.0)
        >>> loss = ModuleLoss(model, lambda m, x: m(x).sum(), {"weight": model.weight})
        >>> loss({"weight": torch.tensor([[2.0]])}, {}, torch.tensor([[3.0]])).item()
        6.0
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
        """Return the loss at these parameters."""
        given = {**inner_params, **outer_params}
        self._check_names(given)
        if all(self._holds(name, tensor) for name, tensor in given.items()):
            return self.loss_fn(self.model, batch)
        return self._functional(given, batch)

    def placed(self, tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context in which the module holds `tensors`; see `swapped`."""
        self._check_names(tensors)
        return _placed(self._slots, tensors)

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            if name not in self._slots:
                msg = (
                    f"the problem has no parameter {name!r} ({some(self._slots)}). Pass "
                    "dictionaries with the problem's own names."
                )
                raise ValueError(msg)

    def _holds(self, name: str, tensor: Tensor) -> bool:
        return all(
            module._parameters.get(attribute) is tensor
            for module, attribute in self._slots[name]
        )

    def _functional(self, given: Mapping[str, Tensor], batch: Any) -> Any:
        if any(
            m.training and getattr(m, "gradient_checkpointing", False) is True
            for m in self.model.modules()
        ):
            raise HypergradError(_CHECKPOINTING)
        # functional_call takes a name that the model does not have for none at all.
        names = {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
        gone = [name for name in given if name not in names]
        if gone:
            msg = (
                f"the model no longer has the parameters {gone[:4]}: it was changed "
                "after the problem was made. Make the problem anew."
            )
            raise HypergradError(msg)
        replaced = {f"model.{name}": tensor for name, tensor in given.items()}
        for name, buffer in self.model.named_buffers():
            replaced[f"model.{name}"] = copy_of_buffer(buffer)
        wrapper = _Functional(self.model, self.loss_fn)
        wrapper.training = self.model.training
        with refuse_recompute():
            value = torch.func.functional_call(wrapper, replaced, (batch,))
        if isinstance(value, Tensor):
            refuse_reentrant(value)
        return value


def select_parameters(
    model: nn.Module, trainable: Mapping[str, Tensor], outer: Any
) -> set[str]:
    """Return the names of the trainable parameters that `outer` means.

    Args:
        model: the module.
        trainable: its parameters that require grad, under all their names.
        outer: as for `BilevelProblem.from_module`.

    Returns:
        At least one name.

    Raises:
        TypeError: `outer` is of no supported kind.
        ValueError: it, or one of its patterns, matches nothing.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> select_parameters(model, dict(model.named_parameters()), "b*")
        {'bias'}
    """
    if isinstance(outer, type) and issubclass(outer, nn.Module):
        of_type = (m for m in model.modules() if isinstance(m, outer))
        ids = {id(p) for m in of_type for p in m.parameters()}
        chosen = {name for name, p in trainable.items() if id(p) in ids}
        return _some_chosen(chosen, outer.__name__, trainable)
    patterns = [outer] if isinstance(outer, str) else outer
    if isinstance(patterns, Collection) and all(isinstance(p, str) for p in patterns):
        chosen = set()
        for pattern in patterns:
            hits = {n for n in trainable if n == pattern or fnmatchcase(n, pattern)}
            chosen |= _some_chosen(hits, repr(pattern), trainable)
        return _some_chosen(chosen, repr(outer), trainable)
    if callable(outer) and not isinstance(outer, type):
        chosen = {name for name, p in trainable.items() if outer(name, p)}
        return _some_chosen(chosen, getattr(outer, "__name__", repr(outer)), trainable)
    msg = (
        f"outer must be names, a module type or a predicate, got {outer!r}. Pass e.g. "
        'outer="*.magnitude" or outer=lambda name, parameter: ...'
    )
    raise TypeError(msg)


def _some_chosen(
    chosen: set[str], outer: str, trainable: Mapping[str, Tensor]
) -> set[str]:
    if not chosen:
        msg = (
            f"outer={outer} matches none of the {len(trainable)} trainable parameters "
            f"({some(trainable)}). Check the name against model.named_parameters() and "
            "requires_grad."
        )
        raise ValueError(msg)
    return chosen
