"""Inner steps are differentiated in the modes that they were taken in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hypergrad import (
    Accumulated,
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    MicroBatch,
    estimator_names,
    make_estimator,
    tree,
)
from hypergrad.rules import SGD
from hypergrad.solvers import make_solver
from hypergrad.steps import take_steps

F64 = torch.float64
RATE = 0.1
OUTER = "0.weight"
SETTINGS: dict[str, dict[str, Any]] = {
    "cg": {"damping": 10.0},
    "implicit": {"solver": make_solver("cg", damping=10.0)},
    "neumann": {"damping": 10.0},
    "nystrom": {"damping": 10.0},
    "unrolled": {"num_steps": 2},
    "forward": {"num_steps": 2},
    "zeroth-order": {"num_steps": 2},
}

Loss = Callable[[nn.Module, Tensor], Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)
    return nn.Sequential(*layers).to(F64)


def data() -> Tensor:
    return torch.linspace(-1, 1, 24, dtype=F64).reshape(6, 4).sin()


def inner_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def plain_outer_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def switching_outer_loss(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    return plain_outer_loss(model, x)


def outer_loss_of_a_twin(model: nn.Module) -> Loss:
    """Return a loss without dropout that leaves the model's mode alone."""
    twin = copy.deepcopy(model).eval()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (
            (functional_call(twin, dict(model.named_parameters()), x) - 1)
            .square()
            .mean()
        )

    return loss


def hypergradient(
    estimator: Any, outer_loss: Loss, *, leave: bool = False, n_steps: int = 2
) -> Tensor:
    """Return what an outer step takes, perhaps with the model in eval mode by then."""
    model, x = network(), data()
    optimizer = BilevelOptimizer(
        BilevelProblem.from_module(
            model, inner_loss, outer=OUTER, outer_loss_fn=outer_loss
        ),
        estimator=estimator,
        inner_optimizer=partial(torch.optim.SGD, lr=RATE),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        outer_every=n_steps,
    )
    torch.manual_seed(1)
    for _ in range(n_steps):
        optimizer.inner_step(x, outer_batch=x)
    before = optimizer.problem.outer_params[OUTER].detach().clone()
    if leave:
        model.eval()
    assert optimizer.outer_step(x).outer_step
    assert model.training is not leave
    return before - optimizer.problem.outer_params[OUTER].detach()


@pytest.mark.parametrize("name", estimator_names())
@pytest.mark.filterwarnings("ignore::hypergrad.NumericalWarning")
def test_the_outer_loss_may_switch_dropout_off(name: str) -> None:
    estimator = make_estimator(name, **SETTINGS.get(name, {}))
    true = hypergradient(estimator, outer_loss_of_a_twin(network()))
    scale = true.abs().max()
    within = hypergradient(estimator, switching_outer_loss)
    assert (within - true).abs().max() < 1e-12 * scale
    if not estimator.needs.outer_batch_each_step:
        before = hypergradient(estimator, plain_outer_loss, leave=True)
        assert (before - true).abs().max() < 1e-12 * scale
    # The comparison would see dropout in the outer loss, or none in the inner one.
    assert (
        hypergradient(estimator, plain_outer_loss) - true
    ).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("name", ["darts", "sama", "unrolled"])
def test_one_step_against_plain_autograd(name: str) -> None:
    given = {"num_steps": 1} if name == "unrolled" else {"product": "exact"}
    found = hypergradient(
        make_estimator(name, **given), plain_outer_loss, leave=True, n_steps=1
    )
    model, x = network(), data()
    leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    loss = functional_call(model, leaves, x).square().mean()
    inner = [n for n in leaves if n != OUTER]
    grads = torch.autograd.grad(loss, [leaves[n] for n in inner], create_graph=True)
    stepped = {n: leaves[n] - RATE * g for n, g in zip(inner, grads, strict=True)}
    model.eval()
    value = (functional_call(model, {**leaves, **stepped}, x) - 1).square().mean()
    (true,) = torch.autograd.grad(value, leaves[OUTER])
    assert (found - true).abs().max() < 1e-12 * true.abs().max()


class Checkpointed(nn.Sequential):
    """The same network, whose hidden layer is run again in each backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = nn.Sequential(self[0], self[1])
        return self[2](checkpoint(hidden, input, use_reentrant=False))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("darts", {"product": "exact"}),
        ("unrolled", {"num_steps": 1}),
        ("cg", {"damping": 10.0}),
        ("cg", {"damping": 10.0, "curvature": "gauss-newton"}),
    ],
)
def test_checkpointed_layers_are_run_again_in_the_mode_of_the_step(
    name: str, given: dict[str, Any], reuse: bool
) -> None:
    found = []
    for kind in (nn.Sequential, Checkpointed):
        model, x = kind(*network()), data()
        problem = BilevelProblem.from_module(
            model,
            inner_loss,
            outer=OUTER,
            outer_loss_fn=plain_outer_loss,
            inner_outputs=lambda model, x: model(x),
            inner_criterion=lambda outputs, x: outputs.square().mean(),
        )
        optimizer = BilevelOptimizer(
            problem,
            estimator=make_estimator(name, **given),
            inner_optimizer=partial(torch.optim.SGD, lr=RATE),
            outer_optimizer=partial(torch.optim.SGD, lr=1.0),
            reuse_graph=reuse,
        )
        torch.manual_seed(1)
        optimizer.inner_step(x)
        before = problem.outer_params[OUTER].detach().clone()
        model.eval()
        optimizer.outer_step(x)
        found.append(before - problem.outer_params[OUTER].detach())
    plain, again = found
    assert (again - plain).abs().max() < 1e-12 * plain.abs().max()


def test_records_have_the_modes_of_their_steps() -> None:
    model, x = network(), data()
    problem = BilevelProblem.from_module(model, inner_loss, outer=OUTER)
    model[1].eval()
    (first, second), _ = take_steps(problem, [x, Accumulated([x, x])], SGD(RATE))
    assert first.micro_batches[0].training == (True, True, False, True)
    # One object for all: a run of thousands of steps keeps it once.
    modes = [m.training for step in (first, second) for m in step.micro_batches]
    assert all(m is modes[0] for m in modes)
    model.eval()
    steps, _ = take_steps(problem, [MicroBatch(x)], SGD(RATE))
    assert steps[0].micro_batches[0].training == (False,) * 4
    model.train()


def test_modes_of_steps_are_saved() -> None:
    def made() -> BilevelOptimizer:
        return BilevelOptimizer(
            network(),
            inner_loss,
            outer=OUTER,
            outer_loss_fn=plain_outer_loss,
            estimator=make_estimator("unrolled", num_steps=3),
            inner_optimizer=partial(torch.optim.SGD, lr=RATE),
            outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        )

    first, x = made(), data()
    for _ in range(3):
        first.inner_step(x)
    second = made()
    second.load_state_dict(first.state_dict())
    module = second.problem.module
    assert module is not None
    tree.copy(list(second.problem.tensors), list(first.problem.tensors))
    for optimizer in (first, second):
        assert optimizer.problem.module is not None
        optimizer.problem.module.eval()
        optimizer.outer_step(x)
    a, b = (o.problem.outer_params[OUTER] for o in (first, second))
    assert torch.equal(a, b)
    assert not torch.equal(a, made().problem.outer_params[OUTER])


def test_a_module_that_was_changed_since_is_refused() -> None:
    model, x = network(), data()
    problem = BilevelProblem.from_module(model, inner_loss, outer=OUTER)
    steps, _ = take_steps(problem, [x], SGD(RATE))
    model.append(nn.Identity())
    with pytest.raises(HypergradError, match=r"has 5 submodules and had 4 when"):
        make_estimator("unrolled", num_steps=1).estimate(
            problem, inner_batch=x, outer_batch=x, steps=steps
        )
