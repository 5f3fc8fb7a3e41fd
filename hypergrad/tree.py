"""Arithmetic on dictionaries of tensors, the vectors of this library.

Every function hands whole lists to torch (`torch._foreach_*`), so that a dictionary of a
hundred small tensors costs a few operations and not hundreds. Numbers stay on the device
until `read` brings several to the host at once: that is the only place here that waits
for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hypergrad import _foreach as foreach

__all__ = [
    "Params",
    "add",
    "all_finite",
    "clone",
    "copy",
    "cosine",
    "dot",
    "map_params",
    "norm",
    "norms",
    "read",
    "relative_error",
    "scale",
    "settled_norm",
    "size",
    "sizes",
    "sub",
    "wide",
    "wide_dtype",
    "widened",
    "zeros_like",
]

Params = dict[str, Tensor]
"""Named tensors: `inner_params`, `outer_params`, and every vector shaped like them."""


# -- arithmetic -------------------------------------------------------------------------


def map_params(fn: Callable[..., Tensor], *trees: Mapping[str, Tensor]) -> Params:
    """Apply `fn` to the tensors of equal name.

    Args:
        fn: takes a tensor of each dictionary.
        trees: dictionaries of the same names.

    Returns:
        What it returned, by name.

    Example:
        >>> map_params(
        ...     torch.maximum, {"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}
        ... )
        {'w': tensor(2.)}
    """
    return {name: fn(*(tree[name] for tree in trees)) for name in trees[0]}


def zeros_like(tree: Mapping[str, Tensor]) -> Params:
    """Return zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(t, requires_grad=False) for name, t in tree.items()}


@torch.no_grad()
def clone(tree: Mapping[str, Tensor]) -> Params:
    """Return detached copies that share no memory with `tree`."""
    return _named(tree, foreach.clone, list(tree.values()))


@torch.no_grad()
def copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors in place, bit for bit where their dtypes agree."""
    if targets:
        foreach.copy_(list(targets), list(values))


@torch.no_grad()
def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float = 1.0) -> Params:
    """Return `a + alpha * b`.

    Example:
        >>> add({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}, alpha=3.0)
        {'w': tensor(7.)}
    """

    def added(x: list[Tensor], y: list[Tensor]) -> Sequence[Tensor]:
        return foreach.add(x, y, alpha=alpha)

    return _named(a, added, list(a.values()), [b[name] for name in a])


@torch.no_grad()
def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Params:
    """Return `a - b`.

    Example:
        >>> sub({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)})
        {'w': tensor(-1.)}
    """
    return _named(a, foreach.sub, list(a.values()), [b[name] for name in a])


@torch.no_grad()
def scale(tree: Mapping[str, Tensor], factor: float | Tensor) -> Params:
    """Return `factor * tree`, in the dtypes of `tree`; a tensor factor has one entry.

    Example:
        >>> scale({"w": torch.tensor([1.0, 2.0])}, 0.5)
        {'w': tensor([0.5000, 1.0000])}
    """
    scaled = _named(tree, foreach.mul, list(tree.values()), factor)
    if isinstance(factor, Tensor):  # which decides the dtype of tensors without axes
        return {n: t.to(tree[n].dtype) for n, t in scaled.items()}
    return scaled


def _named(
    tree: Mapping[str, Tensor], fn: Callable[..., Sequence[Tensor]], *args: object
) -> Params:
    # torch refuses empty lists.
    return dict(zip(tree, fn(*args), strict=True)) if tree else {}


# -- precision --------------------------------------------------------------------------


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the finest dtype of a device: float64, and float32 on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` detached, in the finest dtype of its device."""
    return tensor.detach().to(wide_dtype(tensor.device))


@torch.no_grad()
def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the finest dtype of their device, in one operation."""
    finest = [wide_dtype(t.device) for t in tensors]
    if all(t.dtype == f for t, f in zip(tensors, finest, strict=True)):
        return list(tensors)
    # A factor of one entry takes part in type promotion, where a number does not.
    ones = {
        t.device: torch.ones(1, dtype=f, device=t.device)
        for t, f in zip(tensors, finest, strict=True)
    }
    found = foreach.mul(list(tensors), [ones[t.device] for t in tensors])
    return [
        w if w.shape == t.shape else w.reshape(t.shape)
        for w, t in zip(found, tensors, strict=True)
    ]


# -- numbers ----------------------------------------------------------------------------


def read(scalars: Sequence[Tensor | float]) -> list[float]:
    """Return the values of tensors of one entry: the host waits for the device once.

    Example:
        >>> read([torch.tensor(1.0), 2.0, torch.tensor([3.0])])
        [1.0, 2.0, 3.0]
    """
    tensors = [t.detach() for t in scalars if isinstance(t, Tensor)]
    if not tensors:
        return [float(value) for value in scalars if not isinstance(value, Tensor)]
    device = next((t.device for t in tensors if t.device.type != "cpu"), "cpu")
    device = torch.device(device)
    kind = wide_dtype(device)
    alike = all(t.device == device and t.dtype == kind and not t.dim() for t in tensors)
    if not alike:
        tensors = [t.reshape(()).to(device, kind) for t in tensors]
    found = iter(torch.stack(tensors).tolist())
    return [
        next(found) if isinstance(value, Tensor) else float(value) for value in scalars
    ]


@torch.no_grad()
def sizes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each tensor, on its device, accumulated in its finest dtype."""
    if not tensors:
        return []
    kinds = {t.device for t in tensors}
    if len(kinds) == 1 and not any(t.is_sparse for t in tensors):
        kind = wide_dtype(next(iter(kinds)))
        return list(foreach.norm(list(tensors), 2, dtype=kind))
    return [
        torch.linalg.vector_norm(
            t.to_dense() if t.is_sparse else t, dtype=wide_dtype(t.device)
        )
        for t in tensors
    ]


@torch.no_grad()
def size(tree: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm as a tensor of one entry, on the device.

    It is right to rounding where it is between 1e-140 and 1e140, and NaN or infinite
    where an entry is; hand it to `settled_norm` once it is read.
    """
    tensors = list(tree.values()) if isinstance(tree, Mapping) else list(tree)
    parts = sizes(tensors)
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    if len(parts) == 1:
        return parts[0]
    device = parts[0].device
    if any(p.device != device for p in parts):
        parts = [p.to(device) for p in parts]
    return torch.linalg.vector_norm(torch.stack(parts))


_SAFE = {torch.float64: 1e140, torch.float32: 1e15}
"""Between 1 over this and this, squares neither overflow nor vanish."""


def settled_norm(value: float, tree: Mapping[str, Tensor] | Sequence[Tensor]) -> float:
    """Return a norm that was read, computed again where its squares left the range."""
    if 1 / _SAFE[torch.float32] < value < _SAFE[torch.float32] or not tree:
        return value
    tensors = list(tree.values()) if isinstance(tree, Mapping) else list(tree)
    safe = min(_SAFE[wide_dtype(t.device)] for t in tensors)
    if 1 / safe < value < safe:
        return value
    return _scaled_norm(tensors)


def norms(*trees: Mapping[str, Tensor] | Sequence[Tensor]) -> list[float]:
    """Return several Euclidean norms at once; see `norm`."""
    found = read([size(tree) for tree in trees])
    return [settled_norm(n, tree) for n, tree in zip(found, trees, strict=True)]


def norm(tree: Mapping[str, Tensor] | Sequence[Tensor]) -> float:
    """Return the Euclidean norm; it neither overflows nor vanishes on its way.

    Norms between 1e-300 and 1e300 are right to rounding. NaN and infinity come through.

    Example:
        >>> import torch
        >>> f"{norm({'w': torch.tensor([3e30, 4e30])}):.6g}"
        '5e+30'
    """
    return norms(tree)[0]


def _scaled_norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm by way of the largest entry, at two reads."""
    parts = [wide(t).reshape(-1) for t in tensors if t.numel()]
    if not parts:
        return 0.0
    peaks = read([torch.linalg.vector_norm(p, math.inf) for p in parts])
    largest = math.nan if any(map(math.isnan, peaks)) else max(peaks)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    (scaled,) = read([size([p / largest for p in parts])])
    return largest * scaled


@torch.no_grad()
def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product, accumulated in the finest dtype.

    Example:
        >>> import torch
        >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
        11.0
    """
    if not a:
        return 0.0
    parts = foreach.mul(widened(list(a.values())), widened([b[name] for name in a]))
    device = parts[0].device
    return read([torch.stack([p.sum().to(device) for p in parts]).sum()])[0]


def all_finite(tree: Mapping[str, Tensor]) -> bool:
    """Return whether no entry is NaN or infinite."""
    return math.isfinite(norm(tree))


# -- distance ---------------------------------------------------------------------------


def relative_error(value: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return the relative L2 distance, in the finest dtype; infinite where truth is 0.

    Example:
        >>> import torch
        >>> relative_error({"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])})
        0.5
    """
    length, own = norms(truth, value)
    if own == 0.0 and 0.0 < length < math.inf:
        return 1.0
    if length == 0.0 or not math.isfinite(length):
        return 0.0 if own == length == 0.0 else math.inf
    units = {n: wide(t) / length for n, t in truth.items()}
    return norm({n: wide(value[n]).to(t.device) / length - t for n, t in units.items()})


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float | None:
    """Return the cosine of the angle between two, None where one is 0.

    Example:
        >>> import torch
        >>> cosine({"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([1.0, 1e-9])})
        1.0
    """
    lengths = norm(a), norm(b)
    if 0.0 in lengths:
        return None
    first, second = (
        {n: wide(t).cpu() / length for n, t in tree.items()}
        for tree, length in zip((a, b), lengths, strict=True)
    )
    return max(-1.0, min(1.0, dot(first, second)))
