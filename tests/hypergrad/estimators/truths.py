"""Independent truths: problems, hand-written optimizers, unrolling by plain autograd.

Nothing here uses the code under test beyond `BilevelProblem` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_wine
from torch import Tensor

from hypergrad import BilevelProblem

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Two pure losses and start values; `problem()` makes leaves of them."""

    inner_loss: Callable[[Params, Params, Any], Tensor]
    outer_loss: Callable[[Params, Params, Any], Tensor]
    inner: Params
    outer: Params
    batches: list[Any] = field(default_factory=lambda: [None])
    outer_batch: Any = None

    def batch(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]

    def problem(self) -> BilevelProblem:
        return BilevelProblem(
            self.inner_loss,
            self.outer_loss,
            {n: t.clone().requires_grad_() for n, t in self.inner.items()},
            {n: t.clone().requires_grad_() for n, t in self.outer.items()},
        )

    def to(self, dtype: torch.dtype) -> Case:
        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            if isinstance(value, tuple):
                return tuple(cast(v) for v in value)
            return value

        return Case(
            self.inner_loss,
            self.outer_loss,
            {n: cast(t) for n, t in self.inner.items()},
            {n: cast(t) for n, t in self.outer.items()},
            [cast(b) for b in self.batches],
            cast(self.outer_batch),
        )


def softmax_case() -> Case:
    """Softmax regression on the wine data with one log penalty for each feature."""
    data: Any = load_wine()
    features = torch.tensor(data.data, dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:60], order[60:120]

    def penalised(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        fit = torch.nn.functional.cross_entropy(x @ inner["w"] + inner["b"], y)
        decay = outer["log_penalty"].exp()[:, None] * inner["w"].square()
        return fit + decay.sum() / 2 + 0.005 * inner["b"].square().sum()

    def plain(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(x @ inner["w"] + inner["b"], y)

    return Case(
        penalised,
        plain,
        {
            "w": torch.zeros(13, 3, dtype=torch.float64),
            "b": torch.zeros(3, dtype=torch.float64),
        },
        {"log_penalty": torch.linspace(-3, -1, 13, dtype=torch.float64)},
        [(features[train], labels[train])],
        (features[held], labels[held]),
    )


def network_case(seed: int = 0) -> Case:
    """A two-layer tanh network; λ: penalties, a label bias and an input scale."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    def predict(inner: Params, outer: Params, x: Tensor) -> Tensor:
        hidden = torch.tanh((x * outer["scale"]) @ inner["first"] + inner["bias"])
        return hidden @ inner["second"]

    def inner_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        fit = (predict(inner, outer, x) + outer["shift"] - y).square().mean()
        decay = sum(t.square().sum() for t in inner.values())
        return fit + outer["log_decay"].exp() * decay

    def outer_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        return (predict(inner, outer, x) - y).square().mean()

    def data() -> tuple[Tensor, Tensor]:
        return draw(12, 4), draw(12)

    return Case(
        inner_loss,
        outer_loss,
        {
            "first": draw(4, 5) / 2,
            "bias": draw(5) / 2,
            "second": draw(5) / 2,
        },
        {
            "scale": 1 + draw(4) / 4,
            "shift": draw() / 4,
            "log_decay": torch.tensor(-3.0, dtype=torch.float64),
        },
        [data(), data(), data()],
        data(),
    )


# -- optimizers, written out so that autograd can go through them ------------------


@dataclass(frozen=True)
class Hand:
    """One torch optimizer and a differentiable step that should equal it."""

    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    step: Callable[[dict[str, Any], Tensor, Tensor, int, float], Tensor]
    max_norm: float | None = None


def hand_sgd(
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    decay: float = 0.0,
    max_norm: float | None = None,
) -> Hand:
    def step(slots: dict[str, Any], w: Tensor, g: Tensor, t: int, lr: float) -> Tensor:
        g = g + decay * w
        if not momentum:
            return w - lr * g
        slots["b"] = g if t == 1 else momentum * slots["b"] + (1 - dampening) * g
        return w - lr * (g + momentum * slots["b"] if nesterov else slots["b"])

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            params,
            lr=1.0,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=decay,
        )

    return Hand(make, step, max_norm)


def hand_adam(
    decay: float = 0.0, decoupled: bool = True, max_norm: float | None = None
) -> Hand:
    b1, b2, eps = 0.9, 0.98, 1e-8

    def step(slots: dict[str, Any], w: Tensor, g: Tensor, t: int, lr: float) -> Tensor:
        if not decoupled:
            g = g + decay * w
        slots["m"] = b1 * slots.get("m", 0.0) + (1 - b1) * g
        slots["v"] = b2 * slots.get("v", 0.0) + (1 - b2) * g**2
        m_hat = slots["m"] / (1 - b1**t)
        v_hat = slots["v"] / (1 - b2**t)
        kept = w * (1 - lr * decay) if decoupled else w
        return kept - lr * m_hat / (v_hat.sqrt() + eps)

    kind = torch.optim.AdamW if decoupled else torch.optim.Adam

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return kind(params, lr=1.0, betas=(b1, b2), eps=eps, weight_decay=decay)

    return Hand(make, step, max_norm)


HANDS: dict[str, Hand] = {
    "sgd": hand_sgd(),
    "sgd-decay-clip": hand_sgd(decay=0.1, max_norm=0.3),
    "momentum": hand_sgd(0.9, dampening=0.1),
    "nesterov": hand_sgd(0.9, nesterov=True, decay=0.05),
    "adam": hand_adam(decay=0.05, decoupled=False),
    "adamw": hand_adam(decay=0.1),
    "adamw-clip": hand_adam(decay=0.1, max_norm=0.2),
}


def conditioning(hand: str, n_steps: int) -> float:
    """Return the tolerance of a float64 derivative through the hand's last step.

    1e-12 leaves three digits over the worst seen (3e-15). Adam's first step from a cold
    state has the derivative lr ε/(|g| + ε)², the difference of two terms that agree to
    ε/|g| = 1e-7 or so: of 16 digits 9 are left, in the truth as well.
    """
    return 1e-8 if "adam" in hand and n_steps == 1 else 1e-12


def rate(step: int) -> float:
    """A learning rate that changes at every step."""
    return 0.05 * (1 + 0.5 * (step % 3))


def hand_run(
    case: Case,
    hand: Hand,
    n_steps: int,
    window: int,
    lam: Params,
    shifts: list[float] | None = None,
) -> Tensor:
    """Return f after `n_steps`, differentiable in `lam` through the last `window`.

    Args:
        case: the problem.
        hand: the optimizer.
        n_steps: number of steps from a cold state.
        window: how many of them are differentiated through.
        lam: λ at the end.
        shifts: what λ differed by, at each step, from its value at the end.
    """
    w = {n: t.clone().requires_grad_() for n, t in case.inner.items()}
    slots: dict[str, dict[str, Any]] = {n: {} for n in w}
    for k in range(n_steps):
        through = k >= n_steps - window
        now = {n: t + (shifts[k] if shifts else 0.0) for n, t in lam.items()}
        loss = case.inner_loss(w, now, case.batch(k))
        g = torch.autograd.grad(loss, list(w.values()), create_graph=through)
        if hand.max_norm is not None:
            norm = sum(x.square().sum() for x in g) ** 0.5
            factor = torch.clamp(hand.max_norm / (norm + 1e-6), max=1.0)
            g = tuple(x * factor for x in g)
        with torch.set_grad_enabled(through):
            w = {
                n: hand.step(slots[n], w[n], x, k + 1, rate(k))
                for (n, x) in zip(w, g, strict=True)
            }
        if not through:
            w = {n: t.detach().requires_grad_() for n, t in w.items()}
    return case.outer_loss(w, lam, case.outer_batch)


def hand_hypergradient(case: Case, hand: Hand, n_steps: int, window: int) -> Params:
    """Return df/dλ through the last `window` steps, by plain autograd."""
    lam = {n: t.clone().requires_grad_() for n, t in case.outer.items()}
    value = hand_run(case, hand, n_steps, window, lam)
    grads = torch.autograd.grad(value, list(lam.values()))
    return dict(zip(lam, grads, strict=True))


def real_run(
    case: Case, hand: Hand, estimator: Any, n_steps: int, **settings: Any
) -> Any:
    """Take real torch.optim steps under a `BilevelOptimizer`; return it."""
    from hypergrad.optimizer import BilevelOptimizer

    opt = BilevelOptimizer(
        case.problem(),
        estimator=estimator,
        inner_optimizer=hand.make,
        outer_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        outer_warmup=10**6,
        max_grad_norm=hand.max_norm,
        **settings,
    )
    for k in range(n_steps):
        opt.inner.param_groups[0]["lr"] = rate(k)
        opt.inner_step(case.batch(k))
    return opt


def estimate(opt: Any, case: Case, **settings: Any) -> Any:
    """Estimate at the end of a `real_run`."""
    given: dict[str, Any] = {
        "inner_batch": None,
        "outer_batch": case.outer_batch,
        "steps": opt.recorded_steps,
        **settings,
    }
    return opt.estimator.estimate(opt.problem, **given)


def indirect_truth(case: Case, hand: Hand, n_steps: int, window: int) -> Params:
    """Return the indirect term alone: the total less ∂f/∂λ at the last w."""
    total = hand_hypergradient(case, hand, n_steps, window)
    lam = {n: t.clone().requires_grad_() for n, t in case.outer.items()}
    value = hand_run(case, hand, n_steps, 0, lam)
    parts = torch.autograd.grad(value, list(lam.values()), allow_unused=True)
    direct = dict(zip(lam, parts, strict=True))
    return {n: t if direct[n] is None else t - direct[n] for n, t in total.items()}
