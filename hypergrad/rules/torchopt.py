"""Any functional optimizer of TorchOpt, as a rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import HypergradError, NonFiniteError
from hypergrad.products import jvp_of, vjp_of
from hypergrad.rules.base import (
    Pullback,
    Pushforward,
    Rule,
    Slots,
    State,
    check_settings,
)
from hypergrad.tree import Params

__all__ = ["TorchOptRule"]


class TorchOptRule(Rule):
    """Apply a TorchOpt gradient transformation [RFL23], and pull back through autograd.

    SGD, momentum and what else autograd sees through come out exactly. TorchOpt's Adam
    computes its bias correction in float32 (3e-6 off), and its derivative is NaN where
    a gradient is 0: `Adam` and `AdamW` of this package are exact there.

    Differs from the source: TorchOpt leaves the dampening of momentum out at the first
    call of a transformation's life, whatever state it is given. Here it is never left
    out, so that the same inputs give the same output.

    Args:
        transformation: e.g. `torchopt.sgd(0.1, momentum=0.9)`, `torchopt.chain(...)`.
        lr: learning rate, where an estimator needs one; TorchOpt does not tell it.

    Raises:
        TypeError: `transformation` is not a TorchOpt transformation, or `lr` not a
            number.
        ValueError: `lr` is out of range, or the transformation contains
            `torchopt.clip.clip_grad_norm`, which takes the norm for a constant: its
            derivative would be silently wrong.

    Example:
        >>> import torch, torchopt
        >>> w, g = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
        >>> TorchOptRule(torchopt.sgd(0.1)).apply(w, {}, g)[0]["w"]
        tensor([0.8000])
    """

    def __init__(self, transformation: Any, lr: float | None = None) -> None:
        if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
            msg = (
                f"transformation must be a TorchOpt gradient transformation, got "
                f"{type(transformation).__name__}. Pass e.g. torchopt.sgd(0.1)."
            )
            raise TypeError(msg)
        if any(f.__module__ == "torchopt.clip" for f in _functions(transformation)):
            msg = (
                "the transformation contains torchopt.clip.clip_grad_norm, which "
                "takes the norm for a constant, so that autograd's derivative of the "
                "step lacks a term. Leave it out and wrap the rule: "
                "Clipped(TorchOptRule(transformation), max_norm=...)."
            )
            raise ValueError(msg)
        if lr is not None:
            check_settings({"lr": lr})
        self.transformation = transformation
        self.lr = lr
        self._called = False

    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""
        names = list(params)
        kept, spec = self._unpack(params, state)
        with torch.no_grad():
            inputs = [params[n].detach() for n in names]
            inputs += [grads[n].detach().to(params[n].dtype) for n in names]
            moved, parts = self._step(names, [*inputs, *kept], spec)
        slots = {str(i): _tensor(part).detach() for i, part in enumerate(parts)}
        new = {n: m.to(params[n].dtype) for n, m in zip(names, moved, strict=True)}
        return new, {_key(params): slots}

    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
        settings: Collection[str] = (),
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step.

        Raises:
            HypergradError: a setting is asked for, which a transformation hides.
            NonFiniteError: TorchOpt's own derivative is NaN, as its Adam's is where a
                gradient is exactly 0.
        """
        _check_no_settings(settings)
        names = list(params)
        n = len(names)
        step, inputs, kept, smooth = self._smooth_step(params, state, grads)
        bars = state_bar.get(_key(params), {})
        cotangents = [tree.wide(params_bar[x]) for x in names]
        cotangents += [
            tree.wide(bars.get(str(i), torch.zeros_like(kept[i]))) for i in smooth
        ]
        parts = vjp_of(step, inputs, cotangents)
        w_bars = dict(zip(names, parts[:n], strict=True))
        g_bars = dict(zip(names, parts[n : 2 * n], strict=True))
        slots = {str(i): p for i, p in zip(smooth, parts[2 * n :], strict=True)}
        if not all(tree.all_finite(bar) for bar in (w_bars, g_bars, slots)):
            msg = (
                "TorchOpt's derivative of its own step is not finite. Its Adam (as all "
                "that divide by a running root) divides by sqrt(v) = 0 where a gradient "
                "is exactly 0 (every LoRA A while B is 0). Use hypergrad.rules.Adam or "
                "AdamW, which are exact there."
            )
            raise NonFiniteError(msg)
        return Pullback(
            {x: bar.to(params[x].dtype) for x, bar in w_bars.items()},
            {_key(params): slots},
            {x: bar.to(params[x].dtype) for x, bar in g_bars.items()},
        )

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
        """Return the tangents of w and s after the step, by forward mode.

        Raises:
            HypergradError: a tangent of a setting, which a transformation hides.
        """
        _check_no_settings(
            {key for each in (settings_dot or {}).values() for key in each}
        )
        names = list(params)
        n = len(names)
        step, inputs, kept, smooth = self._smooth_step(params, state, grads)
        dots = state_dot.get(_key(params), {})
        tangents = [tree.wide(params_dot[x]) for x in names]
        tangents += [tree.wide(grads_dot[x]) for x in names]
        tangents += [
            tree.wide(dots.get(str(i), torch.zeros_like(kept[i]))) for i in smooth
        ]
        parts = jvp_of(step, inputs, tangents)
        moved = dict(zip(names, parts[:n], strict=True))
        slots = {str(i): p for i, p in zip(smooth, parts[n:], strict=True)}
        return Pushforward(
            {x: dot.to(params[x].dtype) for x, dot in moved.items()},
            {_key(params): slots},
        )

    def _smooth_step(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Callable[..., list[Tensor]], list[Tensor], list[Any], list[int]]:
        """Return the step as a function of what has derivatives, and the values of that.

        With them the leaves of the state, and which of those are among the values.
        """
        names = list(params)
        n = len(names)
        kept, spec = self._unpack(params, state)
        smooth = [
            i
            for i, leaf in enumerate(kept)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]

        def step(*leaves: Tensor) -> list[Tensor]:
            slots = list(kept)
            for i, leaf in zip(smooth, leaves[2 * n :], strict=True):
                slots[i] = leaf
            moved, parts = self._step(names, [*leaves[: 2 * n], *slots], spec)
            return [*moved, *(parts[i] for i in smooth)]

        # In float64, as all rules: derivatives span more digits than float32 has.
        inputs = [tree.wide(params[x]) for x in names]
        inputs += [tree.wide(grads[x]) for x in names]
        inputs += [tree.wide(kept[i]) for i in smooth]
        return step, inputs, kept, smooth

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter.

        Raises:
            ValueError: `lr` was not given.
        """
        if self.lr is None:
            msg = (
                "a TorchOpt transformation does not tell its learning rate. Pass "
                "TorchOptRule(transformation, lr=...)."
            )
            raise ValueError(msg)
        return dict.fromkeys(params, self.lr)

    def config(self) -> dict[str, Any]:
        """Refuse: a transformation is a closure and has no plain form.

        Raises:
            ValueError: always.
        """
        msg = (
            "a TorchOpt rule cannot be saved: it is made of closures. Use a torch.optim "
            "optimizer where steps are recorded and checkpointed."
        )
        raise ValueError(msg)

    def _step(
        self, names: Sequence[str], leaves: Sequence[Any], spec: Any
    ) -> tuple[list[Tensor], list[Any]]:
        import optree
        import torchopt

        n = len(names)
        w = dict(zip(names, leaves[:n], strict=True))
        g = dict(zip(names, leaves[n : 2 * n], strict=True))
        state = optree.tree_unflatten(spec, leaves[2 * n :])
        updates, new = self.transformation.update(g, state, params=w, inplace=False)
        moved: Any = torchopt.apply_updates(w, updates, inplace=False)
        return [moved[name] for name in names], optree.tree_leaves(new)

    def _unpack(self, params: Params, state: State) -> tuple[list[Any], Any]:
        """Return the leaves of the TorchOpt state, and how they make a tree."""
        import optree

        w = {name: p.detach() for name, p in params.items()}
        fresh = self.transformation.init(w)
        if not self._called:
            # Momentum treats the first call of its life unlike all others, whatever the
            # state: let that call be on nothing.
            nothing = tree.zeros_like(w)
            self.transformation.update(nothing, fresh, params=w, inplace=False)
            self._called = True
            fresh = self.transformation.init(w)
        leaves, spec = optree.tree_flatten(fresh)
        kept = state.get(_key(params), {})
        # The state's structure comes from `init`, its values from the last step.
        tensors = [
            kept.get(str(i), _tensor(leaf)).detach() for i, leaf in enumerate(leaves)
        ]
        return [_like(a, t) for a, t in zip(leaves, tensors, strict=True)], spec


def _check_no_settings(settings: Collection[str]) -> None:
    """Refuse settings, which a transformation keeps to itself.

    Raises:
        HypergradError: naming one.
    """
    if settings:
        msg = (
            f"a TorchOpt transformation hides its settings, so there is no derivative in "
            f"{min(settings)!r}. Use hypergrad.rules.SGD, Adam or AdamW."
        )
        raise HypergradError(msg)


def _key(params: Mapping[str, Tensor]) -> str:
    # A TorchOpt state is one tree for all parameters, not one for each; by their names,
    # so that two groups with such rules do not share an entry.
    return ", ".join(params)


def _tensor(leaf: Any) -> Tensor:
    """Return a leaf of a state as a tensor; AdaMax, for one, counts in an int."""
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, (int, float)):
        return torch.tensor(
            leaf, dtype=torch.float64 if isinstance(leaf, float) else None
        )
    msg = (
        f"the state of the TorchOpt transformation holds a {type(leaf).__name__}: only "
        "tensors and numbers can be recorded from step to step. Keep nothing else in it."
    )
    raise TypeError(msg)


def _like(leaf: Any, tensor: Tensor) -> Any:
    """Return a recorded tensor as the kind of leaf that `init` makes."""
    return tensor if isinstance(leaf, Tensor) else type(leaf)(tensor.item())


def _functions(transformation: Any) -> Iterator[FunctionType]:
    """Yield the functions that a transformation is made of, through its closures."""
    pending: list[Any] = [transformation]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, FunctionType):
            yield part
            for cell in part.__closure__ or ():
                with suppress(ValueError):  # a name that is not bound yet
                    pending.append(cell.cell_contents)
        elif isinstance(part, tuple):  # a transformation is one too: (init, update)
            pending += part
        elif hasattr(part, "update"):
            pending.append(part.update)
