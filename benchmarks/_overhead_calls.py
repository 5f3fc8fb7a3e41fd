"""The hypergradients that `overhead` compares: ours, by hand, and by other libraries.

A call takes nothing and returns the total derivative by name; what can be prepared, is
prepared before it. Peers are imported where they are first called, and are called on the
functions that do the work, without the engines around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from benchmarks import _by_hand
from benchmarks._by_hand import ADAMW, SGD, STEPPERS, Task, leaves, named
from benchmarks._truth import Params
from hypergrad import BilevelProblem, make_estimator, take_steps
from hypergrad.rules import Rule, rule_of

STEPS = 5  # of a walk back
PRODUCTS = 20  # of a CG
TERMS = 5  # of a Neumann series
RADIUS = 1e-5  # of a difference by hand; that of the libraries is their default

OURS, HAND = "hypergrad", "by hand"
DISTRIBUTIONS = {"TorchOpt": "torchopt", "Betty": "betty-ml", "torch.optim": "torch"}
PIP = {
    # Its metadata is refused by pip from 24.1 on; what it needs is torch.
    "Betty": "pip install --no-deps betty-ml==0.1.1",
    "TorchOpt": "pip install torchopt",
    "torch.optim": "pip install torch",
}

Call = Callable[[], Params]


@dataclass(frozen=True)
class Method:
    """One method, by everyone who has it.

    Attributes:
        name: what it is called in the results.
        calls: what makes a call, by who makes it; those of `OURS` and `HAND` among them.
        within: how far ours may be from what is written by hand, relative.
        products: products with second derivatives of each call, the mixed one included.
    """

    name: str
    calls: dict[str, Callable[[Task], Call]]
    within: float
    products: int


def versions() -> dict[str, str | None]:
    """Return the version of each peer, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# -- ours ------------------------------------------------------------------------------


def leaf(params: Params) -> Params:
    return {n: t.detach().clone().requires_grad_() for n, t in params.items()}


def problem_of(task: Task, w: Params) -> BilevelProblem:
    return BilevelProblem(task.inner_loss, task.outer_loss, leaf(w), leaf(task.outer))


def rule_for(optimizer: str, w: Params) -> Rule:
    made = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer]
    settings = {"SGD": SGD, "AdamW": ADAMW}[optimizer]
    return rule_of(made(leaves(w), **settings), w)


def our_minimum(name: str, settings: Callable[[Task], Any], task: Task) -> Call:
    estimator = make_estimator(name, **settings(task))
    problem = problem_of(task, task.inner)

    def call() -> Params:
        return estimator.estimate(
            problem, inner_batch=task.batch, outer_batch=task.held_out
        ).outer_grads

    return call


def our_look_back(
    name: str, settings: dict[str, Any], optimizer: str, steps: int, task: Task
) -> Call:
    """Estimate from records of steps that were taken before."""
    estimator = make_estimator(name, **settings)
    start = problem_of(task, task.inner)
    rule = rule_for(optimizer, start.inner_params)
    taken, end = take_steps(start, [task.batch] * steps, rule)
    problem = problem_of(task, end)

    def call() -> Params:
        return estimator.estimate(
            problem, inner_batch=task.batch, outer_batch=task.held_out, steps=taken
        ).outer_grads

    return call


def our_steps(optimizer: str, task: Task) -> Call:
    """Take the steps too."""
    problem = problem_of(task, task.inner)
    rule = rule_for(optimizer, problem.inner_params)
    estimator = make_estimator("unrolled", num_steps=STEPS, rule=rule)

    def call() -> Params:
        return estimator.estimate(
            problem, inner_batch=task.batch, outer_batch=task.held_out
        ).outer_grads

    return call


# -- by hand ---------------------------------------------------------------------------


def hand_minimum(function: Any, count: int, task: Task) -> Call:
    w, lam = leaf(task.inner), leaf(task.outer)
    return lambda: function(task, w, lam, count)


def hand_one_step(function: Any, task: Task, **more: Any) -> Call:
    w, lam = leaf(task.inner), leaf(task.outer)
    _, ahead = _by_hand.take(task, STEPPERS["SGD"], lam, 1)
    return lambda: function(task, w, ahead, lam, SGD["lr"], **more)


def hand_walk_back(optimizer: str, task: Task) -> Call:
    lam, through = leaf(task.outer), STEPPERS[optimizer]
    taken, end = _by_hand.take(task, through, lam, STEPS)
    return lambda: _by_hand.unrolled(task, through, taken, end, lam)


def hand_steps(optimizer: str, task: Task) -> Call:
    lam, through = leaf(task.outer), STEPPERS[optimizer]

    def call() -> Params:
        taken, end = _by_hand.take(task, through, lam, STEPS)
        return _by_hand.unrolled(task, through, taken, end, lam)

    return call


# -- peers -----------------------------------------------------------------------------


def through_graph(task: Task, end: Any, lam: Params) -> Params:
    """Differentiate f through everything that led to w."""
    f = task.outer_loss(named(task.inner, end), lam, task.held_out)
    return named(lam, grad(f, leaves(lam)))


def torch_steps(optimizer: str, task: Task) -> Call:
    """Step by torch's own optimizer, with `differentiable=True`.

    It changes w in place, so that g is evaluated on a copy that its graph may keep.
    """
    made: Any = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer]
    settings = {"SGD": SGD, "AdamW": ADAMW}[optimizer]
    lam = leaf(task.outer)

    def call() -> Params:
        w = [t.clone().requires_grad_().clone() for t in task.inner.values()]
        stepper = made(w, differentiable=True, **settings)
        for _ in range(STEPS):
            at = [t.clone() for t in w]
            loss = task.inner_loss(named(task.inner, at), lam, task.batch)
            for t, g in zip(w, grad(loss, at, create_graph=True), strict=True):
                t.grad = g
            stepper.step()
        return through_graph(task, w, lam)

    return call


def torchopt_steps(optimizer: str, task: Task) -> Call:
    """Step by TorchOpt's functional optimizer."""
    import torchopt

    made: Any = {"SGD": torchopt.sgd, "AdamW": torchopt.adamw}[optimizer]
    settings = {"SGD": SGD, "AdamW": ADAMW}[optimizer]
    stepper, lam = made(**settings), leaf(task.outer)

    def call() -> Params:
        w: Any = tuple(t.clone().requires_grad_() for t in task.inner.values())
        state = stepper.init(w)
        for _ in range(STEPS):
            loss = task.inner_loss(named(task.inner, w), lam, task.batch)
            slope = grad(loss, w, create_graph=True)
            updates, state = stepper.update(slope, state, params=w, inplace=False)
            w = torchopt.apply_updates(w, updates, inplace=False)
        return through_graph(task, w, lam)

    return call


def torchopt_minimum(solver: str, settings: Callable[[Task], Any], task: Task) -> Call:
    """Call `custom_root` on a solver that is at the minimum already."""
    from torchopt import linear_solve
    from torchopt.diff.implicit import custom_root

    def objective(w: Any, lam: Any) -> Tensor:
        return task.inner_loss(named(task.inner, w), named(task.outer, lam), task.batch)

    made = getattr(linear_solve, solver)(**settings(task))

    @custom_root(torch.func.grad(objective, argnums=0), argnums=1, solve=made)
    def solve(w: Any, lam: Any) -> Any:
        return w

    w, lam = leaf(task.inner), leaf(task.outer)

    def call() -> Params:
        end: Any = solve(tuple(w.values()), tuple(lam.values()))
        return through_graph(task, end, lam)

    return call


def betty_minimum(name: str, settings: Callable[[Task], Any], task: Task) -> Call:
    """Call Betty's function on stand-ins for its problems."""
    from betty.configs import Config

    function = betty_function(name)
    w, lam = leaf(task.inner), leaf(task.outer)
    inner, outer = betty_levels(task, w, lam, Config(type=name, **settings(task)))

    def call() -> Params:
        v, direct = _by_hand.outer_gradient(task, w, lam)
        return named(lam, torch._foreach_add(direct, function(v, inner, outer)))

    return call


def betty_darts(task: Task) -> Call:
    """Call Betty's `darts`, which leaves the learning rate out.

    It also leaves w moved by 0.01; putting it back is part of the call.
    """
    from betty.configs import Config

    function = betty_function("darts")
    w, lam = leaf(task.inner), leaf(task.outer)
    inner, outer = betty_levels(task, w, lam, Config(type="darts"))
    _, ahead = _by_hand.take(task, STEPPERS["SGD"], lam, 1)
    before = [t.detach().clone() for t in w.values()]

    def call() -> Params:
        v, direct = _by_hand.outer_gradient(task, ahead, lam)
        mixed = function(v, inner, outer)
        with torch.no_grad():
            torch._foreach_copy_(leaves(w), before)
        return named(lam, torch._foreach_add(direct, mixed, alpha=SGD["lr"]))

    return call


def betty_function(name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(f"betty.hypergradient.{name}"), name)


def betty_levels(task: Task, w: Params, lam: Params, config: Any) -> tuple[Any, Any]:
    """Return what Betty's functions use of an inner and an outer problem."""
    inner = SimpleNamespace(
        paths=[],
        config=config,
        cur_batch=task.batch,
        training_step_exec=lambda batch: task.inner_loss(w, lam, batch),
        parameters=lambda: leaves(w),
        trainable_parameters=lambda: leaves(w),
    )
    return inner, SimpleNamespace(trainable_parameters=lambda: leaves(lam))


# -- all of them -----------------------------------------------------------------------


def methods() -> Iterator[Method]:
    """Yield what is compared, peers at as many products as ours."""
    one_step: dict[str, Any] = {"inner_lr": SGD["lr"]}
    exact = {**one_step, "product": "exact"}
    yield Method(
        "darts, exact",
        {
            OURS: partial(our_look_back, "darts", exact, "SGD", 1),
            HAND: partial(hand_one_step, _by_hand.darts),
        },
        within=1e-12,
        products=1,
    )
    by_differences = partial(_by_hand.darts_by_differences, radius=RADIUS)
    yield Method(
        "darts, differences",
        {
            OURS: partial(our_look_back, "darts", one_step, "SGD", 1),
            HAND: partial(hand_one_step, by_differences),
            "Betty": betty_darts,
        },
        within=1e-7,
        products=1,
    )
    for optimizer in STEPPERS:
        yield Method(
            f"unrolled, {STEPS} of {optimizer}",
            {
                OURS: partial(our_steps, optimizer),
                HAND: partial(hand_steps, optimizer),
                "torch.optim": partial(torch_steps, optimizer),
                "TorchOpt": partial(torchopt_steps, optimizer),
            },
            within=1e-12,
            products=STEPS,
        )
        more = {"num_steps": STEPS}
        yield Method(
            f"its walk back, {optimizer}",
            {
                OURS: partial(our_look_back, "unrolled", more, optimizer, STEPS),
                HAND: partial(hand_walk_back, optimizer),
            },
            within=1e-12,
            products=STEPS,
        )
    to_the_end = {"max_iter": PRODUCTS, "rtol": 0.0, "on_failure": "return"}
    yield Method(
        f"cg, {PRODUCTS} products",
        {
            OURS: partial(our_minimum, "cg", lambda _: to_the_end),
            HAND: partial(hand_minimum, _by_hand.cg, PRODUCTS),
            # Its first product is with zeros.
            "TorchOpt": partial(
                torchopt_minimum,
                "solve_cg",
                lambda _: {"maxiter": PRODUCTS - 1, "rtol": 0.0},
            ),
            "Betty": partial(
                betty_minimum, "cg", lambda _: {"cg_iterations": PRODUCTS}
            ),
        },
        within=1e-9,
        products=PRODUCTS + 1,
    )
    yield Method(
        f"neumann, {TERMS} terms",
        {
            OURS: partial(
                our_minimum,
                "neumann",
                lambda task: {"num_terms": TERMS, "scale": task.scale},
            ),
            HAND: partial(hand_minimum, _by_hand.neumann, TERMS),
            "TorchOpt": partial(
                torchopt_minimum,
                "solve_inv",
                lambda task: {"ns": True, "maxiter": TERMS, "alpha": task.scale},
            ),
            "Betty": partial(
                betty_minimum,
                "neumann",
                lambda task: {
                    "neumann_iterations": TERMS,
                    "neumann_alpha": task.scale,
                },
            ),
        },
        within=1e-12,
        products=TERMS + 1,
    )
