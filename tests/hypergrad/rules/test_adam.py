"""Adam and AdamW against torch.optim, and their adjoints against plain autograd."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad.rules import Adam, AdamW, State, elementwise
from tests.hypergrad.rules.reference import (
    Step,
    adam_step,
    apply_each,
    copies,
    optimizer_errors,
    pulled_error,
    random_named,
    run,
    same,
    transposed,
)
from tests.tolerances import error, tol

F64 = torch.float64
KINDS = {"adam": (Adam, torch.optim.Adam), "adamw": (AdamW, torch.optim.AdamW)}

CASES = [
    pytest.param(
        kind,
        {"weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize},
        id="-".join(
            [kind]
            + ["decay"] * bool(decay)
            + ["amsgrad"] * amsgrad
            + ["maximize"] * maximize
        ),
    )
    for kind, decay, amsgrad, maximize in itertools.product(
        KINDS, (0.0, 0.1), (False, True), (False, True)
    )
]


def _reference(kind: str, lr: float, options: dict[str, Any], **more: Any) -> Step:
    return adam_step(lr, decoupled=kind == "adamw", **options, **more)


def _state(t: int, options: dict[str, Any]) -> State:
    """Return a state as after t steps, with a maximum above v in some entries."""
    if t == 0:
        return {}
    m, v, top = random_named(21), random_named(22), random_named(23)
    out: State = {}
    for n in m:
        out[n] = {
            "step": torch.tensor(float(t)),
            "exp_avg": 0.1 * m[n],
            "exp_avg_sq": v[n] ** 2,
        }
        if options["amsgrad"]:
            out[n]["max_exp_avg_sq"] = top[n] ** 2
    return out


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_steps_equal_torch(
    kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, theirs = KINDS[kind]
    rule = ours(0.05, betas=(0.8, 0.95), eps=1e-6, **options)
    optimizer = partial(theirs, lr=0.05, betas=(0.8, 0.95), eps=1e-6, **options)
    assert optimizer_errors(optimizer, rule, dtype) <= 4


@pytest.mark.parametrize("t", [0, 1, 6, 5000])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_pullback_is_the_transpose(kind: str, options: dict[str, Any], t: int) -> None:
    rule = KINDS[kind][0](0.05, eps=1e-3, **options)
    w, g, w_bar = random_named(1), random_named(2), random_named(3)
    state = _state(t, options)
    slots = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * options["amsgrad"]
    state_bar: State = {
        n: {s: random_named(30 + i)[n] for i, s in enumerate(slots)} for n in w
    }
    step = partial(
        apply_each, dict.fromkeys(w, _reference(kind, 0.05, options, eps=1e-3))
    )
    truth = transposed(step, w, state, g, w_bar, state_bar)
    got = rule.pullback(w, state, g, w_bar, state_bar)
    # 1/d - m g/(s d²) cancels at t = 1: eps is 1e-3 here, of a smallest |g| of 1e-2.
    assert pulled_error(got, truth) <= tol(F64, cond=10)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_chain_with_changing_learning_rate(kind: str, options: dict[str, Any]) -> None:
    # Five steps from nothing; adjoints of m, v and the maximum carry over.
    rates = (0.1, 0.05, 0.2, 0.01, 0.1)
    w = random_named(1)
    grads = [random_named(10 + k) for k in range(5)]
    flat = {f"{n}{k}": g for k, gs in enumerate(grads) for n, g in gs.items()}

    def all_steps(w: Any, state: Any, flat: Any) -> Any:
        for k, lr in enumerate(rates):
            steps = dict.fromkeys(w, _reference(kind, lr, options))
            w, state = apply_each(steps, w, state, {n: flat[f"{n}{k}"] for n in w})
        return w, {}

    w_bar = random_named(3)
    truth = transposed(all_steps, w, {}, flat, w_bar, {})
    points: list[Any] = []
    now, state = w, State()
    for g, lr in zip(grads, rates, strict=True):
        points.append((KINDS[kind][0](lr, **options), now, state, g))
        now, state = points[-1][0].apply(now, state, g)
    bar, state_bar = w_bar, State()
    pulled_grads: dict[str, torch.Tensor] = {}
    for k, (rule, at, s, g) in reversed(list(enumerate(points))):
        pulled = rule.pullback(at, s, g, bar, state_bar)
        bar, state_bar = pulled.params, pulled.state
        pulled_grads |= {f"{n}{k}": t for n, t in pulled.grads.items()}
    assert error(pulled_grads, truth.grads) <= 1e-13
    assert error(bar, truth.params) <= 1e-13


def test_derivative_in_closed_form() -> None:
    # ∂u/∂g = lr/c1 [(1-β1)/d - (1-β2) m g/(c2 s d²)] at g=.3, m=.1, v=.02, t=7, lr=1.
    b1, b2, eps, g, t = 0.9, 0.999, 1e-8, 0.3, 7
    m, v = b1 * 0.1 + (1 - b1) * g, b2 * 0.02 + (1 - b2) * g * g
    c1, c2 = 1 - b1**t, 1 - b2**t
    s = math.sqrt(v / c2)
    d = s + eps
    truth = ((1 - b1) / d - (1 - b2) * m * g / (c2 * s * d * d)) / c1
    assert truth == pytest.approx(0.111004, abs=5e-7)
    one = {"w": torch.ones((), dtype=F64)}
    slots = {
        "step": torch.tensor(6.0),
        "exp_avg": torch.tensor(0.1, dtype=F64),
        "exp_avg_sq": torch.tensor(0.02, dtype=F64),
    }
    for decay in (0.0, 0.3):  # decoupled decay does not enter
        rule = AdamW(1.0, weight_decay=decay)
        pulled = rule.pullback(one, {"w": slots}, {"w": one["w"] * g}, one, {})
        assert -pulled.grads["w"].item() == pytest.approx(truth, rel=tol(F64))


@pytest.mark.parametrize("t", [0, 9])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_coordinates_in_closed_form(
    kind: str, amsgrad: bool, maximize: bool, t: int
) -> None:
    # g = m = v = 0 in the first coordinate; the others as autograd has them.
    rule = KINDS[kind][0](0.01, amsgrad=amsgrad, maximize=maximize)
    w = {"w": torch.tensor([2.0, 1.0, -1.0], dtype=F64)}
    g = {"w": torch.tensor([0.0, 0.5, -2.0], dtype=F64)}
    zero = torch.tensor([0.0, 0.2, 0.3], dtype=F64)
    state: State = {}
    if t:
        slots = {"step": torch.tensor(float(t)), "exp_avg": zero, "exp_avg_sq": zero}
        state = {"w": slots | ({"max_exp_avg_sq": zero} if amsgrad else {})}
    bar = {"w": torch.tensor([1.0, 3.0, -2.0], dtype=F64)}
    got = rule.pullback(w, state, g, bar, {})
    c1 = 1 - 0.9 ** (t + 1)
    sign = -1.0 if maximize else 1.0
    closed = -sign * 0.01 * (1 - 0.9) / (c1 * 1e-8)
    assert got.grads["w"][0].item() == pytest.approx(closed, rel=tol(F64))
    if t:
        m_bar, v_bar = (got.state["w"][k][0].item() for k in ("exp_avg", "exp_avg_sq"))
        assert m_bar == pytest.approx(-0.01 * 0.9 / (c1 * 1e-8), rel=tol(F64))
        assert v_bar == 0.0
    # The live ones are not touched by their dead neighbour.
    live = {"w": w["w"][1:]}
    live_state = (
        {"w": {k: x if k == "step" else x[1:] for k, x in state["w"].items()}}
        if t
        else {}
    )
    alone = rule.pullback(live, live_state, {"w": g["w"][1:]}, {"w": bar["w"][1:]}, {})
    assert torch.equal(got.grads["w"][1:], alone.grads["w"])


def test_derivative_at_zero_is_the_limit_of_differences() -> None:
    # Differences over h see |g| h/ε of curvature, so their error falls with h.
    rule = Adam(0.01)
    w = {"w": torch.zeros((), dtype=F64)}
    pulled = rule.pullback(w, {}, w, {"w": torch.ones((), dtype=F64)}, {})
    truth = pulled.grads["w"].item()
    assert truth == pytest.approx(-0.01 / 1e-8)
    errors = []
    for h in (1e-10, 1e-11, 1e-12):
        up, down = (
            rule.apply(w, {}, {"w": torch.tensor(x, dtype=F64)})[0]["w"].item()
            for x in (h, -h)
        )
        errors.append(abs((up - down) / (2 * h) / truth - 1))
    assert errors[0] == pytest.approx(1e-2, rel=0.02)  # h/ε
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.02)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.02)


@settings(max_examples=60)
@given(
    g=st.floats(-30, 10).map(lambda x: 10.0**x),
    sign=st.sampled_from([-1.0, 0.0, 1.0]),
    v=st.floats(-60, 10).map(lambda x: 10.0**x) | st.just(0.0),
    m=st.floats(-10, 10),
    t=st.integers(1, 10_000),
)
def test_adjoint_is_finite_and_closed_form_over_all_sizes(
    g: float, sign: float, v: float, m: float, t: int
) -> None:
    g *= sign
    m *= math.sqrt(v)  # |m| stays within reach of sqrt(v), as in a real run
    slots = {
        "step": torch.tensor(float(t)),
        "exp_avg": torch.tensor(m, dtype=F64),
        "exp_avg_sq": torch.tensor(v, dtype=F64),
    }
    one = {"w": torch.ones((), dtype=F64)}
    pulled = Adam(1.0).pullback(
        one, {"w": slots}, {"w": torch.tensor(g, dtype=F64)}, one, {}
    )
    b1, b2, eps = 0.9, 0.999, 1e-8
    c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    m1, v1 = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    s = math.sqrt(v1 / c2)
    d = s + eps
    first = (1 - b1) / d
    second = (1 - b2) * m1 * g / (c2 * s * d * d) if s else 0.0
    got = -pulled.grads["w"].item()
    assert math.isfinite(got)
    # Relative to the terms, which may cancel.
    assert (
        abs(got - (first - second) / c1) <= tol(F64) * (abs(first) + abs(second)) / c1
    )


def test_first_step_in_float32_keeps_its_digits() -> None:
    # At t = 1 the derivative is lr ε/(|g| + ε)²: what is left of terms 1e8 times larger.
    # In float32 nothing would be left; the adjoint works in float64.
    g = torch.tensor([0.3, -2.0, 1e-4], dtype=torch.float32)
    one = {"w": torch.ones(3)}
    pulled = Adam(0.1).pullback(one, {}, {"w": g}, one, {})
    truth = -0.1 * 1e-8 / (g.double().abs() + 1e-8) ** 2
    assert pulled.grads["w"].dtype == torch.float32
    for got, exact in zip(pulled.grads["w"].double(), truth, strict=True):
        assert got.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_unchanged_and_dtypes_kept(
    kind: str, steps: int, dtype: torch.dtype
) -> None:
    rule = KINDS[kind][0](0.1, weight_decay=0.1, amsgrad=True, maximize=True)
    w, state = run(rule, steps, dtype)
    given = {"w": w, "state": state, "g": random_named(5, dtype)}
    given["w_bar"] = random_named(6, dtype)
    before = copies(given)
    new_w, new_state = rule.apply(w, state, given["g"])
    pulled = rule.pullback(w, state, given["g"], given["w_bar"], {})
    assert same(given, before)
    for name in w:
        made = [new_w[name], pulled.params[name], pulled.grads[name]]
        made += [t for k, t in new_state[name].items() if k != "step"]
        assert {t.dtype for t in made} == {dtype}
        assert all(t.shape == w[name].shape for t in made)
        assert new_state[name]["step"].item() == steps + 1


def test_low_precision_steps_are_finite_at_zero() -> None:
    zero = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    new, state = AdamW(1e-3).apply(zero, {}, zero)
    assert torch.equal(new["w"], zero["w"])
    pulled = AdamW(1e-3).pullback(new, state, zero, {"w": zero["w"] + 1}, {})
    assert all(bool(t.isfinite().all()) for t in pulled.grads.values())


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be finite"),
        ({"lr": 0.1, "betas": (1.0, 0.9)}, r"betas\[0\]=1.0 must be below 1"),
        ({"lr": 0.1, "betas": (0.9, 1.5)}, r"betas\[1\]=1.5 must be below 1"),
        (
            {"lr": 0.1, "betas": (-0.1, 0.9)},
            r"betas\[0\]=-0.1 must be finite",
        ),
        ({"lr": 0.1, "eps": -1e-8}, "eps=-1e-08 must be finite"),
        ({"lr": 0.1, "weight_decay": float("nan")}, "weight_decay=nan must be finite"),
    ],
)
def test_settings_out_of_range(
    kind: type[Adam], wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"{words}.*Pass"):
        kind(**wrong)


def test_learning_rates_and_config() -> None:
    for kind in (Adam, AdamW):
        rule = kind(0.5, betas=(0.8, 0.999), amsgrad=True)
        assert rule.learning_rates(random_named(0)) == {"a": 0.5, "b": 0.5, "c": 0.5}
        config = rule.config()
        assert config.pop("kind") == kind.kind
        assert kind(**config) == rule


@pytest.mark.parametrize("t", [0, 6])
@pytest.mark.parametrize("part", [1, 4, 5])
def test_parts_of_a_tensor_give_the_same_bits(
    part: int, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    params = {"w": draw(3, 5), "one": draw(1), "scalar": draw(), "none": draw(0)}

    def like() -> dict[str, torch.Tensor]:
        return {n: draw(*p.shape) for n, p in params.items()}

    grads, bar = like(), like()
    first, second = like(), like()
    state = {
        n: {
            "step": torch.tensor(float(t)),
            "exp_avg": first[n],
            "exp_avg_sq": second[n].square(),
        }
        for n in params
    }
    state_bar = {n: {"exp_avg": t.double()} for n, t in like().items()}
    given = (params, state if t else {}, grads, bar, state_bar)
    whole = AdamW(0.1).pullback(*given)
    monkeypatch.setattr(elementwise, "_PART", part)
    parts = AdamW(0.1).pullback(*given)
    for name, p in params.items():
        assert torch.equal(parts.params[name], whole.params[name])
        assert torch.equal(parts.grads[name], whole.grads[name])
        assert parts.grads[name].shape == p.shape
        for slot, value in whole.state[name].items():
            assert torch.equal(parts.state[name][slot], value)
