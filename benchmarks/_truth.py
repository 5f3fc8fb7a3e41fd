"""A network and optimizers written out so that plain autograd can go through them.

Nothing of the packages is used here: what is computed is the truth that they are held
against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Loss = Callable[[Params, Params, Any], Tensor]


# -- the network ---------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A two-layer network and its data; λ is an input scale, a shift and a penalty."""

    inner: Params
    outer: Params
    batches: list[Params]
    held_out: Params

    def to(self, dtype: torch.dtype) -> Network:
        def cast(tensors: Params) -> Params:
            return {n: t.to(dtype) for n, t in tensors.items()}

        return Network(
            cast(self.inner),
            cast(self.outer),
            [cast(b) for b in self.batches],
            cast(self.held_out),
        )


def network(
    seed: int, examples: int = 32, features: int = 8, hidden: int = 16
) -> Network:
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    def data() -> Params:
        return {"x": draw(examples, features), "y": draw(examples)}

    return Network(
        {
            "first": draw(features, hidden) / (features + 1) ** 0.5,
            "bias": draw(hidden) / 3,
            "second": draw(hidden) / hidden**0.5,
        },
        {
            "scale": 1 + draw(features) / 4,
            "shift": draw(1)[0] / 4,
            "log_decay": torch.tensor(-3.0, dtype=torch.float64),
        },
        [data() for _ in range(4)],
        data(),
    )


def predict(inner: Params, outer: Params, x: Tensor) -> Tensor:
    hidden = torch.tanh((x * outer["scale"]) @ inner["first"] + inner["bias"])
    return hidden @ inner["second"]


def inner_loss(inner: Params, outer: Params, batch: Params) -> Tensor:
    off = predict(inner, outer, batch["x"]) + outer["shift"] - batch["y"]
    decay = torch.stack([t.square().sum() for t in inner.values()]).sum()
    return off.square().mean() + outer["log_decay"].exp() * decay


def outer_loss(inner: Params, outer: Params, batch: Params) -> Tensor:
    return (predict(inner, outer, batch["x"]) - batch["y"]).square().mean()


# -- optimizers: torch's own, and the same written out so that autograd goes through ---


@dataclass(frozen=True)
class Hand:
    """An optimizer twice: as torch makes it, and as a differentiable function.

    Attributes:
        make: from a list of tensors to the torch optimizer, with its settings.
        step: `(w, slots, g, t) -> (w, slots)`, where slots are named as torch names
            them and t counts steps from 1.
    """

    make: partial[torch.optim.Optimizer]
    step: Callable[[Tensor, Params, Tensor, int], tuple[Tensor, Params]]


def sgd_step(
    w: Tensor, slots: Params, g: Tensor, t: int, *, lr: float, momentum: float = 0.0
) -> tuple[Tensor, Params]:
    if momentum and t > 1:
        g = momentum * slots["momentum_buffer"] + g
    return w - lr * g, {"momentum_buffer": g}


def adamw_step(
    w: Tensor,
    slots: Params,
    g: Tensor,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Params]:
    m = betas[0] * slots["exp_avg"] + (1 - betas[0]) * g
    v = betas[1] * slots["exp_avg_sq"] + (1 - betas[1]) * g.square()
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    # Where all gradients were 0, the square root has no derivative, and m does not move.
    root = torch.where(v_hat > 0, v_hat, 1).sqrt() * (v_hat > 0)
    w = w - lr * weight_decay * w - lr * m_hat / (root + eps)
    return w, {"exp_avg": m, "exp_avg_sq": v}


def hand(kind: Any, step: Callable[..., Any], **settings: Any) -> Hand:
    return Hand(partial(kind, **settings), partial(step, **settings))


HANDS = {
    "sgd": hand(torch.optim.SGD, sgd_step, lr=0.05),
    "momentum": hand(torch.optim.SGD, sgd_step, lr=0.05, momentum=0.9),
    "adam": hand(
        torch.optim.Adam,
        adamw_step,
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    ),
    "adamw": hand(
        torch.optim.AdamW,
        adamw_step,
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
    ),
}


def unrolled_truth(
    net: Network,
    w: Params,
    slots: dict[str, Params],
    through: Hand,
    first: int,
    k: int,
    losses: tuple[Loss, Loss] = (inner_loss, outer_loss),
) -> Params:
    """Return the indirect term through k steps, by plain autograd.

    Args:
        net: the data and λ, float64.
        w: parameters before the window, float64.
        slots: optimizer state before the window, by parameter, float64.
        through: the optimizer.
        first: number of steps before the window.
        k: number of steps in the window.
        losses: the inner and the outer one.
    """
    lam = {n: t.clone().requires_grad_() for n, t in net.outer.items()}
    w = {n: t.clone().requires_grad_() for n, t in w.items()}
    slots = dict(slots)
    for t in range(first, first + k):
        loss = losses[0](w, lam, net.batches[t % len(net.batches)])
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        stepped = {
            n: through.step(w[n], slots[n], g, t + 1)
            for n, g in zip(w, grads, strict=True)
        }
        w = {n: new for n, (new, _) in stepped.items()}
        slots = {n: new for n, (_, new) in stepped.items()}
    # λ of the outer loss itself is held fixed: what is left is the term through w.
    value = losses[1](w, net.outer, net.held_out)
    parts = torch.autograd.grad(value, list(lam.values()))
    return dict(zip(lam, parts, strict=True))
