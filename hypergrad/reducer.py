"""Averages and agreements over the ranks of a data-parallel run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad import errors
from hypergrad.errors import HypergradError, RankError
from hypergrad.tree import Params

__all__ = ["Contribution", "Reducer"]

_TEXT = 2000
"""Bytes of an error's message that other ranks are told."""


@dataclass
class Contribution:
    """What one evaluation gives, on one rank or averaged over all of them.

    Attributes:
        values: gradients or products, by name.
        loss: the loss, a tensor of one entry; None where there is none.
        unused: names that the evaluation did not depend on; over ranks, that none did.
        extra: what stays on its rank.
    """

    values: Params
    loss: Tensor | None = None
    unused: set[str] = field(default_factory=set)
    extra: Any = None


class Reducer:
    r"""Average over the ranks of a data-parallel run; the identity on one process.

    With rank losses $g_r$ the loss of the run is $g = \tfrac1R\sum_r g_r$. Gradients
    and products are linear in g, so each is averaged where it is made, before it is used
    as a direction. Whatever decides what is done next is decided on averaged values, so
    that all ranks do the same.

    An evaluation sends one message: what it computed, in one dtype of at least float32,
    on the parameters' own device, with a few numbers in front (whether it failed, its
    loss, what it did not use). Where it failed on some rank, all ranks raise the same
    error, which names the rank.

    Args:
        group: the process group; None for the default one, where torch.distributed is
            initialised when a message is due.

    Raises:
        TypeError: `group` is not a process group.

    Example:
        On one process:

        >>> import torch
        >>> Reducer().mean({"w": torch.ones(2)})["w"]
        tensor([1., 1.])
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        # What new_group returns on a rank that is not in the group.
        if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
            msg = (
                "this process is not a member of the process group that the problem "
                "averages over. Pass group= a group that holds this rank."
            )
            raise ValueError(msg)
        if group is not None and not isinstance(group, dist.ProcessGroup):
            msg = (
                f"group must be a torch.distributed.ProcessGroup or None, got "
                f"{type(group).__name__}. Pass what torch.distributed.new_group returned."
            )
            raise TypeError(msg)
        self.group = group
        self._seen = 0

    @property
    def ranks(self) -> int:
        """Number of ranks; 1 where torch.distributed is not initialised.

        Raises:
            HypergradError: the process group is gone, and was there before.
        """
        alive = dist.is_available() and dist.is_initialized()
        gone = self.group is not None and not alive
        count = 1
        try:
            if alive:
                dist.get_rank(self.group)  # raises where the group was destroyed
                count = dist.get_world_size(self.group)
        except (ValueError, RuntimeError):
            gone = True
        if gone or (count == 1 and self._seen > 1):
            msg = (
                f"the process group of {self._seen or 'several'} ranks is gone: it was "
                "destroyed while the problem was in use, and gradients would no longer "
                "be averages. Keep it until training ends, or make the problem anew."
            )
            raise HypergradError(msg)
        self._seen = count
        return count

    @property
    def rank(self) -> int:
        """This process's number within the group; 0 on one process."""
        return dist.get_rank(self.group) if self.ranks > 1 else 0

    # -- averages -----------------------------------------------------------------------

    def together(
        self,
        like: Mapping[str, Tensor],
        compute: Callable[[], Contribution],
        home: Mapping[str, Tensor] | None = None,
    ) -> Contribution:
        """Compute on every rank, and return the average on each.

        Args:
            like: names, shapes, dtypes and devices of the values, for a rank that fails.
            compute: the evaluation; it must not send messages of its own.
            home: tensors that say where a message lies; None for `like`.

        Returns:
            The average; losses too. Names are unused where no rank used them.

        Raises:
            HypergradError: an error of the same class as that of the first rank that
                failed, with its number and message; `RankError` where the class is not
                one of this library.
        """
        if self.ranks == 1:
            return compute()
        failure: Exception | None = None
        try:
            mine = compute()
        except Exception as error:
            failure = error
            mine = Contribution({n: torch.zeros_like(t) for n, t in like.items()})
        return self._average(like, mine, failure, self._device(home or like))

    def mean(self, tree: Mapping[str, Tensor]) -> Params:
        """Return the mean of `tree` over all ranks; names and shapes agree on each."""
        return self.together(tree, lambda: Contribution(dict(tree))).values

    def _average(
        self,
        like: Mapping[str, Tensor],
        mine: Contribution,
        failure: Exception | None,
        device: torch.device,
    ) -> Contribution:
        ranks, rank = self.ranks, self.rank
        # Sorted, so that ranks agree on the order even where their dictionaries do not.
        names = sorted(like)
        kind = torch.float32
        for t in like.values():
            kind = torch.promote_types(kind, t.dtype)
        failed = [0.0] * ranks
        failed[rank] = float(failure is not None)
        used = [float(failure is None and n not in mine.unused) for n in names]
        has_loss = mine.loss is not None
        head = torch.tensor([*failed, float(has_loss), *used], dtype=kind).to(device)
        loss = mine.loss.detach() if mine.loss is not None else torch.zeros(())
        parts = [head, loss.reshape(1).to(device, kind)]
        parts += [mine.values[n].detach().reshape(-1).to(device, kind) for n in names]
        flat = torch.cat(parts)
        dist.all_reduce(flat, group=self.group)
        told = flat[: len(head)].tolist()
        if any(told[:ranks]):
            first = next(r for r, count in enumerate(told[:ranks]) if count)
            raise self._same_error(first, failure, device)
        rest = flat[len(head) :] / ranks
        values: Params = {}
        start = 1
        for name in names:
            t = like[name]
            part = rest[start : start + t.numel()]
            # A copy: each mean owns its memory.
            values[name] = part.reshape(t.shape).to(t.device, t.dtype, copy=True)
            start += t.numel()
        counts = dict(zip(names, told[ranks + 1 :], strict=True))
        return Contribution(
            {n: values[n] for n in like},
            rest[0] if told[ranks] else None,
            {n for n in names if not counts[n]},
            mine.extra,
        )

    def _device(self, like: Mapping[str, Tensor]) -> torch.device:
        """Return where a message lies: with the parameters, as their backend expects."""
        return next((t.device for t in like.values()), torch.device("cpu"))

    # -- agreements ---------------------------------------------------------------------

    def any(self, flag: bool, like: Mapping[str, Tensor]) -> bool:
        """Return whether the flag is True on some rank.

        Args:
            flag: this rank's own.
            like: tensors of the problem, which say where a message lies.
        """
        return bool(self.largest(1, lambda: [float(flag)], like)[0])

    def largest(
        self,
        count: int,
        compute: Callable[[], Sequence[float]],
        like: Mapping[str, Tensor],
    ) -> list[float]:
        """Return the largest of each of a few numbers; where one rank raises, all do.

        Args:
            count: how many numbers.
            compute: returns this rank's.
            like: tensors of the problem, which say where a message lies.
        """
        if self.ranks == 1:
            return list(compute())
        ranks, device = self.ranks, self._device(like)
        failure: Exception | None = None
        try:
            mine = list(compute())
        except Exception as error:
            failure, mine = error, [0.0] * count
        failed = [0.0] * ranks
        failed[self.rank] = float(failure is not None)
        flat = torch.tensor([*failed, *mine]).to(device)
        dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=self.group)
        told = flat.tolist()
        if any(told[:ranks]):
            raise self._same_error(told.index(1.0), failure, device)
        return told[ranks:]

    def check_same(self, what: str, text: str, like: Mapping[str, Tensor]) -> None:
        """Refuse ranks that were set up differently.

        Args:
            what: what the text describes, for the message.
            text: a description that has to be the same on each rank.
            like: tensors of the problem, which say where a message lies.

        Raises:
            ValueError: on every rank, with the texts of the first two that differ.
        """
        if self.ranks == 1:
            return
        device = self._device(like)
        # What is too long to be sent whole is told apart all the same.
        mine = _packed(f"{zlib.crc32(text.encode()):08x}{text}").to(device)
        every = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(every, mine, group=self.group)
        texts = [_unpacked(each) for each in every]
        for r, other in enumerate(texts):
            if other != texts[0]:
                msg = (
                    f"ranks differ in {what}: rank 0 has {texts[0][8:]}, rank {r} has "
                    f"{other[8:]}. Their messages would not fit each other; make the same "
                    "on every rank."
                )
                raise ValueError(msg)

    def _same_error(
        self, first: int, own: Exception | None, device: torch.device
    ) -> Exception:
        """Return the error of the first rank that failed, told to all of them."""
        own_name = type(own).__name__ if own is not None else ""
        packed = _packed(f"{own_name}\n{own}").to(device)
        source = (
            first if self.group is None else dist.get_global_rank(self.group, first)
        )
        dist.broadcast(packed, source, group=self.group)
        name, _, text = _unpacked(packed).partition("\n")
        known = {n: getattr(errors, n) for n in errors.__all__}
        # Which is caught where less memory is a way out.
        known["OutOfMemoryError"] = torch.OutOfMemoryError
        kind: Any = known.get(name, RankError)
        if not issubclass(kind, (HypergradError, torch.OutOfMemoryError)):
            kind = RankError
        said = (
            text if kind is not RankError or name == "RankError" else f"{name}: {text}"
        )
        told = kind(f"rank {first} of {self.ranks} failed: {said}")
        told.__cause__ = own
        return told


def _packed(text: str) -> Tensor:
    """Return a text as a tensor of fixed size, which every backend can send."""
    raw = text.encode()[:_TEXT]
    return torch.tensor(list(raw.ljust(_TEXT, b"\0")), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> str:
    raw: Sequence[int] = packed.tolist()
    return bytes(raw).rstrip(b"\0").decode(errors="ignore")  # one that was cut
