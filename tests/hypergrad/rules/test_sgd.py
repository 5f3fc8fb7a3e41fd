"""SGD against torch.optim.SGD, and its adjoint against plain autograd."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from hypergrad.rules import SGD, State
from tests.hypergrad.rules.reference import (
    apply_each,
    copies,
    optimizer_errors,
    pulled_error,
    random_named,
    run,
    same,
    sgd_step,
    transposed,
)
from tests.tolerances import error, tol

F64 = torch.float64


def _options() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for momentum, dampening, nesterov, decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (False, True)
    ):
        if (dampening or nesterov) and not momentum:
            continue
        if nesterov and dampening:  # torch.optim refuses it
            continue
        out.append(
            {
                "momentum": momentum,
                "dampening": dampening,
                "nesterov": nesterov,
                "weight_decay": decay,
                "maximize": maximize,
            }
        )
    return out


def _name(options: dict[str, Any]) -> str:
    return "-".join(k for k, v in options.items() if v) or "plain"


OPTIONS = [pytest.param(o, id=_name(o)) for o in _options()]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_equal_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    rule = SGD(0.05, **options)
    optimizer = partial(torch.optim.SGD, lr=0.05, **options)
    assert optimizer_errors(optimizer, rule, dtype) <= 4


@pytest.mark.parametrize("fresh", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("options", OPTIONS)
def test_pullback_is_the_transpose(options: dict[str, Any], fresh: bool) -> None:
    rule = SGD(0.05, **options)
    w, g, w_bar = random_named(1), random_named(2), random_named(3)
    buffers = {} if fresh or not options["momentum"] else random_named(4)
    state: State = {n: {"momentum_buffer": b} for n, b in buffers.items()}
    bars = random_named(5) if options["momentum"] else {}
    state_bar: State = {n: {"momentum_buffer": b} for n, b in bars.items()}
    truth = transposed(
        partial(apply_each, dict.fromkeys(w, sgd_step(0.05, **options))),
        *(w, state, g, w_bar, state_bar),
    )
    got = rule.pullback(w, state, g, w_bar, state_bar)
    assert pulled_error(got, truth) <= tol(F64)


@pytest.mark.parametrize("options", OPTIONS)
def test_chain_with_changing_learning_rate(options: dict[str, Any]) -> None:
    # Four steps; the adjoints of the state carry what the later ones owe to the first.
    rates = (0.1, 0.05, 0.2, 0.01)
    w = random_named(1)
    grads = [random_named(10 + k) for k in range(4)]
    leaves = {f"{n}{k}": g for k, gs in enumerate(grads) for n, g in gs.items()}

    def all_steps(w: Any, state: Any, flat: Any) -> Any:
        for k, lr in enumerate(rates):
            steps = dict.fromkeys(w, sgd_step(lr, **options))
            w, state = apply_each(steps, w, state, {n: flat[f"{n}{k}"] for n in w})
        return w, {}

    w_bar = random_named(3)
    truth = transposed(all_steps, w, {}, leaves, w_bar, {})
    points: list[Any] = []
    now, state = w, State()
    for g, lr in zip(grads, rates, strict=True):
        points.append((SGD(lr, **options), now, state, g))
        now, state = points[-1][0].apply(now, state, g)
    bar, state_bar = w_bar, State()
    for k, (rule, at, s, g) in reversed(list(enumerate(points))):
        pulled = rule.pullback(at, s, g, bar, state_bar)
        bar, state_bar = pulled.params, pulled.state
        for n in w:
            assert error(pulled.grads[n], truth.grads[f"{n}{k}"]) <= tol(F64)
    assert error(bar, truth.params) <= tol(F64)


def test_buffer_is_kept_while_momentum_is_off() -> None:
    # A scheduler may take momentum to 0 and back: torch keeps the buffer meanwhile.
    w = {"w": torch.tensor([1.0, -2.0], dtype=F64)}
    p = w["w"].clone().requires_grad_()
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    state: State = {}
    points: list[Any] = []
    for k, momentum in enumerate((0.9, 0.0, 0.9)):
        g = {"w": torch.tensor([0.5 + k, 1.0 - k], dtype=F64)}
        points.append((SGD(0.1, momentum=momentum), w, state, g))
        w, state = points[-1][0].apply(w, state, g)
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = g["w"].clone()
        optimizer.step()
        assert torch.equal(w["w"], p.detach())
        assert torch.equal(
            state["w"]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]
        )
    # By hand, steps of 0.1 along g0, g1, and g2 + .9 g0 (the buffer skipped g1).
    bar, state_bar = {"w": torch.ones(2, dtype=F64)}, State()
    by_hand = [-0.1 * 1.9, -0.1, -0.1]
    for (rule, at, s, g), truth in zip(
        reversed(points), reversed(by_hand), strict=True
    ):
        pulled = rule.pullback(at, s, g, bar, state_bar)
        bar, state_bar = pulled.params, pulled.state
        assert error(pulled.grads["w"], torch.full((2,), truth, dtype=F64)) <= tol(F64)


def test_hand_computed_adjoint_at_rates_away_from_one() -> None:
    # along = g + .5(.5 b + .8 g), lr 2: dw/dg = -2 (1 + .4), dw/db = -2 (.25).
    rule = SGD(2.0, momentum=0.5, dampening=0.2, nesterov=True)
    one = {"w": torch.ones((), dtype=F64)}
    pulled = rule.pullback(one, {"w": {"momentum_buffer": one["w"]}}, one, one, {})
    assert pulled.grads["w"].item() == pytest.approx(-2.8, rel=1e-15)
    assert pulled.state["w"]["momentum_buffer"].item() == pytest.approx(-0.5, rel=1e-15)
    assert pulled.params["w"].item() == 1.0


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_arguments_are_unchanged_and_dtypes_kept(
    dtype: torch.dtype, steps: int
) -> None:
    rule = SGD(0.1, momentum=0.9, weight_decay=0.1, nesterov=True, maximize=True)
    w, state = run(rule, steps, dtype)
    g, w_bar = random_named(5, dtype), random_named(6, dtype)
    given = {"w": w, "state": state, "g": g, "w_bar": w_bar}
    before = copies(given)
    new_w, new_state = rule.apply(w, state, g)
    pulled = rule.pullback(w, state, g, w_bar, {})
    assert same(given, before)
    for name in w:
        made = [new_w[name], pulled.params[name], pulled.grads[name]]
        made += new_state[name].values()
        assert {t.dtype for t in made} == {dtype}
        assert all(t.shape == w[name].shape for t in made)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_results_own_their_memory(momentum: float) -> None:
    w, g = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    new, state = SGD(0.1, momentum=momentum).apply(w, {}, g)
    made = [new["w"], *state["w"].values()]
    pulled = SGD(0.1, momentum=momentum).pullback(w, {}, g, w, {})
    made += [pulled.params["w"], pulled.grads["w"]]
    given = {w["w"].data_ptr(), g["w"].data_ptr()}
    assert not given & {t.data_ptr() for t in made}


def test_low_precision_adjoints_are_the_float64_ones_rounded() -> None:
    rule = SGD(0.1, momentum=0.9, dampening=0.2, weight_decay=0.1)
    w, state = run(rule, 3, torch.float32)
    g, bar = random_named(5, torch.float32), random_named(6, torch.float32)

    def up(tree: Any) -> Any:
        return (
            {k: up(v) for k, v in tree.items()}
            if isinstance(tree, dict)
            else (tree.double())
        )

    low = rule.pullback(w, state, g, bar, {})
    high = rule.pullback(up(w), up(state), up(g), up(bar), {})
    for name in w:
        assert torch.equal(low.grads[name], high.grads[name].float())
        assert torch.equal(low.params[name], high.params[name].float())


def test_gradients_of_a_finer_dtype_do_not_widen_the_parameters() -> None:
    w = {"w": torch.ones(2, dtype=torch.bfloat16)}
    new, _ = SGD(0.1).apply(w, {}, {"w": torch.ones(2)})
    assert new["w"].dtype == torch.bfloat16


def test_results_carry_no_graph() -> None:
    w = {"w": torch.ones(2, requires_grad=True)}
    rule = SGD(0.1, momentum=0.9)
    new, state = rule.apply(w, {}, {"w": 2 * w["w"]})
    assert not new["w"].requires_grad
    assert not state["w"]["momentum_buffer"].requires_grad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": 0.1, "momentum": -1.0}, "momentum=-1.0"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"lr": 0.1, "dampening": float("nan")}, "dampening=nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words} must be finite.*Pass"):
        SGD(**settings)


def test_learning_rates_and_config() -> None:
    rule = SGD(0.5, momentum=0.9)
    assert rule.learning_rates(random_named(0)) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert rule.config()["kind"] == "sgd"
    assert SGD(**{k: v for k, v in rule.config().items() if k != "kind"}) == rule
