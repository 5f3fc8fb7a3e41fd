"""TorchOpt's functional optimizers as rules, against the closed forms of this package."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from hypergrad.errors import NonFiniteError
from hypergrad.rules import (
    SGD,
    Adam,
    AdamW,
    Clipped,
    Grouped,
    Pullback,
    Rule,
    State,
    TorchOptRule,
)
from tests.hypergrad.rules.reference import Named, copies, random_named, same
from tests.tolerances import error, tol

torchopt: Any = importlib.import_module("torchopt")
F64 = torch.float64

SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"momentum": 0.9, "weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
}


def _forward(
    rule: Rule, steps: int, dtype: torch.dtype = F64
) -> tuple[Named, list[tuple[Named, State, Named]]]:
    w, state = random_named(0, dtype), State()
    points: list[tuple[Named, State, Named]] = []
    for k in range(steps):
        g = random_named(10 + k, dtype)
        points.append((w, state, g))
        w, state = rule.apply(w, state, g)
    return w, points


def _backward(
    rule: Rule, points: list[tuple[Named, State, Named]], bar: Named
) -> tuple[Named, list[Named]]:
    state_bar, grads = State(), []
    for point in reversed(points):
        pulled = rule.pullback(*point, bar, state_bar)
        bar, state_bar = pulled.params, pulled.state
        grads.append(pulled.grads)
    return bar, grads


@pytest.mark.parametrize("kind", SGDS)
def test_sgd_is_exact(kind: str) -> None:
    theirs, ours = TorchOptRule(torchopt.sgd(0.1, **SGDS[kind])), SGD(0.1, **SGDS[kind])
    ends = [_forward(rule, 5) for rule in (theirs, ours)]
    # Not to the last bit: apply_updates adds -lr·b, rounded, where SGD fuses the two.
    assert error(ends[0][0], ends[1][0]) <= torch.finfo(F64).eps
    bar = random_named(3)
    backs = [
        _backward(rule, points, bar)
        for rule, (_, points) in zip((theirs, ours), ends, strict=True)
    ]
    assert error(backs[0][0], backs[1][0]) <= tol(F64)
    for a, b in zip(backs[0][1], backs[1][1], strict=True):
        assert error(a, b) <= tol(F64)


def test_plain_sgd_has_no_error_at_all() -> None:
    # Powers of two do not round.
    theirs = TorchOptRule(torchopt.sgd(0.5, momentum=0.5))
    ours = SGD(0.5, momentum=0.5)
    w = {"w": torch.tensor([1.0, -3.0], dtype=F64)}
    g = {"w": torch.tensor([2.0, 0.25], dtype=F64)}
    states: list[State] = [{}, {}]
    for _ in range(4):
        moved = [r.apply(w, s, g) for r, s in zip((theirs, ours), states, strict=True)]
        pulled = [
            r.pullback(w, s, g, g, {})
            for r, s in zip((theirs, ours), states, strict=True)
        ]
        assert torch.equal(moved[0][0]["w"], moved[1][0]["w"])
        assert torch.equal(pulled[0].grads["w"], pulled[1].grads["w"])
        assert torch.equal(pulled[0].params["w"], pulled[1].params["w"])
        w, states = moved[0][0], [s for _, s in moved]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: torchopt.adam(0.01), Adam(0.01)),
        (lambda: torchopt.adam(0.01, weight_decay=0.1), Adam(0.01, weight_decay=0.1)),
        (lambda: torchopt.adamw(0.01, weight_decay=0.1), AdamW(0.01, weight_decay=0.1)),
    ],
    ids=["adam", "coupled", "adamw"],
)
def test_adam_agrees_as_far_as_its_bias_correction(theirs: Any, ours: Adam) -> None:
    # TorchOpt computes 1 - β^t in float32, where it has cancelled: ε/(1 - .999) = 6e-5.
    rule = TorchOptRule(theirs())
    ends = [_forward(r, 4) for r in (rule, ours)]
    assert error(ends[0][0], ends[1][0]) <= 1e-4
    bar = random_named(3)
    # From a state that is warm: the derivative of a first step is all cancellation.
    backs = [
        _backward(r, points[2:], bar)
        for r, (_, points) in zip((rule, ours), ends, strict=True)
    ]
    assert error(backs[0][0], backs[1][0]) <= 1e-4
    assert error(backs[0][1][0], backs[1][1][0]) <= 1e-3


def test_learning_rate_schedule_counts_its_steps() -> None:
    schedule = torchopt.schedule.linear_schedule(0.4, 0.0, 4, 0)
    rule = TorchOptRule(torchopt.sgd(schedule))
    w, state = {"w": torch.zeros((), dtype=F64)}, State()
    one = {"w": torch.ones((), dtype=F64)}
    moves, slopes = [], []
    for _ in range(3):
        slopes.append(rule.pullback(w, state, one, one, {}).grads["w"].item())
        new, state = rule.apply(w, state, one)
        moves.append(new["w"].item() - w["w"].item())
        w = new
    assert moves == pytest.approx([-0.4, -0.3, -0.2], rel=1e-6)
    assert slopes == pytest.approx(moves, rel=1e-6)


def test_chain_with_clipping_by_norm_is_refused_with_the_remedy() -> None:
    # TorchOpt takes the norm for a constant: its derivative lacks the rank-one term.
    clip = torchopt.clip.clip_grad_norm(1.0)
    for chained in (
        torchopt.chain(clip, torchopt.sgd(0.1)),
        torchopt.chain(torchopt.chain(torchopt.chain(clip)), torchopt.adam(0.1)),
        torchopt.combine.chain_flat(clip),
    ):
        with pytest.raises(ValueError, match=r"clip_grad_norm.*constant.*Clipped"):
            TorchOptRule(chained)


@pytest.mark.parametrize("max_norm", [1.0, 40.0, 1e4])
def test_clipped_torchopt_equals_clipped_sgd(max_norm: float) -> None:
    theirs = Clipped(TorchOptRule(torchopt.sgd(0.1, momentum=0.9)), max_norm)
    ours = Clipped(SGD(0.1, momentum=0.9), max_norm)
    ends = [_forward(rule, 3) for rule in (theirs, ours)]
    assert error(ends[0][0], ends[1][0]) <= tol(F64)
    backs = [
        _backward(rule, points, random_named(3))
        for rule, (_, points) in zip((theirs, ours), ends, strict=True)
    ]
    assert error(backs[0][0], backs[1][0]) <= tol(F64)
    for a, b in zip(backs[0][1], backs[1][1], strict=True):
        assert error(a, b) <= tol(F64)


def test_chain_without_clipping_works() -> None:
    chained = torchopt.chain(
        torchopt.transform.add_decayed_weights(0.1), torchopt.sgd(0.1)
    )
    w, g, bar = random_named(0), random_named(1), random_named(2)
    ours = SGD(0.1, weight_decay=0.1)
    assert (
        error(TorchOptRule(chained).apply(w, {}, g)[0], ours.apply(w, {}, g)[0])
        <= torch.finfo(F64).eps
    )
    pulled = TorchOptRule(chained).pullback(w, {}, g, bar, {})
    assert error(pulled.params, ours.pullback(w, {}, g, bar, {}).params) <= tol(F64)


def test_same_inputs_same_output_with_dampening() -> None:
    # TorchOpt's momentum has a hidden "first call" on the closure; whatever was called
    # before, and from whatever state, the answer is the same.
    def make() -> TorchOptRule:
        return TorchOptRule(torchopt.sgd(1.0, momentum=0.5, dampening=0.25))

    one = {"w": torch.ones((), dtype=F64)}
    rule = make()
    _, warm = rule.apply(one, {}, one)
    for state, step in (({}, 0.75), (warm, 0.5 * 0.75 + 0.75)):
        for again in (rule, make(), make()):
            moved, _ = again.apply(one, state, one)
            assert moved["w"].item() == 1.0 - step
            pulled = again.pullback(one, state, one, one, {})
            assert pulled.grads["w"].item() == -0.75
            assert again.apply(one, state, one)[0]["w"].item() == 1.0 - step


def test_two_groups_keep_their_states_apart() -> None:
    kinds = {"a": torchopt.sgd(0.1, momentum=0.9), "b": torchopt.sgd(0.2, momentum=0.5)}
    ours = {"a": SGD(0.1, momentum=0.9), "b": SGD(0.2, momentum=0.5)}
    theirs = Grouped(tuple(((n,), TorchOptRule(t)) for n, t in kinds.items()))
    truth = Grouped(tuple(((n,), rule) for n, rule in ours.items()))

    def two(tree: Named) -> Named:
        return {n: tree[n] for n in "ab"}

    states: list[State] = [{}, {}]
    ws = [two(random_named(0))] * 2
    for k in range(3):
        g = two(random_named(10 + k))
        for i, rule in enumerate((theirs, truth)):
            ws[i], states[i] = rule.apply(ws[i], states[i], g)
    assert error(ws[0], ws[1]) <= tol(F64)


@pytest.mark.parametrize("kind", ["adam", "adamw", "rmsprop", "adagrad"])
def test_zero_gradient_raises_rather_than_returns_nan(kind: str) -> None:
    rule = TorchOptRule(getattr(torchopt, kind)(0.01))
    w = {"a": torch.ones(2, dtype=F64), "b": torch.ones(3, dtype=F64)}
    g = {"a": torch.zeros(2, dtype=F64), "b": torch.ones(3, dtype=F64)}
    message = "own step is not finite.*where a gradient is exactly 0.*Use .*rules.Adam"
    with pytest.raises(NonFiniteError, match=message):
        rule.pullback(w, {}, g, w, {})
    # Ours is exact there.
    ours = Adam(0.01).pullback(w, {}, g, w, {})
    assert ours.grads["a"][0].item() == pytest.approx(-0.01 / 1e-8)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_arguments_are_unchanged_and_dtypes_kept(
    steps: int, dtype: torch.dtype
) -> None:
    rule = TorchOptRule(torchopt.adam(0.1))
    w, points = _forward(rule, steps, dtype)
    state = rule.apply(*points[-1])[1] if points else State()
    given = {"w": w, "state": state, "g": random_named(5, dtype)}
    given["bar"] = random_named(6, dtype)
    before = copies(given)
    new, _ = rule.apply(w, state, given["g"])
    pulled = rule.pullback(w, state, given["g"], given["bar"], {})
    assert same(given, before)
    made = [*new.values(), *pulled.params.values(), *pulled.grads.values()]
    assert {t.dtype for t in made} == {dtype}


def test_low_precision_adjoints_are_the_float64_ones_rounded() -> None:
    # The adjoint works in float64, as that of the closed forms does.
    def pulled(dtype: torch.dtype) -> Pullback:
        w, g, bar = (
            {n: t.float().to(dtype) for n, t in random_named(k).items()}
            for k in range(3)
        )
        rule = TorchOptRule(torchopt.sgd(0.3, momentum=0.9, weight_decay=0.1))
        return rule.pullback(w, {}, g, bar, {})

    low, high = pulled(torch.float32), pulled(F64)
    for name, bar in high.grads.items():
        assert torch.equal(low.grads[name], bar.float())


def test_learning_rate_must_be_told() -> None:
    w = random_named(0)
    rule = TorchOptRule(torchopt.sgd(0.1), lr=0.1)
    assert rule.learning_rates(w) == {"a": 0.1, "b": 0.1, "c": 0.1}
    with pytest.raises(ValueError, match=r"Pass TorchOptRule.*lr="):
        TorchOptRule(torchopt.sgd(0.1)).learning_rates(w)


@pytest.mark.parametrize("wrong", [0.1, "sgd", None, torch.optim.SGD])
def test_other_things_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="must be a TorchOpt gradient transformation"):
        TorchOptRule(wrong)


@pytest.mark.parametrize("kind", ["adamax", "radam", "adadelta", "adagrad"])
def test_steps_equal_torchopts_own_loop(kind: str) -> None:
    # AdaMax and RAdam count in a Python int, which must survive from step to step.
    transformation = getattr(torchopt, kind)(0.1)
    rule = TorchOptRule(getattr(torchopt, kind)(0.1))
    w, state = random_named(0), State()
    theirs, their_state = copies(w), transformation.init(w)
    for k in range(8):
        g = random_named(10 + k)
        w, state = rule.apply(w, state, g)
        updates, their_state = transformation.update(
            copies(g), their_state, params=theirs, inplace=False
        )
        theirs = torchopt.apply_updates(theirs, updates, inplace=False)
    assert error(w, theirs) <= tol(F64)
    assert all(isinstance(t, torch.Tensor) for s in state.values() for t in s.values())


def test_state_of_other_things_is_refused() -> None:
    def init(params: Any) -> Any:
        del params
        return ("first",)

    def update(updates: Any, state: Any, **_: Any) -> Any:
        return updates, state

    rule = TorchOptRule(torchopt.base.GradientTransformation(init, update))
    one = {"w": torch.ones(1)}
    with pytest.raises(TypeError, match="holds a str: only tensors and numbers"):
        rule.apply(one, {}, one)
