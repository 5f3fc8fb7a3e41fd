r"""DoRA whose gradient is the gradient of the loss, at the cost of LoRA.

A DoRA layer computes $y = x\,W'^\top + b$ with rows

$$w'_i = m_i \frac{w_i + s\,b_i A}{\|w_i + s\,b_i A\|} .$$

(`forward` says what rows an embedding or a convolution has.) PEFT builds $B A$ in every
forward pass and treats the norm as a constant in the backward pass, so what autograd
returns is not the gradient of the loss, and the matrix of second derivatives is not
symmetric. `use_exact_dora` replaces that forward pass and nothing else: injection,
configuration, merging, saving and quantised bases stay PEFT's, and so do parameter names
and files.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from bidora.dora import forward as _forward
from bidora.dora import norms as _norms
from bidora.dora import peft as _peft
from bidora.dora.forward import ExactDora
from bidora.dora.peft import DoraAdapter
from bidora.errors import NoDirectionError

__all__ = [
    "check_norms",
    "direction_norms",
    "exact_dora_layers",
    "magnitudes",
    "plain_dora_layers",
    "use_exact_dora",
    "use_peft_dora",
]

_SHOWN = 8  # layers named in a warning


def direction_norms(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0
) -> Tensor:
    r"""Return the row norms $\|w_i + s\,b_i A\|$ without building $B A$.

    Differentiable any number of times in `lora_a`, `lora_b` and, where it requires a
    gradient, `weight`. Computed in float32, in float64 where a tensor is float64. Takes
    one product of `(r, in)` by `(in, out)` and memory `(out, r)`.

    Args:
        weight: W, `(out, in)`.
        lora_a: A, `(r, in)`.
        lora_b: B, `(out, r)`.
        scaling: s.

    Returns:
        Norms, `(out,)`.

    Example:
        The row (3, 0) + 4·1·(0, 1) = (3, 4) has norm 5.

        >>> import torch
        >>> W, A, B = (
        ...     torch.tensor([[3.0, 0.0]]),
        ...     torch.eye(2)[1:],
        ...     torch.full((1, 1), 2.0),
        ... )
        >>> direction_norms(W, A, B, scaling=2.0)
        tensor([5.])
    """
    dtype = _norms.compute_dtype(weight, lora_a, lora_b)
    rows = _norms.BaseWeight.of(weight)
    base = _norms.cached_base_norms(rows, dtype, _norms.WeightCache())
    return _norms.squared_norms(rows, lora_a, lora_b, scaling, base).sqrt()


def use_exact_dora(
    model: nn.Module,
    *,
    dropout: Literal["lora", "peft"] = "lora",
    norm_grad: Literal["attached", "detached"] = "attached",
) -> tuple[str, ...]:
    """Make every DoRA layer of a PEFT model exact: autograd differentiates the loss.

    The layers' outputs stay as they are to rounding, and so do parameter names, merging
    and files. Every DoRA adapter present is covered; one added or loaded later has
    PEFT's forward again until the next call (see `plain_dora_layers`). A second call
    changes the settings. It also forgets what was cached for the base weights, which
    matters after an edit of a base weight through ``.data`` in place, the one kind of
    change that torch does not count (merging a plain LoRA adapter is such an edit).

    Cost: that of LoRA, where PEFT's DoRA takes up to twice as long. Beyond what LoRA keeps
    for the backward pass, a layer keeps its output and `(out, r)` numbers. Merged by PEFT,
    it is a plain layer.

    `torch.compile(model, fullgraph=True)` gives one graph, which keeps nothing between
    calls: it computes the base weight's norms each time and so sees any change of it.
    Compiled models have first derivatives alone; `'darts'` and `'sama'` need no others.

    A layer in eval without gradients keeps its gains, `(out,)` numbers, until A, B, m or
    W change or it is trained. An edit through ``.data`` in place between two such passes
    is not seen, as above; another call of this function forgets the gains.

    A row of zeros in W (an output feature that was pruned, say) has no direction while
    its row of B A is zero too. PEFT gives NaN there; here its gain is 1, a constant, so
    that its magnitude, which PEFT starts at 0, gets no gradient, and A and B get LoRA's.
    Once B has moved, the row is one like all others, with the gain m / ‖v‖.

    Args:
        model: A model from `peft.get_peft_model`, or a transformers model after
            `model.add_adapter(LoraConfig(use_dora=True))`.
        dropout: Where adapter dropout acts in training. `"lora"`: on the input of `A`
            alone, one pass through the base layer. `"peft"`: on the base layer's part
            of the change as well, a second pass, as PEFT does; with the same random
            numbers it gives PEFT's output. In eval, both are the same.
        norm_grad: `"attached"`: the norm is differentiated. `"detached"`: it is taken
            for a constant, PEFT's surrogate gradient, which is not the gradient of the
            loss.

    Returns:
        Names of the layers covered, as in `model.named_modules()`.

    Raises:
        ValueError: A setting is out of range; the model has no DoRA layer, or one that
            cannot be exact; a weight is absent; an adapter cancels a row of its weight.
            The model is then as it was.
        ImportError: PEFT's version is not one that this was tested with.
    """
    forward = ExactDora(dropout, norm_grad)
    layers = _peft.dora_layers(model)
    refused = [
        f"{name} ({type(layer.module.get_base_layer()).__name__}: {reason})"
        for name, layer in layers
        if (reason := _peft.obstacle(layer))
    ]
    if refused:
        raise ValueError(
            f"These DoRA layers cannot be made exact: {'; '.join(refused)}. Leave them "
            "out of target_modules in the LoraConfig, or keep PEFT's DoRA by not calling "
            "use_exact_dora."
        )
    if not layers:
        raise ValueError(
            "The model has no DoRA layer: none of its modules carries a magnitude "
            "vector. Either it has no adapter or its adapters are plain LoRA. Make one "
            "with peft.get_peft_model(model, LoraConfig(use_dora=True, ...)) or, in "
            "transformers, model.add_adapter(LoraConfig(use_dora=True, ...))."
        )
    for _, layer in layers:
        _peft.clear_cache(layer)
    _check(layers)
    _note_zero_rows(layers)
    for _, layer in layers:
        _peft.replace_forward(layer, forward)
    return tuple(dict.fromkeys(name for name, _ in layers))


def use_peft_dora(model: nn.Module) -> tuple[str, ...]:
    """Give every exact DoRA layer PEFT's own forward again; undo `use_exact_dora`.

    Args:
        model: Any model.

    Returns:
        Names of the layers that were exact.
    """
    names = exact_dora_layers(model)
    for name, layer in _peft.dora_layers(model):
        if layer.adapter in names.get(name, ()):
            _peft.restore_forward(layer)
    return tuple(names)


def exact_dora_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the layers that `use_exact_dora` covers now.

    Args:
        model: Any model.

    Returns:
        Per layer name, the names of its exact adapters.
    """
    return _adapters_where(model, exact=True)


def plain_dora_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the layers with DoRA adapters whose forward is still PEFT's.

    Args:
        model: Any model.

    Returns:
        Per layer name, the names of these adapters.
    """
    return _adapters_where(model, exact=False)


def magnitudes(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """Return the DoRA magnitude vectors of a model.

    Args:
        model: Any model.
        adapter: Name of one adapter; None for all.

    Returns:
        The parameters, trainable or not, under their names in
        `model.named_parameters()`; empty if there are none.
    """
    wanted = {
        id(layer.magnitude)
        for _, layer in _peft.dora_layers(model)
        if adapter is None or layer.adapter == adapter
    }
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def check_norms(model: nn.Module) -> None:
    """Raise where an adapted row has no direction; look for rows near that.

    A forward pass on an accelerator never waits for the device, so it cannot raise:
    `use_exact_dora` calls this once, and a training loop should call it now and then
    (at outer steps, say). Rows that the adapter has nearly cancelled are remembered,
    and later forward passes compute their norms from the entries, which takes care of
    the digits that the expansion loses there. On the CPU every forward pass does so
    by itself. A compiled one computes the 8 most cancelled rows of a layer this way.

    A row of zeros in W is no error, see `use_exact_dora`.

    Args:
        model: A model with DoRA layers; others pass.

    Raises:
        NoDirectionError: The norm of a row of W0 + s·B·A is not finite, or zero where
            the row of W0 is not.
        ValueError: The base weight is not in memory.
    """
    layers = _peft.dora_layers(model)
    _check([(name, layer) for name, layer in layers if not _peft.obstacle(layer)])


def _check(layers: list[tuple[str, DoraAdapter]]) -> None:
    """Do `check_norms` for these layers; the host waits for the device once."""
    norms: list[tuple[Tensor, Tensor]] = []
    for name, layer in layers:
        weight = layer.weight
        if weight.stored.device.type == "meta":
            raise ValueError(
                f"The base weight of layer {name} is on the meta device: offloaded, or "
                "never loaded, so its row norms cannot be computed. Load the model "
                "with all weights in memory (no device_map to disk or cpu)."
            )
        _forward.forget(layer)
        base = _forward.base_norms(layer)
        with torch.no_grad():
            squared = _forward.expanded_norms(layer)
            # Rows near cancellation are looked at from their entries, below.
            near = _norms.near_cancellation(squared, base)
            near |= _norms.without_direction(squared, base)
        norms.append((squared, near))
    flagged = _any([near for _, near in norms])
    for (name, layer), (squared, _), suspect in zip(
        layers, norms, flagged, strict=True
    ):
        if suspect:
            _check_rows(name, layer, squared.device)


def _any(flags: list[Tensor]) -> list[bool]:
    """Return whether some entry of each is True, read at once."""
    if not flags:
        return []
    device = flags[0].device
    return torch.stack([f.any().to(device) for f in flags]).tolist()


def _check_rows(name: str, layer: DoraAdapter, device: torch.device) -> None:
    """Look at the rows of one layer that are near cancellation, or have no norm."""
    base = _forward.base_norms(layer)
    with torch.no_grad():
        squared = _forward.squared_norms(layer, wait=True)
    broken = _norms.without_direction(squared, base).nonzero().squeeze(1)
    if broken.numel():
        row = int(broken[0])
        raise NoDirectionError(
            f"{broken.numel()} of {squared.numel()} rows of W0 + s·B·A in layer "
            f"{name} (adapter {layer.adapter!r}) have no direction, the first is "
            f"row {row} with norm {float(squared[row].sqrt()):.3g}, and DoRA "
            "divides by it. The row of W0 is not zero, so the adapter has cancelled it, "
            "or a number is not finite: the training has diverged. Lower the learning "
            "rate, or start from an adapter that was saved before."
        )
    if device.type != "cpu":  # there, each forward pass looks for itself
        near = _norms.cancelled_rows(squared, base, margin=2.0, wait=True)
        layer.cache.put(layer.weight.key(), _forward.rows_name(layer), near)


def _note_zero_rows(layers: list[tuple[str, DoraAdapter]]) -> None:
    """Say once which layers have rows of zeros, whose gain is 1 while they stay zero."""
    found = {
        name: int(base.zero.sum())
        for name, layer in layers
        if (base := _forward.base_norms(layer)).zero is not None
    }
    counts = [f"{count} in layer {name}" for name, count in found.items() if count]
    if counts:
        shown = ", ".join(counts[:_SHOWN])
        more = f" and in {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        warnings.warn(
            f"Base weights have rows of zeros: {shown}{more}. Such a row has no "
            "direction while its row of B is zero too: its gain is 1, its magnitude "
            "gets no gradient, and PEFT's own forward gives NaN there.",
            stacklevel=3,
        )


def _adapters_where(model: nn.Module, exact: bool) -> dict[str, tuple[str, ...]]:
    """Return, per layer name, the adapters that are exact, or those that are not."""
    found: dict[str, tuple[str, ...]] = {}
    for name, layer in _peft.dora_layers(model):
        if _peft.is_replaced(layer) == exact:
            found[name] = (*found.get(name, ()), layer.adapter)
    return found
