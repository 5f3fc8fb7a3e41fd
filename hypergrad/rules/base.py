"""What an inner optimizer's step did, as a function that can be pulled back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad._checks import check_number
from hypergrad.products.tally import Tally
from hypergrad.rules._many import Many
from hypergrad.tree import Params

__all__ = ["ElementwiseRule", "Pullback", "Rule", "State"]

_PART = 1 << 16
"""Entries that are pulled back at a time."""
_PART_OF_ACCELERATOR = 1 << 24
"""The same where each operation has to be launched."""

Slots = dict[str, Tensor]
State = dict[str, Slots]
"""Optimizer state: parameter name, then slot name, as torch.optim names them.

An absent slot is one that the optimizer has not made yet: zeros, at step 0.
"""

ManySlots = dict[str, Many]
"""Slots of several parameters at once, by slot name; without the step count."""
Counts = list[float]
"""Steps taken before, for each of several parameters."""


@dataclass(frozen=True)
class Pullback:
    """Adjoints of everything that went into one step.

    Attributes:
        params: adjoint of w, same keys as w.
        state: adjoint of the floating point slots of the state.
        grads: adjoint of the gradient, before clipping.
    """

    params: Params
    state: State
    grads: Params


class Rule(ABC):
    r"""One step $(w_+, s_+) = U(w, s, g)$ and its adjoint.

    Laws: `apply` equals the optimizer's own step to rounding, and `pullback` is the
    transpose of the Jacobian of `apply` in (w, s, g) together, not in w alone. Neither
    changes its arguments.
    """

    @abstractmethod
    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""

    @abstractmethod
    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
    ) -> Pullback:
        """Return the adjoints of what went into a step, from those of what came out.

        Args:
            params: w before the step.
            state: s before the step.
            grads: g, before clipping.
            params_bar: adjoint of w after the step.
            state_bar: adjoint of s after the step; absent slots are zeros.

        Returns:
            Adjoints of w, s and g before the step.
        """

    @abstractmethod
    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter.

        Raises:
            ValueError: the rule has no learning rate of its own.
        """

    def adaptive(self, params: Mapping[str, Tensor]) -> frozenset[str]:
        """Return the parameters whose step is divided by their past gradients.

        Where such a parameter's gradient and second moment are exactly 0, the derivative
        of its step is 1/ε.
        """
        del params
        return frozenset()

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the settings as plain values; `rule_from_config` reads them back."""


class ElementwiseRule(Rule):
    """A rule that treats each entry alone, with the same settings.

    Its formulas are written for `Many` tensors at once.
    """

    kind: ClassVar[str]
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

    counts_steps: ClassVar[bool] = False
    """Whether the rule depends on how many steps were taken."""

    @torch.no_grad()
    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step."""
        found: dict[str, list[tuple[Tensor, Slots, Tensor]]] = {n: [] for n in params}
        for names in _alike(params, state):
            counts = dict(
                zip(names, _counts([state.get(n, {}) for n in names]), strict=True)
            )
            slots, bars = _slots_of(state, names), _slots_of(state_bar, names)
            for bundle in _bundles(params, names):
                pieces = [(names.index(n), n, where) for n, where in bundle]
                # 1/(sqrt(v) + eps)² spans more digits than float32 has.

                def of(source: Params, pieces: Any = pieces) -> Many:
                    return Many(_cut(source[n], i) for _, n, i in pieces).widened()

                def all_of(given: ManySlots, pieces: Any = pieces) -> ManySlots:
                    return {
                        key: Many(_cut(t.tensors[k], i) for k, _, i in pieces).widened()
                        for key, t in given.items()
                    }

                w_bar, slots_bar, g_bar = self.pull_many(
                    of(params),
                    all_of(slots),
                    of(grads),
                    [counts[n] for n, _ in bundle],
                    of(params_bar),
                    all_of(bars),
                )
                # Narrow again at once, but for the adjoint of the state.
                like = Many(_cut(params[n].detach(), where) for n, where in bundle)
                w_bar, g_bar = w_bar.like(like), g_bar.like(like)
                for i, (name, _) in enumerate(bundle):
                    rest = {k: t.tensors[i] for k, t in slots_bar.items()}
                    found[name].append((w_bar.tensors[i], rest, g_bar.tensors[i]))
        out = Pullback({}, {}, {})
        for name, w in params.items():
            pieces = found[name]
            out.params[name] = _joined([p[0] for p in pieces], w)
            out.state[name] = {
                k: _joined([p[1][k] for p in pieces], w) for k in pieces[0][1]
            }
            out.grads[name] = _joined([p[2] for p in pieces], w)
        return out

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter."""
        return dict.fromkeys(params, self.lr)

    def config(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"kind": self.kind, **asdict(self)}  # pyright: ignore[reportArgumentType]


_Piece = tuple[str, "slice | None"]


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


def watch_finite(tally: Tally, pulled: Pullback) -> None:
    """Have the adjoints of a step looked at: they must be finite.

    Args:
        tally: says so where it is read.
        pulled: the adjoints.
    """
    tally.watch_finite(
        list(pulled.grads),
        list(pulled.grads.values()),
        lambda bad: (
            f"the derivative of an inner step is not finite in {bad}: a NaN or infinity "
            "in the step's gradient or optimizer state, or Adam with eps=0 where a "
            "gradient is 0, is the usual cause. Look at the optimizer state; raise eps."
        ),
    )


def check_rule(name: str, value: object) -> None:
    """Refuse what is not a rule.

    Raises:
        TypeError: with the value.
    """
    if not isinstance(value, Rule):
        msg = (
            f"{name}={value!r} must be a hypergrad.rules.Rule. Pass e.g. SGD(0.1), or "
            "rule_of(optimizer, params) for that of a torch optimizer."
        )
        raise TypeError(msg)


def check_settings(
    values: Mapping[str, float], below_one: tuple[str, ...] = ()
) -> None:
    """Refuse negative settings, and rates of decay that reach 1.

    Raises:
        TypeError: a setting that is not a number.
        ValueError: naming the setting and its value.
    """
    for name, value in values.items():
        check_number(name, value)
        if not 0 <= value < float("inf"):
            msg = (
                f"{name}={value} must be finite and at least 0. Pass the value that the "
                "inner optimizer has."
            )
            raise ValueError(msg)
        if name in below_one and value >= 1:
            msg = (
                f"{name}={value} must be below 1: it is a rate of decay, and what is "
                "older would never be forgotten. Pass e.g. 0.9."
            )
            raise ValueError(msg)
