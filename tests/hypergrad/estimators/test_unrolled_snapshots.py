"""Unrolling where w and the state of some steps are kept, and the others taken again."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradEstimator,
    NumericalWarning,
    make_estimator,
    take_steps,
    tree,
)
from hypergrad._snapshots import n_retaken, spacing
from hypergrad.batches import Accumulated
from hypergrad.compare._measure import peak_bytes
from hypergrad.products import Tally
from hypergrad.rules import SGD, AdamW
from hypergrad.steps import bytes_of, steps_back, with_grads
from tests.hypergrad.estimators.truths import (
    HANDS,
    estimate,
    hand_indirect,
    network_case,
    path_of,
    real_run,
    warm,
)
from tests.tolerances import error

F64, F32 = torch.float64, torch.float32


def unrolled(num_steps: int, snapshots: Any, **settings: Any) -> HypergradEstimator:
    return make_estimator(
        "unrolled", num_steps=num_steps, snapshots=snapshots, **settings
    )


def n_held(opt: BilevelOptimizer) -> int:
    return sum(step.is_snapshot for step in opt.recorded_steps)


# -- the same derivative ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
@pytest.mark.parametrize(
    ("num_steps", "moving"),
    [(1, False), (2, False), (5, True), (20, False), (20, True), (50, False)],
)
@pytest.mark.parametrize("name", ["momentum", "adam", "adamw-clip"])
def test_equals_records_of_every_step_and_plain_autograd(
    name: str, num_steps: int, moving: bool, dtype: torch.dtype
) -> None:
    """The rate changes at every step, the batch too; clipping binds in most."""
    case = network_case().to(dtype)
    start = warm(case, HANDS[name])
    found = []
    for snapshots in ("all", 3):
        opt = real_run(
            case,
            HANDS[name],
            unrolled(num_steps, snapshots),
            num_steps,
            start=start,
            moving=moving,
        )
        found.append(estimate(opt, case))
    few = num_steps if num_steps <= 3 else 1
    assert n_held(opt) == few
    every, some = found
    # On a CPU the rules round as torch's optimizers do, and so the same w is reached. The
    # factor of clipping may round otherwise: once in each step that is taken again.
    roundings = num_steps if "clip" in name else 0
    off = error(some.outer_grads, every.outer_grads)
    assert off <= roundings * torch.finfo(dtype).eps
    assert some.outer_loss == every.outer_loss
    assert some.info.reason == every.info.reason
    again = some.info.n_forward - every.info.n_forward
    assert again == (n_retaken(num_steps, 2) if num_steps > 3 else 0)
    assert some.info.n_backward - every.info.n_backward == again
    *path, end = path_of(case, num_steps + 1, moving)
    truth = hand_indirect(case, HANDS[name], start, path, end)
    assert error(some.indirect, truth) <= (1e-12 if dtype == F64 else 5e-6)


@pytest.mark.parametrize("rule", [SGD(0.05, momentum=0.9), AdamW(0.05)])
@pytest.mark.parametrize("snapshots", [3, 5])
def test_virtual_steps(rule: Any, snapshots: int) -> None:
    case = network_case()
    batches = {"inner_batch": case.batch(0), "outer_batch": case.outer_batch}
    every, some = (
        unrolled(20, limit, rule=rule).estimate(case.problem(), **batches)
        for limit in ("all", snapshots)
    )
    assert error(some.outer_grads, every.outer_grads) == 0.0
    steps, _ = take_steps(case.problem(), [case.batch(0)] * 20, rule, snapshots=5)
    assert [i for i, step in enumerate(steps) if step.is_snapshot] == [0, 10]


class Model(nn.Module):
    """A head that has nearly all weights, behind dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=F64))
        self.norm = nn.BatchNorm1d(4, affine=False, dtype=F64)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 256, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x * self.scale)))


def loss_fn(model: Any, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def draw(seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, dtype=F64, generator=make)


def trained(
    snapshots: Any, num_steps: int = 8, steps: int = 8, micro: int = 1, **settings: Any
) -> BilevelOptimizer:
    torch.manual_seed(0)
    opt = BilevelOptimizer(
        Model(),
        loss_fn,
        outer="scale",
        estimator=unrolled(num_steps, snapshots),
        inner_optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        **{"outer_warmup": 0, "max_grad_norm": 0.5, **settings},
    )
    for i in range(steps):
        opt.step(batch_of(i, micro), draw(1000 + i))
    return opt


def batch_of(i: int, micro: int) -> Any:
    batches = [draw(10 * i + j) for j in range(micro)]
    return batches[0] if micro == 1 else Accumulated(batches)


def differ(a: BilevelOptimizer, b: BilevelOptimizer) -> list[str]:
    pairs = zip(a.problem.tensors, b.problem.tensors, strict=True)
    return [str(x.shape) for x, y in pairs if not torch.equal(x, y)]


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("outer_every", [None, 1, 3, 11])
def test_training_is_the_same_bit_for_bit(micro: int, outer_every: Any) -> None:
    """Dropout, running statistics, accumulation, and λ that moves in the window."""
    settings: dict[str, Any] = {"outer_every": outer_every, "micro": micro}
    every, some = (trained(s, 5, steps=12, **settings) for s in ("all", 3))
    assert some.n_outer_steps == every.n_outer_steps > 0
    assert n_held(some) < n_held(every)
    assert not differ(every, some)
    model: Any = some.problem.module
    other: Any = every.problem.module
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)


def test_steps_with_gradients_on_record_are_taken_again_for_nothing() -> None:
    infos = []
    for snapshots in ("all", 3):
        opt = trained(snapshots, steps=7, micro=3)
        infos.append(opt.step(batch_of(7, 3), draw(0)).info)
        torch.manual_seed(0)
    assert infos[0] == infos[1]
    some = trained(3, steps=7, micro=3)
    steps = some.recorded_steps
    assert all(step.grads for step in steps)
    assert n_held(some) == 1


# -- memory -----------------------------------------------------------------------------


def held_at_most(num_steps: int, snapshots: Any) -> int:
    """Return the bytes of the records and of an estimate through them, at its peak."""
    opt = trained(snapshots, num_steps, steps=0, outer_warmup=100)
    for i in range(num_steps):
        opt.inner_step(batch_of(i, 1))
    kept = [step for step in opt.recorded_steps if step.is_snapshot]
    records = [t for s in kept for t in s.inner_params.values()]
    records += [t for s in kept for slots in s.state.values() for t in slots.values()]

    def run() -> None:
        opt.estimator.estimate(
            opt.problem, inner_batch=None, outer_batch=draw(0), steps=opt.recorded_steps
        )

    run()  # what is looked up the first time stays
    peak = peak_bytes(run, [torch.device("cpu")])
    assert peak is not None
    return bytes_of(records) + peak


@pytest.mark.parametrize("snapshots", [3, 5])
def test_memory_is_that_of_as_many_steps_as_snapshots(snapshots: int) -> None:
    """Records and peak of an estimate, by what torch allocates."""
    bound = held_at_most(snapshots, "all")
    assert held_at_most(20, snapshots) <= bound * 1.02
    assert held_at_most(20, "all") > 1.5 * bound


@pytest.mark.parametrize("outer_every", [None, 7])
def test_records_between_steps_are_fewer_than_the_snapshots(outer_every: Any) -> None:
    opt = trained(5, 20, steps=0, outer_every=outer_every)
    for i in range(50):
        opt.step(batch_of(i, 1), draw(i))
        held = sum(step.is_snapshot for step in opt._run.window)
        assert held <= 3
        assert len(opt._run.window) < 20 + spacing(20, 5)


def test_by_default_as_many_are_kept_as_take_little(monkeypatch: Any) -> None:
    opt = trained("auto")
    assert n_held(opt) == 8
    # A record is 3 x 1,280 numbers of 8 bytes; the weights are a third of one.
    room = 8 * 3 * 1280 * 8
    for small, share, held in (
        (room, 0, 8),
        (room - 1, 0, 4),  # every second, and three on the way back
        (room // 2, 0, 2),
        (0, 24.1, 8),
        (0, 23, 4),
        (0, 0, 2),
    ):
        monkeypatch.setattr("hypergrad.steps._SMALL", small)
        monkeypatch.setattr("hypergrad.steps._SHARE", share)
        assert n_held(trained("auto")) == held


# -- resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 8, 13])
@pytest.mark.parametrize("outer_every", [None, 3])
def test_resume_in_the_middle_of_a_window(stop: int, outer_every: int | None) -> None:
    settings: dict[str, Any] = {"outer_every": outer_every}
    straight = trained(3, steps=17, **settings)
    first = trained(3, steps=stop, **settings)
    saved, model = first.state_dict(), first.problem.module
    assert model is not None
    weights, state = model.state_dict(), torch.get_rng_state()
    second = trained(3, steps=0, **settings)
    other = second.problem.module
    assert other is not None
    other.load_state_dict(weights)
    second.load_state_dict(saved)
    assert [s.is_snapshot for s in second.recorded_steps] == [
        s.is_snapshot for s in first.recorded_steps
    ]
    torch.set_rng_state(state)
    for i in range(stop, 17):
        second.step(batch_of(i, 1), draw(1000 + i))
    assert not differ(straight, second)
    assert [s.is_snapshot for s in second._run.window] == [
        s.is_snapshot for s in straight._run.window
    ]


# -- what could make a step another than it was ------------------------------------------


@pytest.mark.parametrize("what", ["w", "moment"])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_change_by_hand_between_two_steps(what: str, micro: int) -> None:
    found = []
    for snapshots in ("all", 3):
        opt = trained(snapshots, steps=4, micro=micro)
        w = opt.problem.inner_params["head.weight"]
        changed = w if what == "w" else opt.state[w]["exp_avg"]
        changed.data.mul_(0.5)  # raises no version counter
        for i in range(4, 8):
            opt.step(batch_of(i, micro), draw(1000 + i))
        found.append(opt)
    every, some = found
    assert [i for i, s in enumerate(some.recorded_steps) if s.is_snapshot] == [0, 4]
    assert not differ(every, some)


def test_a_forward_pass_that_moves_w() -> None:
    """An embedding with max_norm renormalises its rows, in training and when replayed."""

    def run(snapshots: Any, micro: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 1, bias=False)
        )
        opt = BilevelOptimizer(
            model,
            lambda m, x: (m(x) - 1).square().mean(),
            outer="1.weight",
            estimator=unrolled(5, snapshots),
            inner_optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_warmup=0,
        )
        for _ in range(15):
            batch = torch.arange(5)
            opt.step(Accumulated([batch] * micro) if micro > 1 else batch, batch)
        return opt.problem.tensors

    for micro in (1, 2):
        pairs = zip(run("all", micro), run(3, micro), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loss_that_depends_on_more_is_warned_of() -> None:
    calls: list[int] = []

    def drifting(inner: Any, outer: Any, batch: Any) -> Tensor:
        calls.append(1)
        return (inner["w"] - outer["lam"]) ** 2 / 2 * (1 + 0.1 * len(calls))

    w, lam = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (4.0, 0.0))
    half: Any = lambda i, o, b: (i["w"] - o["lam"]) ** 2 / 2  # noqa: E731
    problem = BilevelProblem(drifting, half, {"w": w}, {"lam": lam})
    estimator = unrolled(5, 3, rule=SGD(0.1))
    with pytest.warns(NumericalWarning, match=r"had one of.*snapshots='all'"):
        estimator.estimate(problem, inner_batch=None, outer_batch=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unrolled(5, "all", rule=SGD(0.1)).estimate(
            problem, inner_batch=None, outer_batch=None
        )


# -- others that read the records --------------------------------------------------------


def test_an_estimator_that_reads_whole_records_is_given_them() -> None:
    every, some = (trained(s) for s in ("all", 3))
    for name in ("darts", "sama"):
        found = [
            make_estimator(name, product="exact").estimate(
                opt.problem,
                inner_batch=None,
                outer_batch=draw(0),
                steps=opt.recorded_steps,
            )
            for opt in (every, some)
        ]
        assert error(found[1].outer_grads, found[0].outer_grads) == 0.0


def test_an_audit_looks_back_at_no_more_steps_than_it_is_to() -> None:
    def audits(snapshots: Any, window: int) -> list[Any]:
        opt = trained(snapshots, 4, steps=0, audit_every=1, audit_window=window)
        reports = [opt.step(batch_of(i, 1), draw(i)) for i in range(24)]
        return [r.audit for r in reports if r.audit is not None]

    for window in (4, 8):
        every, some = audits("all", window), audits(3, window)
        assert len(every) == 6
        assert [a.why for a in some] == [a.why for a in every]
        assert [a.cosine for a in some] == [a.cosine for a in every]
    assert every[-1].error > 0.0


def test_records_without_a_snapshot_before_them_say_so() -> None:
    opt = trained(3)
    problem, steps = opt.problem, opt.recorded_steps
    with pytest.raises(ValueError, match=r"no copy of w.*recorded_steps"):
        list(steps_back(problem, steps[2:], 2, "all", Tally()))
    with pytest.raises(ValueError, match="w is not on record"):
        with_grads(problem, steps[-1], Tally())
    whole = list(steps_back(problem, steps, 3, "all", Tally()))
    assert all(step.is_snapshot for step in whole)
    now = tree.clone(problem.inner_params)
    assert all(torch.equal(now[n], t) for n, t in problem.inner_params.items())


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (2, ValueError, "at least 3"),
        (0, ValueError, "at least 3"),
        ("none", ValueError, "'auto', 'all' or a whole number"),
        (4.0, TypeError, "whole number"),
        (True, TypeError, "whole number"),
        (None, TypeError, "whole number"),
    ],
)
def test_settings(given: Any, kind: Any, says: str) -> None:
    with pytest.raises(kind, match=says):
        unrolled(5, given)
