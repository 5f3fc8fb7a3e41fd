"""Hypergradients as one would write them for one problem, without a library.

Nothing of the packages is used here: `overhead` asks what they cost over this. Each
function makes the passes and products that its method needs and no others, and checks
nothing. All return the total derivative, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from benchmarks import _truth
from benchmarks._truth import Loss, Params


@dataclass(frozen=True)
class Task:
    """Two losses, where w and λ are, and one batch for each loss.

    Attributes:
        name: what it is called in the results.
        inner_loss: g.
        outer_loss: f.
        inner: w, before any step.
        outer: λ.
        batch: data of g, for each step.
        held_out: data of f.
        scale: α of a Neumann series, below 1 over the largest eigenvalue of ∂²g/∂w².
    """

    name: str
    inner_loss: Loss
    outer_loss: Loss
    inner: Params
    outer: Params
    batch: Any
    held_out: Any
    scale: float

    def to(self, device: torch.device) -> Task:
        """Return the same on another device."""

        def moved(tensors: Params) -> Params:
            return {n: t.to(device) for n, t in tensors.items()}

        return Task(
            self.name,
            self.inner_loss,
            self.outer_loss,
            moved(self.inner),
            moved(self.outer),
            moved(self.batch),
            moved(self.held_out),
            self.scale,
        )


def least_squares() -> Task:
    """Return 64 × 30 least squares with a penalty for each feature: 30 weights."""
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    def fit(w: Params, data: Params) -> Tensor:
        return (data["x"] @ w["w"] - data["y"]).square().mean()

    def inner_loss(w: Params, lam: Params, batch: Any) -> Tensor:
        return fit(w, batch) + lam["log_penalty"].exp() @ w["w"].square()

    def outer_loss(w: Params, lam: Params, batch: Any) -> Tensor:
        return fit(w, batch)

    return Task(
        "30 weights",
        inner_loss,
        outer_loss,
        {"w": draw(30) / 5},
        {"log_penalty": draw(30) / 2 - 3},
        {"x": draw(64, 30), "y": draw(64)},
        {"x": draw(64, 30), "y": draw(64)},
        scale=0.1,
    )


def small_network() -> Task:
    """Return a two-layer network of 33,280 weights, on 64 examples."""
    net = _truth.network(0, examples=64, features=128, hidden=256)
    net.outer["log_decay"].fill_(1.0)  # so that ∂²g/∂w² is positive definite
    return Task(
        "33,280 weights",
        _truth.inner_loss,
        _truth.outer_loss,
        net.inner,
        net.outer,
        net.batches[0],
        net.held_out,
        scale=0.02,
    )


# -- one step --------------------------------------------------------------------------


def darts(task: Task, w: Params, ahead: Params, lam: Params, lr: float) -> Params:
    """Continue the backward pass of a step that SGD took from `w` to `ahead`."""
    v, direct = outer_gradient(task, ahead, lam)
    slope = grad(task.inner_loss(w, lam, task.batch), leaves(w), create_graph=True)
    mixed = grad(slope, leaves(lam), [-lr * part for part in v])
    return named(lam, torch._foreach_add(direct, mixed))


def darts_by_differences(
    task: Task, w: Params, ahead: Params, lam: Params, lr: float, radius: float
) -> Params:
    """Take the product of `darts` as a central difference over `radius`, w put back."""
    v, direct = outer_gradient(task, ahead, lam)
    held = leaves(w)
    step = radius / torch.stack(torch._foreach_norm(v)).norm()
    aside = torch._foreach_mul(v, step)
    before = [t.detach().clone() for t in held]
    slopes = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            torch._foreach_copy_(held, torch._foreach_add(before, aside, alpha=sign))
        loss = task.inner_loss(w, lam, task.batch)
        slopes.append(grad(loss, leaves(lam)))
    with torch.no_grad():
        torch._foreach_copy_(held, before)
    mixed = torch._foreach_mul(torch._foreach_sub(*slopes), -lr / (2 * step))
    return named(lam, torch._foreach_add(direct, mixed))


# -- several steps ---------------------------------------------------------------------


class Snapshot(NamedTuple):
    """What a step began with."""

    w: list[Tensor]
    slots: list[tuple[Tensor, ...]]
    t: int


class Stepper(NamedTuple):
    """An optimizer, one tensor at a time.

    Attributes:
        slots: number of tensors of state, each of the shape of w.
        step: `(w, slots, g, t) -> (w, slots)`, t from 1.
        adjoint: `(slots, g, t, w_bar, slots_bar) -> (w_bar, slots_bar, g_bar)`.
    """

    slots: int
    step: Callable[..., Any]
    adjoint: Callable[..., Any]


def sgd_step(w: Tensor, slots: Any, g: Tensor, t: int, *, lr: float) -> Any:
    return w - lr * g, ()


def sgd_adjoint(
    slots: Any, g: Tensor, t: int, w_bar: Tensor, slots_bar: Any, *, lr: float
) -> Any:
    return w_bar, (), -lr * w_bar


def adamw_step(
    w: Tensor,
    slots: Any,
    g: Tensor,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Any:
    m = torch.lerp(slots[0], g, 1 - betas[0])
    v = (betas[1] * slots[1]).addcmul_(g, g, value=1 - betas[1])
    root = (v / (1 - betas[1] ** t)).sqrt_().add_(eps)
    w = (w * (1 - lr * weight_decay)).addcdiv_(m, root, value=-lr / (1 - betas[0] ** t))
    return w, (m, v)


def adamw_adjoint(
    slots: Any,
    g: Tensor,
    t: int,
    w_bar: Tensor,
    slots_bar: Any,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Any:
    m = torch.lerp(slots[0], g, 1 - betas[0])
    v = (betas[1] * slots[1]).addcmul_(g, g, value=1 - betas[1])
    c2 = 1 - betas[1] ** t
    root = (v / c2).sqrt_()
    over = root + eps
    # w₊ = (1 - lr·decay) w - lr/c₁ · m/d: what comes in at m, and at d through v.
    m_bar = w_bar * (-lr / (1 - betas[0] ** t)) / over
    v_bar = m_bar * m / (over * root * (-2 * c2)) + slots_bar[1]
    m_bar = m_bar + slots_bar[0]
    g_bar = (m_bar * (1 - betas[0])).addcmul_(g, v_bar, value=2 * (1 - betas[1]))
    return w_bar * (1 - lr * weight_decay), (betas[0] * m_bar, betas[1] * v_bar), g_bar


SGD: dict[str, Any] = {"lr": 0.05}
ADAMW: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
}
STEPPERS = {
    "SGD": Stepper(0, partial(sgd_step, **SGD), partial(sgd_adjoint, **SGD)),
    "AdamW": Stepper(2, partial(adamw_step, **ADAMW), partial(adamw_adjoint, **ADAMW)),
}


def take(
    task: Task, through: Stepper, lam: Params, steps: int
) -> tuple[list[Snapshot], Params]:
    """Return what each step began with, and w after the last."""
    w = [t.detach() for t in task.inner.values()]
    slots = [tuple(torch.zeros_like(t) for _ in range(through.slots)) for t in w]
    taken = []
    for t in range(1, steps + 1):
        taken.append(Snapshot(w, slots, t))
        at = [part.detach().requires_grad_() for part in w]
        slope = grad(task.inner_loss(named(task.inner, at), lam, task.batch), at)
        moved = [through.step(*one, t) for one in zip(w, slots, slope, strict=True)]
        w, slots = [one[0] for one in moved], [one[1] for one in moved]
    return taken, named(task.inner, [t.requires_grad_() for t in w])


def unrolled(
    task: Task, through: Stepper, taken: list[Snapshot], end: Params, lam: Params
) -> Params:
    """Walk back through the steps, one graph at a time."""
    w_bar, total = outer_gradient(task, end, lam)
    slots_bar = [tuple(torch.zeros_like(t) for t in one) for one in taken[-1].slots]
    for w, slots, t in reversed(taken):
        at = [part.detach().requires_grad_() for part in w]
        loss = task.inner_loss(named(task.inner, at), lam, task.batch)
        slope = grad(loss, at, create_graph=True)
        pulled = [
            through.adjoint(s, g.detach(), t, *bars)
            for s, g, *bars in zip(slots, slope, w_bar, slots_bar, strict=True)
        ]
        g_bar = [one[2] for one in pulled]
        if t == taken[0].t:  # nobody asks for the oldest w
            return named(
                lam, torch._foreach_add(total, grad(slope, leaves(lam), g_bar))
            )
        parts = grad(slope, [*at, *leaves(lam)], g_bar)
        w_bar = torch._foreach_add([one[0] for one in pulled], parts[: len(at)])
        slots_bar = [one[1] for one in pulled]
        total = torch._foreach_add(total, parts[len(at) :])
    raise ValueError("no steps to walk back through")


# -- at a minimum ----------------------------------------------------------------------


def cg(task: Task, w: Params, lam: Params, products: int) -> Params:
    """Solve in the Krylov space of ∂f/∂w, its basis orthogonalised twice."""
    v, direct = outer_gradient(task, w, lam)
    slope = grad(task.inner_loss(w, lam, task.batch), leaves(w), create_graph=True)
    b = flat(v)
    basis = b.new_empty(products + 1, len(b))
    size = b.norm()
    basis[0] = b / size
    diagonal, beside = [], []
    for k in range(products):
        hq = flat(product(slope, w, basis[k]))
        diagonal.append(basis[k] @ hq)
        known = basis[: k + 1]
        hq = hq - (known @ hq) @ known
        hq = hq - (known @ hq) @ known
        beside.append(hq.norm())
        basis[k + 1] = hq / beside[-1]
    matrix = torch.diag(torch.stack(diagonal))
    if products > 1:
        off = torch.stack(beside[:-1])
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    first = torch.zeros_like(matrix[0])
    first[0] = -size
    x = torch.linalg.solve(matrix, first) @ basis[:-1]
    mixed = grad(slope, leaves(lam), like(w, x))
    return named(lam, torch._foreach_add(direct, mixed))


def neumann(task: Task, w: Params, lam: Params, terms: int) -> Params:
    """Sum the series α Σ (I - αH)ʲ v, with α set."""
    v, direct = outer_gradient(task, w, lam)
    slope = grad(task.inner_loss(w, lam, task.batch), leaves(w), create_graph=True)
    term, total = v, v
    for _ in range(terms):
        hv = grad(slope, leaves(w), term, retain_graph=True)
        term = torch._foreach_sub(term, hv, alpha=task.scale)
        total = torch._foreach_add(total, term)
    mixed = grad(slope, leaves(lam), torch._foreach_mul(total, -task.scale))
    return named(lam, torch._foreach_add(direct, mixed))


# -- what they share -------------------------------------------------------------------


def outer_gradient(
    task: Task, w: Params, lam: Params
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ∂f/∂w and ∂f/∂λ."""
    f = task.outer_loss(w, lam, task.held_out)
    parts = list(
        grad(f, [*leaves(w), *leaves(lam)], allow_unused=True, materialize_grads=True)
    )
    return parts[: len(w)], parts[len(w) :]


def product(slope: Any, w: Params, direction: Tensor) -> Any:
    return grad(slope, leaves(w), like(w, direction), retain_graph=True)


def leaves(params: Params) -> list[Tensor]:
    return list(params.values())


def named(params: Params, values: Any) -> Params:
    return dict(zip(params, values, strict=True))


def flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def like(params: Params, vector: Tensor) -> list[Tensor]:
    sizes = [t.numel() for t in params.values()]
    parts = vector.split(sizes)
    return [p.reshape(t.shape) for p, t in zip(parts, params.values(), strict=True)]
