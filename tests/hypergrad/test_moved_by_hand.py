"""What a user can do between two calls, or pass to one, that must not go by in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import (
    BatchError,
    NumericalWarning,
    SecondOrderError,
    make_estimator,
)
from hypergrad.optimizer import BilevelOptimizer
from tests.faults import content
from tests.tolerances import error, tol

F64 = torch.float64


class Net(nn.Module):
    """A small network whose hidden layer is scaled by λ."""

    def __init__(self) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 6, dtype=F64)
        self.second = nn.Linear(6, 3, dtype=F64)
        self.drop = nn.Dropout(0.2)
        self.gate = nn.Parameter(torch.ones(6, dtype=F64))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=make, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.gate.square() * self.first(x).tanh()))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int) -> Any:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, generator=make, dtype=F64)
    return x, torch.randint(0, 3, (5,), generator=make)


def optimizer(estimator: Any, model: Any = None, **settings: Any) -> BilevelOptimizer:
    torch.manual_seed(7)
    return BilevelOptimizer(
        Net() if model is None else model,
        loss_fn,
        outer=lambda name, _: name.endswith("gate"),
        estimator=estimator,
        inner_optimizer=partial(torch.optim.AdamW, lr=1e-2),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
        **{"outer_every": 1, "outer_warmup": 0, **settings},
    )


# -- a kept graph, and parameters that moved since -----------------------------------------


def in_place(p: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


def behind_autograd(p: nn.Parameter, value: Tensor) -> None:
    p.data.copy_(value)


def new_memory(p: nn.Parameter, value: Tensor) -> None:
    p.data = value


Move = Callable[[nn.Parameter, Tensor], None]
EXACT: dict[str, Any] = {"product": "exact"}
KEEPING = [("unrolled", {"num_steps": 1}), ("darts", EXACT), ("sama", EXACT)]


def hypergradient(
    name: str, settings: dict[str, Any], reuse: bool, moved: str, move: Move
) -> Tensor:
    """Take an inner step, move a parameter by hand, and return what λ then moves by."""
    opt = optimizer(make_estimator(name, **settings), reuse_graph=reuse)
    for t in range(3):
        opt.step(batch(t), batch(10 + t))
    opt.inner_step(batch(4))
    assert (opt.recorded_steps[-1].graph is not None) is reuse
    model: Any = opt.problem.module
    p = model.get_parameter(moved)
    move(p, 1.5 * p.detach() + 0.1)
    before = model.gate.detach().clone()
    assert opt.outer_step(batch(14)).outer_step
    return before - model.gate.detach()


@pytest.mark.parametrize("move", [in_place, behind_autograd, new_memory])
@pytest.mark.parametrize("moved", ["gate", "first.weight"])
@pytest.mark.parametrize(("name", "settings"), KEEPING)
def test_a_kept_graph_never_mixes_two_points(
    name: str, settings: dict[str, Any], moved: str, move: Move
) -> None:
    """The derivative of the step as it was taken, whatever λ or w are by now."""
    kept = hypergradient(name, settings, True, moved, move)
    rebuilt = hypergradient(name, settings, False, moved, move)
    # The same sums in the same order, but for those of a gradient that may be fused.
    assert error(kept, rebuilt) < tol(F64, cond=10)
    if moved == "gate":  # and the move was one that matters
        unmoved = hypergradient(name, settings, True, moved, lambda p, value: None)
        assert error(kept, unmoved) > 1e-2


# -- torch.compile ------------------------------------------------------------------------


ORDER_TWO = [*KEEPING, ("cg", {}), ("neumann", {}), ("nystrom", {"rank": 3})]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("name", "settings"), ORDER_TWO)
def test_second_order_through_a_compiled_model(
    name: str, settings: dict[str, Any], reuse: bool
) -> None:
    compiled: Any = torch.compile(Net(), backend="aot_eager")
    opt = optimizer(make_estimator(name, **settings), compiled, reuse_graph=reuse)
    before = content(opt.problem, opt)
    with pytest.raises(SecondOrderError) as caught:
        opt.step(batch(0), batch(1))
    text = str(caught.value)
    assert "without torch.compile" in text
    assert "'darts'" in text, "what to choose instead"
    assert content(opt.problem, opt) == before
    remedy = optimizer("darts", compiled)
    assert remedy.step(batch(0), batch(1)).outer_step


# -- parts of a batch -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, y: (x[:2], y[:2]), r"0\.2 of a batch of 2 .* larger batch"),
        (lambda x, y: (x, y, y[:3]), r"which entries are examples"),
    ],
    ids=["too small", "of two lengths"],
)
@pytest.mark.parametrize("name", ["darts", "sama"])
def test_a_batch_that_cannot_be_divided_moves_nothing(
    name: str, change: Callable[..., Any], text: str
) -> None:
    """It shows in the outer step, after the inner one: that is undone as well."""
    opt = optimizer(make_estimator(name, product_fraction=0.2))
    opt.step(batch(0), batch(1))
    before = content(opt.problem, opt)
    with pytest.raises(BatchError, match=text):
        opt.step(change(*batch(2)), batch(3))
    assert content(opt.problem, opt) == before
    assert opt.step(batch(2), batch(3)).outer_step


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_fractions_outside_of_a_batch(value: float) -> None:
    for name in ("darts", "sama"):
        with pytest.raises(
            ValueError, match=r"product_fraction=.* must be in \(0, 1\]"
        ):
            make_estimator(name, product_fraction=value)


# -- batches that are written into ---------------------------------------------------------


def test_one_buffer_for_all_batches_is_told_once() -> None:
    opt = optimizer(make_estimator("unrolled", num_steps=2), outer_every=2)
    x, y = batch(0)
    for t in (1, 2):
        opt.inner_step((x, y))
        x.copy_(batch(t)[0])
    with pytest.warns(NumericalWarning, match=r"batches of 2 of the 2 recorded inner"):
        opt.outer_step(batch(9))
    for t in (3, 4):
        x.copy_(batch(t)[0])
        opt.inner_step((x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.outer_step(batch(9))  # one of the two was written into


def test_a_loss_may_write_into_its_own_batch() -> None:
    def padded(model: nn.Module, given: Any) -> Tensor:
        given["labels"][given["labels"] == 2] = -100
        return loss_fn(model, (given["x"], given["labels"]))

    opt = BilevelOptimizer(
        Net(),
        padded,
        outer=lambda name, _: name.endswith("gate"),
        estimator=make_estimator("darts", product="finite-difference"),
        inner_optimizer=partial(torch.optim.SGD, lr=1e-2),
        outer_optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(3):
            x, labels = batch(t)
            opt.inner_step({"x": x, "labels": labels})
            opt.outer_step({"x": x, "labels": labels.clone()})
