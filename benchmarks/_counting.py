"""Count what a computation hands to the device, and how often the host waits for it.

    with counted() as counts:
        optimizer.step()
    counts.operations, counts.reads

An operation is what torch dispatches after autograd: about one kernel each on a GPU. A
read brings a number from the device to the host, which waits for all that was asked
before: `.item()`, `float()`, `bool()`, `torch.equal`, indices of what is not zero,
`.tolist()`, `.numpy()` and `.cpu()`. On a CPU nobody waits, but the count is the same.

AdamW and Adam read their own `step` of each tensor, which lies on the host: no read of the
device. Those are float32 of no dimension, and are left out. **So count with a float64
model**, or reads of other float32 scalars on the host are left out with them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
"""Operations of aten whose answer the host needs before it can go on."""
READING_CALLS: dict[Callable[..., Any], str] = {
    Tensor.tolist: "tolist",
    Tensor.numpy: "numpy",
    Tensor.cpu: "cpu",
}
"""Calls that read, and that on a CPU dispatch nothing."""
_TORCH = str(Path(torch.__file__).parent)


@dataclass
class Counts:
    """What was counted.

    Attributes:
        operations: dispatched operations, reads among them.
        reads: times that the host needed a number.
        by_operation: operations by name.
        by_place: reads by `file:line` of the code that asked, torch's own left out.
    """

    operations: int = 0
    reads: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    by_place: Counter[str] = field(default_factory=Counter)

    def _read(self) -> None:
        self.reads += 1
        self.by_place[_place()] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.counts.operations += 1
        self.counts.by_operation[name] += 1
        if name in READS and not _is_step(args[0]):
            self.counts._read()
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in READING_CALLS:
            self.counts._read()
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what the block does, its backward passes included."""
    counts = Counts()
    with _Operations(counts), _Calls(counts):
        yield counts


def _is_step(tensor: Tensor) -> bool:
    """Tell an optimizer's own count of steps."""
    host = tensor.device.type == "cpu"
    return host and tensor.dim() == 0 and tensor.dtype == torch.float32


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith((_TORCH, "<")):
            return f"{_below_root(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def _below_root(path: str) -> str:
    """Return a path as it is imported, without where that is on this machine."""
    roots = [root for root in (str(Path.cwd()), *sys.path) if root]
    inside = [root for root in roots if path.startswith(root)]
    return path.removeprefix(max(inside, key=len, default="")).lstrip("/")
