"""Rules that treat each entry alone, written for many tensors at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad.errors import HypergradError
from hypergrad.rules._many import Many
from hypergrad.rules.base import (
    NO_FORWARD,
    Pullback,
    Pushforward,
    Rule,
    Slots,
    State,
)
from hypergrad.tree import Params

__all__ = ["Counts", "ElementwiseRule", "ManySlots"]

_PART = 1 << 16
"""Entries that are pulled back at a time."""
_PART_OF_ACCELERATOR = 1 << 24
"""The same where each operation has to be launched."""

ManySlots = dict[str, Many]
"""Slots of several parameters at once, by slot name; without the step count."""
Counts = list[float]
"""Steps taken before, for each of several parameters."""


class ElementwiseRule(Rule):
    """A rule that treats each entry alone, with the same settings.

    Its formulas are written for `Many` tensors at once.
    """

    kind: ClassVar[str]
    counts_steps: ClassVar[bool] = False
    """Whether the rule depends on how many steps were taken."""
    settings: ClassVar[frozenset[str]] = frozenset()
    """Settings that `pull_settings` and `push_many` know."""
    lr: float

    @abstractmethod
    def step_many(
        self, w: Many, slots: ManySlots, g: Many, counts: Counts
    ) -> tuple[Many, ManySlots]:
        """Return tensors and their slots after a step.

        Args:
            w: parameters before the step.
            slots: their state; all of `w` have the same slots, the step count aside.
            g: gradients.
            counts: number of steps taken before, for each of `w`.
        """

    @abstractmethod
    def pull_many(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_bar: Many,
        slots_bar: ManySlots,
    ) -> tuple[Many, ManySlots, Many]:
        """Return the adjoints of tensors, of their slots and of their gradients."""

    def pull_settings(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_bar: Many,
        slots_bar: ManySlots,
    ) -> dict[str, list[Tensor]]:
        """Return the adjoint of each of `settings`, a tensor for each of `w`.

        Args:
            w: as for `pull_many`.
            slots: likewise.
            g: likewise.
            counts: likewise.
            w_bar: likewise.
            slots_bar: likewise.
        """
        del w, slots, g, counts, w_bar, slots_bar
        return {}

    def push_many(
        self,
        w: Many,
        slots: ManySlots,
        g: Many,
        counts: Counts,
        w_dot: Many,
        slots_dot: ManySlots,
        g_dot: Many,
        settings_dot: Mapping[str, Sequence[Any]],
    ) -> tuple[Many, ManySlots]:
        """Return the tangents of tensors and of their slots after a step.

        Args:
            w: as for `step_many`.
            slots: likewise.
            g: likewise.
            counts: likewise.
            w_dot: tangent of `w`.
            slots_dot: tangents of `slots`; an absent one is zeros.
            g_dot: tangent of `g`.
            settings_dot: for some of `settings`, a number for each of `w` (a pair for
                betas).

        Raises:
            HypergradError: the rule has no forward direction.
        """
        del w, slots, g, counts, w_dot, slots_dot, g_dot, settings_dot
        raise HypergradError(NO_FORWARD.format(type(self).__name__, "push_many"))

    @torch.no_grad()
    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""
        new_params: Params = {}
        new_state: State = {}
        for names in _alike(params, state):
            w = Many(params[n].detach() for n in names)
            g = Many(grads[n].detach().to(params[n].dtype) for n in names)
            counts = _counts([state.get(n, {}) for n in names])
            moved, slots = self.step_many(w, _slots_of(state, names), g, counts)
            for i, name in enumerate(names):
                new_params[name] = moved.tensors[i]
                new_state[name] = {k: t.tensors[i] for k, t in slots.items()}
                if self.counts_steps:
                    new_state[name]["step"] = torch.tensor(counts[i] + 1.0)
        return {n: new_params[n] for n in params}, new_state

    @torch.no_grad()
    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
        settings: Collection[str] = (),
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step, and of settings.

        Raises:
            HypergradError: a setting that the rule has no derivative in.
        """
        self._check_known(settings)
        found: dict[str, list[tuple[Tensor, Slots, Tensor]]] = {n: [] for n in params}
        theta: State = {n: {} for n in params} if settings else {}
        for part in _parts(params, state):
            operands = (
                part.of(params),
                part.slots(state),
                part.of(grads),
                part.counts,
                part.of(params_bar),
                part.slots(state_bar),
            )
            w_bar, slots_bar, g_bar = self.pull_many(*operands)
            # Narrow again at once, but for the adjoint of the state.
            like = part.narrow()
            w_bar, g_bar = w_bar.like(like), g_bar.like(like)
            for i, (name, _) in enumerate(part.pieces):
                rest = {k: t.tensors[i] for k, t in slots_bar.items()}
                found[name].append((w_bar.tensors[i], rest, g_bar.tensors[i]))
            pulled = self.pull_settings(*operands) if settings else {}
            for key in settings:
                for (name, _), bar in zip(part.pieces, pulled[key], strict=True):
                    before = theta[name].get(key)
                    theta[name][key] = bar if before is None else before + bar
        out = Pullback({}, {}, {}, theta)
        for name, w in params.items():
            pieces = found[name]
            out.params[name] = _joined([p[0] for p in pieces], w)
            out.state[name] = {
                k: _joined([p[1][k] for p in pieces], w) for k in pieces[0][1]
            }
            out.grads[name] = _joined([p[2] for p in pieces], w)
        return out

    @torch.no_grad()
    def pushforward(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_dot: Params,
        state_dot: State,
        grads_dot: Params,
        settings_dot: Mapping[str, Slots] | None = None,
    ) -> Pushforward:
        """Return the tangents of w and s after the step.

        Raises:
            HypergradError: the rule has no forward direction, or a setting that it has no
                derivative in.
        """
        theta = settings_dot or {}
        self._check_known({key for each in theta.values() for key in each})
        found: dict[str, list[tuple[Tensor, Slots]]] = {n: [] for n in params}
        for part in _parts(params, state):
            names = [name for name, _ in part.pieces]
            keys = {key for name in names for key in theta.get(name, {})}
            numbers = {
                key: [
                    theta[n][key].tolist()
                    if key in theta.get(n, {})
                    else [0.0, 0.0]
                    if key == "betas"
                    else 0.0
                    for n in names
                ]
                for key in keys
            }
            w_dot, slots_dot = self.push_many(
                part.of(params),
                part.slots(state),
                part.of(grads),
                part.counts,
                part.of(params_dot),
                part.slots(state_dot),
                part.of(grads_dot),
                numbers,
            )
            w_dot = w_dot.like(part.narrow())
            for i, name in enumerate(names):
                rest = {k: t.tensors[i] for k, t in slots_dot.items()}
                found[name].append((w_dot.tensors[i], rest))
        out = Pushforward({}, {})
        for name, w in params.items():
            pieces = found[name]
            out.params[name] = _joined([p[0] for p in pieces], w)
            out.state[name] = {
                k: _joined([p[1][k] for p in pieces], w) for k in pieces[0][1]
            }
        return out

    def differentiable(self, params: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
        """Return the settings of each parameter that it has derivatives in."""
        return dict.fromkeys(params, self.settings)

    def _check_known(self, settings: Collection[str]) -> None:
        unknown = sorted(set(settings) - self.settings)
        if unknown:
            known = ", ".join(sorted(self.settings)) or "none"
            msg = (
                f"{type(self).__name__} has no derivative in {unknown[0]!r} (it has: "
                f"{known}). Learn another setting of the inner optimizer, or take an "
                "optimizer that has this one."
            )
            raise HypergradError(msg)

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter."""
        return dict.fromkeys(params, self.lr)

    def config(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"kind": self.kind, **asdict(self)}  # pyright: ignore[reportArgumentType]


_Piece = tuple[str, "slice | None"]


@dataclass(frozen=True)
class _Part:
    """Pieces of parameters with the same slots, computed with together.

    Attributes:
        params: the parameters.
        pieces: names, and where each is cut.
        counts: steps taken before, for each.
    """

    params: Params
    pieces: list[_Piece]
    counts: Counts

    def of(self, source: Params) -> Many:
        """Return the pieces of tensors, in the finest dtype.

        1/(sqrt(v) + eps)² spans more digits than float32 has.
        """
        return Many(_cut(source[n], i) for n, i in self.pieces).widened()

    def narrow(self) -> Many:
        """Return the pieces of the parameters in their own dtype."""
        return Many(_cut(self.params[n], i) for n, i in self.pieces)

    def slots(self, source: State) -> ManySlots:
        """Return the pieces of slots; zeros where one parameter lacks what another has."""
        held = [source.get(n, {}) for n, _ in self.pieces]
        keys = dict.fromkeys(k for each in held for k in each if k != "step")
        like = self.narrow().tensors if keys else []
        return {
            k: Many(
                _cut(each[k].detach(), i) if k in each else torch.zeros_like(t)
                for each, (_, i), t in zip(held, self.pieces, like, strict=True)
            ).widened()
            for k in keys
        }


def _parts(params: Params, state: State) -> Iterator[_Part]:
    for names in _alike(params, state):
        counts = dict(
            zip(names, _counts([state.get(n, {}) for n in names]), strict=True)
        )
        for bundle in _bundles(params, names):
            yield _Part(params, bundle, [counts[n] for n, _ in bundle])


def _alike(params: Params, state: State) -> list[list[str]]:
    """Return names in groups of one device whose state has the same slots."""
    groups: dict[Any, list[str]] = {}
    for name, w in params.items():
        key = w.device, frozenset(state.get(name, {})) - {"step"}
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _slots_of(state: State, names: Sequence[str]) -> ManySlots:
    keys = [k for k in state.get(names[0], {}) if k != "step"]
    return {k: Many(state[n][k].detach() for n in names) for k in keys}


def _counts(slots: Sequence[Slots]) -> Counts:
    """Return how many steps were taken, read at once; torch keeps them on the host."""
    held = [s["step"].reshape(()) for s in slots if "step" in s]
    read = iter(torch.stack(held).tolist() if held else [])
    return [next(read) if "step" in s else 0.0 for s in slots]


def _bundles(params: Params, names: Sequence[str]) -> Iterator[list[_Piece]]:
    """Yield pieces of tensors that are pulled back together.

    An adjoint makes some twenty tensors on its way. Of a few small tensors, or of a part
    of a large one, they are little next to the tensors themselves; of all, they would set
    the memory.
    """
    on_host = params[names[0]].device.type == "cpu"
    most = _PART if on_host else _PART_OF_ACCELERATOR
    bundle: list[_Piece] = []
    room = most
    for name in names:
        n = params[name].numel()
        if n > most:
            for start in range(0, n, most):
                yield [(name, slice(start, start + most))]
            continue
        if n > room:
            yield bundle
            bundle, room = [], most
        bundle.append((name, None))
        room -= n
    if bundle:
        yield bundle


def _cut(tensor: Tensor, where: slice | None) -> Tensor:
    return tensor if where is None else tensor.reshape(-1)[where]


def _joined(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(pieces) == 1 and pieces[0].shape == like.shape:
        return pieces[0]
    return torch.cat([p.reshape(-1) for p in pieces]).reshape(like.shape)
