"""Rules against torch's own optimizers with `differentiable=True`, in float64.

An oracle that shares no line with the rules: torch steps in place, and autograd goes
through it. What it cannot do is asked around: it detaches the first momentum buffer,
takes bias corrections in the dtype of `step` (float32 where torch makes it), changes in
place what the graph of the last amsgrad step needs, and has no derivative of Adam's step
where all gradients were 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad.rules import Rule, State, rule_of
from tests.hypergrad.rules.reference import (
    Named,
    clip,
    pulled_error,
    same,
    transposed,
)
from tests.tolerances import error, tol

F64 = torch.float64
SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (3, 4),
    "vector": (5,),
    "scalar": (),
    "one": (1,),
    "empty": (0,),
    "hollow": (2, 0),
}
Make = Callable[..., torch.optim.Optimizer]


def sgd_cases() -> Iterator[dict[str, Any]]:
    """Yield every combination that torch.optim.SGD accepts."""
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True)
    ):
        if nesterov and (not momentum or dampening):
            continue
        yield {
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": decay,
            "maximize": maximize,
        }


def adam_cases() -> Iterator[dict[str, Any]]:
    for decay, amsgrad, maximize in itertools.product(
        (0.0, 0.1), (False, True), (False, True)
    ):
        yield {
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "weight_decay": decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }


def case(kind: Any, settings: dict[str, Any]) -> Any:
    given = [k for k, v in settings.items() if v and k not in ("betas", "eps")]
    return pytest.param(partial(kind, **settings), id="-".join([kind.__name__, *given]))


CASES = [
    *(case(torch.optim.SGD, settings) for settings in sgd_cases()),
    *(case(torch.optim.Adam, settings) for settings in adam_cases()),
    *(case(torch.optim.AdamW, settings) for settings in adam_cases()),
]
RATES = [
    pytest.param(0.05, id="float"),
    pytest.param(torch.tensor(0.05, dtype=F64), id="tensor"),
]
each_rate = pytest.mark.parametrize("lr", RATES)
each_case = pytest.mark.parametrize("make", CASES)


def draw(seed: int) -> Named:
    make = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=make, dtype=F64) for n, s in SHAPES.items()}


def state_after(make: Make, t: int) -> State:
    """Return a state as after t steps; Adam's of 0 steps is zeros."""
    is_sgd = make.func is torch.optim.SGD  # pyright: ignore[reportFunctionMemberAccess]
    settings = make.keywords  # pyright: ignore[reportFunctionMemberAccess]
    if is_sgd:
        if not settings["momentum"]:
            return {n: {} for n in SHAPES}
        return {n: {"momentum_buffer": b} for n, b in draw(20).items()}
    m, v, top = draw(21), draw(22), draw(23)
    seen = float(t > 0)
    out: State = {}
    for n in SHAPES:
        out[n] = {
            "step": torch.tensor(float(t), dtype=F64),
            "exp_avg": 0.1 * seen * m[n],
            "exp_avg_sq": seen * v[n] ** 2,
        }
        if settings["amsgrad"]:
            out[n]["max_exp_avg_sq"] = seen * top[n] ** 2
    return out


def rule_for(make: Make, lr: Any) -> Rule:
    w = {n: t.requires_grad_() for n, t in draw(0).items()}
    return rule_of(make(list(w.values()), lr=lr), w)


def torch_steps(
    make: Make, lr: Any, w: Named, state: State, grads: list[Named]
) -> tuple[Named, State]:
    """Return w and state after several steps of torch's, with one graph through all."""
    params = {n: t.clone() for n, t in w.items()}
    optimizer = make(list(params.values()), lr=lr, differentiable=True)
    for n, p in params.items():
        optimizer.state[p].update(state.get(n, {}))
    for g in grads:
        for n, p in params.items():
            p.grad = g[n].clone()
            held = optimizer.state[p]
            held.update({k: t.clone() for k, t in held.items() if t is not None})
        optimizer.step()
    slots_of: State = {
        n: {k: t for k, t in optimizer.state[p].items() if isinstance(t, Tensor)}
        for n, p in params.items()
    }
    return params, slots_of


def state_bar_for(state: State) -> State:
    """Return adjoints of all slots that have one."""
    names = dict.fromkeys(k for slots in state.values() for k in slots if k != "step")
    drawn = {k: draw(30 + i) for i, k in enumerate(names)}
    return {n: {k: drawn[k][n] for k in names if k in state[n]} for n in state}


@each_rate
@each_case
def test_apply_equals_the_step(make: Make, lr: Any) -> None:
    rule = rule_for(make, lr)
    w, state = draw(1), State()
    given: list[Named] = []
    # Nothing to start from but Adam's own count, in float64.
    begin = {n: s for n, s in state_after(make, 0).items() if "step" in s}
    for k in range(4):
        # Of very different sizes from one step to the next.
        given.append({n: t * 10.0 ** (k % 3 - 1) for n, t in draw(10 + k).items()})
        w, state = rule.apply(w, state, given[-1])
        truth, slots = torch_steps(make, lr, draw(1), begin, given)
        assert error(w, truth) <= tol(F64)
        for n, of in slots.items():
            assert {k for k in of if k != "step"} == set(state[n]) - {"step"}
            for slot, value in of.items():
                assert error(state[n][slot], value) <= tol(F64, cond=4)


@pytest.mark.parametrize("t", [0, 1, 500])
@each_rate
@each_case
def test_pullback_is_autograd_through_the_step(make: Make, lr: Any, t: int) -> None:
    rule = rule_for(make, lr)
    w, g, w_bar, state = draw(1), draw(2), draw(3), state_after(make, t)
    state_bar = state_bar_for(state)

    def one(w: Named, state: State, g: Named) -> tuple[Named, State]:
        return torch_steps(make, lr, w, state, [g])

    truth = transposed(one, w, state, g, w_bar, state_bar)
    got = rule.pullback(w, state, g, w_bar, state_bar)
    # eps is 1e-3, of a smallest |g| of 1e-2: the two terms cancel at t = 0.
    assert pulled_error(got, truth) <= tol(F64, cond=20)
    assert {n: b.shape for n, b in got.grads.items()} == SHAPES


@each_rate
@each_case
def test_pullback_through_several_steps(make: Make, lr: Any) -> None:
    rule = rule_for(make, lr)
    w, state, w_bar = draw(1), state_after(make, 2), draw(3)
    grads = [draw(10 + k) for k in range(4)]
    flat = {f"{n}{k}": t for k, g in enumerate(grads) for n, t in g.items()}

    def all_of_them(w: Named, state: State, flat: Named) -> tuple[Named, State]:
        each = [{n: flat[f"{n}{k}"] for n in w} for k in range(len(grads))]
        return torch_steps(make, lr, w, state, each)

    truth = transposed(all_of_them, w, state, flat, w_bar, {})
    points = []
    now, slots = w, state
    for g in grads:
        points.append((now, slots, g))
        now, slots = rule.apply(now, slots, g)
    bar, slots_bar, pulled_grads = w_bar, State(), Named()
    for k, (at, slots, g) in reversed(list(enumerate(points))):
        pulled = rule.pullback(at, slots, g, bar, slots_bar)
        bar, slots_bar = pulled.params, pulled.state
        pulled_grads |= {f"{n}{k}": t for n, t in pulled.grads.items()}
    assert error(pulled_grads, truth.grads) <= 1e-13
    assert error(bar, truth.params) <= 1e-13
    for n, of in truth.state.items():
        for slot, value in of.items():
            assert error(slots_bar[n][slot], value) <= 1e-13


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e3])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_and_clipping(kind: Any, max_norm: float | None) -> None:
    """Two groups with settings of their own, and the norm taken over both."""
    names = [["matrix", "scalar", "empty"], ["vector", "one", "hollow"]]
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {"eps": 1e-3}
    own = [{"lr": 0.05, "weight_decay": 0.1}, {"lr": 0.5, **more}]

    def groups(params: Named) -> list[dict[str, Any]]:
        return [
            {"params": [params[n] for n in held], **settings}
            for held, settings in zip(names, own, strict=True)
        ]

    leaves = {n: t.requires_grad_() for n, t in draw(0).items()}
    rule = rule_of(kind(groups(leaves), lr=1.0), leaves, max_norm)
    w, g, w_bar = draw(1), draw(2), draw(3)
    full = state_after(partial(kind, momentum=0.9, amsgrad=False), 3)
    held = names[1] if kind is torch.optim.SGD else list(SHAPES)
    state = {n: full[n] if n in held else {} for n in SHAPES}

    def one(w: Named, state: State, g: Named) -> tuple[Named, State]:
        if max_norm is not None:
            g = clip(g, max_norm)

        def make(params: list[Tensor], **how: Any) -> torch.optim.Optimizer:
            return kind(groups(dict(zip(w, params, strict=True))), **how)

        return torch_steps(make, 1.0, w, state, [g])

    truth_w, _ = one(w, state, g)
    assert error(rule.apply(w, state, g)[0], truth_w) <= tol(F64)
    state_bar = state_bar_for(state)
    truth = transposed(one, w, state, g, w_bar, state_bar)
    got = rule.pullback(w, state, g, w_bar, state_bar)
    assert pulled_error(got, truth) <= tol(F64, cond=20)


@each_case
def test_arguments_are_unchanged(make: Make) -> None:
    rule = rule_for(make, 0.05)
    state = state_after(make, 3)
    given = {"w": draw(1), "g": draw(2), "bar": draw(3), "state": state}
    rule.apply(given["w"], state, given["g"])
    rule.pullback(given["w"], state, given["g"], given["bar"], {})
    fresh = {"w": draw(1), "g": draw(2), "bar": draw(3), "state": state_after(make, 3)}
    assert same(given, fresh)


def test_torch_detaches_the_first_momentum_buffer() -> None:
    # b₊ = g at the first step, so that ∂w₊/∂g = -lr. Torch's graph has no such edge.
    make = partial(torch.optim.SGD, momentum=0.9)
    w, g = {"w": torch.ones(1, dtype=F64)}, {"w": torch.ones(1, dtype=F64)}
    leaf = g["w"].clone().requires_grad_()
    after, _ = torch_steps(make, 0.5, w, {}, [{"w": leaf}])
    assert not after["w"].requires_grad
    held = {"w": w["w"].clone().requires_grad_()}
    rule = rule_of(make(list(held.values()), lr=0.5), held)
    assert rule.pullback(w, {}, g, w, {}).grads["w"].item() == -0.5
