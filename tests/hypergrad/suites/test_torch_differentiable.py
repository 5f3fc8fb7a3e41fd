"""What torch asks of its differentiable optimizers, asked of the rules.

Adapted from pytorch/pytorch, `test/optim/test_optim.py`, class
`TestDifferentiableOptimizer`: gradcheck of one step in w, gradient and state
(`test_sgd`, `test_adam`, `test_rmsprop`, ...), and of a loss after two steps in the
optimizer's settings (`test_adam_differentiable_lr`, `..._betas`, `..._all_hyperparams`,
...). Problems and settings are those of the source: ten entries, Adam at its tenth step
with a state from anywhere, the square of x Σw - y at x = 1 and y = 2.

Differs from the source: there autograd goes through torch's step. Here torch's own step,
in place and without `differentiable`, is what is evaluated, and the derivative is that of
the rule; gradcheck compares it with central differences of torch's step. Settings are
learned on their log and logit scales. (`tests/hypergrad/rules/test_differentiable.py`
compares with torch's graph itself.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from hypergrad import BilevelOptimizer, BilevelProblem, make_estimator
from hypergrad.rules import Rule, State, TorchOptRule, rule_of

torchopt: Any = importlib.import_module("torchopt")
F64 = torch.float64
SIZE = 10
Named = dict[str, Tensor]
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def draw(make: torch.Generator) -> Tensor:
    """Draw as the source does, but nothing next to 0, where 1/√v has no slope to check."""
    return 0.1 + torch.rand(SIZE, generator=make, dtype=F64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- one step, in all that goes into it --------------------------------------------------


class TorchStep(torch.autograd.Function):
    """torch's own step, with the rule's derivative."""

    @staticmethod
    def forward(ctx: Any, kind: Any, more: Any, names: Any, *given: Tensor) -> Any:
        w, g, *rest = (t.detach().clone() for t in given)
        held = dict(zip(names, rest, strict=True))
        slots = {n: t for n, t in held.items() if n not in SETTINGS}
        if "exp_avg" in slots:
            slots["step"] = torch.tensor(10.0, dtype=F64)
        theta = {n: plain(t) for n, t in held.items() if n in SETTINGS}
        ctx.before = {"w": w.clone()}, {"w": dict(slots)}, {"w": g.clone()}
        ctx.names = names
        w.requires_grad_()
        optimizer = kind([w], **more, **theta)
        ctx.rule = rule_of(optimizer, {"w": w})
        w.grad = g
        optimizer.state[w].update({n: t.clone() for n, t in slots.items()})
        optimizer.step()
        ctx.slots = [n for n in slots if n != "step"]
        return (w.detach(), *(optimizer.state[w][n] for n in ctx.slots))

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        w_bar, *rest = bars
        wanted = [n for n in ctx.names if n in SETTINGS]
        state_bar = {"w": dict(zip(ctx.slots, rest, strict=True))}
        pulled = ctx.rule.pullback(*ctx.before, {"w": w_bar}, state_bar, wanted)
        adjoints = {**pulled.state["w"], **pulled.settings.get("w", {})}
        parts = [adjoints[n] for n in ctx.names]
        return None, None, None, pulled.params["w"], pulled.grads["w"], *parts


SETTINGS = {
    "lr": torch.tensor(0.9, dtype=F64),
    "momentum": torch.tensor(0.9, dtype=F64),
    "weight_decay": torch.tensor(0.1, dtype=F64),
    "betas": torch.tensor([0.9, 0.999], dtype=F64),
}


def plain(value: Tensor) -> Any:
    return tuple(value.tolist()) if value.dim() else value.item()


SGD, ADAM = ["momentum_buffer"], ["exp_avg", "exp_avg_sq"]
MAX = [*ADAM, "max_exp_avg_sq"]
STEPS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    # The source's; its SGD has a buffer and no momentum that would read it.
    "test_sgd": (torch.optim.SGD, {"lr": 0.9}, []),
    "test_adam": (torch.optim.Adam, {"lr": 0.9, "amsgrad": True}, MAX),
    "test_adamw": (torch.optim.AdamW, {"lr": 0.9, "amsgrad": True}, MAX),
    # Its options of other optimizers, on those that have a rule.
    "sgd-momentum": (torch.optim.SGD, {"dampening": 0.3, "maximize": True}, SGD),
    "sgd-nesterov": (torch.optim.SGD, {"nesterov": True}, SGD),
    "adam-maximize": (torch.optim.Adam, {"maximize": True}, ADAM),
    "adam-decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True}, ADAM),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}, ADAM),
}


def settings_of(kind: Any) -> list[str]:
    own = "momentum" if kind is torch.optim.SGD else "betas"
    return ["lr", "weight_decay", own]


@pytest.mark.parametrize("name", STEPS)
def test_one_step(name: str) -> None:
    kind, more, slots = STEPS[name]
    make = seeded()
    names = [*slots, *(settings_of(kind) if "lr" not in more else ())]
    given = [draw(make), draw(make)]
    given += [SETTINGS[n].clone() if n in SETTINGS else draw(make) for n in names]
    for t in given:
        t.requires_grad_()
    # Third derivatives reach 1e4 where v = 0.1: times h²/6, and rounding over h. That in
    # β₂ is 1/(1 - β₂)² of the slope, which makes 1e-6 of it.
    assert gradcheck(
        partial(TorchStep.apply, kind, more, names),
        given,
        eps=1e-6,
        atol=1e-8,
        rtol=1e-6 if "betas" in names else 0,
    )


# -- a loss after two steps, in settings and start ---------------------------------------


def loss(w: Named, lam: Any, batch: Any) -> Tensor:
    del lam, batch
    return (w["w"].sum() - 2.0).square()


class TwoSteps(torch.autograd.Function):
    """The loss after two of torch's steps, with the hypergradient for a derivative."""

    @staticmethod
    def forward(ctx: Any, kind: Any, slots: Any, names: Any, *given: Tensor) -> Tensor:
        held = dict(zip(names, (t.detach() for t in given), strict=True))
        theta = {n: natural(n, t) for n, t in held.items() if n != "w"}
        ctx.kind, ctx.slots, ctx.names, ctx.held = kind, slots, names, held
        w = held["w"].clone().requires_grad_()
        optimizer = kind([w], **theta)
        optimizer.state[w].update({n: t.clone() for n, t in slots.items()})
        for _ in range(2):
            with torch.enable_grad():
                (w.grad,) = torch.autograd.grad(loss({"w": w}, None, None), [w])
            optimizer.step()
        return loss({"w": w.detach()}, None, None)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        (bar,) = bars
        held, w = ctx.held, ctx.held["w"].clone().requires_grad_()
        theta = {n: natural(n, t) for n, t in held.items() if n != "w"}
        optimizer = ctx.kind([w], **theta)
        optimizer.state[w].update({n: t.clone() for n, t in ctx.slots.items()})
        with torch.enable_grad():
            opt = BilevelOptimizer(
                BilevelProblem(
                    loss, loss, {"w": w}, {}, inner_settings=theta, learn_start=True
                ),
                estimator=make_estimator("unrolled", num_steps=2),
                inner_optimizer=optimizer,
                outer_optimizer=partial(torch.optim.SGD, lr=0.0),
                outer_warmup=0,
            )
            for _ in range(2):
                opt.inner_step(None)
            found = opt.estimator.estimate(
                opt.problem,
                inner_batch=None,
                outer_batch=None,
                steps=opt.recorded_steps,
            ).outer_grads
        of = {"w": "start of w", "betas": "logit_betas", "momentum": "logit_momentum"}
        parts = [bar * found[of.get(n, f"log_{n}")] for n in ctx.names]
        return None, None, None, *parts


def natural(name: str, held: Tensor) -> Any:
    return plain(held.exp() if name in ("lr", "weight_decay") else held.sigmoid())


SGD_SETS = [["lr"], ["weight_decay"], ["weight_decay", "lr"]]
ADAM_SETS = [["lr"], ["weight_decay"], ["betas"], ["lr", "weight_decay", "betas"]]
TWO_STEPS = [
    *((torch.optim.SGD, names) for names in SGD_SETS),
    (torch.optim.SGD, ["lr", "momentum"]),  # which the source leaves out
    *((torch.optim.Adam, names) for names in ADAM_SETS),
    *((torch.optim.AdamW, names) for names in ADAM_SETS),
]
AT = {"lr": 0.001, "weight_decay": 0.999, "momentum": 0.9, "betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("kind", "names"),
    TWO_STEPS,
    ids=lambda v: v.__name__ if callable(v) else "-".join(v),
)
def test_settings_through_two_steps(kind: Any, names: list[str]) -> None:
    make = seeded(1)
    slots: dict[str, Tensor] = {}
    if kind is not torch.optim.SGD:
        slots = {n: draw(make) for n in ADAM} | {"step": torch.tensor(10.0, dtype=F64)}
    elif "momentum" in names:
        slots = {n: draw(make) for n in SGD}
    given = [draw(make)]
    for name in names:
        value = torch.tensor(AT[name], dtype=F64)
        given.append(
            value.log() if name in ("lr", "weight_decay") else torch.logit(value)
        )
    for t in given:
        t.requires_grad_()
    # A loss of 50 rounds by 1e-14: over h = 1e-4, 1e-10. h² is another 1e-8 of a slope.
    assert gradcheck(
        partial(TwoSteps.apply, kind, slots, ["w", *names]),
        given,
        eps=1e-4,
        atol=1e-9,
        rtol=1e-7,
    )


# -- optimizers without a rule of their own ----------------------------------------------

OTHERS: list[Any] = [
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
]


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_refused_before_the_first_step(kind: Any) -> None:
    w, lam = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no rule.*SGD.*AdamW"):
        BilevelOptimizer(
            BilevelProblem(loss, loss, {"w": w}, {"lam": lam}),
            estimator="unrolled",
            inner_optimizer=kind([w]),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        )


class RuleStep(torch.autograd.Function):
    """A rule's own step and derivative, from a state that is not differentiated."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, state: State, *given: Tensor) -> Tensor:
        w, g = ({"w": t.detach()} for t in given)
        ctx.rule, ctx.before = rule, (w, state, g)
        return rule.apply(w, state, g)[0]["w"]

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        (bar,) = bars
        pulled = ctx.rule.pullback(*ctx.before, {"w": bar}, {})
        return None, None, pulled.params["w"], pulled.grads["w"]


BY_TORCHOPT: dict[str, Any] = {
    "test_adadelta": torchopt.adadelta(0.9, weight_decay=0.1),
    "test_adagrad": torchopt.adagrad(0.9, weight_decay=0.1),
    "test_adamax": torchopt.adamax(0.9, weight_decay=0.1),
    "test_radam": torchopt.radam(0.9, weight_decay=0.1),
    "test_rmsprop": torchopt.rmsprop(
        0.9, momentum=0.9, centered=True, weight_decay=0.1, maximize=True
    ),
}


@pytest.mark.parametrize("name", BY_TORCHOPT)
def test_five_of_them_by_torchopt(name: str) -> None:
    """Those that TorchOpt has, after three steps; the others have no way here."""
    rule, make = TorchOptRule(BY_TORCHOPT[name]), seeded(2)
    w, state = {"w": draw(make)}, State()
    for _ in range(3):
        w, state = rule.apply(w, state, {"w": draw(make)})
    given = [w["w"].clone().requires_grad_(), draw(make).requires_grad_()]
    assert gradcheck(
        partial(RuleStep.apply, rule, state), given, eps=1e-6, atol=1e-8, rtol=1e-6
    )
