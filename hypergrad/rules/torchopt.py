"""Any functional optimizer of TorchOpt, as a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad import tree
from hypergrad.errors import NonFiniteError
from hypergrad.products import vjp_of
from hypergrad.rules.base import Pullback, Rule, State
from hypergrad.tree import Params

__all__ = ["TorchOptRule"]

_KEY = ""  # a TorchOpt state is one tree for all parameters, not one for each


class TorchOptRule(Rule):
    """Apply a TorchOpt gradient transformation, and pull back through autograd.

    Args:
        transformation: e.g. `torchopt.sgd(0.1, momentum=0.9)`, `torchopt.chain(...)`.
        lr: learning rate, where an estimator needs one; TorchOpt does not tell it.

    TorchOpt's Adam computes its bias correction in float32 and its derivative is NaN
    where a gradient is 0; `Adam` and `AdamW` of this package are exact there.

    Raises:
        TypeError: `transformation` is not a TorchOpt transformation.

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
        self.transformation = transformation
        self.lr = lr

    def _step(
        self, names: Sequence[str], leaves: Sequence[Tensor], spec: Any, count: int
    ) -> tuple[list[Tensor], list[Any], Any]:
        import optree
        import torchopt

        n = len(names)
        w = dict(zip(names, leaves[:n], strict=True))
        g = dict(zip(names, leaves[n : 2 * n], strict=True))
        state = optree.tree_unflatten(spec, leaves[2 * n : 2 * n + count])
        # TorchOpt consumes the dictionary of gradients it is given.
        updates, new = self.transformation.update(
            dict(g), state, params=w, inplace=False
        )
        moved: Any = torchopt.apply_updates(w, updates, inplace=False)
        parts, new_spec = optree.tree_flatten(new)
        return [moved[name] for name in names], parts, new_spec

    def _unpack(self, params: Params, state: State) -> tuple[list[Any], Any]:
        import optree

        fresh = self.transformation.init({n: p.detach() for n, p in params.items()})
        leaves, spec = optree.tree_flatten(fresh)
        kept = state.get(_KEY)
        if kept:
            leaves = [kept.get(str(i), leaf) for i, leaf in enumerate(leaves)]
        return leaves, spec

    def apply(
        self, params: Params, state: State, grads: Params
    ) -> tuple[Params, State]:
        """Return the parameters and state after one step."""
        names = list(params)
        kept, spec = self._unpack(params, state)
        with torch.no_grad():
            inputs = [params[n].detach() for n in names]
            moved, parts, _ = self._step(
                names, [*inputs, *(grads[n] for n in names), *kept], spec, len(kept)
            )
        slots = {
            str(i): p.detach() for i, p in enumerate(parts) if isinstance(p, Tensor)
        }
        return dict(zip(names, moved, strict=True)), {_KEY: slots}

    def pullback(
        self,
        params: Params,
        state: State,
        grads: Params,
        params_bar: Params,
        state_bar: State,
    ) -> Pullback:
        """Return the adjoints of w, s and g before the step.

        Raises:
            NonFiniteError: TorchOpt's own derivative is NaN, as its Adam's is where a
                gradient is exactly 0.
        """
        names = list(params)
        n = len(names)
        kept, spec = self._unpack(params, state)
        smooth = [
            i
            for i, leaf in enumerate(kept)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        made: list[int] = []

        def step(*leaves: Tensor) -> list[Tensor]:
            full = list(kept)
            for i, leaf in zip(smooth, leaves[2 * n :], strict=True):
                full[i] = leaf
            moved, parts, _ = self._step(
                names, [*leaves[: 2 * n], *full], spec, len(full)
            )
            made[:] = [i for i in smooth if isinstance(parts[i], Tensor)]
            return [*moved, *(parts[i] for i in made)]

        inputs = [*(params[x] for x in names), *(grads[x] for x in names)]
        inputs += [kept[i] for i in smooth]
        bars = state_bar.get(_KEY, {})
        cotangents = [params_bar[x] for x in names]
        cotangents += [bars.get(str(i), torch.zeros_like(kept[i])) for i in smooth]
        parts = vjp_of(step, inputs, cotangents)
        pulled = Pullback(
            dict(zip(names, parts[:n], strict=True)),
            {_KEY: {str(i): p for i, p in zip(smooth, parts[2 * n :], strict=True)}},
            dict(zip(names, parts[n : 2 * n], strict=True)),
        )
        if not tree.all_finite(pulled.grads):
            msg = (
                "TorchOpt's derivative of its own step is not finite. Its Adam divides "
                "by sqrt(v) = 0 where a gradient is exactly 0 (every LoRA A while B is "
                "0). Use hypergrad.rules.Adam or AdamW, which are exact there."
            )
            raise NonFiniteError(msg)
        return pulled

    def learning_rates(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the learning rate of each parameter."""
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
