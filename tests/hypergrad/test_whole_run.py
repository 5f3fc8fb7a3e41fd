"""`unrolled` through all steps of a training: right, in bounded memory, never silent."""

from __future__ import annotations

import io
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradError,
    NumericalWarning,
    make_estimator,
    steps,
    take_steps,
)
from hypergrad.errors import NonFiniteError
from hypergrad.rules import SGD, AdamW
from tests.hypergrad.estimators.truths import Params, network_case
from tests.tolerances import error

F64, F32 = torch.float64, torch.float32
Problem = Callable[[Params, Params, Any], Tensor]


def recorder(
    problem: BilevelProblem, num_steps: int, inner: Any, **settings: Any
) -> BilevelOptimizer:
    """Return an optimizer whose outer steps look through whole runs."""
    snapshots = settings.pop("snapshots", "auto")
    return BilevelOptimizer(
        problem,
        estimator=make_estimator("unrolled", num_steps=num_steps, snapshots=snapshots),
        inner_optimizer=inner,
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
        **settings,
    )


def hypergradient(opt: BilevelOptimizer, outer_batch: Any = None) -> Any:
    return opt.estimator.estimate(
        opt.problem,
        inner_batch=None,
        outer_batch=outer_batch,
        steps=opt.recorded_steps,
    )


# -- the derivative ---------------------------------------------------------------------


def cosine(t: int, num_steps: int) -> float:
    return float(1 + torch.cos(torch.tensor(torch.pi * t / num_steps, dtype=F64))) / 2


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_fifty_steps_are_those_that_autograd_goes_through(kind: str) -> None:
    """torch.optim's own differentiable steps, under a schedule.

    A gradient rounds by some 1e-16 of its size; 50 steps of them, each amplified by what
    Adam's divisions by small moments do at the start (1e3), stay below 1e-11.
    """
    case, num_steps = network_case(), 50
    make: Any = {
        "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
        "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    }[kind]
    opt = recorder(case.problem(), num_steps, make)
    factor = partial(cosine, num_steps=num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt.inner, factor)
    for t in range(num_steps):
        opt.inner_step(case.batch(t))
        schedule.step()
    found = hypergradient(opt, case.outer_batch)

    lam = {n: t.clone().requires_grad_() for n, t in case.outer.items()}
    w = {n: t.clone().requires_grad_() for n, t in case.inner.items()}
    held: dict[str, Any] = {n: {} for n in w}
    for n, t in w.items():
        zero = torch.zeros_like(t, requires_grad=False)
        held[n] = (
            {"momentum_buffer": zero}
            if kind == "momentum"
            else {
                "step": torch.zeros((), dtype=F64),
                "exp_avg": zero,
                "exp_avg_sq": zero.clone(),
            }
        )
    for t in range(num_steps):
        loss = case.inner_loss(w, lam, case.batch(t))
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {n: x.clone() for n, x in w.items()}
        optimizer = make(list(w.values()), differentiable=True)
        optimizer.param_groups[0]["lr"] *= cosine(t, num_steps)
        for (n, x), g in zip(w.items(), grads, strict=True):
            x.grad = g
            optimizer.state[x].update({k: s.clone() for k, s in held[n].items()})
        optimizer.step()
        held = {n: dict(optimizer.state[x]) for n, x in w.items()}
    value = case.outer_loss(w, lam, case.outer_batch)
    truth = torch.autograd.grad(value, list(lam.values()), allow_unused=True)
    known = {
        n: torch.zeros_like(lam[n]) if t is None else t
        for n, t in zip(lam, truth, strict=True)
    }
    assert abs(found.outer_loss - value.item()) <= 1e-13
    assert error(found.outer_grads, known) <= 1e-11


def tanh_network() -> tuple[Problem, Problem, Params, Params, list[Any], Any]:
    """A network of 36 weights in one tensor, for many (w, λ) at once as well."""
    make = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=F64)

    def predict(w: Tensor, x: Tensor) -> Tensor:
        first, second = w[..., :30].unflatten(-1, (5, 6)), w[..., 30:, None]
        return (torch.tanh(x @ first) @ second).squeeze(-1)

    def inner(i: Params, o: Params, batch: Any) -> Tensor:
        x, y = batch
        lam = o["lam"]
        off = (predict(i["w"], x * lam[..., None, 1:].exp()) - y).square().mean(-1)
        # Summed over copies, none of which depends on another.
        return (off + lam[..., 0].exp() * i["w"].square().sum(-1)).sum()

    def outer(i: Params, o: Params, batch: Any) -> Tensor:
        x, y = batch
        return (predict(i["w"], x) - y).square().mean(-1).sum()

    data = [(draw(10, 5), draw(10)) for _ in range(3)]
    lam = torch.tensor([-4.0, 0.0, 0.1, -0.1, 0.2, -0.2], dtype=F64)
    return inner, outer, {"w": draw(36) / 2}, {"lam": lam}, data, data[-1]


@pytest.mark.parametrize("num_steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_are_the_slope_of_the_whole_training(num_steps: int) -> None:
    """By values of the outer loss alone, at λ moved to both sides along directions.

    A central difference over h is off by c·h². Its value at h and h/2 tells c, and the
    extrapolation of both is off by O(h⁴) = 1e-12 and by rounding, 1e-16·|f|/h times what
    1,000 steps make of it: with h = 1e-3, 1e-6 leaves room for growth by 1e6.
    """
    g, f, w, lam, (first, second, _), held_out = tanh_network()
    rule = AdamW(0.01, weight_decay=0.01)
    batches = [(first, second)[t % 2] for t in range(num_steps)]
    problem = BilevelProblem(
        g,
        f,
        {n: t.clone().requires_grad_() for n, t in w.items()},
        {n: t.clone().requires_grad_() for n, t in lam.items()},
    )
    opt = recorder(
        problem, num_steps, partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01)
    )
    for batch in batches:
        opt.inner_step(batch)
    found = hypergradient(opt, held_out)

    make = torch.Generator().manual_seed(0)
    u = torch.randn(4, 6, generator=make, dtype=F64)
    h = 1e-3
    shifts = torch.cat([s * u for s in (h, -h, h / 2, -h / 2)])
    copies = {"lam": lam["lam"] + shifts}
    x, state = {"w": w["w"].repeat(len(shifts), 1)}, {}
    for batch in batches:
        leaf = x["w"].requires_grad_()
        (grad,) = torch.autograd.grad(g({"w": leaf}, copies, batch), leaf)
        x, state = rule.apply({"w": leaf.detach()}, state, {"w": grad})
    values = torch.stack([f({"w": one}, lam, held_out) for one in x["w"]])
    up, down, half_up, half_down = values.chunk(4)
    wide, narrow = (up - down) / (2 * h), (half_up - half_down) / h
    slopes = (4 * narrow - wide) / 3

    assert error(u @ found.outer_grads["lam"], slopes) <= 1e-6
    # The differences themselves are as far off as their theory says.
    assert 3.5 < float((wide - slopes).norm() / (narrow - slopes).norm()) < 4.5
    assert len(found.info.adjoint_norms) == num_steps


# -- memory -----------------------------------------------------------------------------


def linear(h: float, dtype: torch.dtype = F64, w: float = 0.0) -> BilevelProblem:
    """g = h (w - λ)²/2 and f = w: the adjoint of SGD's step is 1 - η h, whatever w is."""
    return BilevelProblem(
        lambda i, o, b: h * (i["w"] - o["lam"]) ** 2 / 2,
        lambda i, o, b: i["w"] * 1.0,
        {"w": torch.tensor(w, dtype=dtype, requires_grad=True)},
        {"lam": torch.tensor(0.0, dtype=dtype, requires_grad=True)},
    )


@pytest.mark.parametrize("num_steps", [25, 100, 324])
def test_copies_grow_like_the_root_of_the_steps(
    num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1.5 √T at once, two more while a step is taken; 1.5 T taken again."""
    monkeypatch.setattr("hypergrad.steps._SMALL", 0)
    monkeypatch.setattr("hypergrad.steps._SHARE", 0.0)
    problem, again = linear(1.0), steps.take_again
    records, _ = take_steps(
        problem, [None] * num_steps, SGD(0.1), grads=False, snapshots="auto"
    )
    kept = sum(step.is_snapshot for step in records)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts: list[int] = []

    def counted(*args: Any) -> Any:
        w, state = again(*args)
        alive.add(w["w"])
        counts.append(kept + len(alive))
        return w, state

    monkeypatch.setattr(steps, "take_again", counted)
    estimator = make_estimator("unrolled", num_steps=num_steps)
    result = estimator.estimate(
        problem, inner_batch=None, outer_batch=None, steps=records
    )
    assert num_steps**0.5 < max(counts) <= 1.5 * num_steps**0.5 + 2
    assert len(counts) <= 1.5 * num_steps
    assert result.info.n_forward == 1 + num_steps + len(counts)
    assert abs(result.outer_grads["lam"] - (1 - 0.9**num_steps)) <= 1e-13


def test_a_step_of_a_long_run_looks_at_one_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    strip = steps.without_snapshot

    def counted(problem: Any, step: Any) -> Any:
        looked.append(step.number)
        return strip(problem, step)

    monkeypatch.setattr("hypergrad._stepping.without_snapshot", counted)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    opt = recorder(linear(1.0), 200, make, snapshots=12)
    for _ in range(200):
        opt.inner_step(None)
    assert len(looked) == len(set(looked))  # none twice
    kept = {s.number for s in opt.recorded_steps if s.is_snapshot}
    assert kept == set(range(200)) - set(looked)


# -- the adjoint's norm -----------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "rate"), [(1, 0.5), (7, 0.5), (150, 1.2)])
def test_norms_are_powers_of_the_steps_factor(num_steps: int, rate: float) -> None:
    """In each eigenvector of the Hessian, |1 - η h| to the number of steps back."""
    h = torch.tensor([0.5, 1.0, 1.5], dtype=F64)
    v = torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    problem = BilevelProblem(
        lambda i, o, b: (h * (i["w"] - o["lam"]) ** 2).sum() / 2,
        lambda i, o, b: (v * i["w"]).sum(),
        {"w": torch.ones(3, dtype=F64, requires_grad=True)},
        {"lam": torch.zeros(3, dtype=F64, requires_grad=True)},
    )
    estimator = make_estimator("unrolled", num_steps=num_steps, rule=SGD(rate))
    info = estimator.estimate(problem, inner_batch=None, outer_batch=None).info
    back = torch.arange(num_steps - 1, -1, -1)[:, None]
    truth = ((1 - rate * h) ** back * v).norm(dim=1)
    # Each power carries a rounding for each step.
    off = (torch.tensor(info.adjoint_norms, dtype=F64) / truth - 1).abs().max()
    assert off <= 4e-16 * num_steps
    assert info.reason == ""


@pytest.mark.parametrize(("dtype", "log2_eps"), [(F32, 23), (F64, 52)])
def test_growth_beyond_the_precision_is_said(dtype: torch.dtype, log2_eps: int) -> None:
    """η h = 3 doubles the adjoint, exactly: after K - 1 steps back it is 2^(K - 1)."""
    rule = SGD(1.0)
    batches: dict[str, Any] = {"inner_batch": None, "outer_batch": None}
    last = make_estimator("unrolled", num_steps=log2_eps + 1, rule=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        result = last.estimate(linear(3.0, dtype), **batches)
    assert result.info.adjoint_norms[0] == 2.0**log2_eps
    assert result.info.reason == ""
    beyond = make_estimator("unrolled", num_steps=log2_eps + 2, rule=rule)
    with pytest.warns(NumericalWarning, match=r"grew .*-fold.*after step 1: by more"):
        result = beyond.estimate(linear(3.0, dtype), **batches)
    assert "lower it, clip inner gradients" in result.info.reason
    assert result.info.adjoint_norms[-1] == 1.0


def test_growth_in_the_first_step_is_said_where_its_start_is_learned() -> None:
    """g = 10 A B at B = 0: Adam's first step of A has derivative η·10/ε_Adam in B."""
    problem = BilevelProblem(
        lambda i, o, b: 10 * i["A"] * i["B"],
        lambda i, o, b: i["A"] ** 2 / 2,
        {n: torch.tensor(v, requires_grad=True) for n, v in (("A", 1.0), ("B", 0.0))},
        {},
        learn_start=True,
    )
    estimator = make_estimator("unrolled", num_steps=1, rule=AdamW(0.1))
    with pytest.warns(NumericalWarning, match=r"grew 1e\+08-fold.*at their start: by"):
        result = estimator.estimate(problem, inner_batch=None, outer_batch=None)
    assert len(result.info.adjoint_norms) == 1  # after the step
    assert 0.9e8 < result.outer_grads["start of B"].abs() < 1.1e8


def test_an_overflow_on_the_way_names_the_step() -> None:
    """Step 200 - j is left with 2^j and takes 3·2^j: in float32 too much at j = 127."""
    estimator = make_estimator("unrolled", num_steps=200, rule=SGD(1.0))
    told: list[int] = []
    with pytest.raises(
        NonFiniteError, match=r"inner step 73 of 200: .*grew 1\.7e\+38-fold"
    ):
        estimator.estimate(
            linear(3.0, F32),
            inner_batch=None,
            outer_batch=None,
            on_progress=lambda done, _: told.append(done),
        )
    assert told[-1] < 200  # and the rest of the way is not walked in vain


def test_an_optimizer_skips_what_exploded() -> None:
    opt = recorder(linear(3.0, F32), 200, partial(torch.optim.SGD, lr=1.0))
    for _ in range(200):
        opt.inner_step(None)
    report = opt.outer_step(None)
    assert report.skipped is not None
    assert "inner step 73 of 200" in report.skipped
    assert (opt.n_skipped, opt.n_outer_steps) == (1, 0)
    assert opt.problem.outer_params["lam"] == 0.0


# -- progress ---------------------------------------------------------------------------


def test_progress_is_told_after_every_step() -> None:
    told: list[tuple[int, int]] = []

    def note(done: int, in_all: int) -> None:
        told.append((done, in_all))

    expected = [(done, 6) for done in range(1, 7)]
    make = partial(torch.optim.SGD, lr=0.1)
    for way in ("estimate", "outer_step", "step"):
        opt = recorder(linear(1.0, w=1.0), 6, make)
        for _ in range(5):
            opt.step(None, None, on_progress=note)
        assert not told
        if way == "step":
            opt.step(None, None, on_progress=note)
        else:
            opt.inner_step(None)
            if way == "outer_step":
                opt.outer_step(None, on_progress=note)
            else:
                opt.estimator.estimate(
                    opt.problem,
                    inner_batch=None,
                    outer_batch=None,
                    steps=opt.recorded_steps,
                    on_progress=note,
                )
        assert told == expected
        told.clear()


def test_a_listener_that_raises_changes_nothing() -> None:
    opt = recorder(linear(1.0, w=1.0), 6, partial(torch.optim.SGD, lr=0.1))
    for _ in range(6):
        opt.inner_step(None)
    before = [t.clone() for t in opt.problem.tensors]

    def stop(done: int, in_all: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.outer_step(None, on_progress=stop)
    assert all(map(torch.equal, opt.problem.tensors, before))
    assert opt.outer_step(None).outer_step


# -- resume -----------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Dropout draws at every step; λ scales the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=F64))
        self.drop = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(3, 2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(x * self.scale)))


def net_run(num_steps: int) -> tuple[BilevelOptimizer, Any, list[Tensor]]:
    torch.manual_seed(0)
    opt = BilevelOptimizer(
        Net(),
        lambda m, x: (m(x) - x[:, :2]).square().mean(),
        outer="scale",
        estimator=make_estimator("unrolled", num_steps=num_steps, snapshots=16),
        inner_optimizer=partial(torch.optim.AdamW, lr=1e-2),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        max_grad_norm=0.5,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(opt.inner, 1.0, 0.1, num_steps)
    make = torch.Generator().manual_seed(1)
    draws = torch.randn(num_steps, 4, 3, dtype=F64, generator=make)
    return opt, schedule, list(draws)


@pytest.mark.parametrize("stop", [1, 61, 120])
def test_a_run_that_was_stopped_has_the_same_hypergradient(stop: int) -> None:
    """Through a file, in a new model and optimizer: bit for bit, 120 steps long."""
    num_steps = 120
    opt, schedule, batches = net_run(num_steps)
    file = io.BytesIO()
    for t, batch in enumerate(batches):
        if t == stop:
            torch.save(saved_of(opt, schedule), file)
        opt.inner_step(batch)
        schedule.step()
    if stop == num_steps:
        torch.save(saved_of(opt, schedule), file)
    rng = torch.get_rng_state()
    straight = hypergradient(opt, batches[0])

    other, schedule, _ = net_run(num_steps)
    for batch in batches[:3]:  # another run, whose records make way
        other.inner_step(batch)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert other.problem.module is not None
    other.problem.module.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"])
    for batch in batches[stop:]:
        other.inner_step(batch)
        schedule.step()
    torch.set_rng_state(rng)
    resumed = hypergradient(other, batches[0])
    assert torch.equal(resumed.outer_grads["scale"], straight.outer_grads["scale"])
    assert resumed.info == straight.info
    # λ did not move, and is kept once, not once a step.
    assert len({id(s.outer_params) for s in other.recorded_steps[:stop]}) == 1


def saved_of(opt: BilevelOptimizer, schedule: Any) -> dict[str, Any]:
    assert opt.problem.module is not None
    return {
        "model": opt.problem.module.state_dict(),
        "optimizer": opt.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }


# -- bad input --------------------------------------------------------------------------


def test_a_run_that_is_shorter_than_the_window() -> None:
    opt = recorder(linear(1.0, w=1.0), 100, partial(torch.optim.SGD, lr=0.1))
    for _ in range(99):
        assert not opt.step(None, None).outer_step
    with pytest.raises(HypergradError, match="looks back at 100 inner steps but 99"):
        opt.outer_step(None)
    with pytest.raises(ValueError, match=r"100 inner steps but `steps` holds 99"):
        hypergradient(opt)
    assert opt.problem.outer_params["lam"] == 0.0
    with pytest.warns(NumericalWarning, match="run ended at step 99 without an out"):
        opt.begin_run()  # what came before does not count for the next run
    for _ in range(50):
        opt.inner_step(None)
    with pytest.raises(HypergradError, match="looks back at 100 inner steps but 50"):
        opt.outer_step(None)


@pytest.mark.parametrize("snapshots", ["all", 4])
def test_a_rate_that_is_set_at_the_last_moment_is_on_record(snapshots: Any) -> None:
    """dw_K/dλ = 1 - ∏(1 - η_k), with rates that only a hook of the optimizer knows."""
    opt = recorder(
        linear(1.0, w=1.0), 20, partial(torch.optim.SGD, lr=0.9), snapshots=snapshots
    )
    rates = [0.5 / (t + 1) for t in range(20)]
    left = list(reversed(rates))

    def set_rate(optimizer: Any, *_: Any) -> None:
        optimizer.param_groups[0]["lr"] = left.pop()

    opt.inner.register_step_pre_hook(set_rate)
    for _ in range(20):
        opt.inner_step(None)
    kept = 1.0
    for rate in rates:
        kept *= 1 - rate
    assert abs(opt.problem.inner_params["w"] - kept) <= 1e-15
    assert abs(hypergradient(opt).outer_grads["lam"] - (1 - kept)) <= 1e-15


def test_a_learned_schedule_that_is_shorter_than_the_run() -> None:
    torch.manual_seed(0)
    problem = BilevelProblem.from_module(
        torch.nn.Linear(2, 1),
        lambda m, x: m(x).square().mean(),
        inner_settings={"schedule": [1.0] * 5},
    )
    opt = recorder(problem, 6, partial(torch.optim.SGD, lr=0.1))
    batch = torch.ones(3, 2)
    for _ in range(5):
        opt.inner_step(batch)
    with pytest.raises(HypergradError, match=r"5 factors, and this is step 6.*longer"):
        opt.inner_step(batch)
