"""The values of what a job trains, bit for bit, beside PEFT's own file of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as RunningNorm

__all__ = [
    "VALUES_FILE",
    "check_values",
    "directions",
    "load_values",
    "norm_buffers",
    "save_values",
]

VALUES_FILE = "bidora_values.safetensors"


def save_values(
    folder: Path,
    model: nn.Module,
    outer: Collection[str],
    first_values: Mapping[str, Tensor],
) -> None:
    """Write what moves in either phase, and where a fresh retraining starts.

    PEFT's own file is for loading the adapter elsewhere; it may leave out a head that
    is trained without PEFT, and a load may cast.

    Args:
        folder: the checkpoint.
        model: the model.
        outer: names of the outer parameters.
        first_values: what a fresh retraining starts from.
    """
    values = {f"now.{n}": t for n, t in adapter_values(model, outer).items()}
    values.update({f"first.{n}": t for n, t in first_values.items()})
    own = {n: t.detach().cpu().contiguous().clone() for n, t in values.items()}
    save_file(own, str(folder / VALUES_FILE))


def adapter_values(model: nn.Module, outer: Collection[str]) -> dict[str, Tensor]:
    """Return what moves in either phase, by name."""
    trained = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or name in outer
    }
    return trained | norm_buffers(model)


def directions(model: nn.Module, outer: Collection[str]) -> dict[str, Tensor]:
    """Return copies of what a fresh retraining starts from, by name."""
    trained = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and name not in outer
    }
    both = trained | norm_buffers(model)
    return {name: t.detach().clone() for name, t in both.items()}


def norm_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of BatchNorm and its kin, which forwards move."""
    return {
        f"{place}.{name}".lstrip("."): b
        for place, module in model.named_modules()
        if isinstance(module, RunningNorm)
        for name, b in module.named_buffers(recurse=False)
    }


def check_values(folder: Path, model: nn.Module, outer: Collection[str]) -> None:
    """Refuse a checkpoint whose values are not those of this model.

    Args:
        folder: the checkpoint.
        model: the model.
        outer: names of the outer parameters.

    Raises:
        ValueError: the model has other parameters.
    """
    _values(folder, model, outer)


def load_values(
    folder: Path, model: nn.Module, outer: Collection[str]
) -> dict[str, Tensor]:
    """Put the saved values into a model.

    Args:
        folder: the checkpoint.
        model: the model.
        outer: names of the outer parameters.

    Returns:
        What a fresh retraining starts from, by name.

    Raises:
        ValueError: the model has other parameters; nothing was changed.
    """
    now, first = _values(folder, model, outer)
    own = _tensors(model)
    with torch.no_grad():
        for name, value in now.items():
            own[name].copy_(value)
    return first


def _values(
    folder: Path, model: nn.Module, outer: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the values of a checkpoint and the first ones, if they fit the model."""
    saved = load_file(str(folder / VALUES_FILE))
    now, first = (
        {n.removeprefix(mark): t for n, t in saved.items() if n.startswith(mark)}
        for mark in ("now.", "first.")
    )
    own = _tensors(model)
    unfit = [
        f"{n} is {_kind(t)} there and {_kind(own.get(n))} here"
        for n, t in sorted({**first, **now}.items())
        if _kind(own.get(n)) != _kind(t)
    ]
    unfit += [
        f"{n} is missing there and {_kind(t)} here"
        for n, t in sorted(adapter_values(model, outer).items())
        if n not in now
    ]
    if unfit:
        msg = (
            f"{folder} holds other values than this model trains, {len(unfit)} of them "
            f"({'; '.join(unfit[:3])}): it comes from another model or adapter. Build "
            "the model as the first run did."
        )
        raise ValueError(msg)
    return now, first


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **norm_buffers(model)}


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
