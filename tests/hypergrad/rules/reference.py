"""Optimizer steps written by hand, for plain autograd to differentiate.

Independent of `hypergrad.rules`: in the notation of the papers, one tensor at a time, with
no attention to speed or to points where autograd has no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad.rules import Pullback, Rule, State
from tests.tolerances import error

Slots = dict[str, Tensor]
Step = Callable[[Tensor, Slots, Tensor], tuple[Tensor, Slots]]
Named = dict[str, Tensor]


def sgd_step(
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Step:
    """Return SGD as in the documentation of torch.optim.SGD."""

    def step(w: Tensor, slots: Slots, g: Tensor) -> tuple[Tensor, Slots]:
        sign = -1.0 if maximize else 1.0
        g = sign * g + weight_decay * w
        out = dict(slots)
        if momentum != 0:
            if "momentum_buffer" in slots:
                b = momentum * slots["momentum_buffer"] + (1 - dampening) * g
            else:
                b = 1.0 * g
            out["momentum_buffer"] = b
            g = g + momentum * b if nesterov else b
        return w - lr * g, out

    return step


def adam_step(
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
) -> Step:
    """Return Adam as in [KB15, Alg. 1], AdamW as in [LH19, Alg. 2]."""

    def step(w: Tensor, slots: Slots, g: Tensor) -> tuple[Tensor, Slots]:
        g = -g if maximize else g
        if not decoupled:
            g = g + weight_decay * w
        t = float(slots["step"]) + 1 if "step" in slots else 1.0
        m = beta1 * slots.get("exp_avg", torch.zeros_like(w)) + (1 - beta1) * g
        v = beta2 * slots.get("exp_avg_sq", torch.zeros_like(w)) + (1 - beta2) * g**2
        out = {"step": torch.tensor(t), "exp_avg": m, "exp_avg_sq": v}
        if amsgrad:
            v = torch.maximum(slots.get("max_exp_avg_sq", torch.zeros_like(w)), v)
            out["max_exp_avg_sq"] = v
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        decay = lr * weight_decay * w if decoupled else 0.0
        return w - decay - lr * m_hat / (v_hat.sqrt() + eps), out

    return step


def clip(grads: Named, max_norm: float) -> Named:
    """Return gradients scaled as torch.nn.utils.clip_grad_norm_ scales them."""
    total = torch.stack([g.pow(2).sum() for g in grads.values()]).sum().sqrt()
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    return {n: factor * g for n, g in grads.items()}


def apply_each(steps: dict[str, Step], w: Named, state: State, g: Named) -> Any:
    """Take one step of each tensor."""
    new_w: Named = {}
    new_state: State = {}
    for name, step in steps.items():
        new_w[name], new_state[name] = step(w[name], state.get(name, {}), g[name])
    return new_w, new_state


def floating(state: State) -> list[tuple[str, str]]:
    """Return the slots that have adjoints."""
    return [(n, s) for n, slots in state.items() for s in slots if s != "step"]


def leaves_of(tree: Named) -> Named:
    """Return float64 leaves to differentiate with respect to."""
    return {n: t.detach().double().requires_grad_() for n, t in tree.items()}


def transposed(
    function: Callable[[Named, State, Named], tuple[Named, State]],
    w: Named,
    state: State,
    g: Named,
    w_bar: Named,
    state_bar: State,
) -> Pullback:
    """Return the vector-Jacobian product of a whole step by plain autograd, in float64."""
    w, g = leaves_of(w), leaves_of(g)
    state = {
        n: {
            k: t if k == "step" else t.detach().double().requires_grad_()
            for k, t in slots.items()
        }
        for n, slots in state.items()
    }
    new_w, new_state = function(w, state, g)
    outputs = [*new_w.values()]
    bars = [w_bar[n].double() for n in new_w]
    for n, k in floating(new_state):
        if k in state_bar.get(n, {}):
            outputs.append(new_state[n][k])
            bars.append(state_bar[n][k].double())
    slots = floating(state)
    inputs = [*w.values(), *(state[n][k] for n, k in slots), *g.values()]
    parts = torch.autograd.grad(
        outputs, inputs, bars, allow_unused=True, materialize_grads=True
    )
    k = len(w)
    out: State = {n: {} for n in w}
    for (n, slot), part in zip(slots, parts[k : k + len(slots)], strict=True):
        out[n][slot] = part
    return Pullback(
        dict(zip(w, parts[:k], strict=True)),
        out,
        dict(zip(g, parts[k + len(slots) :], strict=True)),
    )


def pulled_error(got: Pullback, truth: Pullback) -> float:
    """Return the largest relative error of the adjoints; a slot left out is zeros.

    Slots that the state did not have (the rule took them for zeros) are not compared.
    """
    worst = max(error(got.params, truth.params), error(got.grads, truth.grads))
    for name, slots in truth.state.items():
        for slot, bar in slots.items():
            mine = got.state.get(name, {}).get(slot, torch.zeros_like(bar))
            worst = max(worst, error(mine, bar))
    return worst


def random_named(seed: int, dtype: torch.dtype = torch.float64) -> Named:
    """Return a matrix, a vector and a scalar of different sizes."""
    make = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {
        n: (torch.randn(s, generator=make, dtype=torch.float64) * scale).to(dtype)
        for (n, s), scale in zip(shapes.items(), (1.0, 30.0, 0.1), strict=True)
    }


def copies(tree: Any) -> Any:
    """Return a deep copy of nested dictionaries of tensors."""
    if isinstance(tree, dict):
        return {k: copies(v) for k, v in tree.items()}
    return tree.clone()


def same(a: Any, b: Any) -> bool:
    """Return whether two nested dictionaries hold the same bits."""
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and torch.equal(a, b)


def run(
    rule: Rule, steps: int, dtype: torch.dtype, state: State | None = None
) -> tuple[Named, State]:
    """Return parameters and state after some steps on random gradients."""
    w, state = random_named(0, dtype), state or {}
    for k in range(steps):
        w, state = rule.apply(w, state, random_named(100 + k, dtype))
    return w, state


def optimizer_errors(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    rule: Rule,
    dtype: torch.dtype,
    steps: int = 6,
) -> float:
    """Return the largest error of a rule's run over an optimizer's, in units of eps.

    Both start from nothing and keep their own state, so that differences add up.
    """
    w = random_named(0, dtype)
    params = {n: t.clone().requires_grad_() for n, t in w.items()}
    torch_optimizer = optimizer(list(params.values()))
    state: State = {}
    worst = 0.0
    for k in range(steps):
        # Gradients of very different sizes from one step to the next.
        g = {n: t * 10.0 ** (k % 3 - 1) for n, t in random_named(7 + k, dtype).items()}
        w, state = rule.apply(w, state, g)
        for name, p in params.items():
            p.grad = g[name].clone()
        torch_optimizer.step()
        for name, p in params.items():
            worst = max(worst, error(w[name], p.detach()))
            for slot, value in torch_optimizer.state[p].items():
                if isinstance(value, Tensor):
                    worst = max(worst, error(state[name][slot], value))
    return worst / torch.finfo(dtype).eps
