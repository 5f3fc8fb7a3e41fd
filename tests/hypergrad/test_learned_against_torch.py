"""Learned settings and starts against torch.optim's own steps, `differentiable=True`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import BilevelOptimizer, BilevelProblem, make_estimator
from hypergrad.batches import Accumulated
from tests.hypergrad.estimators.truths import Case, network_case

F64 = torch.float64
Params = dict[str, Tensor]
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"momentum": 0.1}, {"momentum": 0.5}),
    # Here torch takes a momentum that is a tensor for a number, without a derivative.
    "nesterov": (torch.optim.SGD, {"momentum": 0.5, "nesterov": True}, {}),
    "adam": (torch.optim.Adam, {}, {"betas": (0.8, 0.95)}),
    "adamw": (torch.optim.AdamW, {}, {"betas": (0.8, 0.95)}),
}
ONE = (("first", "bias", "second"),)
TWO = (("first",), ("bias", "second"))


def factor(k: int) -> float:
    return 1 / (1 + 0.1 * k)


def data(case: Case, k: int, *, parts: bool) -> list[tuple[float, Any]]:
    if parts:
        return [(0.3, case.batch(k)), (0.7, case.batch(k + 1))]
    return [(1.0, case.batch(k))]


def fresh(kind: Any, like: Tensor) -> Params:
    """Return a state of zeros: torch detaches a momentum buffer that it makes itself."""
    zero = torch.zeros_like(like, requires_grad=False)
    if kind is torch.optim.SGD:
        return {"momentum_buffer": zero}
    step = torch.zeros((), dtype=F64)  # which torch makes in float32
    return {"step": step, "exp_avg": zero, "exp_avg_sq": zero.clone()}


def truth(
    case: Case,
    made: BilevelProblem,
    kind: Any,
    fixed: dict[str, Any],
    groups: tuple[tuple[str, ...], ...],
    *,
    steps: int,
    max_norm: float | None,
    full: bool,
) -> Params:
    """Return df/dλ through a run, by torch's own derivative of each step."""
    leaves = {
        n: t.detach().clone().requires_grad_() for n, t in made.outer_params.items()
    }
    lam = {n: t for n, t in leaves.items() if n not in made.beside_losses}
    learned = {
        s.setting: leaves[n].exp() if n.startswith("log_") else leaves[n].sigmoid()
        for n, s in made.inner_settings.items()
    }
    w = {n: leaves[made.inner_start[n]] for n in made.inner_params}
    held = {n: fresh(kind, t) for n, t in w.items()}
    for k in range(steps):
        parts = [a * case.inner_loss(w, lam, b) for a, b in data(case, k, parts=full)]
        loss = torch.stack(parts).sum()
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        if max_norm is not None:
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            c = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = [c * g for g in grads]
        moved = {n: t.clone() for n, t in w.items()}
        given: list[dict[str, Any]] = []
        for i, names in enumerate(groups):
            own: dict[str, Any] = dict(learned)
            rate = own["lr"][i] if len(groups) > 1 else own["lr"]
            own["lr"] = rate * factor(k) if full else rate
            if "betas" in own:
                own["betas"] = tuple(own["betas"])
            given.append({"params": [moved[n] for n in names], **own})
        optimizer = kind(given, **fixed, differentiable=True)
        for (n, t), g in zip(moved.items(), grads, strict=True):
            t.grad = g
            optimizer.state[t].update({key: s.clone() for key, s in held[n].items()})
        optimizer.step()
        held = {n: dict(optimizer.state[t]) for n, t in moved.items()}
        w = moved
    value = case.outer_loss(w, lam, case.outer_batch)
    found = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("name", KINDS)
def test_against_torch(name: str, steps: int, full: bool) -> None:
    """Rate, decay, momentum or betas, and start; with all that may change a step.

    That is: clipping, groups with a rate each, accumulated batches and a scheduler. Each
    term is compared at 1e-12 of the whole: a first step of Adam hardly depends on what
    scales its gradient, and what cancels there leaves rounding of the size of the step.
    """
    case, (kind, more, learned) = network_case(), KINDS[name]
    rate, max_norm = (0.05 if kind is torch.optim.SGD else 0.02), 0.3 if full else None
    groups = TWO if full else ONE
    made = BilevelProblem(
        case.inner_loss,
        case.outer_loss,
        {n: t.clone().requires_grad_() for n, t in case.inner.items()},
        {n: t.clone().requires_grad_() for n, t in case.outer.items()},
        inner_settings={
            "lr": [rate, 2 * rate] if full else rate,
            "weight_decay": 0.1,
            **learned,
        },
        learn_start=True,
    )
    fixed = {"lr": 1.0, "weight_decay": 1.0, **more}
    opt = BilevelOptimizer(
        made,
        estimator=make_estimator(
            "unrolled", num_steps=steps, snapshots=3 if steps > 5 else "all"
        ),
        inner_optimizer=kind(
            [{"params": [made.inner_params[n] for n in names]} for names in groups],
            **fixed,
        ),
        outer_optimizer=partial(torch.optim.SGD, lr=0.0),
        outer_warmup=0,
        max_grad_norm=max_norm,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt.inner, factor if full else lambda _: 1.0
    )
    for k in range(steps):
        weights, batches = zip(*data(case, k, parts=full), strict=True)
        opt.inner_step(Accumulated(batches, weights) if full else batches[0])
        schedule.step()
    found = opt.estimator.estimate(
        made,
        inner_batch=None,
        outer_batch=case.outer_batch,
        steps=opt.recorded_steps,
    ).outer_grads
    known = truth(
        case, made, kind, fixed, groups, steps=steps, max_norm=max_norm, full=full
    )
    assert found.keys() == known.keys()
    whole = torch.stack([t.norm() for t in known.values()]).norm()
    off = {n: float((found[n] - t).norm() / whole) for n, t in known.items()}
    assert max(off.values()) <= 1e-12, off
    if steps > 1:  # what is learned matters, in each of its terms
        assert all(known[n].all() for n in made.inner_settings)
