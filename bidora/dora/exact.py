r"""DoRA whose gradient is the gradient of the loss, at the cost of LoRA.

A DoRA layer computes $y = x\,W'^\top + b$ with rows

$$w'_i = m_i \frac{w_i + s\,b_i A}{\|w_i + s\,b_i A\|} .$$

PEFT builds $B A$ (out × in) in every forward pass and treats the norm as a
constant in the backward pass, so what autograd returns is not the gradient of the loss,
and the matrix of second derivatives is not symmetric. `use_exact_dora` replaces that
forward pass and nothing else: injection, configuration, merging, saving and quantised
bases stay PEFT's, and so do parameter names and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidora.dora import norms as _norms
from bidora.dora import peft as _peft
from bidora.dora.gain import add_pair, apply_gain
from bidora.dora.peft import DoraAdapter
from bidora.dora.row_gain import row_gains
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

_DROPOUT = ("lora", "peft")
_NORM_GRAD = ("attached", "detached")


@dataclass(frozen=True)
class ExactDora:
    """The forward pass of an exact DoRA layer.

    Attributes:
        dropout: See `use_exact_dora`.
        norm_grad: See `use_exact_dora`.
    """

    dropout: Literal["lora", "peft"] = "lora"
    norm_grad: Literal["attached", "detached"] = "attached"

    def __post_init__(self) -> None:
        _check_choice("dropout", self.dropout, _DROPOUT)
        _check_choice("norm_grad", self.norm_grad, _NORM_GRAD)

    def __call__(self, layer: DoraAdapter, x: Tensor, result: Tensor) -> Tensor:
        """Return the output with the adapter, given the output without it.

        With z = result + s·(x Aᵀ)Bᵀ, which holds the bias b, the output is
        g ⊙ (z − b) + b with the gain g = m / ‖w + s·b A‖: one low-rank pair added to
        the base output, one `addcmul`. The gain is applied to z, not folded into `B`,
        so that it stays in float32 where products run in bfloat16.

        Args:
            layer: The adapter.
            x: Input, `(..., in)`, in the adapter's dtype.
            result: Output of the base layer and of the active adapters before this one,
                `(..., out)`.

        Returns:
            Output, `(..., out)`, in the wider of the dtypes met; PEFT's layer casts it.
        """
        gain = self._gain(layer)
        scaling, b = layer.scaling, layer.lora_b
        dropped = layer.drop(x)
        low = layer.down(dropped)
        if self.dropout == "peft" and dropped is not x:
            # PEFT sends the dropped input through the base weight a second time.
            base = F.linear(dropped, layer.weight.fetch().to(x.dtype))
            return result + (gain - 1) * base + gain * F.linear(scaling * low, b)
        if result.dtype == low.dtype:
            z = add_pair(result, low, b.to(low.dtype), scaling)
        else:
            z = result + F.linear(scaling * low, b)
        return apply_gain(z, gain, layer.bias)

    def _gain(self, layer: DoraAdapter) -> Tensor:
        """Return m / ‖w + s·b A‖, `(out,)`, in float32 or float64."""
        base = _base_norms(layer)
        magnitude = layer.magnitude.to(base.squared.device, base.squared.dtype)
        if self.norm_grad == "attached":
            weight = layer.weight
            rows = layer.cache.get(weight.key(), _rows_name(layer))
            factors = layer.lora_a, layer.lora_b, magnitude, layer.scaling
            return row_gains(weight, *factors, base, rows)
        with torch.no_grad():
            norms = squared_norms(layer).sqrt()
        return magnitude / norms


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
            is not Linear or Conv1D; a weight is absent; an adapted row has zero norm.
            The model is then as it was.
        ImportError: PEFT's version is not one that this was tested with.
    """
    forward = ExactDora(dropout, norm_grad)
    layers = _peft.dora_layers(model)
    refused = [
        f"{name} ({type(layer.module.get_base_layer()).__name__})"
        for name, layer in layers
        if not _peft.is_replaceable(layer)
    ]
    if refused:
        raise ValueError(
            f"These DoRA layers cannot be made exact: {', '.join(refused)}. Exact DoRA "
            "covers Linear and Conv1D (GPT-2) layers with PEFT's own DoRA and no "
            "lora_bias. Leave the others out of target_modules in the LoraConfig, or "
            "keep PEFT's DoRA by not calling use_exact_dora."
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
        Per layer name, the names of these adapters; Embedding and convolution layers,
        which `use_exact_dora` refuses, among them.
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

    Args:
        model: A model with DoRA layers; others pass.

    Raises:
        NoDirectionError: The norm of a row of W0 + s·B·A is zero or not finite.
        ValueError: The base weight is not in memory.
    """
    layers = _peft.dora_layers(model)
    _check([(name, layer) for name, layer in layers if _peft.is_replaceable(layer)])


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
        layer.cache.put(weight.key(), _rows_name(layer), None)
        base = _base_norms(layer)
        with torch.no_grad():
            squared = _norms.expanded_norms(
                weight, layer.lora_a, layer.lora_b, layer.scaling, base
            )
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
    base = _base_norms(layer)
    with torch.no_grad():
        squared = squared_norms(layer, wait=True)
    broken = _norms.without_direction(squared, base).nonzero().squeeze(1)
    if broken.numel():
        row = int(broken[0])
        raise NoDirectionError(
            f"{broken.numel()} of {squared.numel()} rows of W0 + s·B·A in layer "
            f"{name} (adapter {layer.adapter!r}) have no direction, the first is "
            f"row {row} with norm {float(squared[row].sqrt()):.3g}, and DoRA "
            "divides by it. Usual causes: output features that were pruned or "
            "padded with zeros, or training that diverged. Leave the layer out of "
            "target_modules, or repair the row before adding the adapter."
        )
    if device.type != "cpu":  # there, each forward pass looks for itself
        near = _norms.cancelled_rows(squared, base, margin=2.0, wait=True)
        layer.cache.put(layer.weight.key(), _rows_name(layer), near)


def _base_norms(layer: DoraAdapter) -> _norms.BaseNorms:
    """Return what the norms need of the layer's base weight."""
    weight = layer.weight
    dtype = _norms.compute_dtype(layer.lora_a, layer.lora_b, weight.stored)
    return _norms.cached_base_norms(weight, dtype, layer.cache)


def squared_norms(layer: DoraAdapter, wait: bool = False) -> Tensor:
    """Return the squared norms of the layer's adapted rows, `(out,)`."""
    weight = layer.weight
    rows = layer.cache.get(weight.key(), _rows_name(layer))
    factors = layer.lora_a, layer.lora_b, layer.scaling
    return _norms.squared_norms(weight, *factors, _base_norms(layer), rows, wait)


def _rows_name(layer: DoraAdapter) -> str:
    """Return the name in the cache of the rows to compute from their entries."""
    return f"rows-{layer.adapter}"


def _adapters_where(model: nn.Module, exact: bool) -> dict[str, tuple[str, ...]]:
    """Return, per layer name, the adapters that are exact, or those that are not."""
    found: dict[str, tuple[str, ...]] = {}
    for name, layer in _peft.dora_layers(model):
        if _peft.is_replaced(layer) == exact:
            found[name] = (*found.get(name, ()), layer.adapter)
    return found


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of the choices."""
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise ValueError(
            f"{name}={value!r} is not a setting of use_exact_dora; use {known}."
        )
