"""On an accelerator: the numbers of the CPU, replayed dropout, checkpoints, few reads.

    pytest -m gpu tests/hypergrad/test_gpu.py

The truth is the CPU in float64, which all other tests hold against closed forms.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks._counting import counted
from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    estimator_names,
    make_estimator,
)
from hypergrad.testing import relative_error
from tests.devices import chosen_device, needs_cuda, waits_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
]
F64 = torch.float64
CPU = torch.device("cpu")
Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


@pytest.fixture
def device() -> torch.device:
    return chosen_device()


# -- a model with attention and dropout --------------------------------------------------


class Net(nn.Module):
    """One layer of attention; λ scales its input and weighs a penalty."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(16))
        self.log_decay = nn.Parameter(torch.zeros(()))
        self.attention = nn.Linear(16, 48)
        self.head = nn.Linear(16, 1)
        self.dropout = nn.Dropout(dropout)
        self.rate = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, 8)).transpose(1, 2)
            for part in self.attention(x * self.scale).chunk(3, dim=-1)
        )
        rate = self.rate if self.training else 0.0
        seen = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        hidden = torch.tanh(seen.transpose(1, 2).flatten(2).mean(1))
        return self.head(self.dropout(hidden)).squeeze(-1)


def fit(model: Any, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def penalised(model: Any, batch: Batch) -> Tensor:
    trained = (model.attention.weight, model.head.weight)
    decay = sum((p.square().sum() for p in trained), torch.zeros_like(model.log_decay))
    # Much of it: the inner Hessian is positive definite wherever w is.
    return fit(model, batch) + model.log_decay.exp() * decay


def batch(seed: int, device: torch.device, dtype: torch.dtype = F64) -> Batch:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, 16, generator=make, dtype=F64)
    y = torch.randn(6, generator=make, dtype=F64)
    return x.to(device, dtype), y.to(device, dtype)


def problem_on(
    device: torch.device, dropout: float = 0.0, dtype: torch.dtype = F64
) -> BilevelProblem:
    model = Net(dropout).to(device, dtype).train()
    return BilevelProblem.from_module(
        model, penalised, outer=["scale", "log_decay"], outer_loss_fn=fit
    )


def optimizer_on(
    device: torch.device,
    estimator: Any,
    dropout: float = 0.0,
    dtype: torch.dtype = F64,
    **settings: Any,
) -> BilevelOptimizer:
    return BilevelOptimizer(
        problem_on(device, dropout, dtype),
        estimator=estimator,
        inner_optimizer=partial(torch.optim.AdamW, lr=1e-2),
        outer_optimizer=partial(torch.optim.SGD, lr=1e-2),
        outer_warmup=0,
        **settings,
    )


def run(opt: BilevelOptimizer, start: int, end: int, device: torch.device) -> None:
    for k in range(start, end):
        report = opt.step(batch(k, device), batch(100 + k, device))
        assert report.skipped is None


def values(opt: BilevelOptimizer) -> Params:
    both = {**opt.problem.inner_params, **opt.problem.outer_params}
    return {name: tensor.detach().cpu().clone() for name, tensor in both.items()}


def moved(opt: BilevelOptimizer, start: Params) -> Params:
    return {name: tensor - start[name] for name, tensor in values(opt).items()}


# -- the numbers of the CPU --------------------------------------------------------------


@pytest.mark.parametrize("name", estimator_names())
def test_every_estimator_equals_the_cpu(name: str, device: torch.device) -> None:
    """Several iterations, so that every rule, solver and record has a part in it."""
    here, there = (optimizer_on(where, name) for where in (CPU, device))
    start = values(here)
    run(here, 0, 10, CPU)
    run(there, 0, 10, device)
    assert here.n_outer_steps == there.n_outer_steps > 0
    # A difference over a radius of 6e-6 magnifies rounding by as much.
    within = 1e-6 if here.estimator.needs.order == 1 else 1e-9
    assert relative_error(moved(there, start), moved(here, start)) < within


@pytest.mark.parametrize("name", estimator_names())
def test_every_estimate_is_on_the_device(name: str, device: torch.device) -> None:
    opt = optimizer_on(device, name, outer_every=1000)
    run(opt, 0, 6, device)
    found = opt.estimator.estimate(
        opt.problem,
        inner_batch=batch(5, device),
        outer_batch=batch(9, device),
        steps=opt.recorded_steps or None,
    )
    parts = (found.outer_grads, found.direct, found.indirect)
    assert {t.device.type for part in parts for t in part.values()} == {device.type}


# -- attention ---------------------------------------------------------------------------


def test_fused_attention_serves_first_order_and_math_the_rest(
    device: torch.device,
) -> None:
    opt = optimizer_on(device, "darts", dtype=torch.float32, outer_every=1000)
    few = [batch(k, device, torch.float32) for k in range(2)]
    opt.inner_step(few[0])
    # torch's own choice here is a kernel that cannot be differentiated twice.
    model: Any = opt.problem.module
    weights = list(model.attention.parameters())
    slope = torch.autograd.grad(penalised(model, few[0]), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(torch.stack([s.sum() for s in slope]).sum(), weights)
    fused, plain = (
        make_estimator("darts", product=product).estimate(
            opt.problem,
            inner_batch=few[0],
            outer_batch=few[1],
            steps=opt.recorded_steps,
        )
        for product in ("finite-difference", "exact")
    )
    assert relative_error(fused.indirect, plain.indirect) < 5e-2


# -- dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_replayed(rate: float, device: torch.device) -> None:
    """A graph that was kept has the masks of the step itself; one built again must too."""
    ends = []
    for reuse in (True, False):
        opt = optimizer_on(
            device,
            make_estimator("darts", product="exact"),
            dropout=rate,
            reuse_graph=reuse,
        )
        torch.manual_seed(3)
        run(opt, 0, 5, device)
        ends.append(values(opt))
    assert relative_error(*ends) < 1e-10


@pytest.mark.parametrize("name", ["darts", "unrolled", "neumann"])
def test_an_estimate_leaves_the_generators_alone(
    name: str, device: torch.device
) -> None:
    opt = optimizer_on(device, name, dropout=0.3, outer_every=1000)
    run(opt, 0, 6, device)
    found = []
    for _ in range(2):
        before = generators(device)
        result = opt.estimator.estimate(
            opt.problem,
            inner_batch=batch(5, device),
            outer_batch=batch(9, device),
            steps=opt.recorded_steps or None,
        )
        same = [
            torch.equal(a, b) for a, b in zip(before, generators(device), strict=True)
        ]
        assert all(same)
        found.append(result.outer_grads)
    assert relative_error(*found) < 1e-10  # the same masks; sums may take another order


def generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


# -- checkpoints -------------------------------------------------------------------------


def saved(opt: BilevelOptimizer) -> io.BytesIO:
    file = io.BytesIO()
    model = opt.problem.module
    assert model is not None
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    return file


def resumed(
    file: io.BytesIO, estimator: str, device: torch.device, dropout: float
) -> BilevelOptimizer:
    opt = optimizer_on(device, estimator, dropout)
    held = torch.load(file, map_location=device, weights_only=True)
    model = opt.problem.module
    assert model is not None
    model.load_state_dict(held["model"])
    opt.load_state_dict(held["optimizer"])
    return opt


@pytest.mark.parametrize("stop", [3, 7])
@pytest.mark.parametrize("name", ["darts", "sama", "unrolled", "cg"])
def test_resume_on_the_device(name: str, stop: int, device: torch.device) -> None:
    whole = optimizer_on(device, name, dropout=0.2)
    torch.manual_seed(1)
    run(whole, 0, stop, device)
    file, state = saved(whole), generators(device)
    run(whole, stop, 12, device)
    second = resumed(file, name, device, dropout=0.2)
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    run(second, stop, 12, device)
    assert second.n_outer_steps == whole.n_outer_steps > 0
    within = 1e-6 if whole.estimator.needs.order == 1 else 1e-10
    assert relative_error(values(second), values(whole)) < within


@pytest.mark.parametrize("name", ["darts", "sama", "unrolled", "cg"])
def test_resume_on_a_cpu(name: str, device: torch.device) -> None:
    """Without dropout, whose masks a CPU draws from another generator."""
    there = optimizer_on(device, name)
    run(there, 0, 7, device)
    here = resumed(saved(there), name, CPU, dropout=0.0)
    assert {t.device.type for t in values_in_state(here)} == {"cpu"}
    run(there, 7, 12, device)
    run(here, 7, 12, CPU)
    within = 1e-6 if here.estimator.needs.order == 1 else 1e-9
    assert relative_error(values(here), values(there)) < within


def values_in_state(opt: BilevelOptimizer) -> Iterator[Tensor]:
    yield from opt.problem.tensors
    for step in opt.recorded_steps:
        yield from step.inner_params.values()
        for slots in step.state.values():
            yield from slots.values()


# -- reads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("darts", {}),
        ("darts", {"product": "exact"}),
        ("sama", {}),
        ("unrolled", {"num_steps": 3}),
        ("neumann", {}),
        ("cg", {"max_iter": 5}),
    ],
    ids=str,
)
def test_torch_sees_no_wait_that_was_not_counted(
    name: str, settings: dict[str, Any], device: torch.device
) -> None:
    """Of an inner and of an outer step: torch warns where the host waits for the device."""
    needs_cuda()
    opt = optimizer_on(device, make_estimator(name, **settings), outer_every=1000)
    inner, outer = batch(0, device), batch(1, device)
    steps = max(1, opt.estimator.needs.lookback)
    for _ in range(2):
        for _ in range(steps):
            opt.inner_step(inner)
        opt.outer_step(outer)
    for step in (partial(opt.inner_step, inner), partial(opt.outer_step, outer)):
        with counted() as counts:
            step()
        waits = waits_of(step)
        assert waits.total() <= counts.reads, (waits, counts.by_place)
