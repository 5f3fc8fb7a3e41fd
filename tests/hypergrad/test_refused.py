"""What is wrapped or sharded for several ranks, and results of another kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hypergrad import (
    BilevelOptimizer,
    BilevelProblem,
    HypergradEstimator,
    Indirect,
    Point,
    compare_estimators,
    make_estimator,
    rng,
    tree,
)
from hypergrad.errors import HypergradError
from hypergrad.testing import check_estimator, quadratic


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of one rank, as a single process of a launcher has it."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def square(model: Any, batch: Any) -> Tensor:
    return model(batch).square().mean()


def three(inner: Any, outer: Any, batch: Any) -> Tensor:
    return (inner["w"] * outer["m"]).sum()


@pytest.mark.usefixtures("alone")
def test_a_module_wrapped_for_ranks() -> None:
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"DistributedDataParallel.*Pass model\.module"):
        BilevelProblem.from_module(wrapped, square, outer="module.bias")
    problem = BilevelProblem.from_module(wrapped.module, square, outer="bias")
    assert list(problem.outer_params) == ["bias"]


@pytest.mark.usefixtures("alone")
def test_a_sharded_module_and_a_shard() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded: Any = fully_shard(nn.Linear(2, 1), mesh=mesh)
    with pytest.raises(TypeError, match=r"sharded.*Pass the module unsharded"):
        BilevelProblem.from_module(sharded, square, outer="bias")
    shard = distribute_tensor(torch.ones(2, requires_grad=True), mesh)
    assert isinstance(shard, DTensor)
    given: Any = {"w": shard}
    with pytest.raises(TypeError, match=r"inner_params\['w'\] is a DTensor.*full_ten"):
        BilevelProblem(three, three, given, {"m": torch.ones(1, requires_grad=True)})


def test_a_group_that_is_none() -> None:
    known = quadratic().problem
    group: Any = "world"
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.Process"):
        BilevelProblem(
            known.inner_loss,
            known.outer_loss,
            known.inner_params,
            known.outer_params,
            group=group,
        )


@dataclass(frozen=True)
class Returns(HypergradEstimator):
    """One step of gradient descent, handed on in some form."""

    form: Any = None

    def indirect(self, point: Point) -> Indirect:
        with point.product() as product:
            return self.form(tree.scale(product.mixed_vjp(point.v), -0.1))


@pytest.mark.parametrize(
    ("form", "kind", "words"),
    [
        (lambda g: g, TypeError, r"returned a dict, not a hypergrad\.Indirect"),
        (lambda g: None, TypeError, r"returned a NoneType.*Return Indirect\(grads\)"),
        (lambda g: Indirect(list(g.values())), TypeError, "grads of type list"),  # pyright: ignore[reportArgumentType]
        (lambda g: Indirect({}), ValueError, r"grads for \[\]; the outer parameters"),
        (lambda g: Indirect({"shift": 1.0}), TypeError, "a float for 'shift'"),  # pyright: ignore[reportArgumentType]
        (
            lambda g: Indirect({"shift": g["shift"][:1]}),
            ValueError,
            r"shape \(1,\) for 'shift', whose shape is \(2,\)",
        ),
    ],
)
def test_results_of_another_kind(form: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        Returns(form).estimate(quadratic().problem, inner_batch=None, outer_batch=None)


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_a_wrong_sign_does_not_pass_where_nothing_is_promised(factor: float) -> None:
    right = Returns(Indirect)
    check_estimator(right, dtypes=[torch.float64])
    wrong = Returns(lambda g: Indirect(tree.scale(g, factor)))
    with pytest.raises(AssertionError, match="where H = 1 any approximation"):
        check_estimator(wrong, dtypes=[torch.float64])


def test_check_estimator_on_a_device() -> None:
    check_estimator(
        make_estimator("cg"), exact_to=1e-5, dtypes=[torch.float64], device="cpu"
    )


def test_a_reference_that_raised_its_damping_recommends_nothing() -> None:
    def loss(inner: Any, outer: Any, batch: Any) -> Tensor:
        w = inner["w"]
        return w[0] ** 2 - 4.5 * w[1] ** 2 + (w * outer["m"]).sum()

    w, m = torch.tensor([0.3, 0.4]).double(), torch.ones(2).double()
    problem = BilevelProblem(
        loss, loss, {"w": w.requires_grad_()}, {"m": m.requires_grad_()}
    )
    found = compare_estimators(
        problem, ["neumann", "cg"], None, None, reference="cg", repeats=1
    )
    assert found.reference.damping == pytest.approx(18.0, rel=1e-3)
    assert "Damping was raised" in found.reference.reason
    assert found["cg"].indirect_cosine == pytest.approx(1.0)
    assert found.recommend() is None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(4, 3, max_norm=1.0, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        with torch.no_grad():
            self.words.weight.copy_(torch.arange(12.0).reshape(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.words(x) * self.scale).sum(1)


@pytest.mark.parametrize("reuse", [True, False])
def test_an_embedding_with_max_norm_renormalises_the_parameter(reuse: bool) -> None:
    # With a kept graph a clone stands in for the weight, and its rows are renormalised.
    results = []
    for keeps in (reuse, False):
        model = Words()
        opt = BilevelOptimizer(
            model,
            lambda m, x: functional.mse_loss(m(x), torch.ones(len(x)).double()),
            outer="scale",
            estimator=make_estimator("darts", product="exact"),
            inner_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
            outer_warmup=0,
            reuse_graph=keeps,
        )
        for k in range(3):
            opt.step(torch.tensor([k, 3]), torch.tensor([0, 1]))
        results.append([t.detach().clone() for t in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert results[0][1][3].norm() < 1.5  # 17 before


def test_an_embedding_that_was_renormalised_is_put_back() -> None:
    model = Words()

    def fails(m: Any, x: Tensor) -> Tensor:
        m(x)
        raise RuntimeError("on purpose")

    opt = BilevelOptimizer(
        model,
        fails,
        outer="scale",
        estimator="first-order",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    before = model.words.weight.detach().clone()
    with pytest.raises(RuntimeError, match="on purpose"):
        opt.inner_step(torch.tensor([3]))
    assert torch.equal(model.words.weight, before)


def test_a_module_that_was_moved_between_steps() -> None:
    model = nn.Linear(2, 1)
    opt = BilevelOptimizer(
        model,
        square,
        outer="bias",
        estimator="darts",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
    )
    opt.inner_step(torch.ones(1, 2))
    # As if the records had been made elsewhere: there is one device here.
    run, (step,) = opt._run, opt._run.window
    elsewhere = {n: t.to("meta") for n, t in step.inner_params.items()}
    opt._run = replace(run, window=(replace(step, inner_params=elsewhere),))
    before = model.weight.detach().clone()
    for call in (opt.inner_step, opt.outer_step):
        with pytest.raises(
            HypergradError, match=r"'weight' is on cpu.*have it on meta"
        ):
            call(torch.ones(1, 2))
    assert torch.equal(model.weight, before)
    assert opt.n_inner_steps == 1


def test_a_module_that_was_converted_between_steps() -> None:
    model = nn.Linear(2, 1)
    opt = BilevelOptimizer(
        model,
        square,
        outer="bias",
        estimator="darts",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_warmup=0,
    )
    opt.inner_step(torch.ones(1, 2))
    model.double()
    before = model.weight.detach().clone()
    for call in (opt.inner_step, opt.outer_step):
        with pytest.raises(
            HypergradError,
            match=r"'weight' is torch\.float64.*in torch\.float32: .*anew",
        ):
            call(torch.ones(1, 2, dtype=torch.float64))
    assert torch.equal(model.weight, before)
    assert opt.n_inner_steps == 1


def test_a_module_that_was_converted_after_its_start_was_noted() -> None:
    model = nn.Linear(2, 1)
    opt = BilevelOptimizer(
        model,
        square,
        learn_start="weight",
        estimator=make_estimator("unrolled", num_steps=1),
        inner_optimizer=partial(torch.optim.SGD, lr=0.1),
        outer_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    model.double()
    x = torch.ones(1, 2, dtype=torch.float64)
    for call in (opt.begin_run, partial(opt.inner_step, x)):
        with pytest.raises(
            HypergradError,
            match=r"'weight' is torch\.float64, and 'start of weight' is learned in "
            r"torch\.float32: .*before",
        ):
            call()
    model.float()
    opt.begin_run()
    opt.inner_step(x.float())


def test_a_random_state_goes_to_the_device_that_is_there() -> None:
    state = rng.capture()
    saved = {**state, "cuda:1": torch.arange(3)}
    assert rng.relocated(None, torch.device("cpu")) is None
    here: Any = rng.relocated(saved, torch.device("cpu"))
    assert here.keys() == state.keys()
    there: Any = rng.relocated(saved, torch.device("cuda:0"))
    assert there.keys() == {*state, "cuda:0"}
    assert torch.equal(there["cuda:0"], torch.arange(3))
    own: Any = rng.relocated({**saved, "cuda:0": torch.ones(1)}, torch.device("cuda:0"))
    assert torch.equal(own["cuda:0"], torch.ones(1))
