"""Hypergradients by other libraries, called in the way of their own examples.

The outer loss is given a λ that is held fixed, so that what a library returns is the
indirect term alone. A peer is imported where it is first called. Settings that are
functions are called with the case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks._peer_cases import Case
from benchmarks._truth import HANDS, Params
from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradEstimator,
    make_estimator,
)
from hypergrad.testing import relative_error


class Answer(NamedTuple):
    """What a call found, and how far from their place it left w and λ."""

    indirect: Params
    moved: float


Call = Callable[[], Answer]


# -- ours --------------------------------------------------------------------------------


def our_minimum(estimator: str, settings: Any, case: Case) -> Call:
    made = make_estimator(estimator, **_filled(settings, case))
    w, lam = _leaves(case.inner), _leaves(case.outer)
    problem = BilevelProblem(case.inner_loss, case.outer_loss, w, lam)

    def call() -> Answer:
        result = made.estimate(
            problem, inner_batch=case.batch(0), outer_batch=case.held_out
        )
        return Answer(result.indirect, _moved(case, w, lam))

    return call


def our_steps(estimator: str, settings: Any, case: Case) -> Call:
    end = case.after_steps()

    def call() -> Answer:
        w, lam = _leaves(case.inner), _leaves(case.outer)
        made = _for_steps(estimator, settings, case)
        opt = BilevelOptimizer(
            BilevelProblem(case.inner_loss, case.outer_loss, w, lam),
            estimator=made,
            inner_optimizer=HANDS[case.hand].make,
            outer_optimizer=partial(torch.optim.SGD, lr=1.0),  # never steps
        )
        for step in range(case.steps):
            opt.inner_step(case.batch(step))
        result = made.estimate(
            opt.problem,
            inner_batch=None,
            outer_batch=case.held_out,
            steps=opt.recorded_steps,
        )
        return Answer(result.indirect, _moved(case, w, lam, end))

    return call


def _for_steps(estimator: str, settings: Any, case: Case) -> HypergradEstimator:
    window = {"num_steps": case.steps} if estimator == "unrolled" else {}
    return make_estimator(estimator, **settings, **window)


# -- Betty -------------------------------------------------------------------------------


def betty_minimum(settings: Any, case: Case) -> Call:
    """Call the function of Betty's engine that returns the indirect term alone."""
    levels = _betty(case, settings, lr=0.0)
    from betty.hypergradient import get_grads

    def call() -> Answer:
        levels.inner.cur_batch = (torch.tensor(0),)
        loss = levels.outer.training_step_exec(None)
        grads = get_grads(loss, levels.outer.paths[0], False)
        indirect = dict(zip(case.outer, grads, strict=True))
        return Answer(indirect, _moved(case, *levels.params()))

    return call


def betty_darts(case: Case) -> Call:
    """Call Betty's `darts` at the w before the step, with ∂f/∂w after it.

    It leaves the learning rate of the step out: the result is multiplied by it.
    """
    levels = _betty(case, {"type": "darts"}, lr=0.0)
    from betty.hypergradient.darts import darts

    lr = _learning_rate(case)

    def call() -> Answer:
        w, lam = levels.params()
        levels.inner.cur_batch = (torch.tensor(0),)
        loss = case.inner_loss(w, lam, case.batch(0))
        slope = torch.autograd.grad(loss, list(w.values()))
        ahead = {n: w[n] - lr * g for n, g in zip(w, slope, strict=True)}
        f = case.outer_loss(ahead, _fixed(lam), case.held_out)
        v = torch.autograd.grad(f, list(ahead.values()))
        grads = darts(v, levels.inner, levels.outer)
        indirect = {n: lr * g for n, g in zip(case.outer, grads, strict=True)}
        return Answer(indirect, _moved(case, *levels.params()))

    return call


def betty_engine(case: Case) -> Call:
    """Run Betty's engine for one iteration, which takes the inner step too.

    Where its outer optimizer would step, the gradient in λ is read. As for
    `betty_darts`, the result is multiplied by the learning rate.
    """
    lr = _learning_rate(case)
    end = case.after_steps()

    def call() -> Answer:
        levels = _betty(case, {"type": "darts"}, lr=lr)
        with _silent():
            levels.engine.run()
        indirect = {n: lr * g for n, g in levels.read.items()}
        w, lam = levels.params()
        return Answer(indirect, _moved(case, w, lam, end))

    return call


def _betty(case: Case, settings: Any, lr: float) -> SimpleNamespace:
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    read: Params = {}

    class Level(ImplicitProblem):
        def configure_train_data_loader(self) -> Any:
            return [(torch.tensor(k),) for k in range(max(1, case.steps))]

    class Inner(Level):
        def training_step(self, batch: Any) -> Tensor:
            return case.inner_loss(w(), lam(), case.batch(int(batch[0])))

    class Outer(Level):
        def training_step(self, batch: Any) -> Tensor:
            return case.outer_loss(w(), _fixed(lam()), case.held_out)

        def custom_optimizer_step(self) -> None:
            read.update({n: p.grad for n, p in lam().items()})

    w, lam = _Held(case.inner), _Held(case.outer)
    steppers = [torch.optim.SGD(held.parameters(), lr=lr) for held in (w, lam)]
    with _silent():
        inner = Inner("inner", Config(**_filled(settings, case)), w, steppers[0])
        # retain_graph, as in Betty's examples: f is differentiated in λ and in w.
        outer = Outer("outer", Config(retain_graph=True), lam, steppers[1])
        engine = Engine(
            [outer, inner],
            EngineConfig(train_iters=1),
            {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )
    return SimpleNamespace(
        inner=inner,
        outer=outer,
        engine=engine,
        read=read,
        params=lambda: (w(), lam()),
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Betty's engine from writing to the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


# -- TorchOpt ----------------------------------------------------------------------------


def torchopt_minimum(solver: str | None, settings: Any, case: Case) -> Call:
    """Decorate a solver that is at the minimum already with `custom_root`."""
    from torchopt import linear_solve
    from torchopt.diff.implicit import custom_root

    def objective(w: Any, lam: Any, batch: Any) -> Tensor:
        inner = dict(zip(case.inner, w, strict=True))
        return case.inner_loss(inner, dict(zip(case.outer, lam, strict=True)), batch)

    made = getattr(linear_solve, solver)(**_filled(settings, case)) if solver else None

    @custom_root(torch.func.grad(objective, argnums=0), argnums=1, solve=made)
    def solve(w: Any, lam: Any, batch: Any) -> Any:
        return w

    w, lam = _leaves(case.inner), _leaves(case.outer)

    def call() -> Answer:
        best: Any = solve(tuple(w.values()), tuple(lam.values()), case.batch(0))
        at = dict(zip(w, best, strict=True))
        f = case.outer_loss(at, _fixed(lam), case.held_out)
        grads = torch.autograd.grad(f, list(lam.values()))
        return Answer(dict(zip(lam, grads, strict=True)), _moved(case, w, lam))

    return call


def torchopt_steps(more: Any, case: Case) -> Call:
    """Step by `MetaSGD` or `MetaAdam` with the settings of the case's optimizer."""
    import torchopt

    made = HANDS[case.hand].make
    settings = {**made.keywords, **more}
    kind = {torch.optim.SGD: torchopt.MetaSGD, torch.optim.Adam: torchopt.MetaAdam}
    end = case.after_steps()

    def call() -> Answer:
        model, lam = _Held(case.inner), _leaves(case.outer)
        optimizer = kind[made.func](model, **settings)
        for step in range(case.steps):
            optimizer.step(case.inner_loss(model(), lam, case.batch(step)))
        f = case.outer_loss(model(), _fixed(lam), case.held_out)
        grads = torch.autograd.grad(f, list(lam.values()), allow_unused=True)
        indirect = _or_zeros(lam, grads)
        return Answer(indirect, _moved(case, model(), lam, end))

    return call


# -- higher ------------------------------------------------------------------------------


def higher_steps(case: Case) -> Call:
    """Step within `innerloop_ctx`."""
    import higher

    end = case.after_steps()

    def call() -> Answer:
        model, lam = _Held(case.inner), _leaves(case.outer)
        optimizer = HANDS[case.hand].make(list(model.parameters()))
        with higher.innerloop_ctx(model, optimizer) as (fast, stepper):
            for step in range(case.steps):
                stepper.step(case.inner_loss(fast(), lam, case.batch(step)))
            f = case.outer_loss(fast(), _fixed(lam), case.held_out)
            grads = torch.autograd.grad(f, list(lam.values()), allow_unused=True)
            return Answer(_or_zeros(lam, grads), _moved(case, fast(), lam, end))

    return call


# -- what they share ---------------------------------------------------------------------


class _Held(nn.Module):
    """Parameters, and a forward pass that returns them by name."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = list(params)
        for name, tensor in params.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))

    def forward(self) -> Params:
        return {name: getattr(self, name) for name in self.names}


def _leaves(params: Params) -> Params:
    return {n: t.clone().requires_grad_() for n, t in params.items()}


def _fixed(params: Params) -> Params:
    return {n: t.detach() for n, t in params.items()}


def _or_zeros(like: Params, grads: Any) -> Params:
    # What a graph does not reach has no gradient: the caller asked for that by name.
    return {
        n: torch.zeros_like(t) if g is None else g
        for (n, t), g in zip(like.items(), grads, strict=True)
    }


def _learning_rate(case: Case) -> float:
    return HANDS[case.hand].make.keywords["lr"]


def _filled(settings: Any, case: Case) -> dict[str, Any]:
    """Return settings with those that depend on the case put in."""
    return {k: v(case) if callable(v) else v for k, v in settings.items()}


def _moved(case: Case, w: Params, lam: Params, end: Params | None = None) -> float:
    """Return the larger of the relative distances of w and λ from where they belong."""
    off = relative_error(w, end or case.inner), relative_error(lam, case.outer)
    return max(o if o == o else float("inf") for o in off)  # NaN is as far as it gets
