"""`BilevelOptimizer`: what moves when, resume, schedulers, failures."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from hypergrad import (
    BilevelProblem,
    Choice,
    HypergradError,
    HypergradEstimator,
    Indirect,
    NonFiniteError,
    Point,
    estimator_names,
    make_estimator,
)
from hypergrad.batches import Accumulated
from hypergrad.estimators import FirstOrder
from hypergrad.optimizer import BilevelOptimizer
from hypergrad.rules import SGD as SGDRule
from hypergrad.rules import Clipped, Rule

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


class Net(nn.Module):
    """A small network with dropout, batch norm and one outer vector."""

    def __init__(self) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.ones(8))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=make))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.gate * self.norm(self.first(x)).tanh()))


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(n: int = 30, seed: int = 1) -> list[Any]:
    make = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(6, 4, generator=make),
            torch.randint(0, 3, (6,), generator=make),
        )
        for _ in range(n)
    ]


def make(estimator: Any = "neumann", **settings: Any) -> BilevelOptimizer:
    given: dict[str, Any] = {
        "outer": "gate",
        "estimator": estimator,
        "inner_optimizer": partial(AdamW, lr=1e-2),
        "outer_optimizer": partial(AdamW, lr=1e-2),
        "outer_warmup": 2,
        "max_grad_norm": 1.0,
        **settings,
    }
    return BilevelOptimizer(Net(), loss_fn, **given)


def values(opt: BilevelOptimizer) -> dict[str, torch.Tensor]:
    assert opt.problem.module is not None
    return {n: t.clone() for n, t in opt.problem.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


# -- what moves when ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning")
@pytest.mark.parametrize("name", estimator_names())
def test_outer_parameters_move_in_outer_steps_alone(name: str) -> None:
    opt = make(name)
    model = opt.problem.module
    assert model is not None
    data = iter(batches())
    for _ in range(7):
        gate = opt.problem.outer_params["gate"].clone()
        inner = {n: p.clone() for n, p in opt.problem.inner_params.items()}
        opt.inner_step(next(data), batches()[0])
        assert torch.equal(opt.problem.outer_params["gate"], gate)
        assert not any(
            torch.equal(p, inner[n]) for n, p in opt.problem.inner_params.items()
        )
    before = values(opt)
    report = opt.outer_step(next(data))
    after = values(opt)
    assert report.outer_step
    assert [n for n in after if not torch.equal(after[n], before[n])] == ["gate"]
    assert all(p.grad is None for p in model.parameters())


def test_outer_steps_come_when_due() -> None:
    opt = make("first-order", outer_every=3, outer_warmup=4)
    data = iter(batches())
    drawn: list[int] = []

    def draw() -> Any:
        drawn.append(opt.n_inner_steps)
        return next(data)

    taken = [opt.step(next(data), draw).outer_step for _ in range(9)]
    assert [i + 1 for i, outer in enumerate(taken) if outer] == [6, 9]
    assert drawn == [6, 9]
    assert (opt.n_inner_steps, opt.n_outer_steps) == (9, 2)


@pytest.mark.parametrize(("lookback", "every"), [(1, 1), (3, 3)])
def test_outer_every_follows_the_lookback(lookback: int, every: int) -> None:
    opt = make(make_estimator("unrolled", num_steps=lookback))
    assert opt.outer_every == every


def test_inner_steps_equal_plain_training() -> None:
    """Clipping included; dropout and batch norm see what they would have seen."""
    data = batches(6)
    opt = make("unrolled")
    torch.manual_seed(7)
    for batch in data:
        opt.inner_step(batch)
    model = Net()
    inner = [p for n, p in model.named_parameters() if n != "gate"]
    plain = AdamW(inner, lr=1e-2)
    torch.manual_seed(7)
    for batch in data:
        plain.zero_grad()
        loss_fn(model, batch).backward()
        nn.utils.clip_grad_norm_(inner, 1.0)
        plain.step()
    for n, value in values(opt).items():
        # the norm is taken in float64 here, in float32 there
        torch.testing.assert_close(value, model.state_dict()[n], rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_equal_one_batch() -> None:
    whole = batches(1)[0]
    half = Accumulated([(whole[0][:3], whole[1][:3]), (whole[0][3:], whole[1][3:])])
    results = []
    for batch in (whole, half):
        opt = make("sama", outer_warmup=0)
        assert opt.problem.module is not None
        opt.problem.module.eval()  # batch norm would see other batches
        report = opt.step(batch, whole)
        assert report.outer_step
        results.append(values(opt))
    for n in results[0]:
        torch.testing.assert_close(results[0][n], results[1][n], rtol=1e-4, atol=1e-5)


def test_freezing_ends_the_search() -> None:
    opt = make("neumann", outer_warmup=0)
    data = batches()
    opt.step(data[0], data[1])
    gate = opt.problem.outer_params["gate"].clone()
    opt.freeze_outer()
    report = opt.step(data[2], data[3])
    assert not report.outer_step
    assert torch.equal(opt.problem.outer_params["gate"], gate)
    with pytest.raises(HypergradError, match="frozen"):
        opt.outer_step(data[0])


def test_empty_inner_set() -> None:
    lam = torch.ones(2, requires_grad=True)

    def square(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return outer["lam"].square().sum()

    opt = BilevelOptimizer(
        BilevelProblem(square, square, {}, {"lam": lam}),
        estimator="first-order",
        inner_optimizer=partial(SGD, lr=0.1),
        outer_optimizer=partial(SGD, lr=0.25),
        outer_warmup=0,
    )
    assert opt.step(None, None).outer_step
    assert lam.tolist() == [0.5, 0.5]


# -- torch's own machinery --------------------------------------------------------------


def test_groups_are_views_of_one_layout() -> None:
    opt = make()
    assert [g["level"] for g in opt.param_groups] == ["inner", "outer"]
    opt.param_groups[0]["lr"] = 0.5
    assert opt.inner.param_groups[0]["lr"] == 0.5
    assert opt.inner.state is opt.state
    assert opt.outer.state is opt.state


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=[0.1, 0.2], total_steps=10
    ),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, total_iters=2),
            torch.optim.lr_scheduler.ConstantLR(o),
        ],
        milestones=[2],
    ),
}


@pytest.mark.filterwarnings("error:.*lr_scheduler.*:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_act_on_what_is_used(name: str) -> None:
    opt = make("darts", inner_optimizer=partial(SGD, lr=0.1, momentum=0.5))
    if name == "one-cycle":
        opt = make("darts")
    scheduler = SCHEDULERS[name](opt)
    data = batches()
    for i in range(4):
        before = {n: p.detach().clone() for n, p in opt.problem.inner_params.items()}
        rate = opt.param_groups[0]["lr"]
        opt.step(data[i], data[-i - 1])
        step = opt.recorded_steps[-1]
        assert set(step.rule.learning_rates(step.inner_params).values()) == {rate}
        moved, _ = step.rule.apply(step.inner_params, step.state, step.grads)
        for n, p in opt.problem.inner_params.items():
            torch.testing.assert_close(p.detach(), moved[n], rtol=1e-5, atol=1e-7)
            assert torch.equal(step.inner_params[n], before[n])
        scheduler.step()
    assert opt.inner.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_accelerate_prepares_it() -> None:
    from accelerate import Accelerator

    opt = make("unrolled")
    data = batches()
    for i in range(6):
        opt.step(data[i], data[-1])
    before = opt.recorded_steps
    prepared = Accelerator(cpu=True).prepare(opt)
    assert prepared.optimizer is opt
    assert len(opt.recorded_steps) == len(before)
    assert opt.inner.state is opt.state
    assert opt.step(data[7], data[8]).inner_loss is not None


def test_hooks_see_a_step() -> None:
    opt = make("first-order")
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *a: seen.append("before"))
    opt.register_step_post_hook(lambda *a: seen.append("after"))
    opt.step(batches()[0])
    assert seen == ["before", "after"]


# -- resume -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning")
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(3, marks=pytest.mark.slow),
        6,
        pytest.param(9, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", estimator_names())
def test_resume_is_exact(name: str, stop: int) -> None:
    """Killed in mid-window, with dropout on, through a file read with weights_only."""
    data = batches(24)

    def run(opt: BilevelOptimizer, start: int, end: int) -> None:
        for i in range(start, end):
            opt.step({"x": data[i]}["x"], data[-i - 1])

    straight = make(name)
    torch.manual_seed(3)
    run(straight, 0, 14)

    first = make(name)
    torch.manual_seed(3)
    run(first, 0, stop)
    file = io.BytesIO()
    assert first.problem.module is not None
    torch.save(
        {
            "model": first.problem.module.state_dict(),
            "optimizer": first.state_dict(),
            "rng": torch.get_rng_state(),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make(name)
    assert second.problem.module is not None
    second.problem.module.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    run(second, stop, 14)
    assert same(values(straight), values(second))
    assert second.n_outer_steps == straight.n_outer_steps > 0


def test_resume_between_inner_and_outer_step() -> None:
    data = batches()
    first = make("cg")
    for i in range(3):
        first.inner_step(data[i])
    second = make("cg")
    assert first.problem.module is not None
    assert second.problem.module is not None
    second.problem.module.load_state_dict(first.problem.module.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    results = []
    for opt in (first, second):
        torch.manual_seed(0)
        opt.outer_step(data[5])
        results.append(values(opt))
    assert same(*results)


def test_resume_after_freezing_stays_frozen() -> None:
    first = make("neumann")
    first.step(batches()[0])
    first.freeze_outer()
    second = make("neumann")
    second.load_state_dict(first.state_dict())
    assert second.outer_frozen
    assert not second.problem.outer_params["gate"].requires_grad


def test_loading_from_before_the_freeze_goes_on_searching() -> None:
    opt = make("neumann", outer_warmup=0)
    data = batches()
    opt.step(data[0], data[1])
    saved = copy.deepcopy(opt.state_dict())
    opt.freeze_outer()
    opt.load_state_dict(saved)
    assert opt.step(data[2], data[3]).outer_step


def test_foreign_state_is_refused_and_changes_nothing() -> None:
    opt = make("unrolled")
    opt.step(batches()[0])
    before = copy.deepcopy(opt.state_dict())
    plain = AdamW(list(Net().parameters()))
    with pytest.raises(ValueError, match="no 'bilevel' entry"):
        opt.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="saved with estimator Neumann"):
        opt.load_state_dict(make("neumann").state_dict())
    torn = copy.deepcopy(before)
    torn["param_groups"] = torn["param_groups"][:1]
    with pytest.raises(ValueError, match="levels of the saved groups"):
        opt.load_state_dict(torn)
    torn = copy.deepcopy(before)
    torn["bilevel"]["window"][0]["inner_params"].popitem()
    with pytest.raises(ValueError, match="have other inner parameters than"):
        opt.load_state_dict(torn)
    after = opt.state_dict()
    assert str(after) == str(before)


# -- failures -----------------------------------------------------------------------------


class Trap:
    """A loss that is NaN or raises at chosen calls."""

    def __init__(self) -> None:
        self.fail_at: set[int] = set()
        self.kind: Any = None
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += 1
        loss = loss_fn(model, batch)
        if self.calls not in self.fail_at:
            return loss
        if self.kind is not None:
            raise self.kind
        return loss * float("nan")


def trapped(estimator: Any) -> tuple[BilevelOptimizer, Trap]:
    trap = Trap()
    opt = BilevelOptimizer(
        Net(),
        trap,
        outer="gate",
        estimator=estimator,
        inner_optimizer=partial(AdamW, lr=1e-2),
        outer_optimizer=partial(AdamW, lr=1e-2),
        outer_warmup=0,
    )
    data = batches()
    for i in range(4):
        opt.inner_step(data[i])
    trap.calls = 0
    return opt, trap


def snapshot(opt: BilevelOptimizer) -> dict[str, Any]:
    state = opt.state_dict()
    state["bilevel"].pop("n_skipped")
    return copy.deepcopy({"state": state, "values": values(opt)})


@pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning")
@pytest.mark.parametrize("name", ["darts", "neumann", "sama"])
def test_nan_in_an_outer_step_skips_and_counts_it(name: str) -> None:
    opt, trap = trapped(name)
    before = snapshot(opt)
    trap.fail_at = {1}
    report = opt.outer_step(batches()[5])
    assert not report.outer_step
    assert report.skipped is not None
    assert "the outer loss is nan" in report.skipped
    assert opt.n_skipped == 1
    assert str(snapshot(opt)) == str(before)
    trap.fail_at = set()
    assert opt.outer_step(batches()[5]).outer_step


def test_a_skipped_step_does_not_use_up_the_next_ones_graph() -> None:
    """A product that overflows has freed the graph that the inner step kept."""
    kept = make_estimator("darts", product="exact", inner_lr=1e-3)
    opt = make(kept, outer_warmup=0, reuse_graph=True)
    data = batches()
    opt.inner_step(data[0])
    assert opt.recorded_steps[0].graph is not None
    passes: list[int] = []

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        passes.append(1)  # the first is that of the outer loss
        return grad * float("inf") if len(passes) == 2 else grad

    hook = opt.problem.outer_params["gate"].register_hook(overflow)
    report = opt.outer_step(data[1])
    hook.remove()
    assert report.skipped is not None
    assert "a second-derivative product" in report.skipped
    assert opt.recorded_steps[0].graph is None
    assert opt.outer_step(data[1]).outer_step


def test_nan_in_an_inner_step_raises_and_moves_nothing() -> None:
    opt, trap = trapped("neumann")
    opt.problem.module.eval()  # pyright: ignore[reportOptionalMemberAccess]
    before = snapshot(opt)
    trap.fail_at = {1}
    with pytest.raises(NonFiniteError, match="the inner loss is nan"):
        opt.inner_step(batches()[5])
    assert str(snapshot(opt)) == str(before)


@pytest.mark.parametrize("kind", [RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_loss_that_raises_in_an_outer_step_changes_nothing(
    call: int, kind: Any
) -> None:
    opt, trap = trapped("darts")
    before, rng = snapshot(opt), torch.get_rng_state()
    trap.fail_at, trap.kind = {call}, kind
    with pytest.raises(type(kind)):
        opt.outer_step(batches()[5])
    assert str(snapshot(opt)) == str(before)
    assert torch.equal(torch.get_rng_state(), rng)
    trap.fail_at = set()
    assert opt.outer_step(batches()[5]).outer_step


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_an_optimizer_that_fails_midway_is_undone(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, _ = trapped("darts")
    optimizer = getattr(opt, level)
    real = optimizer.step

    def broken() -> None:
        real()
        raise KeyboardInterrupt

    assert opt.problem.module is not None
    opt.problem.module.eval()
    before = snapshot(opt)
    monkeypatch.setattr(optimizer, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        (opt.inner_step if level == "inner" else opt.outer_step)(batches()[0])
    assert str(snapshot(opt)["values"]) == str(before["values"])
    assert str(snapshot(opt)["state"]["state"]) == str(before["state"]["state"])


def test_warning_of_a_solver_comes_once() -> None:
    opt, _ = trapped(make_estimator("cg", max_iter=1, rtol=1e-12, damping=100.0))
    with pytest.warns(UserWarning, match="CG stopped after 1 products"):
        opt.outer_step(batches()[5])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = opt.outer_step(batches()[5])
    assert report.info is not None
    assert "CG stopped" in report.info.reason


# -- estimators that choose another -----------------------------------------------------


@dataclass(frozen=True)
class Choosing(HypergradEstimator):
    """Take what it is told to take; on its own it looks back at nothing."""

    name: ClassVar[str] = "choosing"
    choice: HypergradEstimator | None = None
    asked: list[Any] = field(default_factory=list, compare=False)

    def resolve(
        self, problem: BilevelProblem, inner_batch: Any, rule: Rule | None
    ) -> Choice:
        self.asked.append((inner_batch, rule))
        return Choice(self.choice or self)

    def indirect(self, point: Point) -> Indirect:
        return FirstOrder().indirect(point)


def choosing(name: str, **settings: Any) -> Choosing:
    return Choosing(make_estimator(name, **settings))


@pytest.mark.parametrize("entry", ["step", "inner_step"])
def test_the_choice_is_made_once_before_the_first_step(entry: str) -> None:
    estimator = choosing("unrolled", num_steps=3)
    opt = make(estimator, outer_warmup=0)
    data = batches()
    assert opt.estimator is estimator
    assert opt.outer_every == 1
    outer = (data[10],) if entry == "step" else ()
    taken = [getattr(opt, entry)(data[i], *outer) for i in range(6)]
    assert opt.estimator is estimator.choice
    ((batch, rule),) = estimator.asked
    assert batch is data[0]
    assert isinstance(rule, Clipped)
    assert opt.outer_every == 3  # as the choice looks back
    assert len(opt.recorded_steps) == 3
    due = entry == "step"
    assert [i + 1 for i, r in enumerate(taken) if r.outer_step] == [3, 6] * due


def test_the_choice_trains_as_if_it_had_been_given() -> None:
    data = batches()
    results = []
    for estimator in (choosing("sama"), "sama"):
        torch.manual_seed(0)
        opt = make(estimator)
        for i in range(6):
            opt.step(data[i], data[-i - 1])
        results.append(values(opt))
    assert same(*results)


def test_the_choice_leaves_a_given_outer_every_alone() -> None:
    opt = make(choosing("unrolled", num_steps=3), outer_every=2)
    opt.inner_step(batches()[0])
    assert opt.outer_every == 2


def test_the_choice_is_made_in_a_first_outer_step_too() -> None:
    estimator = choosing("cg")
    opt = make(estimator)
    data = batches()
    with pytest.raises(HypergradError, match="no inner step was taken yet"):
        opt.outer_step(data[0])
    assert estimator.asked == []
    assert opt.outer_step(data[0], data[1]).outer_step
    assert opt.estimator is estimator.choice
    assert estimator.asked[0][0] is data[1]


def test_there_is_no_rule_where_the_inner_optimizer_has_none() -> None:
    adagrad = partial(torch.optim.Adagrad, lr=0.1)
    estimator = choosing("cg")
    make(estimator, inner_optimizer=adagrad).step(batches()[0])
    assert estimator.asked[0][1] is None
    opt = make(choosing("sama"), inner_optimizer=adagrad)
    with pytest.raises(TypeError, match="Adagrad has no rule"):
        opt.step(batches()[0])
    assert opt.n_inner_steps == 0


def test_a_choice_that_a_checkpoint_cannot_hold_is_refused_at_once() -> None:
    opt = make(choosing("sama", rule=SGDRule(0.1)))
    with pytest.raises(TypeError, match=r"Sama\(.* cannot be written to a checkpoint"):
        opt.step(batches()[0])
    unknown = Choosing(Choosing(make_estimator("cg")))
    with pytest.raises(TypeError, match=r"Choosing\(.* cannot be written"):
        make(unknown).step(batches()[0])


@pytest.mark.parametrize("stop", [0, 4])
def test_resume_keeps_the_choice(stop: int) -> None:
    """The resumed optimizer would choose otherwise, and does not choose again."""
    data = batches()

    def run(opt: BilevelOptimizer, start: int, end: int) -> None:
        for i in range(start, end):
            opt.step(data[i], data[-i - 1])

    straight = make(choosing("unrolled", num_steps=2))
    torch.manual_seed(0)
    run(straight, 0, 9)
    first = make(choosing("unrolled", num_steps=2))
    torch.manual_seed(0)
    run(first, 0, stop)
    rng = torch.get_rng_state()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other = choosing("cg") if stop else choosing("unrolled", num_steps=2)
    second = make(other)
    if stop == 4:
        run(second, 0, 3)  # it has chosen already
        other.asked.clear()
    assert first.problem.module is not None
    assert second.problem.module is not None
    second.problem.module.load_state_dict(first.problem.module.state_dict())
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(rng)
    run(second, stop, 9)
    assert second.estimator == make_estimator("unrolled", num_steps=2)
    assert second.outer_every == 2
    assert len(other.asked) == (0 if stop else 1)
    assert same(values(straight), values(second))


def test_a_step_that_fails_undoes_the_choice() -> None:
    estimator = choosing("unrolled", num_steps=3)
    trap = Trap()
    opt = BilevelOptimizer(
        Net(),
        trap,
        outer="gate",
        estimator=estimator,
        inner_optimizer=partial(AdamW, lr=1e-2),
        outer_optimizer=partial(AdamW, lr=1e-2),
    )
    trap.fail_at, trap.kind = {1}, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        opt.step(batches()[0])
    assert opt.estimator is estimator
    assert opt.outer_every == 1
    opt.step(batches()[0])
    assert opt.outer_every == 3


# -- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"estimator": 3}, TypeError, "estimator must be a name or"),
        ({"estimator": "newton"}, ValueError, "'newton' is unknown"),
        ({"outer_every": 0}, ValueError, "outer_every=0 must be at least 1"),
        ({"outer_warmup": -1}, ValueError, "outer_warmup=-1 must be at least 0"),
        ({"outer_every": 1.5}, TypeError, "outer_every=1.5 must be a whole number"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0 must be positive"),
        ({"reuse_graph": "yes"}, ValueError, "reuse_graph='yes' must be"),
        ({"inner_optimizer": 3}, TypeError, "inner_optimizer must be a torch"),
        ({"outer_optimizer": lambda p: 3}, TypeError, "made a int, not an optimizer"),
        ({"loss_fn": None}, TypeError, "pass loss_fn and outer"),
    ],
)
def test_settings_out_of_range(settings: Any, kind: Any, text: str) -> None:
    given = {
        "loss_fn": loss_fn,
        "outer": "gate",
        "estimator": "darts",
        "inner_optimizer": partial(AdamW, lr=1e-2),
        "outer_optimizer": partial(AdamW, lr=1e-2),
        **settings,
    }
    with pytest.raises(kind, match=text):
        BilevelOptimizer(Net(), given.pop("loss_fn"), **given)


def test_an_optimizer_over_other_tensors_is_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"holds 1 of the 6 inner parameters"):
        BilevelOptimizer(
            model,
            loss_fn,
            outer="gate",
            estimator="darts",
            inner_optimizer=SGD([model.first.weight], lr=0.1),
            outer_optimizer=partial(SGD, lr=0.1),
        )


def test_an_unsupported_inner_optimizer_is_refused_by_name() -> None:
    adagrad = partial(torch.optim.Adagrad, lr=0.1)
    with pytest.raises(TypeError, match=r"Adagrad has no rule.*torch\.optim\.AdamW"):
        make("unrolled", inner_optimizer=adagrad)
    opt = make("first-order", inner_optimizer=adagrad)  # it needs no rule
    assert opt.step(batches()[0]).inner_loss is not None


def test_outer_step_before_the_window_is_full() -> None:
    with pytest.raises(HypergradError, match="looks back at 5 inner steps but 0"):
        make("unrolled").outer_step(batches()[0])
    with pytest.raises(HypergradError, match="no inner step was taken"):
        make("cg").outer_step(batches()[0])


def test_groups_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="come from its problem"):
        make().add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
