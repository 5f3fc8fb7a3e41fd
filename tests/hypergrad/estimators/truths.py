"""Independent truths: problems, hand-written optimizers, unrolling by plain autograd.

Nothing here uses the code under test beyond `BilevelProblem` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sklearn.datasets import load_wine
from torch import Tensor

from hypergrad import BilevelProblem
from tests.tolerances import error

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


def reweighting_case() -> Case:
    """Softmax regression on wine with wrong labels; λ: one log weight an example."""
    case = softmax_case()
    (x, y), held = case.batches[0], case.outer_batch
    x, y = x[:20], y[:20].clone()
    y[:5] = (y[:5] + 1) % 3

    def weighted(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        logits = x @ inner["w"] + inner["b"]
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        decay = inner["w"].square().sum() + inner["b"].square().sum()
        return (outer["log_weight"].exp() * losses).mean() + 0.05 * decay

    weights = torch.linspace(-0.5, 0.5, 20, dtype=torch.float64)
    return Case(
        weighted, case.outer_loss, case.inner, {"log_weight": weights}, [(x, y)], held
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


def classifier_case(seed: int = 0) -> Case:
    """A two-layer softmax network; λ: a gain for each hidden unit, and a decay."""
    make = torch.Generator().manual_seed(100 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=torch.float64)

    def cost(inner: Params, outer: Params, batch: Any) -> Tensor:
        x, y = batch
        hidden = torch.tanh(x @ inner["first"] + inner["bias"]) * outer["gain"]
        return torch.nn.functional.cross_entropy(hidden @ inner["second"], y)

    def inner_loss(inner: Params, outer: Params, batch: Any) -> Tensor:
        decay = sum(t.square().sum() for t in inner.values())
        return cost(inner, outer, batch) + outer["log_decay"].exp() * decay

    def data() -> tuple[Tensor, Tensor]:
        return draw(24, 6), torch.randint(0, 3, (24,), generator=make)

    return Case(
        inner_loss,
        cost,
        {"first": draw(6, 8) / 2, "bias": draw(8) / 4, "second": draw(8, 3) / 3},
        {
            "gain": 1 + draw(8) / 4,
            "log_decay": torch.tensor(-4.0, dtype=torch.float64),
        },
        [data(), data()],
        data(),
    )


# -- minima ------------------------------------------------------------------------


def minimise(problem: BilevelProblem, batch: Any, tol: float = 1e-13) -> Tensor:
    """Move w to a strict minimum of g by Newton's method; return the Hessian there.

    An independent inner solver: dense Hessians by torch.func, damped while they are not
    positive definite.
    """
    w = problem.inner_params
    sizes = [t.numel() for t in w.values()]
    lam = {n: t.detach() for n, t in problem.outer_params.items()}

    def unflat(x: Tensor) -> Params:
        parts = torch.split(x, sizes)
        return {n: p.reshape(w[n].shape) for n, p in zip(w, parts, strict=True)}

    def g(x: Tensor) -> Tensor:
        return problem.inner_loss(unflat(x), lam, batch)

    x = torch.cat([t.detach().reshape(-1) for t in w.values()])
    for _ in range(200):
        grad: Any = torch.func.grad(g)(x)
        hessian: Any = torch.func.hessian(g)(x)
        lowest = float(torch.linalg.eigvalsh(hessian)[0])
        if float(grad.norm()) < tol and lowest > 0:
            break
        shift = max(0.0, 0.1 - 2 * lowest) if lowest <= 0 else 0.0
        x = x - torch.linalg.solve(hessian + shift * torch.eye(len(x)).double(), grad)
    else:
        raise AssertionError("Newton's method did not converge")
    with torch.no_grad():
        for n, value in unflat(x).items():
            w[n].copy_(value)
    return hessian


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


def rate(step: int) -> float:
    """A learning rate that changes at every step."""
    return 0.05 * (1 + 0.5 * (step % 3))


@dataclass(frozen=True)
class Start:
    """Where a window of inner steps begins: the very numbers that the run has there.

    Attributes:
        t: number of steps taken before.
        w: inner parameters.
        slots: optimizer state by parameter, as torch.optim names it.
    """

    t: int
    w: Params
    slots: dict[str, Params] = field(default_factory=dict)


def cold(case: Case) -> Start:
    return Start(0, case.inner)


def warm(case: Case, hand: Hand, t: int = 100) -> Start:
    """Return the state after t steps of the torch optimizer alone."""
    w = {n: x.clone().requires_grad_() for n, x in case.inner.items()}
    opt = hand.make(list(w.values()))
    for k in range(t):
        opt.param_groups[0]["lr"] = rate(k)
        grads = torch.autograd.grad(
            case.inner_loss(w, case.outer, case.batch(k)), list(w.values())
        )
        for x, g in zip(w.values(), grads, strict=True):
            x.grad = g
        if hand.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(w.values()), hand.max_norm)
        opt.step()
    slots = {n: dict(opt.state.get(x, {})) for n, x in w.items()}
    return Start(t, {n: x.detach() for n, x in w.items()}, slots)


Noise = Callable[[Tensor], Tensor]
_SLOTS = {"momentum_buffer": "b", "exp_avg": "m", "exp_avg_sq": "v"}


def hand_run(
    case: Case,
    hand: Hand,
    start: Start,
    path: list[Params],
    lam: Params,
    noise: Noise = torch.clone,
) -> tuple[Tensor, Params]:
    """Return f after the window, differentiable in `lam` through it, and w there.

    Args:
        case: the problem, in float64.
        hand: the optimizer.
        start: where the window begins.
        path: λ at each of its steps; moved together where `lam` is moved.
        lam: λ at its end.
        noise: what each gradient is passed through.
    """
    w = {n: t.detach().double().requires_grad_() for n, t in start.w.items()}
    slots: dict[str, dict[str, Any]] = {
        n: {_SLOTS[k]: t.double() for k, t in kept.items() if k in _SLOTS}
        for n, kept in start.slots.items()
    }
    for t, then in enumerate(path, start=start.t):
        now = {n: x + (then[n].double() - x.detach()) for n, x in lam.items()}
        loss = case.inner_loss(w, now, case.batch(t))
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        g = [noise(x) for x in grads]
        if hand.max_norm is not None:
            norm = sum(x.square().sum() for x in g) ** 0.5
            factor = torch.clamp(hand.max_norm / (norm + 1e-6), max=1.0)
            g = [x * factor for x in g]
        w = {
            n: hand.step(slots.setdefault(n, {}), w[n], x, t + 1, rate(t))
            for n, x in zip(w, g, strict=True)
        }
    return case.outer_loss(w, lam, case.outer_batch), w


def hand_indirect(
    case: Case,
    hand: Hand,
    start: Start,
    path: list[Params],
    end: Params,
    noise: Noise = torch.clone,
) -> Params:
    """Return the indirect term through the window by plain autograd, in float64."""
    case = case.to(torch.float64)
    lam = {n: t.detach().double().requires_grad_() for n, t in end.items()}
    value, w = hand_run(case, hand, start, path, lam, noise)
    total = torch.autograd.grad(value, list(lam.values()))
    fixed = {n: t.detach() for n, t in w.items()}
    value = case.outer_loss(fixed, lam, case.outer_batch) + 0 * sum(
        t.sum() for t in lam.values()
    )
    direct = torch.autograd.grad(value, list(lam.values()))
    return {n: a - b for n, a, b in zip(lam, total, direct, strict=True)}


def one_rounding(dtype: torch.dtype, seed: int) -> Noise:
    """Return a function that moves each number by half a spacing, up or down."""
    make = torch.Generator().manual_seed(seed)

    def moved(t: Tensor) -> Tensor:
        signs = 2.0 * torch.randint(0, 2, t.shape, generator=make) - 1
        return t + t.detach() * signs * torch.finfo(dtype).eps / 2

    return moved


def conditioning(
    case: Case,
    hand: Hand,
    start: Start,
    path: list[Params],
    end: Params,
    dtype: torch.dtype,
) -> float:
    """Return how far one rounding of the w that g comes from, and of g, moves the term.

    The most of a few draws, relative to the term; propagated in float64. A gradient
    computed in a dtype is the exact one of inputs that differ by about this much.
    """
    truth = hand_indirect(case, hand, start, path, end)
    worst = 0.0
    for seed in range(4):
        noise = one_rounding(dtype, seed)
        moved = Start(
            start.t, {n: noise(t.double()) for n, t in start.w.items()}, start.slots
        )
        worst = max(
            worst, error(hand_indirect(case, hand, moved, path, end, noise), truth)
        )
    return worst


def real_run(
    case: Case,
    hand: Hand,
    estimator: Any,
    n_steps: int,
    *,
    start: Start | None = None,
    moving: bool = False,
    **settings: Any,
) -> Any:
    """Take real torch.optim steps under a `BilevelOptimizer`; return it.

    Args:
        case: the problem.
        hand: the optimizer.
        estimator: of the `BilevelOptimizer`.
        n_steps: number of steps.
        start: where they begin; cold where None.
        moving: whether λ moves after each step.
        **settings: of the `BilevelOptimizer`.
    """
    from hypergrad.optimizer import BilevelOptimizer

    start = start or cold(case)
    problem = replace(case, inner=start.w).problem()

    def inner_optimizer(params: list[Tensor]) -> torch.optim.Optimizer:
        opt = hand.make(params)
        for n, p in problem.inner_params.items():
            if start.slots.get(n):
                opt.state[p] = {k: t.clone() for k, t in start.slots[n].items()}
        return opt

    opt = BilevelOptimizer(
        problem,
        estimator=estimator,
        inner_optimizer=inner_optimizer,
        outer_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        outer_warmup=10**6,
        max_grad_norm=hand.max_norm,
        **settings,
    )
    for t in range(start.t, start.t + n_steps):
        opt.inner.param_groups[0]["lr"] = rate(t)
        opt.inner_step(case.batch(t))
        if moving:
            with torch.no_grad():
                for p in problem.outer_params.values():
                    p.add_(0.02)
    return opt


def path_of(case: Case, n_steps: int, moving: bool) -> list[Params]:
    """Return λ at each step of a `real_run`, rounded as it rounds."""
    now, out = {n: t.clone() for n, t in case.outer.items()}, []
    for _ in range(n_steps):
        out.append(now)
        now = {n: t + 0.02 if moving else t for n, t in now.items()}
    return out


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
    """Return the indirect term of the last steps of a cold run, λ fixed."""
    start = warm(case, hand, n_steps - window)
    return hand_indirect(case, hand, start, path_of(case, window, False), case.outer)
