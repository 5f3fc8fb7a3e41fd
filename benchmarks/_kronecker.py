"""Kronecker-factored curvature of adapters and a head: the inverse that is measured.

For a linear layer with inputs a and output gradients g the block of the Gauss-Newton
matrix is modelled as $A \\otimes G$, A the second moment of a over examples and tokens, G
that of g, summed over tokens [MG15; tokens count as examples, "expand"]. Output gradients
are those of the model's own predictive distribution: of one sampled label for each example,
or of all classes in turn, which leaves no sampling noise. E-KFAC keeps the eigenvectors and
takes the second moments of the examples' gradients along them [GLBV18].

A and B of a DoRA layer are two such layers. Factors take the norm of V as a constant, for
with it neither is linear; the examples' gradients, and so E-KFAC's moments, are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bidora.dora.peft import DoraAdapter, dora_layers

Params = dict[str, Tensor]


@dataclass
class Layer:
    """One weight: its factors, and the gradients of examples in it.

    Attributes:
        weight: name of the weight.
        bias: name of the bias, a further column; None for none.
        inputs: A, `(in, in)`, with a row for the bias.
        outputs: G, `(out, out)`.
        grads: of examples, or of examples and classes, over √n: `(k, out, in)`.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: Tensor
    grads: Tensor

    def joined(self, values: Params) -> Tensor:
        w = values[self.weight]
        return w if self.bias is None else torch.cat([w, values[self.bias][:, None]], 1)

    def split(self, joined: Tensor) -> Params:
        if self.bias is None:
            return {self.weight: joined}
        return {self.weight: joined[:, :-1], self.bias: joined[:, -1]}


Spectrum = Callable[[Tensor], Tensor]


@dataclass
class Model:
    """A model of the curvature with damping, by blocks, that any power is taken of."""

    powers: list[tuple[Layer, Callable[[Tensor, float], Tensor]]] = field(
        default_factory=list
    )

    def to(self, power: float, vector: Params) -> Params:
        """Return (model + damping) to a power, times a vector."""
        out: Params = {}
        for layer, apply in self.powers:
            out |= layer.split(apply(layer.joined(vector), power))
        return {n: out[n] for n in vector}


def factored(layers: list[Layer], damping: float, *, split: bool) -> Model:
    """Return K-FAC's model.

    Args:
        layers: their factors.
        damping: δ.
        split: whether both factors take √δ, in the ratio π of their mean eigenvalues, as
            the source does; else every product of eigenvalues takes δ.
    """
    model = Model()
    for layer in layers:
        a, left = torch.linalg.eigh(layer.inputs)
        g, right = torch.linalg.eigh(layer.outputs)
        a, g = a.clamp(min=0), g.clamp(min=0)
        if split:  # [MG15, §6.3]
            ratio = (a.mean() / g.mean()).sqrt()
            root = damping**0.5
            values = torch.outer(g + root / ratio, a + root * ratio)
        else:
            values = torch.outer(g, a) + damping
        model.powers.append((layer, _rotated(right, left, values)))
    return model


def corrected(layers: list[Layer], damping: float) -> Model:
    """Return E-KFAC's model: second moments along the factors' eigenvectors."""
    model = Model()
    for layer in layers:
        left = torch.linalg.eigh(layer.inputs).eigenvectors
        right = torch.linalg.eigh(layer.outputs).eigenvectors
        moments = (right.T @ layer.grads @ left).square().sum(0)
        model.powers.append((layer, _rotated(right, left, moments + damping)))
    return model


def block_diagonal(layers: list[Layer], damping: float) -> Model:
    """Return the exact blocks of the layers, which every factored model approximates."""
    model = Model()
    for layer in layers:
        rows = layer.grads.flatten(1)
        values, basis = torch.linalg.eigh(rows @ rows.T)
        kept = values > 1e-13 * values[-1]
        basis = (rows.T @ basis[:, kept]) / values[kept].sqrt()

        def apply(
            v: Tensor, power: float, basis: Tensor = basis, s: Tensor = values[kept]
        ) -> Tensor:
            flat = v.reshape(-1)
            along = basis.T @ flat
            factor = (s + damping) ** power - damping**power
            return (damping**power * flat + basis @ (factor * along)).reshape(v.shape)

        model.powers.append((layer, apply))
    return model


def _rotated(
    right: Tensor, left: Tensor, values: Tensor
) -> Callable[[Tensor, float], Tensor]:
    def apply(v: Tensor, power: float) -> Tensor:
        return right @ (values**power * (right.T @ v @ left)) @ left.T

    return apply


def flattened(layers: list[Layer], values: Params) -> Tensor:
    """Return values as one vector, layer by layer."""
    return torch.cat([layer.joined(values).reshape(-1) for layer in layers])


def unflattened(layers: list[Layer], flat: Tensor, like: Params) -> Params:
    """Return what `flattened` was given, in the order of `like`."""
    out: Params = {}
    parts = flat.split([layer.grads[0].numel() for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        out |= layer.split(part.reshape(layer.grads.shape[1:]))
    return {n: out[n] for n in like}


# -- one pass over the data ----------------------------------------------------------------


def measured(model: Any, batch: Any, *, labels: str, seed: int = 0) -> list[Layer]:
    """Return the factors of every layer that is trained.

    Args:
        model: a PEFT model with exact DoRA adapters and a linear head.
        batch: examples.
        labels: `"sampled"`, one label for each example from the model's distribution:
            one forward and one backward pass; `"all"`, every class with its probability:
            a backward pass for each; `"given"`, the data's: its gradient, for a check.
        seed: of the sampled labels.
    """
    adapters = dora_layers(model)
    head = _head_of(model)
    with _listening([layer.module for _, layer in adapters] + [head[1]]) as heard:
        logits = model(**batch).logits
    columns = _cotangents(logits.detach(), batch["labels"], labels, seed)
    outs = [heard[layer.module][1] for _, layer in adapters] + [heard[head[1]][1]]
    pulled = [torch.autograd.grad(logits, outs, c, retain_graph=True) for c in columns]
    kept = batch["attention_mask"].to(logits.dtype)
    layers: list[Layer] = []
    for i, (name, layer) in enumerate(adapters):
        grads = torch.cat([p[i] for p in pulled])
        layers += _of_adapter(name, layer, heard[layer.module][0], grads, kept)
    x = torch.cat(
        [heard[head[1]][0], torch.ones(len(logits), 1, dtype=logits.dtype)], 1
    )
    g = torch.cat([p[-1] for p in pulled])
    n = len(x)
    each = torch.einsum("ko,ki->koi", g, x.repeat(len(pulled), 1)) / n**0.5
    layers.append(
        Layer(f"{head[0]}.weight", f"{head[0]}.bias", x.T @ x / n, g.T @ g / n, each)
    )
    return layers


def _of_adapter(
    name: str, layer: DoraAdapter, x: Tensor, g: Tensor, kept: Tensor
) -> list[Layer]:
    """Return A and B of a DoRA layer, by its inputs and the gradients of its outputs."""
    a, b, s = layer.lora_a.detach(), layer.lora_b.detach(), layer.scaling
    v = layer.module.get_base_layer().weight.detach() + s * b @ a
    norm = torch.linalg.vector_norm(v, dim=1)
    unit, gain = v / norm[:, None], layer.magnitude.detach() / norm
    n, again = len(x), len(g) // len(x)
    tokens = float(kept.sum())
    x = x * kept[:, :, None]  # padding takes part in nothing
    low = x @ a.T
    after = gain * g  # the gradient of V x
    many = x.repeat(again, 1, 1)
    low_many = low.repeat(again, 1, 1)
    # V's norm takes away what lies along V: dV = gain (g xᵀ - (g · Vx/|V|) V/|V|).
    along = (g * (many @ unit.T)).sum(1) * gain
    back = after @ b
    in_b = s * (
        torch.einsum("kto,ktr->kor", after, low_many) - along[:, :, None] * (unit @ a.T)
    )
    in_a = s * (
        torch.einsum("ktr,kti->kri", back, many)
        - torch.einsum("or,ko,oi->kri", b, along, unit)
    )
    path = f"{name}.lora_{{}}.{layer.adapter}.weight"

    def moment(t: Tensor, count: float) -> Tensor:
        flat = t.flatten(0, 1)
        return flat.T @ flat / count

    return [
        Layer(
            path.format("A"),
            None,
            moment(x, tokens),
            moment(s * back, n),
            in_a / n**0.5,
        ),
        Layer(
            path.format("B"),
            None,
            moment(low, tokens),
            moment(s * after, n),
            in_b / n**0.5,
        ),
    ]


def _cotangents(logits: Tensor, given: Tensor, labels: str, seed: int) -> list[Tensor]:
    """Return what to pull back: Σ c cᵀ is the Hessian of the cross-entropy, or like it."""
    p = logits.softmax(1)
    hot = torch.nn.functional.one_hot(given, p.shape[1]).to(p)
    if labels == "given":
        return [p - hot]
    if labels == "sampled":
        make = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(p, 1, generator=make)[:, 0]
        return [p - torch.nn.functional.one_hot(drawn, p.shape[1]).to(p)]
    identity = torch.eye(p.shape[1], dtype=p.dtype)
    return [p[:, c, None].sqrt() * (p - identity[c]) for c in range(p.shape[1])]


def _head_of(model: Any) -> tuple[str, Any]:
    (name,) = [
        n.removesuffix(".weight")
        for n, p in model.named_parameters()
        if p.requires_grad and n.endswith("weight") and ".lora_" not in n
    ]
    return name, model.get_submodule(name)


@contextmanager
def _listening(modules: list[Any]) -> Any:
    """Yield what goes into and comes out of modules, filled in by a forward pass."""
    heard: dict[Any, tuple[Tensor, Tensor]] = {}

    def hear(module: Any, inputs: Any, output: Tensor) -> None:
        heard[module] = (inputs[0].detach(), output)

    handles = [module.register_forward_hook(hear) for module in modules]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
