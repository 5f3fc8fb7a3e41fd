r"""Row norms of an adapted weight from its low-rank factors, and their cache.

For a frozen weight $W$ with rows $w_i$, factors $A$, $B$ with
rows $b_i$ and scaling $s$,

$$\|w_i + s\,b_i A\|^2
  = \|w_i\|^2 + 2 s\, b_i \cdot (A w_i) + s^2\, b_i (A A^\top) b_i^\top .$$

Everything is computed in float32 (float64 where a tensor is float64) with autocast off:
in bfloat16 the value is off by 5e-4 and its derivative by tens of percent. This file
knows tensors only; PEFT is met in ``peft.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from bidora.dora.function import Function

__all__ = [
    "BLOCK_ELEMENTS",
    "CANCELLATION",
    "COMPILED_ROWS",
    "BaseNorms",
    "BaseWeight",
    "WeightCache",
    "autocast_off",
    "base_norms",
    "cached_base_norms",
    "cancelled_rows",
    "cancels",
    "compute_dtype",
    "expanded_norms",
    "expansion",
    "frozen_product",
    "gains",
    "identity",
    "near_cancellation",
    "row_blocks",
    "squared_norms",
    "times_rows",
    "without_direction",
    "without_norm",
]

# Rows of a weight that is not stored in the compute dtype are converted this many
# elements at a time: 16 MiB in float32.
BLOCK_ELEMENTS = 1 << 22

# Below this fraction of ‖w_i‖² the expansion has lost about a digit to cancellation,
# and the row is computed from its entries instead.
CANCELLATION = 0.25

# Rows that a compiled graph computes from their entries in every forward pass.
COMPILED_ROWS = 8


@dataclass(frozen=True)
class BaseWeight:
    """The frozen weight of a layer, as rows of output features.

    Attributes:
        stored: The tensor that holds the weight, quantised or not; its storage and
            version identify the weight.
        fetch: Returns the dense weight, `(out, in)`.
        quantised: Whether `fetch` builds a new tensor from `stored`.
    """

    stored: Tensor
    fetch: Callable[[], Tensor]
    quantised: bool = False

    @classmethod
    def of(cls, weight: Tensor) -> BaseWeight:
        """Return `weight`, `(out, in)`, as it is."""
        return cls(weight, lambda: weight)

    def key(self) -> tuple[Any, ...] | None:
        """Return what identifies the weight's present value, or None if nothing does.

        None means that the weight must be treated as a variable: it requires a
        gradient, carries a tangent, is traced by a compiler or wrapped by a functional
        transform. The storage is held weakly, because its address alone is reused:
        ``p.data = new`` leaves the version as it was, and the allocator gladly returns
        an address that was just freed.
        """
        tensor = self.stored
        if torch.compiler.is_compiling() or tensor.requires_grad:
            return None
        found = identity(tensor)
        if found is None or forward_ad.unpack_dual(tensor).tangent is not None:
            return None
        return found


def identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return what changes with a tensor's value, as far as torch counts it, or None.

    Args:
        tensor: Any tensor; a functional transform's or an inference tensor has none.
    """
    try:
        storage = StorageWeakRef(tensor.untyped_storage())
        place = (tensor.data_ptr(), tensor._version)
    except RuntimeError:
        return None
    return (storage, *place, tensor.dtype, tensor.device, tensor.shape)


class BaseNorms(NamedTuple):
    """What the norms need of the frozen weight, each `(out,)`.

    Attributes:
        squared: ‖w_i‖².
        guard: Expanded squared norms below this are computed from the entries.
        floor: No expanded squared norm is taken to be less: it is rounding error there.
        zero: Which rows w_i are zero; None where none is known to be.
    """

    squared: Tensor
    guard: Tensor
    floor: Tensor
    zero: Tensor | None


class WeightCache:
    """Values computed from a weight, dropped when the weight changes.

    Copies and pickles are empty (and plain dicts, so that a pickled model needs this
    package for what it computes, never for what it had cached).
    """

    def __init__(self) -> None:
        self._entries: tuple[Any, dict[str, Any]] = (None, {})

    def get(self, key: tuple[Any, ...] | None, name: str) -> Any:
        """Return the value stored under `name` for the weight with `key`, or None."""
        stored_key, values = self._entries
        return values.get(name) if key is not None and stored_key == key else None

    def put(self, key: tuple[Any, ...] | None, name: str, value: Any) -> None:
        """Store `value`; a key other than the last one's drops all that was stored."""
        if key is None:
            return
        if self._entries[0] != key:
            self._entries = (key, {})
        self._entries[1][name] = value

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[()]]:
        return (dict, ())


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 where any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their operands."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the rows, in `dtype`, of each block of `weight`.

    A weight that is stored in `dtype` is one block, since nothing is copied.
    """
    out_features, in_features = weight.shape
    if weight.dtype == dtype:
        yield 0, weight
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, in_features))
    for start in range(0, out_features, rows):
        yield start, weight[start : start + rows].to(dtype)


def base_norms(weight: BaseWeight, dtype: torch.dtype) -> BaseNorms:
    """Return the squared row norms of `weight` and the thresholds made from them."""
    blocks = row_blocks(weight.fetch(), dtype)
    squared = torch.cat([rows.square().sum(1) for _, rows in blocks])
    info = torch.finfo(dtype)
    detached = squared.detach()
    zero = detached == 0
    # Of a frozen weight this is asked once, so the host may wait for the answer.
    known = weight.key() is not None and not bool(zero.any())
    guard, floor = CANCELLATION * detached, info.eps * detached + info.tiny
    return BaseNorms(squared, guard, floor, None if known else zero)


def cached_base_norms(
    weight: BaseWeight, dtype: torch.dtype, cache: WeightCache
) -> BaseNorms:
    """Return `base_norms`, computed once as long as a frozen weight stays as it is."""
    key = weight.key()
    if key is None:
        return base_norms(weight, dtype)
    name = f"norms-{dtype}"
    found = cache.get(key, name)
    if found is None:
        # A tensor made in inference mode could not enter a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            found = base_norms(weight, dtype)
        cache.put(key, name, found)
    return cast(BaseNorms, found)


class _FrozenProduct(Function):
    r"""The linear maps $X \mapsto X W^\top$ and, adjoint, $X \mapsto X W$.

    Plain autograd would keep the converted copy of a bfloat16 or quantised `W` until
    the backward pass; this keeps `W` as it is stored and converts blocks of rows when
    they are needed. Each map is the other's derivative, so both can be differentiated
    any number of times and in both modes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, stored: Tensor, weight: BaseWeight, adjoint: bool) -> Tensor:
        with autocast_off(x.device):
            blocks = row_blocks(weight.fetch(), x.dtype)
            if not adjoint:
                return torch.cat([x @ rows.T for _, rows in blocks], dim=1)
            total = None
            for start, rows in blocks:
                part = x[:, start : start + rows.shape[0]] @ rows
                total = part if total is None else total + part
            return cast(Tensor, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, stored, ctx.weight, ctx.adjoint = inputs
        # Saved for its version check: a weight moved in place before the backward pass
        # raises instead of giving another weight's derivative.
        ctx.save_for_backward(stored)
        ctx.save_for_forward(stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (stored,) = ctx.saved_tensors
        product = frozen_product(grads[0], stored, ctx.weight, not ctx.adjoint)
        return product, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (stored,) = ctx.saved_tensors
        return frozen_product(tangents[0], stored, ctx.weight, ctx.adjoint)


def frozen_product(
    x: Tensor, stored: Tensor, weight: BaseWeight, adjoint: bool
) -> Tensor:
    """Apply `_FrozenProduct`, typed."""
    return cast(Tensor, _FrozenProduct.apply(x, stored, weight, adjoint))


def times_rows(x: Tensor, weight: BaseWeight, adjoint: bool = False) -> Tensor:
    r"""Return $X W^\top$, `(k, out)`, for `x` of shape `(k, in)`; adjoint, $X W$."""
    stored = weight.stored
    same = stored.dtype == x.dtype and not weight.quantised
    if same or weight.key() is None:
        dense = weight.fetch() if same else weight.fetch().to(x.dtype)
        return x @ (dense if adjoint else dense.T)
    return frozen_product(x, stored, weight, adjoint)


def squared_norms(
    weight: BaseWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    base: BaseNorms,
    rows: Tensor | None = None,
    wait: bool = False,
) -> Tensor:
    r"""Return $\|w_i + s\,b_i A\|^2$ of every row, `(out,)`, differentiable.

    Exact but for rounding: where the adapter nearly cancels the weight the expansion
    loses digits (5e-5 at nine tenths cancelled), so such rows are computed from their
    entries. On the CPU they are found here. Elsewhere finding them would stop the host
    until the device is done, so they are those given in `rows`, and an expansion that
    came out below the rounding error of $\|w_i\|^2$ is set to that error, with
    derivative zero.

    Args:
        weight: The frozen weight, `(out, in)`.
        lora_a: `A`, `(r, in)`.
        lora_b: `B`, `(out, r)`.
        scaling: s.
        base: `base_norms(weight, dtype)` in the dtype to compute in.
        rows: Indices of rows to compute from their entries, if known.
        wait: Find them off the CPU too.

    Returns:
        Squared norms, `(out,)`.
    """
    dtype = base.squared.dtype
    with autocast_off(lora_a.device):
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        expanded = expanded_norms(weight, a, b, scaling, base)
        if rows is None:
            rows = cancelled_rows(expanded, base, wait=wait)
        expanded = expanded.clamp(min=base.floor)
        if rows is None:
            return expanded
        entries = weight.fetch()[rows].to(dtype) + scaling * (b[rows] @ a)
        tiny = torch.finfo(dtype).tiny
        return expanded.index_copy(0, rows, entries.square().sum(1).clamp(min=tiny))


def expanded_norms(
    weight: BaseWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    base: BaseNorms,
) -> Tensor:
    """Return the expansion of the squared norms alone, as `squared_norms` starts from.

    Args:
        weight: The frozen weight, `(out, in)`.
        lora_a: `A`, `(r, in)`.
        lora_b: `B`, `(out, r)`.
        scaling: s.
        base: `base_norms(weight, dtype)` in the dtype to compute in.

    Returns:
        Squared norms, `(out,)`.
    """
    dtype = base.squared.dtype
    with autocast_off(lora_a.device):
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        return expansion(weight, a, b, scaling, base.squared)[0]


def expansion(
    weight: BaseWeight, a: Tensor, b: Tensor, scaling: float, base: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the expansion and what its derivatives are made of.

    Args:
        weight: The frozen weight, `(out, in)`.
        a: `A`, `(r, in)`, in the dtype to compute in, as all that follow.
        b: `B`, `(out, r)`.
        scaling: s.
        base: ‖w_i‖², `(out,)`.

    Returns:
        The squared norms, `(out,)`; $-s A V^\top$ with $V = W + s B A$, `(r, out)`; and
        $A A^\top$, `(r, r)`.
    """
    bt, gram = b.T, a @ a.T
    cross = times_rows(a, weight)
    scaled = torch.addmm(cross, gram, bt, beta=-scaling, alpha=-scaling * scaling)
    twice = torch.add(scaled, cross, alpha=-scaling)
    return base - (bt * twice).sum(0), scaled, gram


def cancels(squared: Tensor, guard: Tensor) -> bool | None:
    """Return whether the expansion of some row has lost digits to cancellation.

    Args:
        squared: The squared norms, `(out,)`.
        guard: What none of them may be below, `(out,)`.

    Returns:
        None under vmap: a batch of norms has no single answer.
    """
    try:
        return bool((squared.detach() < guard).any())
    except RuntimeError:
        return None


def cancelled_rows(
    squared: Tensor, base: BaseNorms, *, margin: float = 1.0, wait: bool = False
) -> Tensor | None:
    """Return the rows whose expansion has lost digits to cancellation, None if none.

    A compiled graph cannot branch on how many there are, so it gets the most cancelled
    ones, `COMPILED_ROWS` in number, whether they need it or not.

    Args:
        squared: The squared norms, `(out,)`.
        base: The base's.
        margin: How much sooner than necessary a row counts.
        wait: Look even where that makes the host wait for the device.

    Returns:
        Indices, `(k,)`.
    """
    if torch.compiler.is_compiling():
        share = squared.detach() / base.squared.detach()
        return share.topk(min(COMPILED_ROWS, len(share)), largest=False).indices
    if not (wait or squared.device.type == "cpu"):
        return None
    guard = base.guard if margin == 1.0 else margin * base.guard
    if not cancels(squared, guard):
        return None
    return (squared.detach() < guard).nonzero().squeeze(1)


def without_direction(squared: Tensor, base: BaseNorms) -> Tensor:
    """Return which rows have a norm of zero up to rounding, or one that is not finite.

    A zero row of the weight that is not adapted is none of them.

    Args:
        squared: The squared norms, `(out,)`.
        base: The base's.

    Returns:
        True or False for each row, `(out,)`.
    """
    info = torch.finfo(squared.dtype)
    zero = (8 * info.eps) ** 2 * base.squared + info.tiny
    found = ~((squared > zero) & squared.isfinite())
    gone = without_norm(squared, base)
    return found if gone is None else found & ~gone


def without_norm(squared: Tensor, base: BaseNorms) -> Tensor | None:
    """Return which rows are zero: those of a zero row of the weight, not adapted.

    Args:
        squared: The squared norms, `(out,)`.
        base: The base's.

    Returns:
        True or False for each row, `(out,)`; None where no row of the weight is zero.
    """
    if base.zero is None:
        return None
    return base.zero & (squared.detach() <= torch.finfo(squared.dtype).tiny)


def gains(magnitude: Tensor, squared: Tensor, base: BaseNorms) -> Tensor:
    """Return m / ‖v‖ of each row, and 1, a constant, where v is zero.

    Args:
        magnitude: m, `(out,)`.
        squared: The squared norms, `(out,)`.
        base: The base's.

    Returns:
        Gains, `(out,)`.
    """
    gone = without_norm(squared, base)
    if gone is None:
        return magnitude / squared.sqrt()
    # The norm is replaced before the root: its derivative at 0 would be 0 · ∞.
    whole = magnitude / torch.where(gone, 1.0, squared).sqrt()
    return torch.where(gone, 1.0, whole)


def near_cancellation(squared: Tensor, base: BaseNorms) -> Tensor:
    """Return which rows the adapter has nearly cancelled, or is about to.

    Args:
        squared: The squared norms, `(out,)`.
        base: The base's.

    Returns:
        True or False for each row, `(out,)`.
    """
    return squared < 2.0 * base.guard
