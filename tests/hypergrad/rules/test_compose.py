"""Clipping and groups against torch, and their adjoints against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import tree
from hypergrad.rules import SGD, Adam, AdamW, Clipped, Grouped, Rule, State
from tests.hypergrad.rules.reference import (
    Named,
    adam_step,
    apply_each,
    clip,
    copies,
    pulled_error,
    random_named,
    same,
    sgd_step,
    transposed,
)
from tests.tolerances import error, tol

F64 = torch.float64
IDENTITY = SGD(1.0, maximize=True)  # adds the gradient: w+ = w + g


def _clipped_by_hand(max_norm: float, steps: Any) -> Any:
    def step(w: Named, state: State, g: Named) -> tuple[Named, State]:
        return apply_each(steps, w, state, clip(g, max_norm))

    return step


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 25.0, 1e3, float("inf")])
def test_clips_as_torch(max_norm: float, dtype: torch.dtype) -> None:
    g = random_named(2, dtype)
    leaves = [t.clone().requires_grad_() for t in g.values()]
    for leaf, t in zip(leaves, g.values(), strict=True):
        leaf.grad = t.clone()
    total = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    w = tree.zeros_like(g)
    got, _ = Clipped(IDENTITY, max_norm).apply(w, {}, g)
    truth = {n: leaf.grad for n, leaf in zip(g, leaves, strict=True)}
    assert all(t is not None for t in truth.values())
    assert error(got, truth) <= tol(dtype)  # pyright: ignore[reportArgumentType]
    clipped = tree.norm(got)
    assert clipped == pytest.approx(min(max_norm, float(total)), rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 40.0, 1e4], ids=["far", "near", "below"])
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_pullback_is_the_transpose(inner: str, max_norm: float) -> None:
    w, g, bar = random_named(1), random_named(2), random_named(3)
    rule: Rule = SGD(0.1) if inner == "sgd" else AdamW(0.1, eps=1e-3)
    by_hand = (
        sgd_step(0.1)
        if inner == "sgd"
        else adam_step(0.1, eps=1e-3, weight_decay=0.01, decoupled=True)
    )
    steps = dict.fromkeys(w, by_hand)
    truth = transposed(_clipped_by_hand(max_norm, steps), w, {}, g, bar, {})
    got = Clipped(rule, max_norm).pullback(w, {}, g, bar, {})
    # The derivative of Adam's first step cancels: terms 100 times what is left.
    assert pulled_error(got, truth) <= tol(F64, cond=1 if inner == "sgd" else 100)
    # What the inner rule gives alone, times the factor, is not it: the norm moves too.
    if max_norm < tree.norm(g) and inner == "sgd":
        constant = tree.scale(bar, -0.1 * max_norm / (tree.norm(g) + 1e-6))
        assert error(constant, truth.grads) > 0.01


def test_clipping_removes_what_lies_along_the_gradient() -> None:
    # A longer gradient gives the same step, but for the 1e-6 added to its norm.
    g = random_named(2)
    pulled = Clipped(IDENTITY, 1.0).pullback(g, {}, g, g, {})
    assert error(pulled.grads, tree.zeros_like(g)) <= 2e-6 * tree.norm(g)
    at_right_angles = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0])}
    g = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    pulled = Clipped(IDENTITY, 1.0).pullback(g, {}, g, at_right_angles, {})
    assert pulled.grads["a"].tolist() == pytest.approx([0.0, 0.2], rel=1e-6)


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1.0, 1e18, 1e30])
def test_adjoint_in_float32_at_any_size(size: float) -> None:
    # Powers of the norm leave float32 (1e30 cubed) where the adjoint does not.
    g = {n: (t * size).float() for n, t in random_named(2).items()}
    bar = random_named(3, torch.float32)
    max_norm = size  # below the norm, which is about 60 times size
    low = Clipped(IDENTITY, max_norm).pullback(g, {}, g, bar, {})
    wide = {n: t.double() for n, t in g.items()}
    wide_bar = {n: t.double() for n, t in bar.items()}
    steps = dict.fromkeys(wide, sgd_step(1.0, maximize=True))
    truth = transposed(_clipped_by_hand(max_norm, steps), wide, {}, wide, wide_bar, {})
    assert error(low.grads, truth.grads) <= tol(torch.float32)
    # Not in float64 either: the part along the gradient is there.
    assert error(tree.scale(bar, tree.norm(low.grads)), truth.grads) > 0.01


def test_zero_gradient_below_a_threshold_of_nothing() -> None:
    # c < 1 though the norm is 0: 1e-7 / (0 + 1e-6); there is no direction to remove.
    zero, one = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    pulled = Clipped(IDENTITY, 1e-7).pullback(zero, {}, zero, one, {})
    assert pulled.grads["w"].tolist() == pytest.approx([0.1, 0.1])


def test_infinite_and_nan_gradients_come_through() -> None:
    w = {"w": torch.zeros(2)}
    for bad in (float("nan"), float("inf")):
        moved, _ = Clipped(IDENTITY, 1.0).apply(w, {}, {"w": torch.tensor([bad, 1.0])})
        assert not bool(moved["w"].isfinite().all())


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_threshold_out_of_range(max_norm: float) -> None:
    with pytest.raises(ValueError, match=f"max_norm={max_norm} must be positive"):
        Clipped(SGD(0.1), max_norm)


RULES = {
    "a": (SGD(0.1, momentum=0.9), sgd_step(0.1, momentum=0.9)),
    "b": (Adam(0.05, eps=1e-3), adam_step(0.05, eps=1e-3)),
    "c": (SGD(2.0), sgd_step(2.0)),
}


def _grouped() -> Grouped:
    return Grouped(tuple(((n,), rule) for n, (rule, _) in RULES.items()))


def test_groups_equal_their_rules_alone() -> None:
    w, g, bar = random_named(1), random_named(2), random_named(3)
    rule = _grouped()
    now, state = rule.apply(w, {}, random_named(4))
    new, new_state = rule.apply(now, state, g)
    pulled = rule.pullback(now, state, g, bar, {})
    assert list(new) == list(w)
    for name, (alone, _) in RULES.items():
        one = {name: now[name]}, {name: state[name]}, {name: g[name]}
        moved, slots = alone.apply(*one)
        assert torch.equal(moved[name], new[name])
        assert same(slots[name], new_state[name])
        back = alone.pullback(*one, {name: bar[name]}, {})
        assert torch.equal(back.grads[name], pulled.grads[name])
        assert torch.equal(back.params[name], pulled.params[name])
    assert rule.learning_rates(w) == {"a": 0.1, "b": 0.05, "c": 2.0}


def test_clipped_groups_over_steps() -> None:
    # The norm is that of all groups together; adjoints of the state pass through both.
    w, bar = random_named(1), random_named(3)
    grads = [random_named(10 + k) for k in range(4)]
    flat = {f"{n}{k}": g for k, gs in enumerate(grads) for n, g in gs.items()}
    steps = {n: by_hand for n, (_, by_hand) in RULES.items()}

    def all_steps(w: Any, state: Any, flat: Any) -> Any:
        for k in range(4):
            g = clip({n: flat[f"{n}{k}"] for n in w}, 10.0)
            w, state = apply_each(steps, w, state, g)
        return w, {}

    truth = transposed(all_steps, w, {}, flat, bar, {})
    rule = Clipped(_grouped(), 10.0)
    points: list[Any] = []
    now, state = w, State()
    for g in grads:
        points.append((now, state, g))
        now, state = rule.apply(now, state, g)
    back, state_bar = bar, State()
    mine: Named = {}
    for k, point in reversed(list(enumerate(points))):
        at, before, g = point
        pulled = rule.pullback(at, before, g, back, state_bar)
        back, state_bar = pulled.params, pulled.state
        mine |= {f"{n}{k}": t for n, t in pulled.grads.items()}
    assert error(back, truth.params) <= tol(F64, cond=10)
    assert error(mine, truth.grads) <= tol(F64, cond=10)


def test_arguments_are_unchanged() -> None:
    rule = Clipped(_grouped(), 1.0)
    w, state = rule.apply(random_named(0), {}, random_named(4))
    given = {"w": w, "state": state, "g": random_named(1), "bar": random_named(2)}
    before = copies(given)
    rule.apply(w, state, given["g"])
    rule.pullback(w, state, given["g"], given["bar"], {})
    assert same(given, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    w, g, bar = (random_named(k, dtype) for k in range(3))
    rule = Clipped(_grouped(), 1.0)
    new, _ = rule.apply(w, {}, g)
    pulled = rule.pullback(w, {}, g, bar, {})
    made = [*new.values(), *pulled.params.values(), *pulled.grads.values()]
    assert {t.dtype for t in made} == {dtype}


def test_a_parameter_in_two_groups_or_none() -> None:
    with pytest.raises(ValueError, match=r"'a' is in two groups.*Leave it in one"):
        Grouped(((("a", "b"), SGD(0.1)), (("a",), SGD(0.2))))
    rule = Grouped(((("a", "b"), SGD(0.1)),))
    w = random_named(0)
    with pytest.raises(ValueError, match=r"'c' is in none of the 1 groups.*Add it"):
        rule.apply(w, {}, w)
    with pytest.raises(ValueError, match="'c' is in none of the 1 groups"):
        rule.pullback(w, {}, w, w, {})


def test_no_parameters_at_all() -> None:
    rule = Clipped(Grouped(()), 1.0)
    assert rule.apply({}, {}, {}) == ({}, {})
    pulled = rule.pullback({}, {}, {}, {}, {})
    assert (pulled.params, pulled.state, pulled.grads) == ({}, {}, {})


def test_rules_compose_with_a_part_of_the_parameters() -> None:
    # A group may name parameters that this problem does not have.
    one = {"a": torch.ones(1)}
    new, _ = _grouped().apply(one, {}, one)
    assert list(new) == ["a"]
