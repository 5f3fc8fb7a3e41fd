"""Problems with a known answer, and cases that go wrong, for `against_peers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import _truth
from benchmarks._truth import HANDS, Loss, Network, Params, unrolled_truth
from hypergrad import testing


@dataclass(frozen=True)
class Case:
    """A problem in float64, and its indirect term.

    Attributes:
        name: heading of its column.
        inner_loss: g.
        outer_loss: f.
        inner: w; a minimum, or where the steps start.
        outer: λ.
        truth: the indirect term; None where there is none, and silence is the failure.
        may_refuse: whether an error or a warning is as good as the answer.
        largest: the largest eigenvalue of the inner Hessian, or a bound of it.
        hand: name in `HANDS` of the optimizer that takes steps; empty at a minimum.
        steps: how many it takes, each on a batch of its own, in turn.
        batches: data of the inner loss.
        held_out: data of the outer loss.
    """

    name: str
    inner_loss: Loss
    outer_loss: Loss
    inner: Params
    outer: Params
    truth: Params | None
    may_refuse: bool = False
    largest: float = 1.0
    hand: str = ""
    steps: int = 0
    batches: Sequence[Any] = field(default=(None,))
    held_out: Any = None

    def batch(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]

    def after_steps(self) -> Params:
        """Return where torch's own optimizer goes."""
        w = {n: t.clone().requires_grad_() for n, t in self.inner.items()}
        optimizer = HANDS[self.hand].make(list(w.values()))
        for step in range(self.steps):
            optimizer.zero_grad()
            loss = self.inner_loss(w, self.outer, self.batch(step))
            loss.backward(inputs=list(w.values()))
            optimizer.step()
        return {n: t.detach() for n, t in w.items()}


# -- what goes wrong, for both kinds -----------------------------------------------------


def flat(outer_loss: Loss) -> Loss:
    """Return a hinge that holds everywhere near: its gradient is exactly 0."""
    return lambda w, lam, batch: (outer_loss(w, lam, batch) - 1e6).relu()


def zeros(params: Params) -> Params:
    return {n: torch.zeros_like(t) for n, t in params.items()}


def going_wrong(case: Case) -> list[Case]:
    """Return a healthy case with v = 0, with tiny v, with NaN, with an unused λ."""
    g, f = case.inner_loss, case.outer_loss
    truth = case.truth or {}
    tiny = {n: 1e-12 * t for n, t in truth.items()}
    idle = torch.ones(2, dtype=torch.float64)
    more = {"idle": idle, **case.outer}
    return [
        replace(case, name="v = 0", outer_loss=flat(f), truth=zeros(truth)),
        replace(case, name="f × 1e-12", outer_loss=_times(f, 1e-12), truth=tiny),
        replace(case, name="f is NaN", outer_loss=_times(f, torch.nan), truth=None),
        replace(
            case,
            name="unused λ",
            inner_loss=lambda w, lam, batch: g(w, lam, batch),
            outer_loss=lambda w, lam, batch: f(w, lam, batch) + lam["idle"].sum(),
            outer=more,
            truth={"idle": torch.zeros_like(idle), **truth},
        ),
    ]


def _times(loss: Loss, factor: float) -> Loss:
    return lambda w, lam, batch: factor * loss(w, lam, batch)


def strided(params: Params) -> Params:
    """Return the same numbers with the strides of a transpose."""
    return {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in params.items()}


# -- at a minimum ----------------------------------------------------------------------


def at_minima(seed: int) -> list[Case]:
    """Return the cases of what differentiates a minimum."""
    spread = torch.logspace(-2, 2, 50, dtype=torch.float64).tolist()
    saddle = testing.quadratic([-1.0, 0.5, 1.0, 2.0, 4.0], seed=seed)
    easy = round_bowl(seed)
    return [
        _known("ridge", testing.ridge(30, 60, seed=seed)),
        _known("network", testing.two_layer_network(seed=seed)),
        _known("κ = 1e4", testing.quadratic(spread, seed=seed)),
        _known("H = 2I", testing.quadratic([2.0] * 5, seed=seed)),
        replace(_known("saddle", saddle), may_refuse=True),
        *going_wrong(easy),
        replace(easy, name="strided w", inner=strided(easy.inner)),
    ]


def round_bowl(seed: int) -> Case:
    """Return a quadratic so near to |W|²/2 that one term of any series is enough.

    Where a method fails on it, the series is not why.
    """
    make = torch.Generator().manual_seed(seed)
    x, centre = torch.randn(2, 3, 4, generator=make, dtype=torch.float64)
    stretch = torch.linspace(0.999, 1.001, 12, dtype=torch.float64).reshape(3, 4)

    def inner_loss(w: Params, lam: Params, data: Any) -> Tensor:
        off = w["weight"] - x * lam["scale"]
        return (stretch * off.square()).sum() / 2

    def outer_loss(w: Params, lam: Params, data: Any) -> Tensor:
        return (w["weight"] - centre).square().sum() / 2

    start = {"weight": torch.zeros(3, 4)}, {"scale": torch.linspace(0.5, 1.5, 4)}
    return _known("", testing.at_minimum(inner_loss, outer_loss, *start))


def _known(name: str, known: testing.KnownProblem) -> Case:
    problem = known.problem
    return Case(
        name,
        lambda w, lam, batch: problem.inner_loss(w, lam, batch),
        lambda w, lam, batch: problem.outer_loss(w, lam, batch),
        {n: t.detach().clone() for n, t in problem.inner_params.items()},
        {n: t.detach().clone() for n, t in problem.outer_params.items()},
        known.indirect,
        largest=float(torch.linalg.eigvalsh(known.hessian)[-1]),
    )


# -- through steps ---------------------------------------------------------------------


def through_steps(seed: int) -> list[Case]:
    """Return the cases of what differentiates inner steps."""
    net = _truth.network(seed)
    one = _stepped("SGD, 1 step", net, "sgd", 1)
    return [
        one,
        _stepped("SGD, 5", net, "sgd", 5),
        _stepped("momentum, 5", net, "momentum", 5),
        _stepped("Adam, 5", net, "adam", 5),
        _stepped(
            "Adam, B = 0", low_rank(seed), "adam", 3, (low_rank_fit, low_rank_fit)
        ),
        *going_wrong(one),
        replace(one, name="strided w", inner=strided(one.inner)),
    ]


def _stepped(
    name: str,
    net: Network,
    hand: str,
    steps: int,
    losses: tuple[Loss, Loss] = (_truth.inner_loss, _truth.outer_loss),
) -> Case:
    slots = {
        n: {"exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.zeros_like(t)}
        for n, t in net.inner.items()
    }
    truth = unrolled_truth(net, net.inner, slots, HANDS[hand], 0, steps, losses)
    return Case(
        name,
        *losses,
        net.inner,
        net.outer,
        truth,
        hand=hand,
        steps=steps,
        batches=net.batches,
        held_out=net.held_out,
    )


def low_rank(seed: int) -> Network:
    """Return a linear layer plus BA with B = 0, so that the gradient in A is 0."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    base = draw(6, 8) / 8**0.5

    def data() -> Params:
        return {"x": draw(32, 8), "y": draw(32, 6), "base": base}

    inner = {"A": draw(2, 8) / 8**0.5, "B": torch.zeros(6, 2, dtype=torch.float64)}
    return Network(
        inner, {"scale": 1 + draw(8) / 4}, [data() for _ in range(3)], data()
    )


def low_rank_fit(w: Params, lam: Params, batch: Params) -> Tensor:
    scaled = batch["x"] * lam["scale"]
    off = scaled @ (batch["base"] + w["B"] @ w["A"]).T - batch["y"]
    return off.square().mean()


# -- wide enough for the arithmetic to be most of the time -------------------------------


def wide(kind: str) -> Case:
    """Return a network whose cost is that of its products; its answer is not asked for.

    Its penalty makes the inner Hessian positive definite also away from a minimum.
    """
    net = _truth.network(0, examples=256, features=128, hidden=256)
    net.outer["log_decay"].fill_(1.0)
    hand, steps = {"minimum": ("", 0), "one step": ("sgd", 1), "steps": ("sgd", 5)}[
        kind
    ]
    return Case(
        f"wide network, {kind}",
        _truth.inner_loss,
        _truth.outer_loss,
        net.inner,
        net.outer,
        None,
        largest=50.0,
        hand=hand,
        steps=steps,
        batches=net.batches,
        held_out=net.held_out,
    )


MAKERS: dict[str, Callable[[int], list[Case]]] = {
    "minimum": at_minima,
    "steps": through_steps,
}
