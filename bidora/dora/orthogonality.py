r"""The Gram regulariser of BiDoRA, at the cost of a few thin products.

With V = W0 + s·B·A, rows divided by their norms in $\hat V$, a layer's term is

$$\|\hat V \hat V^\top - I\|_F^2 = \|\hat V \hat V^\top\|_F^2 - \mathrm{out} .$$

The Gram matrix is $V V^\top = G_0 + C B^\top + B C^\top$ with
$G_0 = W_0 W_0^\top$ and
$C = s\,W_0 A^\top + \tfrac{s^2}{2} B (A A^\top)$, both `(out, r)` but for
$G_0$. With $e_i$ the inverse squared row norms, the squared norm becomes

$$\sum_{ij} e_i e_j (G_0)_{ij}^2
  + 4 \langle C_e, G_0 B_e \rangle
  + 2 \langle C^\top C_e, B^\top B_e \rangle
  + 2 \operatorname{tr} (B^\top C_e)^2,
  \qquad C_e = \operatorname{diag}(e)\, C ,$$

so $V$ is never formed and $G_0$ is all that depends on `in`. Rows of V that are zero have
no direction and no part in the term.

The gradient is thin too. With $M = V V^\top$, $E = \operatorname{diag}(e)$ and
$h_i = e_i^2 \sum_j e_j M_{ij}^2$,

$$\partial / \partial V = 4\,(E M E - \operatorname{diag}(h))\,V ,$$

of which $s\,V A^\top$ on the right gives that of $B$, and $s\,B^\top$ on the left that
of $A$.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bidora.dora import forward as dora
from bidora.dora import norms as _norms
from bidora.dora import peft as _peft
from bidora.dora.function import is_last, is_plain
from bidora.dora.norms import BaseNorms, BaseWeight, WeightCache

__all__ = ["gram_penalty", "orthogonality"]

# Squares of W Wᵀ are summed over this many entries at a time on a CPU: 256 KiB in
# float32, which stay in its cache.
SQUARED_ELEMENTS = 1 << 16


class _Gram:
    """The matrix W Wᵀ as blocks of rows, from a copy of it or made when needed."""

    def __init__(self, weight: BaseWeight, dtype: torch.dtype, full: Tensor | None):
        self.weight = weight
        self.dtype = dtype
        self.full = full

    def blocks(self) -> Iterator[Tensor]:
        """Yield the rows of W Wᵀ, `(k, out)` at a time."""
        dense = self.weight.fetch() if self.full is None else self.full
        rows = max(1, _norms.BLOCK_ELEMENTS // max(dense.shape))
        for start in range(0, dense.shape[0], rows):
            left = dense[start : start + rows].to(self.dtype)
            if self.full is None:
                right = _norms.row_blocks(dense, self.dtype)
                left = torch.cat([left @ block.T for _, block in right], dim=1)
            yield left

    def times(self, x: Tensor) -> Tensor:
        """Return W Wᵀ x, `(out, k)`."""
        parts = [rows @ x for rows in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def times_both(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return W Wᵀ x, and the squares of W Wᵀ times e, `(out,)`."""
        products, squares = [], []
        for block in self.blocks():
            count = block.shape[0]
            if block.device.type == "cpu":
                count = max(1, SQUARED_ELEMENTS // block.shape[1])
            for rows in block.split(count):
                products.append(rows @ x)
                squares.append(rows.square() @ e)
        return torch.cat(products), torch.cat(squares)


class _GramProducts(torch.autograd.Function):
    r"""The linear map $(X, e) \mapsto (G_0 X, (G_0 \circ G_0)\, e)$.

    Both matrices are symmetric, so the map is its own derivative in either mode, any
    number of times, and nothing of size `(out, out)` is kept for the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, e: Tensor, stored: Tensor, gram: _Gram
    ) -> tuple[Tensor, Tensor]:
        with _norms.autocast_off(x.device):
            return gram.times_both(x, e)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, stored, ctx.gram = inputs
        ctx.save_for_backward(stored)  # for its version check
        ctx.save_for_forward(stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (stored,) = ctx.saved_tensors
        return *_gram_products(grads[0], grads[1], stored, ctx.gram), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        (stored,) = ctx.saved_tensors
        return _gram_products(tangents[0], tangents[1], stored, ctx.gram)


def _gram_products(
    x: Tensor, e: Tensor, stored: Tensor, gram: _Gram
) -> tuple[Tensor, Tensor]:
    """Apply `_GramProducts`, typed."""
    return cast(tuple[Tensor, Tensor], _GramProducts.apply(x, e, stored, gram))


def gram_penalty(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float = 1.0
) -> Tensor:
    r"""Return $\|\hat V \hat V^\top - I\|_F^2$ of one adapted weight.

    Differentiable twice in `lora_a`, `lora_b` and, where it requires a gradient,
    `weight`. The value is a difference of numbers of size `out`, so its absolute error
    is that of `out`: 1e-7 · out in float32.

    Args:
        weight: W0, `(out, in)`.
        lora_a: A, `(r, in)`.
        lora_b: B, `(out, r)`.
        scaling: s.

    Returns:
        A scalar in float32, in float64 where a tensor is float64.

    Example:
        The rows (3, 0) and (3, 0) + (0, 4) have cosine 3/5, twice off the diagonal.

        >>> import torch
        >>> W, A = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> B = torch.tensor([[0.0], [1.0]])
        >>> print(f"{gram_penalty(W, A, B):.4f}")  # 2 · 0.36
        0.7200
    """
    rows = BaseWeight.of(weight)
    dtype = _norms.compute_dtype(weight, lora_a, lora_b)
    base = _norms.base_norms(rows, dtype)
    return _Term(_Gram(rows, dtype, None), scaling, base)(lora_a, lora_b)


def orthogonality(
    model: nn.Module, *, adapter: str | None = None, max_cache_bytes: int = 1 << 30
) -> Tensor:
    r"""Return BiDoRA's regulariser, summed over the DoRA layers of a model.

    $$R = \sum_\text{layers} \|\hat V \hat V^\top - I_\text{out}\|_F^2,$$
        \qquad V = W_0 + s B A \text{ with rows normalised}

    Exact, differentiable twice in A and B. A convolution's rows are its kernels, an
    embedding's the columns of its table. Normalised rows go with magnitudes per
    output feature; the Gram matrix of the input axis, $\hat V^\top \hat V$,
    gives the same plus the constant in − out per layer.

    Cost per layer: O(out²·r) and `(out, out)` numbers kept while the base weight stays
    as it is. Where these would exceed `max_cache_bytes`, rows of $W_0 W_0^\top$
    are made anew each time, in blocks, for O(out²·in).

    Args:
        model: A model with DoRA layers, exact or not.
        adapter: Name of one adapter; by default each layer's active ones.
        max_cache_bytes: Most bytes to keep, over all layers.

    Returns:
        A scalar on the device of the first layer, in float32 or float64.

    Raises:
        ValueError: No layer has such a DoRA adapter, one is a convolution in groups,
            adapters are merged into the base weights, or `max_cache_bytes` is negative.
    """
    if max_cache_bytes < 0:
        raise ValueError(
            f"max_cache_bytes={max_cache_bytes} is negative; use 0 to keep nothing."
        )
    named = [
        (name, layer)
        for name, layer in _peft.dora_layers(model)
        if not _peft.obstacle(layer)
        and (layer.is_active if adapter is None else layer.adapter == adapter)
    ]
    layers = [layer for _, layer in named]
    if not layers:
        which = (
            "active adapter as DoRA" if adapter is None else f"DoRA adapter {adapter!r}"
        )
        raise ValueError(
            f"No layer has the {which}, so there is no direction to "
            "regularise. Make one with LoraConfig(use_dora=True), activate it with "
            "model.set_adapter(name), or leave the regulariser out."
        )
    grouped = [name for name, layer in named if layer.groups > 1]
    if grouped:
        raise ValueError(
            f"{', '.join(grouped)} are convolutions in groups, whose kernels see "
            "different channels, so that no angle between them has a meaning. Set "
            "orthogonality=0, or leave them out of target_modules."
        )
    if any(layer.is_merged for layer in layers):
        raise ValueError(
            "Adapters are merged into the base weights, so W0 is not there to compute "
            "with. Call unmerge_adapter() first."
        )
    size = sum(max(4, x.lora_b.itemsize) * x.lora_b.shape[0] ** 2 for x in layers)
    total: Tensor | None = None
    for layer in layers:
        base, weight = dora.base_norms(layer), layer.weight
        kept = size <= max_cache_bytes
        gram = _cached_gram(weight, base.squared.dtype, layer.cache, kept)
        rows = layer.cache.get(weight.key(), dora.rows_name(layer))
        term = _Term(gram, layer.scaling, base, rows)(layer.lora_a, layer.lora_b)
        total = term if total is None else total + term.to(total.device, total.dtype)
    return cast(Tensor, total)


@dataclass(frozen=True)
class _Term:
    """The term of one layer, as a function of its factors.

    Attributes:
        gram: Of the base weight.
        scaling: s.
        base: What the norms need of the base weight.
        rows: Whose norms are computed from their entries, if known.
    """

    gram: _Gram
    scaling: float
    base: BaseNorms
    rows: Tensor | None = None

    def __call__(self, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """Return the term, a scalar."""
        weight, dtype = self.gram.weight, self.gram.dtype
        with _norms.autocast_off(lora_a.device):
            a, b = lora_a.to(dtype), lora_b.to(dtype)
            if weight.key() is not None and is_plain():
                thin = self.expansion(a, b)
                if thin is not None:
                    return cast(Tensor, _Penalty.apply(a, b, weight.stored, self, thin))
            return self.by_autograd(a, b)

    @torch.no_grad()
    def expansion(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...] | None:
        """Return squared norms, s·V·Aᵀ and A·Aᵀ; None where the norms lose digits."""
        base = self.base
        if self.rows is not None or base.zero is not None:
            return None
        squared, minus, inner = _norms.expansion(
            self.gram.weight, a, b, self.scaling, base.squared
        )
        if squared.device.type == "cpu" and _norms.cancels(squared, base.guard):
            return None
        return squared, minus.neg().T.contiguous(), inner

    def by_autograd(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the term of factors in the compute dtype, differentiable in any way."""
        base, scaling = self.base, self.scaling
        squared = _norms.squared_norms(self.gram.weight, a, b, scaling, base, self.rows)
        gone = _norms.without_norm(squared, base)
        return _penalty(self.gram, a, b, scaling, squared, gone)


class _Penalty(torch.autograd.Function):
    """A term and its gradient in closed form, for autograd's backward pass alone."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        stored: Tensor,
        term: _Term,
        thin: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        expanded, k, inner = thin
        squared = expanded.clamp(min=term.base.floor)
        e = squared.reciprocal()
        c = torch.addmm(k, b, inner, alpha=-0.5 * term.scaling**2)
        b_e, c_e = e[:, None] * b, e[:, None] * c
        g_b, squares = term.gram.times_both(b_e, e)
        bb, bc, cc = b.T @ b_e, b.T @ c_e, c.T @ c_e
        ctx.save_for_backward(a, b, stored)
        ctx.term, ctx.clamped = term, expanded < squared
        ctx.kept = (e, k, inner, c, c_e, g_b, squares, bb, bc, cc)
        return (
            e @ squares
            + 4 * (c_e * g_b).sum()
            + 2 * (cc * bb).sum()
            + 2 * (bc * bc.T).sum()
            - squared.numel()
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, _ = ctx.saved_tensors
        with _norms.autocast_off(a.device):
            if is_last():
                in_a, in_b = _penalty_gradient(ctx, a, b)
                return grads[0] * in_a, grads[0] * in_b, None, None, None
            with torch.enable_grad():
                value = ctx.term.by_autograd(a, b)
        wanted = ctx.needs_input_grad[:2]
        own = [t for t, is_wanted in zip((a, b), wanted, strict=True) if is_wanted]
        found = iter(torch.autograd.grad(value, own, create_graph=True))
        moved = (grads[0] * next(found) if is_wanted else None for is_wanted in wanted)
        return *moved, None, None, None


def _penalty_gradient(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient in A and B, by what the forward pass kept."""
    term: _Term = ctx.term
    e, k, inner, c, c_e, g_b, squares, bb, bc, cc = ctx.kept
    s, half, column = term.scaling, 0.5 * term.scaling**2, e[:, None]
    g_c = term.gram.times(c_e)
    h = squares + 2 * ((c * g_b) + (b * g_c)).sum(1)
    h += ((c @ bb + 2 * (b @ bc.T)) * c + (b @ cc) * b).sum(1)
    h = torch.where(ctx.clamped, 0.0, e.square() * h)[:, None]
    # M E K and M E B, with K = s V Aᵀ = C + s²/2 B A Aᵀ.
    m_k = g_c + c @ (bc + half * (bb @ inner)) + b @ (cc + half * (bc.T @ inner))
    m_k = torch.addmm(m_k, g_b, inner, alpha=half)
    m_b = g_b + c @ bb + b @ bc.T
    z = (column * m_b - h * b).T
    in_a = torch.addmm(
        _norms.times_rows(z, term.gram.weight, adjoint=True), z @ b, a, alpha=s
    )
    return 4 * s * in_a, 4 * (column * m_k - h * k)


def _penalty(
    gram: _Gram,
    a: Tensor,
    b: Tensor,
    scaling: float,
    squared: Tensor,
    gone: Tensor | None,
) -> Tensor:
    """Return the penalty, given the rows' squared norms and which of them are zero."""
    dtype, weight = gram.dtype, gram.weight
    with _norms.autocast_off(a.device):
        e, rows = squared.reciprocal(), squared.numel()
        if gone is not None:
            e, rows = torch.where(gone, 0.0, e), (~gone).sum()
        cross = _norms.times_rows(a, weight).T
        c = torch.addmm(cross, b, a @ a.T, beta=scaling, alpha=scaling**2 / 2)
        b_e, c_e = e[:, None] * b, e[:, None] * c
        if weight.key() is None:
            dense = weight.fetch().to(dtype)
            full = dense @ dense.T
            g_b, squares = full @ b_e, full.square() @ e
        else:
            g_b, squares = _gram_products(b_e, e, weight.stored, gram)
        mixed = b.T @ c_e
        frobenius = (
            e @ squares
            + 4 * (c_e * g_b).sum()
            + 2 * ((c.T @ c_e) * (b.T @ b_e)).sum()
            + 2 * (mixed * mixed.T).sum()
        )
    return frobenius - rows


def _cached_gram(
    weight: BaseWeight, dtype: torch.dtype, cache: WeightCache, kept: bool
) -> _Gram:
    """Return W Wᵀ, from the cache or into it where it is `kept`."""
    key, name = weight.key(), f"gram-{dtype}"
    if not kept or key is None:
        return _Gram(weight, dtype, None)
    full = cache.get(key, name)
    if full is None:
        with torch.inference_mode(False), torch.no_grad():
            full = torch.cat(list(_Gram(weight, dtype, None).blocks()))
        cache.put(key, name, full)
    return _Gram(weight, dtype, full)
