"""Ways to differentiate through AdamW's steps, for `unroll_memory`.

Each takes the model, its w and λ by name, an AdamW that took one step, and batches; and
returns the hypergradient, and how many bytes it keeps of the steps where that is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call

from bidora import BiDoRAOptimizer
from hypergrad import make_estimator

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def bytes_of(tensors: dict[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def ours(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], int]:
    """Walk back one step at a time."""
    del w, lam
    estimator = make_estimator("unrolled", num_steps=len(inner_batches))
    opt = BiDoRAOptimizer(
        model,
        estimator,
        inner_optimizer=lambda _: adamw,
        orthogonality=0.0,
        max_grad_norm=None,
    )
    for batch in inner_batches:
        opt.inner_step(batch)
    steps = opt.recorded_steps
    recorded = sum(
        bytes_of(step.inner_params)
        + bytes_of(step.grads)  # empty where the walk back finds it anyway
        + sum(bytes_of(slots) for slots in step.state.values())
        for step in steps
    )
    result = estimator.estimate(
        opt.problem, inner_batch=None, outer_batch=outer_batch, steps=steps
    )
    return result.outer_grads, recorded


def plain(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], None]:
    """Take AdamW's steps as they stand in its definition."""
    m = {n: adamw.state[p]["exp_avg"] for n, p in w.items()}
    v = {n: adamw.state[p]["exp_avg_sq"] for n, p in w.items()}
    t = 1  # the plain step

    def advance(now: Any, loss: Any) -> Any:
        nonlocal t
        t += 1
        grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        after = {}
        for (n, p), g in zip(now.items(), grads, strict=True):
            m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * g
            v[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * g.square()
            d = (v[n] / (1 - BETAS[1] ** t)).sqrt() + EPS
            after[n] = p - LR * (DECAY * p + m[n] / (1 - BETAS[0] ** t) / d)
        return after

    return through_all(advance, model, w, lam, inner_batches, outer_batch)


def by_torchopt(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], None]:
    """Take the steps of TorchOpt's functional AdamW."""
    import torchopt

    optimizer = torchopt.adamw(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    slots = [adamw.state[p] for p in w.values()]
    first, *others = optimizer.init(tuple(w.values()))
    first = first._replace(
        mu=tuple(s["exp_avg"] for s in slots),
        nu=tuple(s["exp_avg_sq"] for s in slots),
        count=tuple(s["step"].long() for s in slots),
    )
    state: Any = (first, *others)

    def advance(now: Any, loss: Any) -> Any:
        nonlocal state
        params = tuple(now.values())
        grads = torch.autograd.grad(loss, params, create_graph=True)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        after: Any = torchopt.apply_updates(params, updates, inplace=False)
        return dict(zip(now, after, strict=True))

    return through_all(advance, model, w, lam, inner_batches, outer_batch)


def by_higher(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], None]:
    """Take the steps of higher's differentiable Adam, with AdamW's decay put before."""
    import higher
    from higher.optim import DifferentiableAdam

    class DifferentiableAdamW(DifferentiableAdam):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group in self.param_groups:
                kept = 1 - group["lr"] * group["weight_decay"]
                group["params"] = [kept * p for p in group["params"]]
                group["weight_decay"], decay = 0.0, group["weight_decay"]
                super()._update(grouped_grads, **kwargs)
                group["weight_decay"] = decay

    register: Any = higher.register_optim  # annotated as if it took an instance
    register(torch.optim.AdamW, DifferentiableAdamW)
    for slots in adamw.state.values():
        slots["step"] = int(slots["step"])  # as in the torch that higher was made for
    stepper = higher.get_diff_optim(adamw, list(w.values()))

    def advance(now: Any, loss: Any) -> Any:
        after = stepper.step(loss, params=list(now.values()))
        return dict(zip(now, after, strict=True))

    return through_all(advance, model, w, lam, inner_batches, outer_batch)


def through_all(
    advance: Callable[[Any, Any], Any],
    model: Any,
    w: Any,
    lam: Any,
    inner_batches: list[Any],
    outer_batch: Any,
) -> tuple[dict[str, Any], None]:
    """Return the hypergradient by one backward pass through the steps of `advance`."""

    def loss(params: Any, batch: Any) -> Any:
        return functional_call(model, {**params, **lam}, (), batch).loss

    now = dict(w)
    for batch in inner_batches:
        now = advance(now, loss(now, batch))
    grads = torch.autograd.grad(loss(now, outer_batch), list(lam.values()))
    return dict(zip(lam, grads, strict=True)), None


def whole_by_torchopt(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], None]:
    """Step the whole model by `MetaAdamW`, as in TorchOpt's examples."""
    import torchopt

    del w, adamw
    optimizer = torchopt.MetaAdamW(model, lr=LR, weight_decay=DECAY)
    for batch in inner_batches:
        optimizer.step(model(**batch).loss)
    grads = torch.autograd.grad(model(**outer_batch).loss, list(lam.values()))
    return dict(zip(lam, grads, strict=True)), None


def whole_by_higher(
    model: Any, w: Any, lam: Any, adamw: Any, inner_batches: list[Any], outer_batch: Any
) -> tuple[dict[str, Any], None]:
    """Step the whole model within `innerloop_ctx`, as in higher's examples."""
    import higher

    del adamw
    adam = torch.optim.Adam(w.values(), lr=LR)
    with higher.innerloop_ctx(model, adam, copy_initial_weights=False) as (fast, step):
        for batch in inner_batches:
            step.step(fast(**batch).loss)
        grads = torch.autograd.grad(fast(**outer_batch).loss, list(lam.values()))
    return dict(zip(lam, grads, strict=True)), None


METHODS = {
    "ours": ours,
    "ours-frozen": ours,
    "ours-large": ours,
    "plain": plain,
    "torchopt": by_torchopt,
    "higher": by_higher,
    "whole-torchopt": whole_by_torchopt,
    "whole-higher": whole_by_higher,
}
