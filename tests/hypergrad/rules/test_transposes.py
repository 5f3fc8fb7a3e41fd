"""`pushforward` and `pullback` are transposes, in settings too, of the right matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from hypergrad import HypergradError
from hypergrad.rules import (
    SGD,
    Adam,
    AdamW,
    Clipped,
    ElementwiseRule,
    Grouped,
    Rule,
    State,
    TorchOptRule,
)
from tests.hypergrad.rules.reference import (
    Named,
    Step,
    adam_step,
    apply_each,
    clip,
    copies,
    random_named,
    same,
    sgd_step,
)
from tests.tolerances import error

F64 = torch.float64
TWO_GROUPS = Grouped(
    (
        (("c", "a"), AdamW(0.3, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2)),
        (("b",), SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    )
)
RULES: dict[str, Rule] = {
    "sgd": SGD(0.3),
    "decay": SGD(0.3, weight_decay=0.2, maximize=True),
    "momentum": SGD(0.3, momentum=0.8, dampening=0.3, weight_decay=0.1),
    "nesterov": SGD(0.3, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adam": Adam(0.3, betas=(0.7, 0.9), eps=1e-3),
    "adam-coupled": Adam(
        0.3, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2, maximize=True
    ),
    "adamw": AdamW(0.3, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2),
    "amsgrad": AdamW(0.3, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2, amsgrad=True),
    "groups": TWO_GROUPS,
    "clipped": Clipped(TWO_GROUPS, 1.0),
    "not clipped": Clipped(TWO_GROUPS, 1e6),
    "torchopt": TorchOptRule(torchopt.sgd(0.3, momentum=0.8, nesterov=True)),
    "clipped torchopt": Clipped(TorchOptRule(torchopt.sgd(0.3, momentum=0.8)), 1.0),
}


def warmed(rule: Rule, steps: int) -> tuple[Named, State]:
    w, state = random_named(0), State()
    for k in range(steps):
        w, state = rule.apply(w, state, random_named(10 + k))
    return w, state


def drawn_like(state: State, seed: int) -> State:
    """Return tangents of all slots that have them."""
    make = torch.Generator().manual_seed(seed)
    return {
        n: {
            k: torch.randn(t.shape, generator=make, dtype=F64)
            for k, t in slots.items()
            if k != "step" and t.is_floating_point()
        }
        for n, slots in state.items()
    }


def dot(a: Any, b: Any) -> Tensor:
    """Return the inner product over the names that both have."""
    if isinstance(a, Tensor):
        return (a.double() * b.double()).sum()
    parts = [dot(a[k], b[k]) for k in a if k in b]
    return torch.stack([torch.zeros((), dtype=F64), *parts]).sum()


def size(a: Any) -> float:
    return float(dot(a, a).sqrt())


def settings_tangents(rule: Rule, seed: int = 5) -> tuple[State, set[str]]:
    """Return tangents of the settings that all groups have, and their names."""
    make = torch.Generator().manual_seed(seed)
    known = rule.differentiable(random_named(0))
    keys = set.intersection(*map(set, known.values()))
    drawn = {
        name: {
            key: torch.randn(2 if key == "betas" else (), generator=make, dtype=F64)
            for key in sorted(keys)
        }
        for name in known
    }
    return drawn, keys


@pytest.mark.parametrize("t", [0, 1, 7])
@pytest.mark.parametrize("name", RULES)
def test_pushforward_and_pullback_are_transposes(name: str, t: int) -> None:
    rule = RULES[name]
    w, state = warmed(rule, t)
    g = random_named(1)
    dots = random_named(2), drawn_like(state, 3), random_named(4)
    theta, keys = settings_tangents(rule)
    pushed = rule.pushforward(w, state, g, *dots, theta)
    after = rule.apply(w, state, g)[1]
    bars = random_named(6), drawn_like(after, 7)
    shared = {key for known in theta.values() for key in known if known}
    if isinstance(rule, ElementwiseRule):
        assert shared == rule.settings
    wanted = keys if all(keys <= set(known) for known in theta.values()) else {"lr"}
    if wanted != keys:
        theta = {
            n: {k: t for k, t in e.items() if k in wanted} for n, e in theta.items()
        }
        pushed = rule.pushforward(w, state, g, *dots, theta)
    pulled = rule.pullback(w, state, g, *bars, wanted if theta["a"] else ())
    there = dot(bars[0], pushed.params) + dot(bars[1], pushed.state)
    back = dot(pulled.params, dots[0]) + dot(pulled.state, dots[1])
    back = back + dot(pulled.grads, dots[2]) + dot(pulled.settings, theta)
    sizes = size(bars[0]) * size(pushed.params) + size(bars[1]) * size(pushed.state)
    assert abs(float(there - back)) <= 1e-14 * sizes
    # A rule that has slots after the first step has tangents of them from the start.
    assert {n: set(s) for n, s in pushed.state.items() if s} == {
        n: set(s) for n, s in drawn_like(after, 0).items() if s
    }


# -- against autograd through steps written by hand ---------------------------------------

Hand = tuple[ElementwiseRule, Any, dict[str, Any]]
HANDS: dict[str, Hand] = {
    "sgd": (SGD(0.3, weight_decay=0.2), sgd_step, {}),
    "momentum": (SGD(0.3, 0.8, 0.3, 0.1), sgd_step, {"dampening": 0.3}),
    "nesterov": (
        SGD(0.3, 0.8, weight_decay=0.1, nesterov=True, maximize=True),
        sgd_step,
        {"nesterov": True, "maximize": True},
    ),
    "adam": (
        Adam(0.3, (0.7, 0.9), 1e-3, 0.2, maximize=True),
        adam_step,
        {"eps": 1e-3, "maximize": True},
    ),
    "adamw": (
        AdamW(0.3, (0.7, 0.9), 1e-3, 0.2),
        adam_step,
        {"eps": 1e-3, "decoupled": True},
    ),
    "amsgrad": (
        AdamW(0.3, (0.7, 0.9), 1e-3, 0.2, amsgrad=True),
        adam_step,
        {"eps": 1e-3, "decoupled": True, "amsgrad": True},
    ),
}


def by_hand(name: str, theta: dict[str, Tensor]) -> Step:
    rule, make, more = HANDS[name]
    if isinstance(rule, SGD):
        momentum = theta["momentum"] if rule.momentum else 0.0
        return make(theta["lr"], momentum, weight_decay=theta["weight_decay"], **more)
    beta1, beta2 = theta["betas"]
    decay = theta["weight_decay"]
    return make(theta["lr"], beta1, beta2, weight_decay=decay, **more)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("t", [0, 1, 5])
@pytest.mark.parametrize("name", HANDS)
def test_settings_against_autograd(name: str, t: int, clipped: bool) -> None:
    rule: Any = HANDS[name][0]
    whole: Rule = Clipped(rule, 0.7) if clipped else rule
    w, state = warmed(whole, t)
    g, w_bar = random_named(1), random_named(2)
    state_bar = drawn_like(rule.apply(w, state, g)[1], 3)
    theta = {
        n: {
            key: torch.tensor(getattr(rule, key), dtype=F64, requires_grad=True)
            for key in sorted(rule.settings)
        }
        for n in w
    }
    steps = {n: by_hand(name, theta[n]) for n in w}
    new_w, new_state = apply_each(steps, w, state, clip(g, 0.7) if clipped else g)
    value = dot(w_bar, new_w) + dot(state_bar, new_state)
    pulled = whole.pullback(w, state, g, w_bar, state_bar, rule.settings)
    for n, each in theta.items():
        for key, leaf in each.items():
            (truth,) = torch.autograd.grad(
                value,
                leaf,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if key == "momentum" and not rule.momentum:
                assert not pulled.settings[n][key]  # torch takes another way there
                continue
            # At t = 0 the moment's part and the correction's cancel in a beta.
            assert error(pulled.settings[n][key], truth) <= 1e-12, (n, key)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_rate_against_torch_through_several_steps(kind: Any) -> None:
    """torch.optim with differentiable=True and a tensor for a learning rate."""
    more: Any = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
    lr = torch.tensor(0.05, dtype=F64, requires_grad=True)
    start = random_named(0)
    p = {n: t.clone() for n, t in start.items()}
    optimizer = kind(
        list(p.values()), lr=lr, weight_decay=0.1, differentiable=True, **more
    )
    make: Any = {torch.optim.SGD: SGD, torch.optim.Adam: Adam}.get(kind, AdamW)
    rule = make(0.05, weight_decay=0.1, **more)
    w, state = start, State()
    if kind is not torch.optim.SGD:  # whose count torch would make in float32
        for t in p.values():
            optimizer.state[t].update(
                step=torch.zeros((), dtype=F64),
                exp_avg=torch.zeros_like(t),
                exp_avg_sq=torch.zeros_like(t),
            )
    points = []
    for k in range(5):
        g = random_named(20 + k)
        points.append((w, state, g))
        w, state = rule.apply(w, state, g)
        for n, t in p.items():
            t.grad = g[n].clone()
            held = optimizer.state[t]
            held.update({k: s.clone() for k, s in held.items() if s is not None})
        optimizer.step()
        for n, t in p.items():
            assert error(w[n], t.detach()) <= 1e-14
    bar = random_named(9)
    (truth,) = torch.autograd.grad(dot(bar, p), lr)
    total, state_bar = torch.zeros((), dtype=F64), State()
    for at in reversed(points):
        pulled = rule.pullback(*at, bar, state_bar, {"lr"})
        bar, state_bar = pulled.params, pulled.state
        total = total + sum(each["lr"] for each in pulled.settings.values())
    assert error(total, truth) <= 1e-12


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is computed in parts; its settings' adjoints are their sums."""
    from hypergrad.rules import elementwise

    rule = AdamW(0.3, betas=(0.7, 0.9), eps=1e-3)
    w, state = warmed(rule, 2)
    given = (w, state, random_named(1), random_named(2), drawn_like(state, 3))
    theta, _ = settings_tangents(rule)
    tangents = random_named(5), drawn_like(state, 6), random_named(7), theta
    whole = rule.pullback(*given, rule.settings)
    pushed = rule.pushforward(*given[:3], *tangents)
    monkeypatch.setattr(elementwise, "_PART", 5)
    parts = rule.pullback(*given, rule.settings)
    for n, each in whole.settings.items():
        for key, bar in each.items():
            assert error(parts.settings[n][key], bar) <= 1e-14
    again = rule.pushforward(*given[:3], *tangents)
    assert same(again.params, pushed.params)
    assert same(again.state, pushed.state)


def test_arguments_are_unchanged() -> None:
    rule = RULES["clipped"]
    w, state = warmed(rule, 2)
    given: Any = [w, state, random_named(1), random_named(2), drawn_like(state, 3)]
    before = [copies(each) for each in given]
    w, state, g, bar, slots_bar = given
    rule.pullback(w, state, g, bar, slots_bar, {"lr", "weight_decay"})
    theta, _ = settings_tangents(rule)
    rule.pushforward(w, state, g, bar, slots_bar, random_named(4), theta)
    assert all(same(a, b) for a, b in zip(given, before, strict=True))


class OneWay(ElementwiseRule):
    """Written before there was a forward direction."""

    kind = "one-way"
    lr = 0.1

    def step_many(self, w: Any, slots: Any, g: Any, counts: Any) -> Any:
        return w - self.lr * g, dict(slots)

    def pull_many(
        self, w: Any, slots: Any, g: Any, counts: Any, w_bar: Any, slots_bar: Any
    ) -> Any:
        return w_bar, {}, -self.lr * w_bar


def test_what_a_rule_cannot_do_is_refused_by_name() -> None:
    w, g = random_named(0), random_named(1)
    with pytest.raises(HypergradError, match=r"OneWay has no forward.*`push_many`"):
        OneWay().pushforward(w, {}, g, w, {}, g)
    with pytest.raises(HypergradError, match=r"OneWay has no derivative in 'lr'.*none"):
        OneWay().pullback(w, {}, g, w, {}, {"lr"})
    with pytest.raises(
        HypergradError, match=r"SGD has no derivative in 'betas'.*it has"
    ):
        SGD(0.1).pullback(w, {}, g, w, {}, {"betas"})
    zero = {"a": {"momentum": torch.zeros(())}}
    with pytest.raises(HypergradError, match="AdamW has no derivative in 'momentum'"):
        AdamW(0.1).pushforward(w, {}, g, w, {}, g, zero)
    hidden = RULES["torchopt"]
    with pytest.raises(HypergradError, match=r"TorchOpt.*hides its settings.*'lr'"):
        hidden.pullback(w, {}, g, w, {}, {"lr"})
